"""`diffit train`: Ray Train starts and restarts the workers; this process shows progress."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffit_train import ray_session, storage
from diffit_train.background import background_thread
from diffit_train.config import Recipe, stored_text
from diffit_train.data.loader import SampleOrder
from diffit_train.data.shards import Manifest, latents_url, load_manifest, require_recipe
from diffit_train.diffusion.objective import load_objective
from diffit_train.errors import DiffitError, Interrupted, UserError
from diffit_train.models.attention_kernels import kernel_name
from diffit_train.models.build import build_model
from diffit_train.models.transfer import check_transfer
from diffit_train.progress import Progress, say
from diffit_train.redaction import first_line
from diffit_train.runs import lease
from diffit_train.runs.checkpoints import (
    checkpoint_digest,
    committed_steps,
    read_index,
    read_state,
    remove_unfinished,
)
from diffit_train.runs.identity import (
    RunMetadata,
    check_latents,
    check_recipe,
    finished_step,
    new_metadata,
    record_latents,
    record_steps,
    run_url,
    store_run,
)
from diffit_train.runs.live import LiveWriter, live_until_end
from diffit_train.tracking import (
    TAG_STEPS,
    Tracker,
    git_commit,
    tracking_uri,
    unreachable_errors,
)
from diffit_train.training import ray_train
from diffit_train.training.log import check_run_files
from diffit_train.training.samples import Samples, SampleThread
from diffit_train.training.status import TrainingStatus
from diffit_train.training.supervisor import Supervisor, cause_of
from diffit_train.training.worker import POLL_S, Validate

# 128 + SIGTERM or SIGINT, the shell's status for a process ended by it.
STOPPED, INTERRUPTED = 143, 130


def train(
    recipe: Recipe,
    run: str,
    address: str | None = None,
    validate: Validate | None = None,
    *,
    samples: Samples | None = None,
    wait: bool = False,
) -> int:
    """Train a run to its last step, resuming it if it exists; returns that step.

    A finished run is left unchanged. On SIGTERM, and on the first Ctrl-C, the workers save a
    checkpoint and exit, and this function raises SystemExit with status 143, or 130.

    Args:
        address: of the Ray cluster; None as in `ray_session.connected`.
        validate: evaluates a checkpoint every `train.validate_every` steps while training runs.
        samples: draws a grid every `train.sample_every` steps while training runs.
        wait: whether to wait for another command that trains the run.

    Raises:
        UserError: bad input, or another command trains the run; nothing was written.
        DiffitError: training failed more often than `scaling.max_failures` allows.
    """
    done = finished_step(recipe, run)
    if done is not None:
        return done
    _check_resumable(run_url(recipe, run))
    manifest = _check_latents(recipe)
    _check_order(recipe, manifest)
    if known := check_recipe(recipe, run):
        check_latents(run_url(recipe, run), known, manifest)
        check_run_files(run_url(recipe, run))
    if not committed_steps(run_url(recipe, run)):
        _check_start(recipe)
    tracking_uri(recipe)
    storage.require_writable(recipe.storage.root)
    _kernel(recipe)
    _require_own_classes(recipe)
    stop = Stop()
    with lease.held(run_url(recipe, run), wait, say, stop.set) as held:
        done = finished_step(recipe, run)  # by the command that was waited for
        if done is not None:
            return done
        remove_unfinished(run_url(recipe, run))
        with ray_session.connected(address):
            ray_session.require(*recipe.scaling.needs("train"), "training", recipe.scaling.wait_s)
            known = check_recipe(recipe, run)
            identity = known or new_metadata(recipe, run, manifest.samples_digest)
            # Before anything is written: a new run is refused without MLflow.
            mlflow_run_id = _mlflow_run(recipe, identity, manifest)
            if known is None:
                store_run(recipe, identity)
            identity = record_latents(run_url(recipe, run), identity, manifest)
            record_steps(recipe, run)
            return _tracked_fit(recipe, run, mlflow_run_id, validate, samples, held, stop)


def _kernel(recipe: Recipe) -> str:
    """The workers' attention kernel; a UserError if their device does not support it."""
    device = torch.device("cuda" if recipe.scaling.gpus_per_worker else "cpu")
    return kernel_name(recipe.model.attention, device)


def _require_own_classes(recipe: Recipe) -> None:
    """Refuse a network or objective of another package that cannot be made, before Ray starts."""
    if recipe.model.plugged:
        with torch.device("meta"):
            build_model(recipe)
    load_objective(recipe.diffusion)


