"""`diffit sample`, `import`, `export` and `ema`: weights in and out of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.commands.of_run import (
    OptionalRecipe,
    RunOverrides,
    recipe_and_run,
    split_recipe,
)
from diffit_train.commands.options import (
    AllowPickle,
    Json,
    Overrides,
    Root,
    RunName,
    output,
    print_result,
)
from diffit_train.config import Recipe, load_recipe, load_recipe_text
from diffit_train.errors import UserError
from diffit_train.progress import say
from diffit_train.runs.identity import NEWEST, find_checkpoint, parse_step
from diffit_train.runs.start import starting_from

# Warn if the relative error of a reconstructed profile is larger than this.
POOR_PROFILE = 0.1


class ExportFormat(StrEnum):
    """What `diffit export` writes."""

    SAFETENSORS = "safetensors"
    DIFFUSERS = "diffusers"


@dataclass(frozen=True)
class WeightSource:
    """The weights to sample from: a checkpoint of a run, or a file."""

    run: str
    step: str = NEWEST
    file: str | None = None
    allow_pickle: bool = False


def sample_images(
    recipe: Recipe,
    source: WeightSource,
    classes: Sequence[str],
    seeds: str,
    out: str,
    batch_size: int,
    animate: bool = False,
) -> dict[str, Any]:
    """Sample images of classes and seeds into a folder; return the content of samples.json."""
    from diffit_train.evaluation import generate
    from diffit_train.evaluation import sample as stage

    if classes and not recipe.model.conditional:
        raise UserError(
            f"--class is {classes[0]!r}, but the model has no labels (model.conditional is false); "
            "remove --class"
        )
    labels = stage.choose_classes(generate.class_names(recipe), classes)
    numbers = stage.parse_seeds(seeds)
    folder = output("--out", out)
    if source.file is not None:
        title = storage.display_path(source.file)
        weights = generate.file_weights(recipe, source.file, source.allow_pickle)
    else:
        recipe = starting_from(recipe, source.run)
        url, step = find_checkpoint(recipe, source.run, source.step)
        title = f"{source.run}, step {step:,}, {recipe.evaluate.weights}"
        weights = generate.run_weights(recipe, url, step)
    result = stage.sample(recipe, weights, labels, numbers, folder, batch_size, title, animate)
    count = len(result["images"])
    say(f"{count:,} {'image' if count == 1 else 'images'} in {storage.display_path(folder)}")
    return result


def recipe_of_weights(
    file: str,
    name: str | None,
    overrides: Sequence[str],
    root: str | None,
    allow_pickle: bool = False,
) -> Recipe:
    """The named recipe, or else the weight file's own.

    Raises:
        UserError: no recipe is named and the file has none, or the file is damaged.
    """
    if name is not None:
        return load_recipe(name, overrides, root)
    from diffit_train.models.published import recipe_of_file

    found = recipe_of_file(storage.absolute(file), allow_pickle)
    if found is None:
        raise UserError(
            f"{file} does not name its model; name its recipe (`diffit sample RECIPE --weights`, "
            "`diffit import --recipe RECIPE`)"
        )
    text, reference = found
    if text:
        return load_recipe_text(text, reference, overrides, root)
    say(f"{file} has the shapes of recipe {reference}")
    return load_recipe(reference, overrides, root)


def import_file(
    recipe: Recipe, run: str, file: str, step: int | None, allow_pickle: bool
) -> dict[str, Any]:
    """Import a weight file into a run.

    Args:
        step: step of the new checkpoint; None for the file's own.
    """
    from diffit_train.runs import import_export
    from diffit_train.runs.deepspeed import is_deepspeed_checkpoint

    file = storage.absolute(file)
    if is_deepspeed_checkpoint(file):
        url, number = import_export.import_deepspeed(recipe, run, file, allow_pickle)
        say(
            f"imported {storage.display_path(file)} into run {storage.display_path(url)} at step "
            f"{number:,}; training can resume from it, and its EMAs restart"
        )
    else:
        url, number = import_export.import_weights(recipe, run, file, step, allow_pickle)
        say(
            f"imported {storage.display_path(file)} into run {storage.display_path(url)} as the "
            f"EMA of step {number:,}"
        )
    return {"run": run, "url": url, "step": number}


def export_checkpoint(
    recipe: Recipe, run: str, step: str, kind: str, out: str | None
) -> dict[str, Any]:
    """Write a checkpoint's weights to a file."""
    from diffit_train.runs import import_export

    recipe = starting_from(recipe, run)
    _, number = find_checkpoint(recipe, run, step)
    target = None if out is None else output("--out", out)
    file = import_export.export_weights(recipe, run, number, kind, target)
    say(f"wrote {storage.display_path(file)}: {kind} of {run}, step {number:,}")
    return {"file": file, "run": run, "step": number, "weights": kind}


