"""The long commands as one call each, alike for the command line and for jobs on a cluster.

What is finished is found out before Ray, torch or MLflow are imported, so a rerun is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffit_train import storage
from diffit_train.config import Recipe, load_recipe, load_recipe_text
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import say

NEWEST = "newest"
INTERRUPTED = 130
# Relative error of a reconstructed profile beyond which the user is warned.
POOR_PROFILE = 0.1


def guarded(body: Callable[[], object]) -> int:
    """Run a command's body; its exit status: 0, 1 failed, 2 bad input, 130 interrupted."""
    try:
        body()
    except UserError as error:
        say(f"error: {error}")
        return 2
    except DiffitError as error:
        say(f"failed: {error}")
        return 1
    except OSError as error:  # a full disk, a folder that may not be read
        say(f"failed: {error}")
        return 1
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as error:  # how the command line reports that it was interrupted
        return _interrupted() if error.code == INTERRUPTED else _status(error)
    finally:
        sys.stdout.flush()
    return 0


def _interrupted() -> int:
    say("interrupted; the same command continues")
    return INTERRUPTED


def _status(error: SystemExit) -> int:
    return error.code if isinstance(error.code, int) else 0


def encode(recipe: Recipe, address: str | None = None, append: bool = False) -> dict[str, Any]:
    """Encode the recipe's pictures; a summary of the latents."""
    from diffit_train.data.shards import finished, latents_url

    manifest = finished(recipe)
    if manifest is None or append:
        from diffit_train.data import encode as stage

        manifest = stage.encode(recipe, address, append)
    else:
        say("encoded already")
    say(
        f"latents {storage.shown(latents_url(recipe))}: {manifest.totals.written:,} pictures in "
        f"{len(manifest.shards)} shards, {manifest.totals.rejected:,} rejected"
    )
    return {
        "latents": latents_url(recipe),
        **manifest.totals.model_dump(),
        "digest": manifest.digest,
    }


def verify_latents(
    url: str, picture: str | None, repair: bool, address: str | None = None
) -> dict[str, Any]:
    """Check a folder of latents, make bad shards again if asked to, and draw a picture.

    Args:
        picture: a PNG of originals beside their reconstructions; None for no picture.

    Raises:
        DiffitError: something is bad and was not, or could not be, repaired.
    """
    from diffit_train.data import verify as stage

    report = stage.verify(url)
    for name, reason in report.bad.items():
        say(f"bad: {name}: {reason}")
    if report.bad and repair:
        stage.repair(url, list(report.bad), address)
        report = stage.verify(url)
    found = report.as_json()
    if report.bad:
        raise DiffitError(
            f"{len(report.bad)} of {report.shards} shards of {storage.shown(url)} are bad: "
            f"{', '.join(list(report.bad)[:8])}"
            + ("" if repair else "; --repair encodes them again")
        )
    spread = "  ".join(f"{m:.3f}±{s:.3f}" for m, s in zip(found["mean"], found["std"], strict=True))
    say(
        f"{storage.shown(url)}: {report.pictures:,} pictures in {report.shards} shards are good; "
        f"latents by channel {spread}, from {report.lowest:.2f} to {report.highest:.2f}"
    )
    if picture is not None:
        found["reconstruction_mse"] = stage.draw_reconstructions(url, picture)
        found["picture"] = picture
        say(f"reconstruction mse {found['reconstruction_mse']:.4g}: {storage.shown(picture)}")
    return found


def starting_from(
    recipe: Recipe, run: str, source: str | None = None, weights: str = "ema"
) -> Recipe:
    """The recipe of a run that starts from another run's weights: one named, or one it had."""
    from diffit_train.training.run import begun_from, starting_from

    if source is None:
        return begun_from(recipe, run)
    return starting_from(recipe, run, source, weights)


def train(
    recipe: Recipe,
    run: str,
    address: str | None = None,
    source: str | None = None,
    source_weights: str = "ema",
) -> dict[str, Any]:
    """Train a run; where it stands.

    Args:
        source: RUN or RUN@STEP whose weights a new run starts from.
        source_weights: which of them: raw, or the name of an average.
    """
    from diffit_train.training.run import finished_step, run_url, send_unsent

    recipe = starting_from(recipe, run, source, source_weights)
    step = finished_step(recipe, run)
    if step is None:
        from diffit_train.training import worker

        step = worker.train(recipe, run, address)
    else:
        say("trained already")
        send_unsent(recipe, run, say)
    say(f"run {storage.shown(run_url(recipe, run))} stands at step {step:,}")
    return {"run": run, "url": run_url(recipe, run), "step": step}


def evaluate(
    recipe: Recipe, run: str, steps: Sequence[str], address: str | None = None
) -> list[dict[str, Any]]:
    """Evaluate checkpoints of a run: a result for each of `steps`, numbers or `newest`."""
    from diffit_train.evaluation.result import finished

    recipe = starting_from(recipe, run)
    wanted = [_checkpoint(recipe, run, text)[1] for text in steps or (NEWEST,)]
    results = {step: finished(recipe, run, step) for step in wanted}
    missing = [step for step, result in results.items() if result is None]
    if missing:
        from diffit_train.evaluation import fleet

        for result in fleet.evaluate(recipe, run, missing, address):
            results[result.step] = result
    else:
        say("evaluated already")
    found = [result for result in results.values() if result is not None]
    for result in found:
        figures = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
        say(f"step {result.step:,}: {figures}  {storage.shown(result.grid)}")
    return [result.model_dump(mode="json") for result in found]


