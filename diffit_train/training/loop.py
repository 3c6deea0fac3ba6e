"""The training loop of one rank: a function of recipe and seed, not of ranks or restarts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffit_train.checkpoints import State, committed_steps, read_weights
from diffit_train.config import Recipe
from diffit_train.data.autoencoder import scaled_sample
from diffit_train.data.loader import Batch, LatentLoader, SampleOrder, draw
from diffit_train.data.shards import Manifest, latents_url, load_manifest
from diffit_train.diffusion.objective import build_objective
from diffit_train.errors import DiffitError
from diffit_train.models.build import build_model
from diffit_train.models.runtime import checkpoint_activations, compile_blocks, use_kernel
from diffit_train.tracking import Tracker
from diffit_train.training.checkpoint import load_checkpoint, remove_old, save_checkpoint
from diffit_train.training.engine import Engine, learning_rate
from diffit_train.training.run import TrainingLog, run_url
from diffit_train.training.telemetry import (
    LossMeter,
    SpeedMeter,
    matmul_flops_per_s,
    training_flops_per_image,
)

Report = Callable[[dict[str, Any]], None]

# Names under which a record's fields go to MLflow.
_METRICS = {
    **{name: f"train/{name}" for name in ("loss", "grad_norm", "lr")},
    **{f"loss_q{q}": f"train/loss_q{q}" for q in range(4)},
    **{name: f"perf/{name}" for name in ("images_per_s", "step_s", "data_wait_fraction", "mfu")},
}


@dataclass(frozen=True)
class Drawn:
    """A rank's part of a batch with all its randomness: what a step is a function of."""

    x0: Tensor  # (n, C, h, w), scaled latents
    t: Tensor  # (n,)
    noise: Tensor  # as x0
    y: Tensor  # (n,), null where dropped


