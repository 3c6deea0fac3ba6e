"""`diffit train`: Ray Train starts the workers, restarts them, and this process shows progress.

Ray Train's own checkpoints and resumption are not used: it would resume an old name with another
recipe, and its snapshot may be left truncated. Workers that start, for whatever reason, go on
from the newest committed checkpoint of the run; Ray gets a fresh name each time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Iterator
from typing import Any, Literal

import ray
import torch

from diffit_train import cluster, storage
from diffit_train.checkpoints import committed_steps, read_index
from diffit_train.config import Recipe
from diffit_train.data.shards import Manifest, latents_url, load_manifest, require_recipe
from diffit_train.errors import DiffitError, UserError
from diffit_train.models.attention import kernel_name
from diffit_train.progress import Progress, say
from diffit_train.tracking import Tracker, git_commit, tracking_uri
from diffit_train.training.run import (
    RunIdentity,
    check_recipe,
    create_identity,
    finished_step,
    run_url,
)

POLL_S = 0.5


def train(recipe: Recipe, run: str, address: str | None = None) -> int:
    """Train a run to its last step, from wherever it stands; returns that step.

    Args:
        address: of the Ray cluster; None as in `cluster.connected`.

    Rerunning continues; a finished run is left alone.

    Raises:
        UserError: bad input; nothing was written.
        DiffitError: training failed more often than `scaling.max_failures` allows.
    """
    done = finished_step(recipe, run)
    if done is not None:
        return done
    _check_resumable(run_url(recipe, run))
    manifest = _check_latents(recipe)
    tracking_uri(recipe)
    _kernel(recipe)
    scaling = recipe.scaling
    cpus, gpus = scaling.cpus_per_worker, scaling.gpus_per_worker
    with cluster.connected(address):
        cluster.require(scaling.workers * cpus, scaling.workers * gpus, "training")
        identity = check_recipe(recipe, run) or create_identity(recipe, run)
        return _tracked_fit(recipe, identity, manifest)


def _kernel(recipe: Recipe) -> str:
    """The attention kernel of the workers; a UserError where their device has it not."""
    device = torch.device("cuda" if recipe.scaling.gpus_per_worker else "cpu")
    return kernel_name(recipe.model.attention, device)


def _check_resumable(url: str) -> None:
    """Refuse a run of imported weights: they came without the state of an optimizer."""
    steps = committed_steps(url)
    if steps and "master" not in read_index(url, steps[-1]).kinds:
        raise UserError(
            f"the weights of {url} were imported and have no optimizer state to go on from; they "
            "can be sampled and evaluated; to train, choose another --run"
        )


def _tracked_fit(recipe: Recipe, identity: RunIdentity, manifest: Manifest) -> int:
    """Train, with an MLflow run that ends as training did."""
    tracker = Tracker.of(recipe)
    tags = {
        "diffit.recipe_hash": identity.recipe_hash,
        "diffit.dataset_digest": manifest.digest,
        "mlflow.source.name": "diffit train",
    }
    for name, value in (
        ("mlflow.source.git.commit", git_commit()),
        ("diffit.submission_id", os.environ.get("DIFFIT_SUBMISSION_ID")),
    ):
        if value:
            tags[name] = value
    mlflow_run_id = tracker.training_run(
        recipe.tracking.experiment, identity.uuid, identity.name, recipe.flat(), tags
    )
    tracker.log_dataset(mlflow_run_id, recipe.data.name, manifest.digest, recipe.data.source)
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        step = _fit(recipe, identity.name, mlflow_run_id)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(mlflow_run_id, status)
    return step


def _check_latents(recipe: Recipe) -> Manifest:
    """The latents, if they are those of the recipe."""
    manifest = load_manifest(latents_url(recipe))
    require_recipe(recipe, manifest.recipe_hash)
    return manifest


@ray.remote(num_cpus=0)
class Board:
    """Where rank 0 writes its newest record, and the driver reads it."""

    def __init__(self) -> None:
        self.record: dict[str, Any] = {}

    def put(self, record: dict[str, Any]) -> None:
        """Replace the record."""
        self.record = record

    def get(self) -> dict[str, Any]:
        """The newest record."""
        return self.record


def _worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train
    import ray.train.torch

    from diffit_train.training.loop import Trainer

    recipe, board = Recipe.model_validate(config["recipe"]), config["board"]
    rank = ray.train.get_context().get_world_rank()

    def report(record: dict[str, Any]) -> None:
        if rank == 0:
            board.put.remote(record)

    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(recipe.scaling.cpus_per_worker)
    trainer = Trainer(recipe, config["run"], config["mlflow_run_id"], device, report)
    step = trainer.run()
    ray.train.report({"step": step})


def _fit(recipe: Recipe, run: str, mlflow_run_id: str) -> int:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    scaling = recipe.scaling
    board = Board.remote()  # type: ignore[attr-defined]
    url = run_url(recipe, run)
    scratch = storage.join(url, "ray")
    storage.remove(scratch)
    resources = {"CPU": float(scaling.cpus_per_worker)}
    if scaling.gpus_per_worker:
        resources["GPU"] = float(scaling.gpus_per_worker)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "run": run,
            "mlflow_run_id": mlflow_run_id,
            "board": board,
        },
        scaling_config=ScalingConfig(
            num_workers=scaling.workers,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"attempt-{uuid.uuid4().hex[:12]}",
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            **_ray_storage(scratch),
        ),
    )
    try:
        with _progress(recipe, board, max(committed_steps(url), default=0)):
            trainer.fit()
    except SystemExit as error:  # Ray Train's answer to Ctrl-C, with status 0
        raise KeyboardInterrupt from error
    except TrainingFailedError as error:
        raise DiffitError(f"training of {run!r} failed: {_cause(error)}") from error
    finally:
        ray.kill(board)
    storage.remove(scratch)
    step = max(committed_steps(url), default=0)
    if step < recipe.train.steps:
        raise DiffitError(f"training of {run!r} ended at step {step} of {recipe.train.steps}")
    return step


def _ray_storage(url: str) -> dict[str, Any]:
    """Where Ray Train keeps its own state, as RunConfig wants it."""
    if storage.is_local(url):
        return {"storage_path": str(storage.local_path(url).absolute())}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = storage.filesystem(url)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


def _cause(error: BaseException) -> str:
    """The last line of the innermost failure, which is what went wrong."""
    failures = getattr(error, "worker_failures", None) or {}
    texts = [str(failure) for failure in failures.values()] or [str(error)]
    lines = [line for line in texts[0].strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


@contextlib.contextmanager
def _progress(recipe: Recipe, board: Any, start: int) -> Iterator[None]:
    """Show the board's record while the block runs."""
    stop = threading.Event()
    batch, steps = recipe.train.batch_size, recipe.train.steps
    say(
        f"starting {recipe.scaling.workers} training workers at step {start:,} of {steps:,}, "
        f"attention kernel {_kernel(recipe)}"
    )

    def watch() -> None:
        with Progress("train", steps, "steps", done=start) as progress:
            begun = False
            while not stop.wait(POLL_S):
                record = ray.get(board.get.remote())
                if record and not begun:
                    begun = True
                    progress.restart_clock()
                if "loss" in record:
                    detail = f"loss {record['loss']:.4f}  {record['images_per_s']:,.0f} pictures/s"
                    progress.update(record["step"], detail)

    thread = threading.Thread(target=watch, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    say(f"trained {steps:,} steps of {batch} pictures")
