"""The model card of an exported folder."""

from __future__ import annotations

import yaml

from diffit_train import __version__, storage
from diffit_train.config import Recipe
from diffit_train.data.manifest import MANIFEST, latents_url, load_manifest
from diffit_train.errors import redact
from diffit_train.evaluation.result import run_results
from diffit_train.models.backbone import trainable_parameters
from diffit_train.models.build import build_model
from diffit_train.runs.run import Run

# Precisions of an autoencoder that are not diffusers' own, and the types that they are loaded in.
_DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}


def model_card(run: Run, step: int, weights: str, license_id: str) -> str:
    """The card in Markdown, with the metadata of the hub in front.

    Args:
        weights: their name.
        license_id: license of the weights; "" if it is not stated.
    """
    metadata = {
        "license": license_id or "other",
        "library_name": "diffusers",
        "tags": ["diffit", "diffusion", "image-generation"],
    }
    license_text = "None is stated for the weights."
    if license_id:
        license_text = f"The weights: {license_id}."
    recipe, own = run.recipe, run.stored_recipe
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {own.name}, run {run.name}",
        _summary(run, step, weights),
        f"## Use\n\n{_usage(recipe)}",
        f"## Data\n\n{_data(recipe)}",
        f"## Evaluation\n\n{_evaluation(run, step)}",
        "## Recipe\n\n`recipe.yaml`, with which `diffit train` repeats the training. Hash of what "
        f"determines the weights: `{own.train_hash()}`.",
        f"## License\n\n{license_text} The code in this folder: Apache-2.0.",
    ]
    return "\n\n".join(parts) + "\n"


def _summary(run: Run, step: int, weights: str) -> str:
    own, state = run.stored_recipe, run.checkpoints[step].state
    model = build_model(own)
    where = "pixels" if own.autoencoder.kind == "identity" else "latents"
    return (
        f"A diffusion network `{own.model.architecture}` on {where} for images of "
        f"{own.data.resolution}x{own.data.resolution} pixels: {model.summary}; "
        f"{trainable_parameters(model):,} parameters. Objective `{own.diffusion.objective}`. "
        f"Weights `{weights}` of step {step:,}, after {state.images_seen:,} images. Exported by "
        f"diffit_train {__version__}."
    )


def _usage(recipe: Recipe) -> str:
    labels = "class_labels=[0], " if recipe.model.conditional else ""
    dtype = _DTYPES.get(recipe.autoencoder.precision)
    typed = f'    dtype={{"vae": {dtype}, "default": torch.float32}},\n' if dtype else ""
    sampler, guidance = recipe.evaluate.sampler, recipe.evaluate.guidance
    guided = "" if guidance.kind == "none" else f", guidance {guidance.title}"
    return (
        "```python\n"
        + ("import torch\n" if dtype else "")
        + "from diffusers import DiffusionPipeline\n\n"
        "pipe = DiffusionPipeline.from_pretrained(\n"
        '    "path/of/this/folder",\n'
        '    custom_pipeline="path/of/this/folder/pipeline.py",\n'
        f"    trust_remote_code=True,\n{typed})\n"
        f"images = pipe({labels}seeds=range(4)).images\n"
        "```\n\n"
        "Needs diffusers 0.42 or later, torch and safetensors. Read `pipeline.py` and the other "
        ".py files before you trust them. By default it samples by "
        f"{sampler.name}, {sampler.steps} steps{guided}; an image depends on its class and seed "
        "only."
    )


def _data(recipe: Recipe) -> str:
    data, url = recipe.data, latents_url(recipe)
    source = redact(data.source)
    text = f"`{data.name}`, {data.num_classes:,} classes, from `{source}`."
    if not storage.exists(storage.join(url, MANIFEST)):
        return f"{text} The encoded images were not there at the export."
    manifest = load_manifest(url)
    if manifest.recipe_hash != recipe.encode_hash():
        return f"{text} The encoded images there at the export are of another recipe."
    return (
        f"{text} {manifest.totals.written:,} images encoded, {manifest.totals.rejected:,} "
        f"rejected; digest `{manifest.digest}`."
    )


def _evaluation(run: Run, step: int) -> str:
    results = [result for result in run_results(run) if result.step == step]
    if not results:
        return "This step has not been evaluated."
    rows = ["| weights | samples | sampler | guidance | features | metric | value |"]
    rows.append("|---|---|---|---|---|---|---|")
    for result in results:
        evaluate = result.evaluate
        sampler, guidance = evaluate["sampler"], evaluate["guidance"]
        guided = guidance["kind"]
        if guided != "none":
            guided += f" {guidance['scale']:g}"
        cells = (
            evaluate["weights"],
            f"{result.samples:,}",
            f"{sampler['name']} {sampler['steps']}",
            guided,
            evaluate["features"]["name"],
        )
        rows += [
            f"| {' | '.join((*cells, metric, f'{value:.6g}'))} |"
            for metric, value in sorted(result.metrics.items())
        ]
    return "\n".join(rows)
