"""`diffit train`: checks, the lease, MLflow; then training under Ray Train or in this process."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol

import torch

from diffit_train import ray_session, storage
from diffit_train.config import Recipe, stored_text
from diffit_train.config.model import CustomModel
from diffit_train.data.loader import SampleOrder
from diffit_train.data.manifest import Manifest, latents_url, load_manifest, require_recipe
from diffit_train.diffusion.objective import load_objective
from diffit_train.errors import DiffitError, Interrupted, UserError, first_line
from diffit_train.models.attention_kernels import kernel_name
from diffit_train.models.build import build_model
from diffit_train.models.transfer import check_transfer
from diffit_train.progress import say
from diffit_train.runs.checkpoints import DamagedCheckpoint
from diffit_train.runs.lease import Lease
from diffit_train.runs.run import Run, RunMetadata
from diffit_train.tracking import (
    TAG_STEPS,
    Tracker,
    git_commit,
    tracking_uri,
    unreachable_errors,
)
from diffit_train.training.checkpoint_thread import CheckpointThread
from diffit_train.training.cluster import RayTraining, Stop
from diffit_train.training.local import train_locally
from diffit_train.training.log import check_run_files

# 128 + SIGTERM or SIGINT, the shell's status of a process that a signal killed.
STOPPED, INTERRUPTED = 143, 130

# Evaluates the checkpoint of a step while training continues; returns a one-line summary.
Validate = Callable[[int], str]


class Samples(Protocol):
    """What draws a run's grids; see `evaluation.training_samples`."""

    def due(self, steps: Iterable[int]) -> list[int]:
        """Those of the checkpoints at `steps` whose grid is to be drawn."""

    def draw(self, step: int) -> None:
        """Draw the grid of a checkpoint."""

    def send(self, mlflow_run_id: str) -> None:
        """Log the grids that the MLflow run lacks."""


def train(
    run: Run,
    address: str | None = None,
    validate: Validate | None = None,
    *,
    samples: Samples | None = None,
    wait: bool = False,
    local: bool = False,
) -> int:
    """Train a run to its recipe's last step, resuming it if it exists; returns that step.

    A finished run is left unchanged. On SIGTERM, and on the first Ctrl-C, the workers save a
    checkpoint and exit, and this function raises SystemExit with status 143, or 130.

    Args:
        address: of the Ray cluster; None as in `ray_session.connected`.
        validate: evaluates a checkpoint every `train.validate_every` steps while training runs.
        samples: draws a grid every `train.sample_every` steps while training runs.
        wait: whether to wait for another command that trains the run.
        local: train in this process, without Ray, evaluations and samples.

    Raises:
        UserError: bad input, or another command trains the run; nothing was written.
        DiffitError: training failed more often than `scaling.max_failures` allows.
    """
    if run.finished_step is not None:
        return run.finished_step
    recipe, stop = run.recipe, Stop()
    manifest = _check(run)
    with run.acquire(wait, stop.set) as lease:
        done = run.refresh().finished_step  # by the command that was waited for
        if done is not None:
            return done
        run.remove_unfinished()
        with contextlib.nullcontext() if local else ray_session.connected(address):
            if not local:
                needs = recipe.scaling.needs("train")
                ray_session.require(*needs, "training", recipe.scaling.node_wait_timeout_s)
            metadata = run.check() or run.new_metadata(manifest.samples_digest)
            # Before anything is written: a new run is refused without MLflow.
            mlflow_run_id = _mlflow_run(run, metadata, manifest)
            if run.metadata is None:
                run.create(metadata)
            run.record_latents(manifest.samples_digest)
            run.record_steps()
            with _mlflow_status(recipe, mlflow_run_id), _on_signals(stop):
                _say_start(run, local)
                if local:
                    train_locally(run, lease, mlflow_run_id, stop)
                else:
                    _train_under_ray(run, lease, mlflow_run_id, validate, samples, stop)
                return _reached_step(run, stop)


