"""`diffit export --format diffusers`: a folder that diffusers samples from without this package.

model_index.json   components, names of the classes, scale; written last
pipeline.py        `DiffiTPipeline`
transformer/       the network: its code, sizes and weights
scheduler/         the objective: its code, samplers and guidance
vae/               the autoencoder, unless the network works on pixels
recipe.yaml        the run's recipe
README.md          the model card
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.diffusion import OBJECTIVES, CustomObjective
from diffit_train.config.model import ARCHITECTURES, CustomModel
from diffit_train.diffusion.objective import load_objective
from diffit_train.errors import UserError
from diffit_train.evaluation.generate import class_names, fill_model, load_decoder
from diffit_train.export.card import model_card
from diffit_train.export.code import (
    join_modules,
    require_same_network,
    require_same_samples,
    running,
)
from diffit_train.models.build import build_model, network_shape
from diffit_train.models.published import CHECKSUM, tensors_checksum
from diffit_train.runs.import_export import export_metadata
from diffit_train.runs.run import Run

INDEX, PIPELINE = "model_index.json", "pipeline.py"
# First line of the pipeline, by which a former export is recognized.
_TITLE = "A pipeline of diffusers for a DiffiT network."
# First lines of the other files.
_TITLES = {
    "transformer": "The network as a model of diffusers.",
    "scheduler": "The objective and its samplers as a scheduler of diffusers.",
}
# Whose classes `transformer` imports, in place of the recipe's.
_LATENT = "diffit_train.models.latent"
# The lowest version of diffusers that the code has been run with.
_DIFFUSERS = "0.42.0"


def export_folder(
    run: Run, step: int, weights: str, license_id: str = "", out: str | None = None
) -> str:
    """Write the folder of a checkpoint's weights; its URL.

    Args:
        weights: `raw`, or the name of an EMA.
        license_id: license of the weights, for the model card; "" if it is not stated.
        out: folder to write, whose former export is replaced; None for
            RUN/export/WEIGHTS-STEP-diffusers.

    Raises:
        UserError: `out` holds something else, the weights are NaN or infinite, or the code of
            another package does not run on its own.
        DiffitError: the checkpoint is damaged.
    """
    recipe = run.recipe
    names = dict(enumerate(class_names(recipe))) if recipe.model.conditional else None
    out = out or storage.join(run.url, "export", f"{weights}-{step:010d}-diffusers")
    _require_replaceable(out)
    tensors = run.checkpoints[step].load(weights)
    with tempfile.TemporaryDirectory(prefix="diffit-export-") as name:
        folder = Path(name)
        decoder = load_decoder(recipe, torch.device("cpu"))
        index = {
            "_class_name": [PIPELINE.removesuffix(".py"), "DiffiTPipeline"],
            "_diffusers_version": _DIFFUSERS,
            "transformer": _write_transformer(recipe, tensors, folder / "transformer"),
            "scheduler": _write_scheduler(recipe, folder / "scheduler"),
            "vae": [None, None],
            "scale": decoder.scale,
            "id2label": names,
            "null_label": recipe.data.num_classes,
            "pixels": recipe.evaluate.pixels,
            "precision": recipe.evaluate.precision,
        }
        if decoder.model is not None:
            decoder.model.save_pretrained(folder / "vae")
            index["vae"] = ["diffusers", type(decoder.model).__name__]
        (folder / PIPELINE).write_text(join_modules("diffit_train.export.pipeline", _TITLE))
        (folder / "recipe.yaml").write_text(export_metadata(run, step, weights)["recipe"])
        (folder / "README.md").write_text(model_card(run, step, weights, license_id))
        _write_json(folder / INDEX, index)
        _publish(folder, out)
    return out


def _require_replaceable(out: str) -> None:
    """Refuse a folder that is not a former export.

    Raises:
        UserError: it is not empty, and no export.
    """
    if not storage.exists(out):
        return
    code = storage.join(out, PIPELINE)
    former = storage.exists(code) and _TITLE in storage.read_bytes(code).decode(errors="replace")
    if not former and (not storage.is_folder(out) or storage.list_names(out)):
        raise UserError(
            f"{out} exists and is not a folder that `diffit export --format diffusers` wrote; "
            "choose another --out"
        )


def _publish(folder: Path, out: str) -> None:
    """Copy the files, the pipeline first and the index last, without which nothing is loaded."""
    storage.remove(out)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    order = {PIPELINE: -1, INDEX: 1}
    for path in sorted(files, key=lambda path: order.get(str(path), 0)):
        with storage.atomic_file(storage.join(out, *path.parts)) as target:
            shutil.copyfile(folder / path, target)


def _write_transformer(recipe: Recipe, weights: dict[str, Tensor], folder: Path) -> list[str]:
    """Code, sizes and weights of the network; its entry in the index."""
    section, model = recipe.model, build_model(recipe)
    fill_model(model, weights)
    folder.mkdir()
    tensors = {f"network.{n}": v.detach().contiguous() for n, v in model.state_dict().items()}
    metadata = {"format": "pt"}
    metadata[CHECKSUM] = tensors_checksum(tensors, metadata)
    save_file(tensors, str(folder / "diffusion_pytorch_model.safetensors"), metadata=metadata)
    custom = section if isinstance(section, CustomModel) else None
    shape: Any = network_shape(recipe) if custom else model.shape
    config = {"sizes": asdict(shape), "options": (custom.options if custom else None) or None}
    replaced = {
        f"from {_LATENT} import LatentDiffiT as Network": _import(type(model), "Network"),
        f"from {_LATENT} import Shape as Sizes": _import(type(shape), "Sizes"),
    }
    code, kind = _write_component(folder, "transformer", "config.json", config, replaced)
    if custom:
        with running(ARCHITECTURES.key, custom.architecture, code, kind, config) as exported:
            require_same_network(exported, model)
    return [code.stem, kind]


def _write_scheduler(recipe: Recipe, folder: Path) -> list[str]:
    """Code and settings of the objective and its sampler; its entry in the index."""
    section, objective = recipe.diffusion, load_objective(recipe.diffusion)
    folder.mkdir()
    config = {
        "diffusion": section.model_dump(mode="json"),
        "sampler": recipe.evaluate.sampler.model_dump(mode="json"),
        "guidance": recipe.evaluate.guidance.model_dump(mode="json"),
    }
    custom = isinstance(section, CustomObjective)
    replaced = {
        "from diffit_train.diffusion.objective import build_objective": _import(
            type(objective), "Own"
        ),
        "build_objective(_section(diffusion))": 'Own(**diffusion["options"])',
    }
    code, kind = _write_component(
        folder, "scheduler", "scheduler_config.json", config, replaced if custom else {}
    )
    if custom:
        with running(OBJECTIVES.key, section.objective, code, kind, config) as exported:
            require_same_samples(exported, recipe, objective)
    return [code.stem, kind]


def _write_component(
    folder: Path, name: str, file: str, config: dict[str, Any], replaced: dict[str, str]
) -> tuple[Path, str]:
    """Write configuration and code of a component; its code file and the name of its class."""
    kind = f"DiffiT{name.capitalize()}"
    _write_json(folder / file, {"_class_name": kind, "_diffusers_version": _DIFFUSERS, **config})
    code = folder / f"diffit_{name}.py"
    code.write_text(join_modules(f"diffit_train.export.{name}", _TITLES[name], replaced))
    return code, kind


def _import(cls: type, name: str) -> str:
    return f"from {cls.__module__} import {cls.__qualname__} as {name}"


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
