"""`diffit evaluate` and `diffit references`: resumable work on Ray actors.

Each chunk of images, and each part of a reference, is committed as soon as it is done. A rerun
computes only what is missing, and the result does not depend on the number of actors or on their
failures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Self

from diffit_train import ray_session, storage
from diffit_train.config import Recipe
from diffit_train.config.model import ARCHITECTURES, CustomModel
from diffit_train.diffusion.objective import nfe_per_image
from diffit_train.errors import DiffitError, first_line
from diffit_train.evaluation import chunks
from diffit_train.evaluation.actors import EvaluationTarget
from diffit_train.evaluation.chunks import LABELS, Layout, Range
from diffit_train.evaluation.features import features_digest
from diffit_train.evaluation.generate import class_names, guidance_saving
from diffit_train.evaluation.grid import draw_grid
from diffit_train.evaluation.pool import EvaluationPool, Generation, Usage
from diffit_train.evaluation.references import Reference, ReferenceSource, StoredReference
from diffit_train.evaluation.result import (
    GRID,
    SAMPLES,
    Evaluation,
    Result,
    evaluated_identity,
    read_result,
    write_result,
)
from diffit_train.evaluation.scores import Scorer, grid_rows, metrics, read_grid, warnings
from diffit_train.progress import Progress, say
from diffit_train.runs.checkpoints import State
from diffit_train.tracking import EVALUATION, NFE, TAG_REFERENCE, Tracker, unreachable_errors

# Threads that sum finished chunks while actors generate others.
SUMMING_THREADS = 2
# Evaluations whose images are there, but not their metrics: each holds its features in memory.
MOST_UNFINISHED = 3


@dataclass(frozen=True)
class Options:
    """What evaluations of a call have in common.

    Attributes:
        sweep: name of the sweep that they belong to, or "".
        npz: write samples.npz next to each result.
        curve: prefix of their metrics in the training run's curves over steps. Evaluations of a
            sweep are not logged there: there would be many at one step.
    """

    sweep: str = ""
    npz: bool = False
    curve: Literal["eval", "validation"] = "eval"


def evaluate(
    evaluations: Sequence[Evaluation], address: str | None = None, options: Options | None = None
) -> list[Result]:
    """Evaluate checkpoints of a run on the Ray cluster at `address`; one result each.

    A rerun resumes. All chunks are in one queue. Metrics are computed here, while the actors
    generate the next evaluation's images or after they are gone.

    Args:
        evaluations: they differ in checkpoint, sampler, guidance and seed only.

    Raises:
        UserError: bad input; nothing was written.
        DiffitError: a chunk failed, or its metrics are not finite.
    """
    for evaluation in evaluations:
        check(evaluation.run.recipe)
    with ray_session.connected(address):
        return _evaluate(evaluations, options or Options())


def check(recipe: Recipe) -> None:
    """Check features and reference file before anything starts.

    The images of a reference are listed later, only once: there may be millions.

    Raises:
        UserError: the features or the reference file cannot be used.
    """
    if isinstance(recipe.model, CustomModel):
        ARCHITECTURES.load(recipe.model.architecture)
    features_digest(recipe)
    ReferenceSource.of(recipe).check()


def make_reference(recipe: Recipe, address: str | None = None) -> tuple[str, Reference]:
    """Compute or read the recipe's reference; return its URL and statistics.

    Raises:
        UserError: the images or the file cannot be used.
    """
    check(recipe)
    with ray_session.connected(address):
        pool = EvaluationPool(recipe)
        try:
            found = pool.reference()
        finally:
            pool.close()
    return found.url, found.read()


def _evaluate(evaluations: Sequence[Evaluation], options: Options) -> list[Result]:
    """Evaluate with one set of actors, which is gone before the last metrics are computed."""
    for saving in dict.fromkeys(guidance_saving(each.run.recipe) for each in evaluations):
        if saving:
            say(saving)
    with ThreadPoolExecutor(SUMMING_THREADS) as summing, ThreadPoolExecutor(1) as finishing:
        started = [_Started.of(each, options, summing) for each in evaluations]
        pool = EvaluationPool(evaluations[0].run.recipe)
        finished: list[Future[Result]] = []
        try:
            reference = pool.reference()
            statistics = finishing.submit(reference.read)

            def finish(one: _Started, usage: Usage) -> None:
                _raise_failures([statistics, *finished])
                for waiting in finished[:-MOST_UNFINISHED]:
                    waiting.result()
                finished.append(finishing.submit(_finish, one, reference, statistics, usage))

            usage = _generate(pool, started, finish)
        finally:
            pool.close()
        results = [future.result() for future in finished]
        # In this thread, so that Ctrl-C need not wait for it.
        return [*results, _finish(started[-1], reference, statistics, usage)]


@dataclass
class _Started:
    """An evaluation whose images are being generated."""

    evaluation: Evaluation
    options: Options
    state: State
    generation: Generation
    scorer: Scorer
    started_s: float

    @classmethod
    def of(cls, evaluation: Evaluation, options: Options, summing: Executor) -> Self:
        """Find what there is, and what is missing, before any actor exists."""
        run, step, recipe = evaluation.run, evaluation.step, evaluation.run.recipe
        url, key, evaluate = evaluation.url, evaluation.key, recipe.evaluate
        storage.remove_temporary(url)
        keep_all = options.npz or evaluate.keep_images == "all"
        there = _usable_chunks(url, keep_all)
        batches = recipe.scaling.evaluate_batches
        missing = Layout(evaluate.samples, evaluate.batch_size, batches).missing(there)
        scorer = Scorer(recipe, url, key, summing)
        scorer.add(there)
        generation = Generation(
            recipe, EvaluationTarget(run.url, step, url, key), missing, keep_all
        )
        state = run.checkpoints[step].state
        return cls(evaluation, options, state, generation, scorer, time.monotonic())


def _usable_chunks(url: str, keep_all: bool) -> list[Range]:
    """The complete chunks; those without images are removed if all images are wanted."""
    there = chunks.committed_chunks(url)
    if not keep_all:
        return there
    whole = chunks.committed_chunks(url, with_images=True)
    if len(whole) < len(there):
        say(
            f"chunks of {storage.display_path(url)} that kept only the grid's images: "
            f"{len(there) - len(whole)}; generating them again"
        )
    for part in set(there) - set(whole):
        chunks.remove_chunk(url, part)
    return whole


def _generate(
    pool: EvaluationPool, started: Sequence[_Started], finish: Callable[[_Started, Usage], None]
) -> Usage:
    """Generate all missing chunks, and stop the actors.

    Args:
        finish: called, in order, for each evaluation but the last once it has its images, with the
            use of actors since the one before; for the first, since they were started.

    Returns:
        Use of actors for the last evaluation.
    """
    committed = pool.generate([one.generation for one in started])
    before = Usage(0.0, 0.0)
    for number, one in enumerate(started):
        if number:
            one.started_s = time.monotonic()
        samples = one.generation.recipe.evaluate.samples
        title = f"evaluate step {one.evaluation.step:,}"
        with Progress(title, samples, "images", one.scorer.taken) as shown:
            while not one.scorer.complete:
                of, part = next(committed)
                started[of].scorer.add([part])
                shown.update(one.scorer.taken)
        now = pool.usage()
        if number < len(started) - 1:
            finish(one, now.since(before))
            before = now
    pool.close()
    return now.since(before)


def _raise_failures(futures: Sequence[Future[Any]]) -> None:
    """Raise what has gone wrong in the background so far."""
    for future in futures:
        if future.done():
            future.result()


def _finish(
    one: _Started, reference: StoredReference, statistics: Future[Reference], usage: Usage
) -> Result:
    """Compute the metrics of generated images, log them, and commit the result."""
    run, step, url = one.evaluation.run.name, one.evaluation.step, one.evaluation.url
    recipe = one.evaluation.run.recipe
    sums, real = one.scorer.finish(), statistics.result()
    values = metrics(recipe, sums, real)
    for warning in warnings(sums, real):
        say(f"note: {warning}")
    grid = storage.join(url, GRID)
    numbers = "   ".join(f"{name} {value:.3g}" for name, value in values.items())
    title = f"{run}, step {step:,}\n{numbers}"
    shown, names = read_grid(recipe, url), class_names(recipe)
    named = [names[label] for label in shown] if recipe.model.conditional else None
    draw_grid(list(shown.values()), named, title, grid)
    grid_sha256 = storage.sha256_bytes(storage.read_bytes(grid))
    cost = nfe_per_image(recipe)
    try:
        child = _track(one, values, cost, grid, reference)
    except unreachable_errors() as error:
        raise DiffitError(
            f"computed the metrics of step {step:,} ({numbers}), but could not log them to MLflow: "
            f"{first_line(error)}; rerun the same command to retry"
        ) from error
    result = Result(
        run=run,
        step=step,
        key=one.evaluation.key,
        samples=recipe.evaluate.samples,
        metrics=values,
        grid=grid,
        seconds=time.monotonic() - one.started_s,
        idle_fraction=usage.idle_fraction,
        keep_images=recipe.evaluate.keep_images,
        nfe=cost,
        evaluate=evaluated_identity(recipe),
        reference_digest=reference.digest,
        features_digest=features_digest(recipe),
        recipe_hash=recipe.train_hash(),
        mlflow_run_id=child,
        files={GRID: grid_sha256},
    )
    write_result(url, result)
    if one.options.npz:
        write_npz(recipe, url)
    if usage.idle_fraction is not None:
        say(
            f"step {step:,}: the actors were idle for {usage.idle_fraction:.1%} of their "
            f"{usage.existed_s:,.0f} s"
        )
    return result


def write_npz(recipe: Recipe, url: str) -> str:
    """Write a finished evaluation's images as samples.npz in ADM's format, once; its URL.

    Raises:
        UserError: its images were not kept.
    """
    target, result = storage.join(url, SAMPLES), read_result(url)
    if SAMPLES not in result.files:
        parts = chunks.committed_chunks(url)
        labels = [chunks.read_chunk(url, part, result.key)[LABELS] for part in parts]
        sha256 = chunks.write_samples(url, target, recipe.evaluate.samples, labels)
        files = {**result.files, SAMPLES: sha256}
        write_result(url, result.model_copy(update={"files": files}))
        if recipe.evaluate.keep_images == "grid":
            for part in parts:
                chunks.keep_only(url, part, grid_rows(recipe, part))
        say(f"images: {storage.display_path(target)}")
    return target


def _track(
    one: _Started,
    metrics: dict[str, float],
    cost: float,
    grid: str,
    reference: StoredReference,
) -> str:
    """Log to a child of the training run, and to that run's own curves over steps.

    A rerun of a killed evaluation logs the same values at the same step.
    """
    run, key, state, options = one.evaluation.run, one.evaluation.key, one.state, one.options
    recipe, checkpoint = run.recipe, run.checkpoints[one.evaluation.step]
    tracker = Tracker.of(recipe)
    params = {k: v for k, v in recipe.flat().items() if k.startswith("evaluate.")}
    tags = {
        "diffit.recipe_hash": recipe.train_hash(),
        "diffit.evaluation_key": key,
        "diffit.checkpoint": checkpoint.url,
        "diffit.checkpoint_digest": checkpoint.digest,
        TAG_REFERENCE: reference.digest,
        "mlflow.source.name": "diffit evaluate",
    }
    if options.sweep:
        tags["diffit.sweep"] = options.sweep
    child = tracker.evaluation_run(
        recipe.tracking.experiment,
        state.mlflow_run_id,
        f"{state.step}/{key}",
        f"{run.name}-step-{state.step}-{key}",
        {**params, "step": state.step, "run": run.name},
        tags,
    )
    name = reference.url.rsplit("/", 1)[-1].removesuffix(".safetensors")
    tracker.log_dataset(child, name, name.rsplit("-", 1)[-1], reference.url)
    named = {f"{EVALUATION}/{name}": value for name, value in metrics.items()}
    curves = [(child, {**named, NFE: cost})]
    if not options.sweep:
        own = {f"{options.curve}/{name}": value for name, value in metrics.items()}
        curves.append((state.mlflow_run_id, own))
    for run_id, values in curves:
        first = next(iter(values))
        if tracker.value_at(run_id, first, state.step) != values[first]:
            tracker.log_metrics(run_id, values, state.step)
    with storage.local_copy(grid) as path:
        tracker.log_artifact(child, path)
    tracker.finish(child)
    return child
