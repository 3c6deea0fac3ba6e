"""`diffit sample`, `import` and `export`: weights in and out of a run."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.cli.options import (
    AllowPickle,
    Json,
    OptionalRecipe,
    Overrides,
    Root,
    RunName,
    RunOverrides,
    Step,
    output,
    print_result,
)
from diffit_train.errors import UserError
from diffit_train.progress import say
from diffit_train.runs.checkpoints import NEWEST
from diffit_train.runs.run import Run, open_run
from diffit_train.runs.select import select_run, split_recipe


class ExportFormat(StrEnum):
    """What `diffit export` writes."""

    SAFETENSORS = "safetensors"
    DIFFUSERS = "diffusers"


def sample_command(
    name: OptionalRecipe = None,
    overrides: RunOverrides = None,
    root: Root = None,
    run: RunName = None,
    step: Step = NEWEST,
    weights: Annotated[
        str | None,
        typer.Option(help="Weight file (exported or published) to use instead of a run."),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class", help="Name or number of a class; repeatable. Default: eight of them."
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds, e.g. 0-3,8; one image per class and seed.")
    ] = "0-3",
    out: Annotated[
        str, typer.Option(help="Output folder for grid.png and the images.")
    ] = "samples",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 16,
    animate: Annotated[
        bool,
        typer.Option(
            "--animate", metavar="", help="Also write the denoising as denoising.gif, in a grid."
        ),
    ] = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Sample images of chosen classes and seeds from a run, with its recipe's sampler and guidance.

    Example: `diffit sample --run demo --root my-project --class 3 --class 7 --seeds 0-9`

    Example: `diffit sample evaluate.sampler.steps=50 --run demo --root my-project --out fast`

    Example: `diffit sample --run demo --root my-project --class 3 --class 7 --animate`
    """
    if weights is None:
        chosen = select_run("sample", name, overrides, root, run)
    else:
        from diffit_train.runs.import_export import recipe_of_weights

        name, words = split_recipe(name, overrides)
        recipe = recipe_of_weights(weights, name, words, root, allow_pickle)
        chosen = Run(recipe.storage.root, run or recipe.name, recipe)
    folder = output("--out", out)
    from diffit_train.evaluation.sample import WeightSource, sample_images

    source = WeightSource(chosen, step, weights, allow_pickle)
    result = sample_images(source, classes or [], seeds, folder, batch_size, animate)
    print_result(result, as_json)


def import_command(
    file: Annotated[str, typer.Argument(help="Weight file.", show_default=False)],
    overrides: Overrides = None,
    name: Annotated[
        str | None,
        typer.Option("--recipe", help="Recipe of the weights. Default: the file's own."),
    ] = None,
    root: Root = None,
    run: RunName = None,
    step: Annotated[
        int | None,
        typer.Option(min=0, help="Step of the imported checkpoint. Default: the file's own, or 0."),
    ] = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Import a weight file with the published names into a run, to sample and evaluate.

    A folder from DeepSpeed's `save_checkpoint` becomes a run that can be trained further.

    Example: `diffit import diffit_256.safetensors --root my-project --run nvidia`
    """
    from diffit_train.runs.import_export import import_file, recipe_of_weights

    recipe = recipe_of_weights(file, name, overrides or (), root, allow_pickle)
    into = open_run(recipe, run)
    checkpoint = import_file(into, file, step, allow_pickle)
    print_result({"run": into.name, "url": into.url, "step": checkpoint.step}, as_json)


def export_command(
    name: OptionalRecipe = None,
    overrides: RunOverrides = None,
    root: Root = None,
    run: RunName = None,
    step: Step = NEWEST,
    weights: Annotated[
        str, typer.Option(help="Weights to export: raw, or the name of an EMA.")
    ] = "ema",
    sigma_rel: Annotated[
        float | None,
        typer.Option(
            help="Instead, reconstruct the EMA of this width, relative to the training up to the "
            "step, from the run's snapshots (EDM2)."
        ),
    ] = None,
    format_name: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="safetensors: one file with the published names; diffusers: a folder that "
            "diffusers samples from, without this package.",
        ),
    ] = ExportFormat.SAFETENSORS,
    out: Annotated[
        str | None,
        typer.Option(
            help="Output file or folder. Default: RUN/export/ema-STEP.safetensors, "
            "ema-SIGMA-STEP.safetensors or ema-STEP-diffusers."
        ),
    ] = None,
    license_id: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="ID",
            help="With --format diffusers: license of the weights for the model card, such as "
            "cc-by-nc-4.0. Default: none stated.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a checkpoint's weights: one safetensors file, or a folder for diffusers.

    --sigma-rel needs EMAs with a sigma_rel in train.ema, and train.ema_snapshot_every.

    Example: `diffit export --run demo --root my-project --step newest`

    Example: `diffit export --run demo --root my-project --format diffusers --out demo-pipeline`

    Example: `diffit export --run first --root my-project --sigma-rel 0.07`
    """
    diffusers = format_name is ExportFormat.DIFFUSERS
    if license_id is not None and not diffusers:
        raise UserError(
            f"--license is {license_id!r}, but only --format diffusers writes a model card; remove "
            "it, or add --format diffusers"
        )
    if sigma_rel is not None and diffusers:
        raise UserError("--sigma-rel writes a safetensors file; remove --format diffusers")
    command = "export --format diffusers" if diffusers else "export"
    chosen = select_run(command, name, overrides, root, run)
    target = None if out is None else output("--out", out)
    if sigma_rel is not None:
        from diffit_train.runs.phema import reconstruct_ema

        chosen.checkpoint()
        made = reconstruct_ema(chosen, sigma_rel, step, target)
        print_result({**asdict(made), "run": chosen.name, "sigma_rel": sigma_rel}, as_json)
        return
    number = chosen.checkpoint(step).step
    result: dict[str, Any] = {"run": chosen.name, "step": number, "weights": weights}
    if diffusers:
        from diffit_train.export.folder import export_folder

        url = export_folder(chosen, number, weights, license_id or "", target)
        result["folder"], use = url, "; its README.md says how diffusers samples from it"
    else:
        from diffit_train.runs.import_export import export_weights

        url = export_weights(chosen, number, weights, target)
        result["file"], use = url, ""
    say(f"wrote {storage.display_path(url)}: {weights} of {chosen.name}, step {number:,}{use}")
    print_result(result, as_json)