def _check_resumable(url: str) -> None:
    """Refuse a run with imported weights: it has no optimizer state."""
    steps = committed_steps(url)
    if steps and "master" not in read_index(url, steps[-1]).kinds:
        raise UserError(
            f"the weights of {url} were imported without optimizer state, so training cannot "
            "resume from them; they can be sampled and evaluated; to train, choose another --run"
        )


def _check_start(recipe: Recipe) -> None:
    """Refuse to start from a checkpoint that is missing or has changed."""
    start = recipe.train.start
    if start is None:
        return
    url = run_url(recipe, start.run)
    if start.step not in committed_steps(url) or checkpoint_digest(url, start.step) != start.digest:
        raise UserError(
            f"train.start is step {start.step} of run {start.run!r}, but that checkpoint in "
            f"{storage.display_path(url)} has been removed or replaced; pass --init-from again"
        )
    with torch.device("meta"):
        model = build_model(recipe)
    index = read_index(url, start.step)
    shapes = {name: torch.Size(p.shape) for name, p in index.parameters.items()}
    check_transfer(model, shapes, f"{start.run}@{start.step}")


def _tracked_fit(
    recipe: Recipe,
    run: str,
    mlflow_run_id: str,
    validate: Validate | None,
    samples: Samples | None,
    held: lease.Lease,
    stop: Stop,
) -> int:
    """Train, and give the MLflow run the final status of training."""
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    url = run_url(recipe, run)
    live = LiveWriter(url, max(committed_steps(url), default=0), recipe.train.steps, say, held)
    try:
        with live_until_end(live):
            step = _run_ray_train(recipe, run, mlflow_run_id, validate, samples, held, stop, live)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        try:
            Tracker.of(recipe).finish(mlflow_run_id, status)
        except unreachable_errors() as error:
            say(f"Could not mark the MLflow run {status}: {first_line(error)}")
    return step


