"""Section `scaling`: how much of the cluster each command takes."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from diffit_train.config.base import Positive, PositiveInt, Section


class Scaling(Section):
    """How much of the cluster each command takes. It never changes a result."""

    workers: PositiveInt | Annotated[str, Field(pattern=r"^[1-9]\d*\.\.[1-9]\d*$")] = Field(
        default=1,
        description="training workers; 2..8 goes on with as many as there are, from 2 to 8",
    )
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    encode_actors: PositiveInt = Field(default=1, description="most autoencoder actors")
    encode_min_actors: PositiveInt = Field(
        default=1, description="autoencoder actors to begin with; more start as images wait"
    )
    encode_threads: PositiveInt = Field(
        default=1, description="processors that each autoencoder actor computes on, without a GPU"
    )
    evaluate_actors: PositiveInt = Field(default=1, description="generating actors")
    evaluate_batches: PositiveInt = Field(
        default=1, description="batches of an evaluation that an actor makes and commits at once"
    )
    gpus_per_actor: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    max_failures: int = Field(
        default=3, ge=-1, description="restarts of the training workers; -1: any number"
    )
    max_preemptions: int = Field(
        default=-1, ge=-1, description="restarts after announced preemptions; -1: any number"
    )
    resize_check_s: Positive = Field(
        default=60.0, description="seconds between looks whether an elastic run may grow"
    )
    shard_cache_gib: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="disk of each node that keeps copies of remote latent shards; 0: none",
    )
    shard_cache_folder: str = Field(
        default="", description="where they are kept; empty: the node's temporary folder"
    )

    @property
    def fewest_workers(self) -> int:
        """Training workers without which a run waits."""
        return self.workers if isinstance(self.workers, int) else int(self.workers.split("..")[0])

    @property
    def most_workers(self) -> int:
        """Training workers that a run takes where it can."""
        return self.workers if isinstance(self.workers, int) else int(self.workers.split("..")[1])

    @model_validator(mode="after")
    def _range_is_one(self) -> Self:
        if self.fewest_workers > self.most_workers:
            raise ValueError(
                f"scaling.workers is {self.workers!r}, but its first number must be the smaller"
            )
        return self