@dataclass(frozen=True)
class WeightSource:
    """Which weights to sample: a checkpoint of a run, or a file."""

    run: str
    step: str = NEWEST
    file: str | None = None
    allow_pickle: bool = False


def sample(
    recipe: Recipe,
    source: WeightSource,
    classes: Sequence[str],
    seeds: str,
    out: str,
    batch_size: int,
) -> dict[str, Any]:
    """Sample pictures of classes and seeds into a folder; the record of samples.json."""
    from diffit_train.evaluation import sample as stage

    labels = stage.choose_classes(stage.class_names(recipe), classes)
    numbers = stage.parse_seeds(seeds)
    if source.file is not None:
        title = storage.shown(source.file)
        weights = stage.file_weights(recipe, source.file, source.allow_pickle)
    else:
        recipe = starting_from(recipe, source.run)
        url, step = _checkpoint(recipe, source.run, source.step)
        title = f"{source.run}, step {step:,}, {recipe.evaluate.weights}"
        weights = stage.run_weights(recipe, url, step)
    folder = storage.absolute(out)
    result = stage.sample(recipe, weights, labels, numbers, folder, batch_size, title)
    count = len(result["pictures"])
    say(f"{count:,} {'picture' if count == 1 else 'pictures'} in {storage.shown(folder)}")
    return result


def recipe_of_weights(
    file: str,
    name: str | None,
    overrides: Sequence[str],
    root: str | None,
    allow_pickle: bool = False,
) -> Recipe:
    """The recipe named, or that of the weight file itself.

    Raises:
        UserError: the file does not say which, so it must be named; or it is broken.
    """
    if name is not None:
        return load_recipe(name, overrides, root)
    from diffit_train.models.published import stored_recipe

    found = stored_recipe(storage.absolute(file), allow_pickle)
    if found is None:
        raise UserError(f"{file} does not say what model it holds; name its recipe by --recipe")
    text, reference = found
    if text:
        return load_recipe_text(text, reference, overrides, root)
    say(f"{file} has the shapes of {reference}")
    return load_recipe(reference, overrides, root)


def import_weights(
    recipe: Recipe, run: str, file: str, step: int | None, allow_pickle: bool
) -> dict[str, Any]:
    """Read a weight file into a run.

    Args:
        step: under which the weights are kept; None for the file's own.
    """
    from diffit_train.training import exchange
    from diffit_train.training.deepspeed_checkpoint import is_deepspeed_checkpoint

    file = storage.absolute(file)
    if is_deepspeed_checkpoint(file):
        url, number = exchange.import_deepspeed(recipe, run, file, allow_pickle)
        say(
            f"run {storage.shown(url)} holds {storage.shown(file)} at step {number:,}, ready to be "
            "trained on; its averages of the weights begin anew"
        )
    else:
        url, number = exchange.import_weights(recipe, run, file, step, allow_pickle)
        say(f"run {storage.shown(url)} holds {storage.shown(file)} as the EMA of step {number:,}")
    return {"run": run, "url": url, "step": number}


def export_weights(
    recipe: Recipe, run: str, step: str, kind: str, out: str | None
) -> dict[str, Any]:
    """Write a checkpoint's weights to a file."""
    from diffit_train.training import exchange

    recipe = starting_from(recipe, run)
    _, number = _checkpoint(recipe, run, step)
    target = None if out is None else storage.absolute(out)
    file = exchange.export_weights(recipe, run, number, kind, target)
    say(f"wrote {storage.shown(file)}: {kind} of {run}, step {number:,}")
    return {"file": file, "run": run, "step": number, "weights": kind}


def reconstruct_ema(
    recipe: Recipe, run: str, sigma_rel: float, step: str, out: str | None
) -> dict[str, Any]:
    """Make an average of the weights from a run's snapshots."""
    from diffit_train.training import exchange

    recipe = starting_from(recipe, run)
    _checkpoint(recipe, run, NEWEST)
    target = None if out is None else storage.absolute(out)
    made = exchange.reconstruct_ema(recipe, run, sigma_rel, _step(step), target)
    say(
        f"wrote {storage.shown(made.file)}: sigma_rel {sigma_rel:g} of {run}, step {made.step:,}, "
        f"from {made.snapshots} snapshots; its profile is off by {made.error:.2%}"
    )
    if made.error > POOR_PROFILE:
        say(
            "that is far from what was asked; take a sigma_rel nearer those of train.ema, or more "
            "snapshots"
        )
    return {**asdict(made), "run": run, "sigma_rel": sigma_rel}


def _checkpoint(recipe: Recipe, run: str, step: str) -> tuple[str, int]:
    """Folder of a run and the step asked for, if both are there."""
    from diffit_train.checkpoints import require_step
    from diffit_train.training.run import check_recipe, run_url

    if check_recipe(recipe, run) is None:
        raise UserError(
            f"there is no run {run!r} under {recipe.storage.root}; train it first, or name "
            "another by --run"
        )
    url = run_url(recipe, run)
    return url, require_step(url, _step(step))


def _step(text: str) -> int | None:
    if text == NEWEST:
        return None
    if not text.isdigit():
        raise UserError(f"--step is {text!r}, but must be a number of steps or {NEWEST!r}")
    return int(text)