class Trainer:
    """One rank's training, from the newest committed checkpoint to the recipe's last step.

    torch.distributed must be initialised.

    Args:
        recipe: the run's recipe.
        run: the run's name.
        mlflow_run_id: the run that rank 0 logs to.
        device: where the model runs.
        report: called on rank 0 with each record of the log, for the progress line.
    """

    def __init__(
        self, recipe: Recipe, run: str, mlflow_run_id: str, device: torch.device, report: Report
    ) -> None:
        self.recipe, self.device, self.report = recipe, device, report
        self.mlflow_run_id = mlflow_run_id
        self.url = run_url(recipe, run)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.objective = build_objective(recipe.diffusion)
        self.latents_url = latents_url(recipe)
        self.manifest: Manifest = load_manifest(self.latents_url)
        self._start_engine()
        self.losses = LossMeter(self.objective.timesteps, device)
        self.log = TrainingLog(self.url, self.step)
        self._start_tracking()

    def _start_engine(self) -> None:
        """Model, engine and position: of the newest checkpoint, or new ones."""
        train = self.recipe.train
        # Rank 0 looks once, so that all ranks resume from the same checkpoint.
        newest: list[int | None] = [max(committed_steps(self.url), default=None)]
        dist.broadcast_object_list(newest)
        torch.manual_seed(train.seed)
        model = build_model(self.recipe)
        peak_size = 512 if self.device.type == "cpu" else 8192
        dtype = torch.float32 if train.precision == "fp32" else torch.bfloat16
        peak = matmul_flops_per_s(self.device, dtype, peak_size) * self.world
        flops = training_flops_per_image(
            model, self.recipe.autoencoder.latent_channels, self.recipe.latent_size
        )
        self.speed = SpeedMeter(train.batch_size, flops, peak)
        if newest[0] is not None:
            weights = read_weights(self.url, newest[0], "raw")
            model.load_state_dict(weights, strict=False)
        model.to(self.device)
        use_kernel(model, self.recipe.model.attention, self.device)
        checkpoint_activations(
            model, train.activation_checkpointing, train.checkpoint_every_nth_block
        )
        if train.compile:
            compile_blocks(model)
        self.engine = Engine(model, train, self.world, self.device)
        self.step = 0
        if newest[0] is None:
            self._save()
        else:
            self.step = load_checkpoint(self.engine, self.url, newest[0]).step

    def _start_tracking(self) -> None:
        self.tracker: Tracker | None = None
        if self.rank == 0:
            self.tracker = Tracker.of(self.recipe)
            # A restarted run repeats steps behind its checkpoint; their points are there already.
            self.tracked_step = self.tracker.last_step(self.mlflow_run_id, "train/loss")

    def run(self) -> int:
        """Train to the last step and return it; checkpoints and log are committed then."""
        train = self.recipe.train
        order = SampleOrder(
            [entry.count for entry in self.manifest.shards],
            train.batch_size,
            self.recipe.data.lanes,
            self.recipe.data.shuffle_window,
            train.seed,
        )
        if self.step >= train.steps:
            return self.step
        with LatentLoader(
            self.latents_url, self.manifest, order, self.rank, self.world, self.step
        ) as loader:
            self.report({"step": self.step})
            self.speed.restart(loader.wait_s)
            for batch in loader:
                self._train_step(batch)
                self.step += 1
                if self.step % train.log_every == 0 or self.step == train.steps:
                    self._record(loader)
                if self.step % train.checkpoint_every == 0 or self.step == train.steps:
                    self._save()
                    self.speed.restart(loader.wait_s)
                if self.step == train.steps:
                    break
        return self.step

    def _train_step(self, batch: Batch) -> None:
        drawn = self._draw(batch)
        loss = self._loss(drawn)
        self.losses.add(loss, drawn.t)
        self.engine.step(loss.mean(), self.step)

    def _draw(self, batch: Batch) -> Drawn:
        """Timesteps, noise, posterior samples, flips and dropped labels, lane by lane."""
        count = len(batch.labels) // len(batch.lanes)
        frames = self.manifest.frames
        shape = (self.manifest.channels, self.manifest.height, self.manifest.width)
        seed, dropout = self.recipe.train.seed, self.recipe.train.label_dropout
        timesteps = self.objective.draw_timesteps
        lanes = [
            draw(seed, batch.step, lane, count, shape, frames, timesteps, dropout)
            for lane in batch.lanes
        ]

        def joined(name: str) -> Tensor:
            return torch.cat([torch.from_numpy(getattr(lane, name)) for lane in lanes])

        moments = torch.from_numpy(batch.moments)[torch.arange(len(batch.labels)), joined("flip")]
        x0 = scaled_sample(moments, joined("posterior"), self.manifest.scale)
        labels = torch.from_numpy(batch.labels)
        y = torch.where(joined("drop"), self.recipe.data.num_classes, labels)
        return Drawn(*(v.to(self.device) for v in (x0, joined("t"), joined("noise"), y)))

    def _loss(self, drawn: Drawn) -> Tensor:
        noisy = self.objective.noisy(drawn.x0, drawn.t, drawn.noise)
        output = self.engine.forward(noisy, drawn.t, drawn.y)
        return self.objective.loss(output, drawn.x0, drawn.t, drawn.noise)

    def _record(self, loader: LatentLoader) -> None:
        """A record of the interval that ends at this step, to log, MLflow and progress line."""
        every = self.recipe.train.log_every
        steps = self.step % every or every
        values = self.losses.reduce()
        if not math.isfinite(values["loss"]):
            raise DiffitError(
                f"the loss was {values['loss']} between steps {self.step - steps} and {self.step}; "
                "lower train.lr or set train.grad_clip"
            )
        norm = self.engine.grad_norm()
        values |= {"grad_norm": norm, "lr": learning_rate(self.recipe.train, self.step - 1)}
        values |= self.speed.measure(steps, loader.wait_s)
        self.speed.restart(loader.wait_s)
        if self.tracker is None:
            return
        self.log.append({"step": self.step, **values})
        if self.step > self.tracked_step:
            metrics = {_METRICS[key]: value for key, value in values.items()}
            self.tracker.log_metrics(self.mlflow_run_id, metrics, self.step)
        self.report({"step": self.step, **values})

    def _save(self) -> None:
        """Log first, then the checkpoint that vouches for it, then what retention removes."""
        if self.rank == 0 and self.step > 0:
            self.log.write()
        state = State(
            step=self.step,
            images_seen=self.step * self.recipe.train.batch_size,
            optimizer_steps=self.engine.optimizer_steps(),
            recipe_hash=self.recipe.train_hash(),
            mlflow_run_id=self.mlflow_run_id,
            world_size=self.world,
            zero_stage=self.recipe.train.zero_stage,
        )
        save_checkpoint(self.engine, self.url, state)
        if self.rank == 0:
            remove_old(self.url, self.recipe.train.keep_checkpoints)
