"""The long commands as one call each, alike for the command line and for jobs on a cluster.

What is finished is found out before Ray, torch or MLflow are imported, so a rerun is quick.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffit_train import storage
from diffit_train.config import Recipe, load_recipe, load_recipe_text
from diffit_train.config.recipe import OWN
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import print_rows, say

NEWEST = "newest"
INTERRUPTED = 130
# Between looks for new checkpoints.
WATCH_S = 30.0
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

        step = worker.train(recipe, run, address, _validation(recipe, run))
    else:
        say("trained already")
        send_unsent(recipe, run, say)
    say(f"run {storage.shown(run_url(recipe, run))} stands at step {step:,}")
    return {"run": run, "url": run_url(recipe, run), "step": step}


def _validation(recipe: Recipe, run: str) -> Callable[[int], str] | None:
    """What evaluates checkpoints while a run trains; None where the recipe wants none."""
    if recipe.train.validate_every is None:
        return None
    from diffit_train.data.sources import list_pictures
    from diffit_train.evaluation import fleet

    changed = {"samples": recipe.train.validate_samples}
    evaluate = recipe.evaluate.model_copy(update=changed)
    recipe = recipe.model_copy(update={"evaluate": evaluate})
    fleet.check(recipe)
    if recipe.evaluate.reference == OWN:
        list_pictures(recipe)
    return functools.partial(validate_checkpoint, recipe, run)


def validate_checkpoint(recipe: Recipe, run: str, step: int) -> str:
    """Evaluate a checkpoint of a run in training; a line that says what came of it."""
    from diffit_train.evaluation import fleet

    request = fleet.Request(recipe, run, step, curve="validation")
    result = request.finished or fleet.evaluate([request])[0]
    keep_best(recipe, run)
    figures = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    return f"step {step:,} evaluated: {figures}  {storage.shown(result.grid)}"


def evaluate(
    recipe: Recipe,
    run: str,
    steps: Sequence[str],
    address: str | None = None,
    sweep: str = "",
    npz: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate checkpoints of a run: a result for each of `steps`, numbers or `newest`.

    Args:
        sweep: that the evaluations belong to.
        npz: write the pictures as ADM's samples.npz beside each result.
    """
    recipe = starting_from(recipe, run)
    wanted = [_checkpoint(recipe, run, text)[1] for text in steps or (NEWEST,)]
    return _evaluated([(recipe, step) for step in wanted], run, address, sweep, npz)


def _evaluated(
    wanted: Sequence[tuple[Recipe, int]], run: str, address: str | None, sweep: str, npz: bool
) -> list[dict[str, Any]]:
    """Results of (recipe, step), those made that are missing."""
    from diffit_train.evaluation.result import evaluation_url, finished

    results = [finished(recipe, run, step) for recipe, step in wanted]
    missing = [number for number, result in enumerate(results) if result is None]
    if missing:
        from diffit_train.evaluation import fleet

        for number in missing:
            _reconstruct(*wanted[number], run)
        requests = [
            fleet.Request(wanted[number][0], run, wanted[number][1], sweep, npz)
            for number in missing
        ]
        made = fleet.evaluate(requests, address)
        for number, new in zip(missing, made, strict=True):
            results[number] = new
    else:
        say("evaluated already")
    found = []
    for (recipe, step), result in zip(wanted, results, strict=True):
        if result is None:
            continue
        found.append(result)
        figures = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
        say(f"step {step:,}: {figures}  {storage.shown(result.grid)}")
        if npz:
            from diffit_train.evaluation import fleet

            fleet.write_npz(recipe, evaluation_url(recipe, run, step, result.key))
    if not sweep:
        keep_best(wanted[0][0], run)
    return [result.model_dump(mode="json") for result in found]


def _reconstruct(recipe: Recipe, step: int, run: str) -> None:
    """Make the average that an evaluation wants of the run's snapshots, where it is not there."""
    from diffit_train.checkpoints import reconstructed_url
    from diffit_train.training.run import run_url

    width = recipe.evaluate.reconstructed
    if width is None or storage.exists(reconstructed_url(run_url(recipe, run), width, step)):
        return
    reconstruct_ema(recipe, run, width, str(step), None)