def _tags(recipe: Recipe, identity: RunMetadata, manifest: Manifest) -> dict[str, str]:
    """What the run is found by in MLflow, and where it comes from."""
    tags = {
        "diffit.recipe_hash": identity.recipe_hash,
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


def _mlflow_run(recipe: Recipe, identity: RunMetadata, manifest: Manifest) -> str:
    """The run's id in MLflow. A resumed run reads it from its checkpoint if MLflow is down.

    Raises:
        UserError: MLflow is unreachable and the run is new.
    """
    try:
        tracker = Tracker.of(recipe)
        run_id = tracker.training_run(
            recipe.tracking.experiment,
            identity.uuid,
            identity.name,
            recipe.flat(),
            _tags(recipe, identity, manifest),
        )
        tracker.log_dataset(run_id, recipe.data.name, manifest.digest, recipe.data.source)
    except unreachable_errors() as error:
        url = run_url(recipe, identity.name)
        steps = committed_steps(url)
        if not steps:
            kind = UserError if isinstance(error, UserError) else DiffitError
            raise kind(f"a new run needs MLflow: {first_line(error)}") from error
        say(f"Continuing without MLflow: {first_line(error)}")
        return read_state(url, steps[-1]).mlflow_run_id
    say(f"Curves: {tracker.curves_link(run_id)}")
    try:
        tracker.log_text(run_id, stored_text(recipe), "recipe.yaml")
    except unreachable_errors() as error:  # the server may be there without its artifacts
        say(f"Could not store the recipe in MLflow: {first_line(error)}")
    return run_id


def _check_order(recipe: Recipe, manifest: Manifest) -> None:
    """Refuse a batch that is larger than the data, or more workers than streams."""
    SampleOrder.of(recipe, manifest).rank_streams(0, recipe.scaling.max_workers)


def _check_latents(recipe: Recipe) -> Manifest:
    """The manifest of the latents, checked against the recipe."""
    manifest = load_manifest(latents_url(recipe))
    require_recipe(recipe, manifest.recipe_hash)
    return manifest


def _run_ray_train(
    recipe: Recipe,
    run: str,
    mlflow_run_id: str,
    validate: Validate | None,
    samples: Samples | None,
    held: lease.Lease,
    stop: Stop,
    live: LiveWriter,
) -> int:
    """Train by Ray Train to the end or until told to stop; returns the step reached.

    Raises:
        DiffitError: training failed more often than allowed.
        SystemExit: SIGTERM told it to stop (status 143), or Ctrl-C (130).
        KeyboardInterrupt: a second Ctrl-C.
    """
    from ray.train import TrainingFailedError

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    status = TrainingStatus.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    url = run_url(recipe, run)
    scratch = storage.join(url, "ray")
    storage.remove(scratch)
    worker_config = {
        "recipe": recipe.model_dump(mode="json"),
        "run": run,
        "mlflow_run_id": mlflow_run_id,
        "status": status,
        "lease": held,
    }
    supervisor = Supervisor(status, recipe.scaling, max(committed_steps(url), default=0))
    trainer = ray_train.new_trainer(recipe, worker_config, scratch, validate, supervisor)
    saved = "checkpoint saved"
    try:
        start = max(committed_steps(url), default=0)
        with (
            _on_signals(stop),
            _drawing(recipe, samples, url, mlflow_run_id, status, stop),
            _progress(recipe, status, start, stop, live),
            ray_train.settings(),
        ):
            trainer.fit()
            if reason := ray.get(status.why_failed.remote()):
                raise DiffitError(f"training of {run!r} failed: {reason}")
    except TrainingFailedError as error:
        if not stop.is_set():
            reason = ray.get(status.why_failed.remote()) or cause_of(error)
            raise DiffitError(f"training of {run!r} failed: {reason}") from error
        saved = f"newest checkpoint; {cause_of(error)}"
    finally:
        ray.kill(status)
    storage.remove(scratch)
    step = max(committed_steps(url), default=0)
    if step < recipe.train.steps:
        if stop.is_set():
            say(f"Stopped at step {step:,} ({saved}); rerun the same command to resume from there")
            raise Interrupted(INTERRUPTED) if stop.by_ctrl_c else SystemExit(STOPPED)
        raise DiffitError(f"training of {run!r} ended at step {step} of {recipe.train.steps}")
    say(f"Trained {step:,} steps of {recipe.train.batch_size} images")
    return step


def _drawing(
    recipe: Recipe,
    samples: Samples | None,
    url: str,
    mlflow_run_id: str,
    status: Any,
    stop: Stop,
) -> contextlib.AbstractContextManager[object]:
    """What draws grids while training runs, if the recipe wants them."""
    if samples is None or recipe.train.sample_every is None:
        return contextlib.nullcontext()

    def newest() -> int:
        return int(ray.get(status.newest_checkpoint.remote()))

    return SampleThread(
        samples, url, mlflow_run_id, newest, stop, say, on_cpu=not recipe.scaling.gpus_per_worker
    )


class Stop(threading.Event):
    """A request to save and exit."""

    by_ctrl_c = False


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

    ended = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    broken = signal.getsignal(signal.SIGINT)
    if broken is not signal.SIG_IGN:  # as in a background job of a shell
        signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, ended)
        signal.signal(signal.SIGINT, broken)


@contextlib.contextmanager
def _progress(
    recipe: Recipe, status: Any, start: int, stop: Stop, live: LiveWriter
) -> Iterator[None]:
    """Show the status actor's record and lines while the block runs; forward a stop request."""
    steps = recipe.train.steps
    workers = recipe.scaling.workers  # a number or a range
    say(
        f"Starting {workers} training worker{'' if workers == 1 else 's'} at step {start:,} of "
        f"{steps:,}, attention kernel {_kernel(recipe)}"
    )
    seen = 0

    def show(progress: Progress) -> dict[str, Any]:
        nonlocal seen
        record, lines = ray.get(status.read.remote(seen))
        seen += len(lines)
        for line in lines:
            say(line)
        live.update(record, lines)
        if "step" in record:
            detail = ""
            if "loss" in record:
                detail = f"loss {record['loss']:.4f}  {record['images_per_s']:,.0f} images/s"
            progress.update(record["step"], detail)
        return dict(record)

    def watch(ended: threading.Event) -> None:
        with Progress("train", steps, "steps", done=start) as progress:
            begun = stop_sent = False
            begun_s = time.monotonic()
            while not ended.wait(POLL_S):
                if stop.is_set() and not stop_sent:
                    stop_sent = True
                    again = "; Ctrl-C again quits at once" if stop.by_ctrl_c else ""
                    say(f"Stop requested; saving a checkpoint{again}")
                    status.stop.remote()
                if not show(progress):
                    progress.update(start, f"({time.monotonic() - begun_s:.0f} s)")
                elif not begun:
                    begun = True
                    progress.restart_clock()
            show(progress)

    with background_thread("training-progress", watch):
        yield