def export_pipeline(
    recipe: Recipe, run: str, step: str, kind: str, license_id: str, out: str | None
) -> dict[str, Any]:
    """Write a folder that diffusers samples from."""
    from diffit_train.export import folder

    recipe = starting_from(recipe, run)
    _, number = find_checkpoint(recipe, run, step)
    target = None if out is None else output("--out", out)
    url = folder.export_folder(recipe, run, number, kind, license_id, target)
    say(
        f"wrote {storage.display_path(url)}: {kind} of {run}, step {number:,}; its README.md says "
        "how diffusers samples from it"
    )
    return {"folder": url, "run": run, "step": number, "weights": kind}


def reconstruct_run_ema(
    recipe: Recipe, run: str, sigma_rel: float, step: str, out: str | None
) -> dict[str, Any]:
    """Reconstruct an EMA from a run's snapshots."""
    from diffit_train.runs import phema

    recipe = starting_from(recipe, run)
    find_checkpoint(recipe, run, NEWEST)
    target = None if out is None else output("--out", out)
    made = phema.reconstruct_ema(recipe, run, sigma_rel, parse_step(step), target)
    say(
        f"wrote {storage.display_path(made.file)}: sigma_rel {sigma_rel:g} of {run}, step "
        f"{made.step:,}, from {made.snapshots} snapshots; profile error {made.error:.2%}"
    )
    if made.error > POOR_PROFILE:
        say(
            "warning: the profile is far from the requested one; choose a sigma_rel closer to "
            "those in train.ema, or take more snapshots"
        )
    return {**asdict(made), "run": run, "sigma_rel": sigma_rel}


def sample_command(
    name: OptionalRecipe = None,
    overrides: RunOverrides = None,
    root: Root = None,
    run: RunName = None,
    step: Annotated[
        str, typer.Option("--step", help="Step of the checkpoint, or `newest`.")
    ] = NEWEST,
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
        recipe, run = recipe_and_run("sample", name, overrides, root, run)
    else:
        name, words = split_recipe(name, overrides)
        recipe = recipe_of_weights(weights, name, words, root, allow_pickle)
    source = WeightSource(run or recipe.name, step, weights, allow_pickle)
    result = sample_images(recipe, source, classes or [], seeds, out, batch_size, animate)
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
    recipe = recipe_of_weights(file, name, overrides or (), root, allow_pickle)
    result = import_file(recipe, run or recipe.name, file, step, allow_pickle)
    print_result(result, as_json)


def export_command(
    name: OptionalRecipe = None,
    overrides: RunOverrides = None,
    root: Root = None,
    run: RunName = None,
    step: Annotated[
        str, typer.Option("--step", help="Step of the checkpoint, or `newest`.")
    ] = NEWEST,
    weights: Annotated[
        str, typer.Option(help="Weights to export: raw, or the name of an EMA.")
    ] = "ema",
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
            help="Output file or folder. Default: RUN/export/ema-STEP.safetensors, or "
            "RUN/export/ema-STEP-diffusers."
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

    Example: `diffit export --run demo --root my-project --step newest`

    Example: `diffit export --run demo --root my-project --format diffusers --out demo-pipeline`
    """
    diffusers = format_name is ExportFormat.DIFFUSERS
    command = "export --format diffusers" if diffusers else "export"
    recipe, run = recipe_and_run(command, name, overrides, root, run)
    if diffusers:
        result = export_pipeline(recipe, run, step, weights, license_id or "", out)
    elif license_id is not None:
        raise UserError(
            f"--license is {license_id!r}, but only --format diffusers writes a model card; remove "
            "it, or add --format diffusers"
        )
    else:
        result = export_checkpoint(recipe, run, step, weights, out)
    print_result(result, as_json)


def ema_reconstruct_command(
    sigma_rel: Annotated[
        float, typer.Option(help="Width of the profile, relative to the training up to that step.")
    ],
    name: OptionalRecipe = None,
    overrides: RunOverrides = None,
    root: Root = None,
    run: RunName = None,
    step: Annotated[
        str, typer.Option("--step", help="Step of the EMA, or `newest` for the last snapshot.")
    ] = NEWEST,
    out: Annotated[
        str | None,
        typer.Option(help="Output file. Default: RUN/export/ema-SIGMA-STEP.safetensors."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Reconstruct an EMA with any profile width after training, from a run's snapshots.

    The run needs EMAs with a sigma_rel in train.ema, and train.ema_snapshot_every (EDM2).

    Example: `diffit ema reconstruct --run first --root my-project --sigma-rel 0.07`
    """
    recipe, run = recipe_and_run("ema reconstruct", name, overrides, root, run)
    result = reconstruct_run_ema(recipe, run, sigma_rel, step, out)
    print_result(result, as_json)