def _check(run: Run) -> Manifest:
    """Refuse what cannot be trained before anything is written; the manifest of the latents."""
    recipe = run.recipe
    newest = run.checkpoints.latest
    with contextlib.suppress(DamagedCheckpoint):  # the one before it is used
        if newest is not None and "raw" not in newest.weights:
            raise UserError(
                f"the weights of {run.url} were imported without optimizer state, so training "
                "cannot resume from them; they can be sampled and evaluated; to train, choose "
                "another --run"
            )
    manifest = load_manifest(latents_url(recipe))
    require_recipe(recipe, manifest.recipe_hash)
    # No larger batch than the data, no more workers than streams.
    SampleOrder.of(recipe, manifest).rank_streams(0, recipe.scaling.max_workers)
    if run.check() is not None:
        run.check_latents(manifest.samples_digest)
        check_run_files(run)
    if newest is None:
        _check_start(run)
    tracking_uri(recipe)
    storage.require_writable(recipe.storage.root)
    _kernel(recipe)
    if isinstance(recipe.model, CustomModel):
        with torch.device("meta"):
            build_model(recipe)
    load_objective(recipe.diffusion)
    return manifest


def _kernel(recipe: Recipe) -> str:
    """The workers' attention kernel; a UserError if their device does not support it."""
    device = torch.device("cuda" if recipe.scaling.gpus_per_worker else "cpu")
    return kernel_name(recipe.model.attention, device)


def _check_start(run: Run) -> None:
    """Refuse to start from a checkpoint that is missing or has changed."""
    start = run.recipe.train.start
    if start is None:
        return
    source = Run(run.root, start.run)
    if (
        start.step not in source.checkpoints
        or source.checkpoints[start.step].digest != start.digest
    ):
        raise UserError(
            f"train.start is step {start.step} of run {start.run!r}, but that checkpoint in "
            f"{storage.display_path(source.url)} has been removed or replaced; pass --init-from "
            "again"
        )
    with torch.device("meta"):
        model = build_model(run.recipe)
    parameters = source.checkpoints[start.step].index.parameters
    shapes = {name: torch.Size(p.shape) for name, p in parameters.items()}
    check_transfer(model, shapes, f"{start.run}@{start.step}")


def _say_start(run: Run, local: bool) -> None:
    train, workers = run.recipe.train, run.recipe.scaling.workers  # a number or a range
    what = "in this process" if local else f"with {workers} worker{'' if workers == 1 else 's'}"
    say(
        f"Training {what}, from step {run.checkpoints.latest_step:,} of {train.steps:,}, "
        f"attention kernel {_kernel(run.recipe)}"
    )
    if local and (train.validate_every or train.sample_every):
        say("Without Ray, checkpoints are neither evaluated nor sampled during training")


@contextlib.contextmanager
def _mlflow_status(recipe: Recipe, mlflow_run_id: str) -> Iterator[None]:
    """Give the MLflow run the final status of training."""
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        try:
            Tracker.of(recipe).finish(mlflow_run_id, status)
        except unreachable_errors() as error:
            say(f"Could not mark the MLflow run {status}: {first_line(error)}")


def _tags(recipe: Recipe, metadata: RunMetadata, manifest: Manifest) -> dict[str, str]:
    """What the run is found by in MLflow, and where it comes from."""
    tags = {
        "diffit.recipe_hash": metadata.recipe_hash,
        "diffit.dataset_digest": manifest.digest,
        TAG_STEPS: str(recipe.train.steps),
        "mlflow.source.name": "diffit train",
    }
    start = recipe.train.start
    for name, value in (
        ("mlflow.source.git.commit", git_commit()),
        ("diffit.submission_id", os.environ.get("DIFFIT_SUBMISSION_ID")),
        ("diffit.deterministic", "true" if recipe.train.deterministic else None),
        ("diffit.started_from", start and f"{start.run}@{start.step} {start.weights}"),
    ):
        if value:
            tags[name] = value
    return tags


