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
from diffit_train.evaluation.result import Result, evaluation_url, finished_result
from diffit_train.progress import say
from diffit_train.runs.checkpoints import committed_steps, reconstructed_url
from diffit_train.runs.identity import NEWEST, find_checkpoint, run_url
from diffit_train.runs.run import Run
from diffit_train.runs.start import init_from

# Seconds between checks for new checkpoints.
WATCH_S = 30.0


def evaluate_run(
    recipe: Recipe,
    run: str,
    steps: Sequence[str],
    address: str | None = None,
    sweep: str = "",
    npz: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate checkpoints of a run; one result per checkpoint that `steps` name.

    Args:
        steps: numbers, or `newest`, which is the default.
        sweep: name of the sweep that the evaluations belong to.
        npz: write the images in ADM's format as samples.npz next to each result.
    """
    recipe = init_from(recipe, run)
    wanted = dict.fromkeys(find_checkpoint(recipe, run, text)[1] for text in steps or (NEWEST,))
    return evaluate_all([(recipe, step) for step in wanted], run, address, sweep, npz)


def evaluate_all(
    wanted: Sequence[tuple[Recipe, int]],
    run: str,
    address: str | None = None,
    sweep: str = "",
    npz: bool = False,
) -> list[dict[str, Any]]:
    """The results of all (recipe, step), computing those that are missing."""
    found = [finished_result(recipe, run, step) for recipe, step in wanted]
    if None in found:
        found = _computed(wanted, found, run, address, sweep, npz)
    else:
        say("already evaluated")
    results = [result for result in found if result is not None]
    for (recipe, step), result in zip(wanted, results, strict=True):
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
        say(f"step {step:,}: {metrics}  {storage.display_path(result.grid)}")
        if npz:
            from diffit_train.evaluation import runner

            runner.write_npz(recipe, evaluation_url(recipe, run, step, result.key))
    if results and not sweep:
        register_best(wanted[0][0], run, results)
    return [result.model_dump(mode="json") for result in results]


def _computed(
    wanted: Sequence[tuple[Recipe, int]],
    found: Sequence[Result | None],
    run: str,
    address: str | None,
    sweep: str,
    npz: bool,
) -> list[Result | None]:
    """The results, with those that are missing."""
    missing = [pair for pair, result in zip(wanted, found, strict=True) if result is None]
    steps = list(dict.fromkeys(f"{step:,}" for _, step in missing))
    url = run_url(wanted[0][0], run)
    plural = "s" if len(steps) > 1 else ""
    say(f"Evaluating step{plural} {', '.join(steps)} of {storage.display_path(url)}")
    from diffit_train.evaluation import runner

    for recipe, step in missing:
        width = recipe.evaluate.reconstructed
        if width is not None and not storage.exists(reconstructed_url(url, width, step)):
            from diffit_train.runs.phema import reconstruct_ema

            reconstruct_ema(Run(recipe.storage.root, run, recipe), width, step)
    requests = [runner.Request(recipe, run, step, sweep, npz) for recipe, step in missing]
    made = iter(runner.evaluate(requests, address))
    return [next(made) if result is None else result for result in found]


def watch_run(
    recipe: Recipe,
    run: str,
    address: str | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> list[dict[str, Any]]:
    """Evaluate each checkpoint of a run as it appears, up to its last step.

    Checkpoints that training removes in the meantime are skipped.

    Args:
        pause: sleeps for a number of seconds between checks.
    """
    recipe = init_from(recipe, run)
    find_checkpoint(recipe, run, NEWEST)
    url, waiting = run_url(recipe, run), False
    found: dict[int, dict[str, Any]] = {}
    while True:
        steps = committed_steps(url)
        missing = [s for s in steps if s not in found]
        for step in missing:
            try:
                (found[step],) = evaluate_all([(recipe, step)], run, address)
            except DiffitError as error:
                if step in committed_steps(url):
                    raise
                say(f"the checkpoint of step {step:,} was removed during its evaluation: {error}")
        if steps and steps[-1] >= recipe.train.steps:
            return [found[step] for step in sorted(found)]
        if not missing and not waiting:
            waiting = True
            say(f"waiting for new checkpoints in {storage.display_path(url)}")
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
