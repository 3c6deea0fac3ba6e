"""`diffit train --local`: the Trainer in this process, without Ray, as a debugger wants it."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from diffit_train.errors import DiffitError
from diffit_train.models.precision import tf32
from diffit_train.progress import Progress, loss_and_rate, show_log
from diffit_train.runs.lease import Lease
from diffit_train.runs.run import Run
from diffit_train.training.cluster import Stop


def train_locally(run: Run, lease: Lease, mlflow_run_id: str, stop: Stop) -> None:
    """Train as the only rank, to the end or a stop request.

    Raises:
        DiffitError: training cannot go on.
    """
    # They import DeepSpeed.
    from diffit_train.training.checkpointer import UnrecoverableError
    from diffit_train.training.trainer import Trainer

    train = run.recipe.train
    device = torch.device("cuda" if run.recipe.scaling.gpus_per_worker else "cpu")
    if not dist.is_initialized():  # DeepSpeed keeps the first group as long as the process lives
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
        )
    try:
        with (
            show_log(),
            tf32(train.precision == "tf32"),
            Trainer(run, lease, mlflow_run_id, device) as trainer,
            Progress("train", train.steps, "steps", done=trainer.step) as progress,
        ):
            detail = ""
            for step in trainer:
                detail = loss_and_rate(step.record) or detail
                progress.update(step.step, detail)
                lease.progress.update({"step": step.step, **step.record})
                trainer.requests.stop = stop.is_set()
                if step.stop:
                    trainer.save()
                    break
            trainer.finish()
    except UnrecoverableError as error:
        raise DiffitError(f"training of {run.name!r} failed: {error}") from error