def _mlflow_run(run: Run, metadata: RunMetadata, manifest: Manifest) -> str:
    """The run's id in MLflow. A resumed run reads it from its checkpoint if MLflow is down.

    Raises:
        UserError: MLflow is unreachable and the run is new.
    """
    recipe = run.recipe
    try:
        tracker = Tracker.of(recipe)
        run_id = tracker.training_run(
            recipe.tracking.experiment,
            metadata.uuid,
            run.name,
            recipe.flat(),
            _tags(recipe, metadata, manifest),
        )
        tracker.log_dataset(run_id, recipe.data.name, manifest.digest, recipe.data.source)
    except unreachable_errors() as error:
        if not run.checkpoints:
            kind = UserError if isinstance(error, UserError) else DiffitError
            raise kind(f"a new run needs MLflow: {first_line(error)}") from error
        say(f"Continuing without MLflow: {first_line(error)}")
        return run.mlflow_run_id
    say(f"Curves: {tracker.curves_link(run_id)}")
    try:
        tracker.log_text(run_id, stored_text(recipe), "recipe.yaml")
    except unreachable_errors() as error:  # the server may be there without its artifacts
        say(f"Could not store the recipe in MLflow: {first_line(error)}")
    return run_id


def _reached_step(run: Run, stop: Stop) -> int:
    """The step that training has reached.

    Raises:
        SystemExit: SIGTERM (status 143) or Ctrl-C (130) stopped it.
    """
    step, train = run.refresh().checkpoints.latest_step, run.recipe.train
    if step < train.steps:
        if stop.is_set():
            say(f"Stopped at step {step:,}; rerun the same command to resume from there")
            raise Interrupted(INTERRUPTED) if stop.by_ctrl_c else SystemExit(STOPPED)
        raise DiffitError(f"training of {run.name!r} stopped at step {step} of {train.steps}")
    say(f"Trained {step:,} steps of {train.batch_size} images")
    return step


def _train_under_ray(
    run: Run,
    lease: Lease,
    mlflow_run_id: str,
    validate: Validate | None,
    samples: Samples | None,
    stop: Stop,
) -> None:
    recipe, training = run.recipe, RayTraining(run, lease, mlflow_run_id, stop)
    on_cpu, every = not recipe.scaling.gpus_per_worker, recipe.train.validate_every
    with contextlib.ExitStack() as stack:
        if samples is not None and recipe.train.sample_every is not None:
            draw = functools.partial(draw_and_log, samples, mlflow_run_id)
            thread = CheckpointThread(run, samples.due, draw, "draw samples of", stop, on_cpu)
            stack.enter_context(thread)
        if validate is not None and every:
            first = max(run.checkpoints.latest_step, 1)
            training.set_validated(first - 1)

            def due(steps: Iterable[int]) -> list[int]:
                return [step for step in steps if step >= first and step % every == 0]

            def evaluate(step: int) -> None:
                try:
                    say(validate(step))
                finally:
                    training.set_validated(step)

            stack.enter_context(CheckpointThread(run, due, evaluate, "evaluate", stop, on_cpu))
        training.run_to_end()


def draw_and_log(samples: Samples, mlflow_run_id: str, step: int) -> None:
    """Draw the grid of a checkpoint and log it."""
    samples.draw(step)
    try:
        samples.send(mlflow_run_id)
    except unreachable_errors() as error:
        say(f"Could not log samples to MLflow; they are kept: {first_line(error)}")


@contextlib.contextmanager
def _on_signals(stop: Stop) -> Iterator[None]:
    """Request a stop on SIGTERM and on the first Ctrl-C while the block runs.

    The second Ctrl-C raises KeyboardInterrupt. Only the main thread can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupted(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.by_ctrl_c = True
        stop.set()

    terminated = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    broken = signal.getsignal(signal.SIGINT)
    if broken is not signal.SIG_IGN:  # as in a background job of a shell
        signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, terminated)
        signal.signal(signal.SIGINT, broken)