def keep_best(recipe: Recipe, run: str) -> dict[str, Any] | None:
    """Tag a run's best checkpoint in MLflow, and register its weights under the alias `best`.

    The best is that of the smallest distance among evaluations made alike, outside of sweeps. Its
    weights are exported, so they outlast the checkpoint.

    Returns:
        step, value and file of the best; None where nothing was evaluated.
    """
    from diffit_train.evaluation.result import best_metric, best_result
    from diffit_train.tracking import Tracker, first_line, unreachable_errors

    best = best_result(recipe, run)
    if best is None:
        return None
    metric = best_metric(recipe)
    found: dict[str, Any] = {"step": best.step, metric: best.metrics[metric]}
    try:
        tracker = Tracker.of(recipe)
        tracker.tag_best(best.mlflow_run_id, best.step, metric, best.metrics[metric])
    except unreachable_errors() as error:
        say(f"MLflow was not told of the best checkpoint: {first_line(error)}")
        return found
    if recipe.tracking.register_best:
        found["file"] = _register(recipe, run, best, tracker)
    return found


def _register(recipe: Recipe, run: str, best: Any, tracker: Any) -> str | None:
    """Export and register the best weights where they are not yet; their file if they were."""
    from diffit_train.checkpoints import committed_steps, reconstructed_url
    from diffit_train.evaluation.result import best_metric, run_url
    from diffit_train.tracking import first_line, unreachable_errors
    from diffit_train.training import exchange

    name = f"{recipe.tracking.experiment}-{run}"
    metric, weights = best_metric(recipe), recipe.evaluate.weights
    shown = f"step {best.step:,}, {metric} {best.metrics[metric]:.4g}"
    try:
        if tracker.registered_step(name) == best.step:
            return None
        if best.step not in committed_steps(run_url(recipe, run)):
            say(f"best so far: {shown}; its checkpoint is gone, so its weights are not registered")
            return None
        width = recipe.evaluate.reconstructed
        if width is None:
            file = exchange.export_weights(recipe, run, best.step, weights, None)
        else:
            file = reconstructed_url(run_url(recipe, run), width, best.step)
        tags = {"step": best.step, metric: best.metrics[metric], "weights": weights}
        tracker.register(name, file, best.mlflow_run_id, tags)
    except unreachable_errors() as error:
        say(f"best so far: {shown}; not registered: {first_line(error)}")
        return None
    say(f"best so far: {shown}; MLflow's model {name}@best is {storage.shown(file)}")
    return file


