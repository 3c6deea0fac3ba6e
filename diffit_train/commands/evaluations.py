"""Results of evaluations, computing those that are missing: shared by `evaluate` and `sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffit_train import storage
from diffit_train.commands.weights import reconstruct_run_ema
from diffit_train.config import Recipe
from diffit_train.evaluation.best import register_best
from diffit_train.evaluation.result import Result, evaluation_url, finished_result
from diffit_train.progress import say
from diffit_train.runs.checkpoints import reconstructed_url
from diffit_train.runs.identity import run_url


def evaluate_all(
    wanted: Sequence[tuple[Recipe, int]], run: str, address: str | None, sweep: str, npz: bool
) -> list[dict[str, Any]]:
    """The results of all (recipe, step), computing those that are missing."""
    results = [finished_result(recipe, run, step) for recipe, step in wanted]
    missing = [number for number, result in enumerate(results) if result is None]
    if missing:
        steps = dict.fromkeys(f"{wanted[number][1]:,}" for number in missing)
        where = storage.display_path(run_url(wanted[0][0], run))
        say(f"Evaluating step{'s' if len(steps) > 1 else ''} {', '.join(steps)} of {where}")
        from diffit_train.evaluation import runner

        for number in missing:
            _reconstruct(*wanted[number], run)
        requests = [
            runner.Request(wanted[number][0], run, wanted[number][1], sweep, npz)
            for number in missing
        ]
        made = runner.evaluate(requests, address)
        for number, new in zip(missing, made, strict=True):
            results[number] = new
    else:
        say("already evaluated")
    found: list[Result] = []
    for (recipe, step), result in zip(wanted, results, strict=True):
        if result is None:
            continue
        found.append(result)
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
        say(f"step {step:,}: {metrics}  {storage.display_path(result.grid)}")
        if npz:
            from diffit_train.evaluation import runner

            runner.write_npz(recipe, evaluation_url(recipe, run, step, result.key))
    if found and not sweep:
        register_best(wanted[0][0], run, found)
    return [result.model_dump(mode="json") for result in found]


def _reconstruct(recipe: Recipe, step: int, run: str) -> None:
    """Reconstruct the EMA that an evaluation needs from snapshots, unless it exists."""
    width = recipe.evaluate.reconstructed
    if width is None or storage.exists(reconstructed_url(run_url(recipe, run), width, step)):
        return
    reconstruct_run_ema(recipe, run, width, str(step), None)
