"""Ray Train set up for a run: its trainer and its settings.

Ray Train's own checkpoints and resumption are not used: it would resume an old name with another
recipe, and its snapshot may be truncated. Workers that start, for whatever reason, resume from the
newest committed checkpoint of the run; Ray gets a fresh name each time.
"""

from __future__ import annotations

import contextlib
import math
import os
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from diffit_train import ray_session, storage
from diffit_train.config import Recipe
from diffit_train.training.stall import SLOW_FACTOR
from diffit_train.training.supervisor import PLACEMENT_S, Supervisor
from diffit_train.training.worker import NodeNetwork, Validate, ValidationTask, train_worker

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


def new_trainer(
    recipe: Recipe,
    worker_config: dict[str, Any],
    scratch: str,
    validate: Validate | None,
    supervisor: Supervisor,
) -> TorchTrainer:
    """Ray Train's trainer of a recipe.

    Args:
        worker_config: what each worker gets.
        scratch: URL for Ray Train's own state.
        supervisor: counts failures and limits waiting, in place of Ray Train.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, ValidationConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )

    class Trainer(TorchTrainer):  # type: ignore[misc]
        """Leaves Ctrl-C to us, and does not wait for an actor that cannot answer."""

        def _register_sigint_handler(self, controller: Any) -> None:
            pass  # Ray Train would abort without saving

        def _create_default_callbacks(self) -> list[Any]:
            # An actor for Ray Data, which is not used here, takes a second of two CPUs to start.
            # The other one frees the workers' resources if the controller dies, as Ray does at the
            # end of this command. Without the state API, as here, it delays the end by 12 s.
            unwanted = (DatasetsCallback, PlacementGroupCleanerCallback)
            callbacks: list[Any] = super()._create_default_callbacks()
            return [callback for callback in callbacks if not isinstance(callback, unwanted)]

    scaling = recipe.scaling
    resources = {"CPU": float(scaling.cpus_per_worker)}
    if scaling.gpus_per_worker:
        resources["GPU"] = float(scaling.gpus_per_worker)
    environment = {} if scaling.gpus_per_worker else {"env_vars": ray_session.KEEP_FREED_MEMORY}
    fewest, most = scaling.min_workers, scaling.max_workers
    validation = None
    if validate is not None and recipe.train.validate_every:
        # The task only waits for the evaluation's actors, which reserve their own resources.
        validation = ValidationConfig(
            ValidationTask(worker_config["status"], validate),
            ray_remote_kwargs={"num_cpus": 0, "max_retries": 0},
        )
    return Trainer(
        train_worker,
        torch_config=NodeNetwork(
            status=worker_config["status"],
            timeout_s=math.ceil(SLOW_FACTOR * scaling.stall_timeout_s),
        ),
        validation_config=validation,
        train_loop_config=worker_config,
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            elastic_resize_monitor_interval_s=scaling.resize_check_s,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"attempt-{uuid.uuid4().hex[:12]}",
            worker_runtime_env=environment,
            failure_config=FailureConfig(
                max_failures=-1,
                max_preemption_failures=scaling.max_preemptions,
                controller_failure_limit=-1,
            ),
            callbacks=[supervisor],
            **_ray_storage(scratch),
        ),
    )


def _ray_storage(url: str) -> dict[str, Any]:
    """RunConfig arguments for where Ray Train keeps its own state."""
    if storage.is_local(url):
        return {"storage_path": str(storage.local_path(url).absolute())}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = storage.filesystem(url)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Set Ray Train's variables during the block; those that are set already stay."""
    # The end of training is noticed sooner than by Ray Train's own two seconds.
    values = {"WORKER_GROUP_START_TIMEOUT_S": f"{PLACEMENT_S:g}", "HEALTH_CHECK_INTERVAL_S": "0.5"}
    variables = {f"RAY_TRAIN_{name}": value for name, value in values.items()}
    variables = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