def watch(
    recipe: Recipe,
    run: str,
    address: str | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> list[dict[str, Any]]:
    """Evaluate each checkpoint of a run as it comes, until that of its last step.

    Checkpoints that training has removed meanwhile are passed over.

    Args:
        pause: waits between looks, so many seconds.
    """
    from diffit_train.checkpoints import committed_steps
    from diffit_train.evaluation.result import finished, run_url

    recipe = starting_from(recipe, run)
    _checkpoint(recipe, run, NEWEST)
    url, waiting = run_url(recipe, run), False
    found: dict[int, dict[str, Any]] = {}
    while True:
        steps = committed_steps(url)
        missing = [s for s in steps if s not in found]
        for step in missing:
            if finished(recipe, run, step) is None:
                say(f"checkpoint of step {step:,}")
            try:
                (found[step],) = _evaluated([(recipe, step)], run, address, "", npz=False)
            except DiffitError as error:
                if step in committed_steps(url):
                    raise
                say(f"step {step:,} was removed while it was evaluated: {error}")
        if steps and steps[-1] >= recipe.train.steps:
            return [found[step] for step in sorted(found)]
        if not missing and not waiting:
            waiting = True
            say(f"waiting for checkpoints of {storage.shown(url)}")
        pause(WATCH_S)


def references(recipe: Recipe, address: str | None = None) -> dict[str, Any]:
    """Compute the statistics of the recipe's real pictures, or find them computed."""
    from diffit_train.evaluation import fleet

    url, reference = fleet.make_reference(recipe, address)
    kept = 0 if reference.features is None else len(reference.features)
    count = "" if reference.count is None else f" of {reference.count:,} pictures"
    say(
        f"reference {storage.shown(url)}: {len(reference.pool.mean):,} features{count}, "
        f"{kept:,} of them kept for precision and recall"
    )
    return {
        "reference": url,
        "pictures": reference.count,
        "features": len(reference.pool.mean),
        "kept": kept,
    }


# ---- Sweeps ----


@dataclass(frozen=True)
class Fleet:
    """Where and how the jobs of a sweep run."""

    address: str
    at_most: int = 4
    retries: int = 2
    python: str | None = None


def sweep(
    recipe: Recipe,
    run: str,
    steps: Sequence[str],
    texts: Sequence[str],
    name: str | None,
    address: str | None = None,
    fleet: Fleet | None = None,
) -> dict[str, Any]:
    """Evaluate every combination of some keys' values; a table and a picture of them.

    Args:
        texts: KEY=VALUES each.
        fleet: send each evaluation as a Ray job of its own; None makes them here one by one, on
            the Ray cluster at `address`.

    Raises:
        DiffitError: some evaluations failed, or the sweep was cancelled; the others are kept.
    """
    from diffit_train.evaluation import sweep as stage

    recipe = starting_from(recipe, run)
    wanted = [_checkpoint(recipe, run, text)[1] for text in steps or (NEWEST,)]
    plan = stage.plan_sweep(recipe, run, wanted, texts, name)
    stage.open_sweep(plan)
    say(f"sweep {plan.name!r}: {len(plan.members)} evaluations in {storage.shown(plan.url())}")
    failed: list[str] = []
    if fleet is None:
        pairs = [(member.recipe(recipe), member.step) for member in plan.members]
        _evaluated(pairs, run, address, plan.name, npz=False)
    else:
        failed = _sweep_by_jobs(plan, recipe, fleet)
    found = stage.results(plan)
    outputs: dict[str, str] = {}
    if any(result is not None for result in found):
        outputs = stage.write_outputs(plan, found)
        print_rows(plan.name, stage.rows(plan, found))
        say(f"{storage.shown(outputs['csv'])}  {storage.shown(outputs['picture'])}")
    if failed:
        raise DiffitError(
            f"{len(failed)} of {len(plan.members)} evaluations of sweep {plan.name!r} were not "
            f"made: {'; '.join(failed[:3])}. The same command tries them again"
        )
    return {"name": plan.name, "rows": stage.rows(plan, found), **outputs}


def _sweep_by_jobs(plan: Any, recipe: Recipe, fleet: Fleet) -> list[str]:
    """Make a sweep's evaluations as Ray jobs; why those failed that did."""
    from diffit_train import submit as jobs
    from diffit_train.evaluation import sweep as stage
    from diffit_train.evaluation.result import finished
    from diffit_train.progress import StatesTable

    members = list(enumerate(plan.members))
    every = {number: member.recipe(recipe) for number, member in members}
    todo = [
        jobs.Job("evaluate", every[n], plan.run, (str(m.step),), plan.name, n) for n, m in members
    ]

    def is_done(job: jobs.Job) -> bool:
        return finished(job.recipe, plan.run, plan.members[job.number].step) is not None

    with StatesTable(f"sweep {plan.name}") as table:

        def show(states: list[jobs.JobState]) -> None:
            table.show([_state_row(plan.members[s.job.number], s) for s in states])

        states = jobs.submit_fleet(
            todo,
            fleet.address,
            jobs.FleetPlan(
                fleet.at_most,
                fleet.retries,
                is_done,
                lambda: stage.is_cancelled(plan.url()),
                show,
                fleet.python,
            ),
        )
    return [
        state.reason or f"{state.job.name} was cancelled"
        for state in states
        if state.state != "done"
    ]


def _state_row(member: Any, state: Any) -> dict[str, str]:
    begun, ended = state.begun_s, state.ended_s
    seconds = (ended or time.monotonic()) - begun if begun else 0.0
    changes = {key.removeprefix("evaluate."): str(v) for key, v in member.changes.items()}
    return {
        "step": f"{member.step:,}",
        **changes,
        "state": state.state,
        "s": f"{seconds:.0f}" if begun else "",
        "failures": str(state.failures or ""),
        "job": state.submission_id,
    }


def show_sweep(root: str, run: str, name: str) -> dict[str, Any]:
    """The table of a sweep as far as it has got."""
    from diffit_train.evaluation import sweep as stage

    plan = stage.read_sweep(stage.sweep_url(storage.absolute(root), run, name))
    found = stage.results(plan)
    done = sum(result is not None for result in found)
    state = ", cancelled" if stage.is_cancelled(plan.url()) else ""
    say(f"sweep {name!r}: {done} of {len(found)} evaluations are done{state}")
    table = stage.rows(plan, found)
    if table:
        print_rows(name, table)
    return {"name": name, "done": done, "members": len(found), "rows": table}


def cancel_sweep(root: str, run: str, name: str, address: str) -> dict[str, Any]:
    """Stop the jobs of a sweep; what is finished stays."""
    from diffit_train import submit as jobs
    from diffit_train.evaluation import sweep as stage

    plan = stage.read_sweep(stage.sweep_url(storage.absolute(root), run, name))
    recipe = plan.loaded()
    names = [
        jobs.Job("evaluate", recipe, run, (), name, number).name
        for number in range(len(plan.members))
    ]
    stage.cancel_sweep(plan.url())
    stopped = jobs.cancel_jobs(names, address)
    say(f"sweep {name!r} is cancelled; {stopped} jobs were running")
    return {"name": name, "stopped": stopped}


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
