"""Evaluations of a run's checkpoints: those that are missing are computed, finished ones reused.

Importing this imports neither torch nor Ray, so that what is finished is found at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.errors import DiffitError
from diffit_train.evaluation.best import register_best
from diffit_train.evaluation.result import Evaluation, Result, evaluation_url
from diffit_train.progress import say
from diffit_train.runs.checkpoints import NEWEST, reconstructed_url
from diffit_train.runs.run import Run

# Seconds between checks for new checkpoints.
WATCH_S = 30.0


def evaluate_run(
    run: Run,
    steps: Sequence[int | str] = (),
    address: str | None = None,
    sweep: str = "",
    npz: bool = False,
) -> list[Result]:
    """Evaluate checkpoints of a run; one result per checkpoint that `steps` name.

    Args:
        steps: numbers, or `newest`, which is the default.
        sweep: name of the sweep that the evaluations belong to.
        npz: write the images in ADM's format as samples.npz next to each result.
    """
    wanted = dict.fromkeys(run.checkpoint(step).step for step in steps or (NEWEST,))
    return evaluate_all([(run, step) for step in wanted], address, sweep, npz)


def evaluate_all(
    wanted: Sequence[tuple[Run, int]],
    address: str | None = None,
    sweep: str = "",
    npz: bool = False,
) -> list[Result]:
    """The results of all (run, step), computing those that are missing.

    Args:
        wanted: a run with the recipe of each evaluation, and the step of its checkpoint.
    """
    finished = [Evaluation(run, step).read() for run, step in wanted]
    if None in finished:
        finished = _computed(wanted, finished, address, sweep, npz)
    else:
        say("already evaluated")
    results = [result for result in finished if result is not None]
    for (run, step), result in zip(wanted, results, strict=True):
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
        say(f"step {step:,}: {metrics}  {storage.display_path(result.grid)}")
        if npz:
            from diffit_train.evaluation import runner

            runner.write_npz(run.recipe, evaluation_url(run, step, result.key))
    if results and not sweep:
        register_best(wanted[0][0], results)
    return results


def _computed(
    wanted: Sequence[tuple[Run, int]],
    finished: Sequence[Result | None],
    address: str | None,
    sweep: str,
    npz: bool,
) -> list[Result | None]:
    """The results, with those that are missing."""
    missing = [pair for pair, result in zip(wanted, finished, strict=True) if result is None]
    steps = list(dict.fromkeys(f"{step:,}" for _, step in missing))
    url = wanted[0][0].url
    plural = "s" if len(steps) > 1 else ""
    say(f"Evaluating step{plural} {', '.join(steps)} of {storage.display_path(url)}")
    from diffit_train.evaluation import runner

    for run, step in missing:
        width = run.recipe.evaluate.reconstructed
        if width is not None and not storage.exists(reconstructed_url(url, width, step)):
            from diffit_train.runs.phema import reconstruct_ema

            reconstruct_ema(run, width, step)
    evaluations = [Evaluation(run, step) for run, step in missing]
    made = iter(runner.evaluate(evaluations, address, runner.Options(sweep, npz)))
    return [next(made) if result is None else result for result in finished]


def watch_run(
    run: Run, address: str | None = None, pause: Callable[[float], None] = time.sleep
) -> list[Result]:
    """Evaluate each checkpoint of a run as it appears, up to its last step.

    Checkpoints that training removes in the meantime are skipped.

    Args:
        pause: sleeps for a number of seconds between checks.
    """
    run.checkpoint()
    results: dict[int, Result] = {}
    waiting = False
    while True:
        steps = run.checkpoints.refresh().steps
        missing = [step for step in steps if step not in results]
        for step in missing:
            try:
                (results[step],) = evaluate_all([(run, step)], address)
            except DiffitError as error:
                if step in run.checkpoints.refresh():
                    raise
                say(f"the checkpoint of step {step:,} was removed during its evaluation: {error}")
        if steps and steps[-1] >= run.recipe.train.steps:
            return [results[step] for step in sorted(results)]
        if not missing and not waiting:
            waiting = True
            say(f"waiting for new checkpoints in {storage.display_path(run.url)}")
        pause(WATCH_S)


def compute_references(recipe: Recipe, address: str | None = None) -> dict[str, Any]:
    """Compute the statistics of the recipe's real images unless they exist; summarize them."""
    from diffit_train.evaluation import runner

    url, reference = runner.make_reference(recipe, address)
    kept = 0 if reference.features is None else len(reference.features)
    count = "" if reference.count is None else f" over {reference.count:,} images"
    say(
        f"reference {storage.display_path(url)}: {len(reference.pool.mean):,} features{count}; "
        f"{kept:,} images kept for precision and recall"
    )
    features = len(reference.pool.mean)
    return {"reference": url, "images": reference.count, "features": features, "kept": kept}
