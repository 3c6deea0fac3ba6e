"""Section `scaling`: the cluster resources that each command uses."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from diffit_train.config.base import NonNegative, Positive, PositiveInt, Section

ClusterStage = Literal["encode", "train", "evaluate"]


class Scaling(Section):
    """The cluster resources that each command uses. They never change a result."""

    workers: PositiveInt | Annotated[str, Field(pattern=r"^[1-9]\d*\.\.[1-9]\d*$")] = 1
    """training workers; 2..8: elastic, as many as fit from 2 to 8"""
    cpus_per_worker: PositiveInt = 1
    """CPU cores per training worker"""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    """GPUs per training worker; 0: train on the CPU"""
    encode_actors: PositiveInt = 1
    """maximum number of encoding actors; one starts, and more when images queue up"""
    encode_threads: PositiveInt = 1
    """CPU threads per encoding actor without a GPU"""
    evaluate_actors: PositiveInt = 1
    """evaluation actors"""
    evaluate_batches: PositiveInt = 1
    """batches that an evaluation actor generates per committed chunk"""
    gpus_per_actor: NonNegative = 0.0
    """GPUs per encoding or evaluation actor, may be a fraction; 0: use the CPU"""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """restarts after failures of training workers without a new checkpoint in between, announced
    preemptions not counted; -1: unlimited"""
    resize_check_s: Positive = 60.0
    """seconds between checks whether an elastic run can grow"""
    node_wait_timeout_s: NonNegative = 0.0
    """seconds to wait for an autoscaling cluster to provide the CPUs and GPUs that a command needs;
    0: fail at once. Training that has lost a node waits at least 300"""
    stall_timeout_s: Positive = 300.0
    """seconds without progress after which a training worker stores its stack traces and exits, and
    all workers restart; before the first step 4 times as long"""
    shard_cache_gib: NonNegative | None = None
    """disk space per node for caching remote latent shards, in GiB; null: as much as they need,
    while a fifth of the disk stays free; 0: no cache"""
    shard_cache_folder: str = ""
    """folder of the shard cache; empty: the node's temporary folder"""

    @property
    def min_workers(self) -> int:
        """Minimum number of training workers; with fewer, a run waits."""
        return self.workers if isinstance(self.workers, int) else int(self.workers.split("..")[0])

    @property
    def max_workers(self) -> int:
        """Maximum number of training workers."""
        return self.workers if isinstance(self.workers, int) else int(self.workers.split("..")[1])

    @property
    def uses_gpus(self) -> bool:
        """Whether any stage uses GPUs."""
        return self.gpus_per_worker > 0 or self.gpus_per_actor > 0

    def needs(self, stage: ClusterStage) -> tuple[float, float]:
        """CPUs and GPUs that a cluster must have before a stage begins."""
        workers, actors = self.min_workers, self.evaluate_actors
        return {
            "encode": (1.0, self.gpus_per_actor),
            "train": (
                float(workers * self.cpus_per_worker),
                float(workers * self.gpus_per_worker),
            ),
            "evaluate": (float(actors), actors * self.gpus_per_actor),
        }[stage]

    @model_validator(mode="after")
    def _range_ascends(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"scaling.workers is {self.workers!r}, but the first number must not exceed the "
                "second"
            )
        return self
