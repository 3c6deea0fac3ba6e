"""One rank's training loop: depends on recipe and seed, not on world size or restarts."""

from __future__ import annotations

import gc
import math
import time
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data.augment import augment
from diffit_train.data.cache import shard_cache
from diffit_train.data.loader import LatentLoader, SampleOrder
from diffit_train.data.shards import latents_url, load_manifest, read_shard
from diffit_train.diffusion.objective import load_objective
from diffit_train.errors import DiffitError
from diffit_train.models.attention_kernels import enable_determinism, kernel_name
from diffit_train.models.backbone import Backbone
from diffit_train.models.build import build_model
from diffit_train.models.cost import training_flops_per_image
from diffit_train.models.transfer import transfer_weights
from diffit_train.models.wrap import checkpoint_activations, compile_blocks, use_kernel
from diffit_train.runs.checkpoints import SNAPSHOTS, State, prune, read_weights
from diffit_train.runs.identity import run_url
from diffit_train.training.batch import BatchBuilder, TrainingBatch
from diffit_train.training.checkpointer import (
    CheckpointWriter,
    UnrecoverableError,
    agreed_steps,
    load_newest,
)
from diffit_train.training.control import ControlPlane, Decision, TrainerHooks
from diffit_train.training.engine import Engine
from diffit_train.training.guard import BadStepGuard, RollbackRequested, require_lease
from diffit_train.training.recorder import Recorder, StepProfiler
from diffit_train.training.telemetry import SpeedMeter, matmul_flops_per_s


def train_until_done(
    recipe: Recipe, run: str, mlflow_run_id: str, device: torch.device, hooks: TrainerHooks
) -> int:
    """Train from the newest checkpoint, rolling back when needed; returns the step reached.

    That is the recipe's last step, or an earlier one if a stop was requested.
    """
    while True:
        with Trainer(recipe, run, mlflow_run_id, device, hooks) as trainer:
            try:
                return trainer.run()
            except RollbackRequested:
                hooks.say("Rolling back to the last checkpoint")
        del trainer
        gc.collect()


# Between reports of the step alone.
REPORT_S = 1.0


class Trainer:
    """One rank's training, from the newest intact checkpoint to the recipe's last step.

    torch.distributed must be initialized.

    Args:
        recipe: the run's recipe.
        run: the run's name.
        mlflow_run_id: the MLflow run that rank 0 logs to.
        device: where the model runs.
        hooks: callbacks to whoever runs the training.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: str,
        mlflow_run_id: str,
        device: torch.device,
        hooks: TrainerHooks,
    ) -> None:
        if recipe.train.deterministic:
            enable_determinism(kernel_name(recipe.model.attention, device))
        self.recipe, self.device, self.hooks = recipe, device, hooks
        self.mlflow_run_id = mlflow_run_id
        self.url = run_url(recipe, run)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        hooks.doing("starting", slow=True)
        self.control = ControlPlane(recipe.train, hooks)
        require_lease(self.control)
        self.objective = load_objective(recipe.diffusion)
        self.latents_url = latents_url(recipe)
        self.manifest = load_manifest(self.latents_url)
        self.build_batch = BatchBuilder(recipe, self.manifest, self.objective, device)
        self.order = SampleOrder.of(recipe, self.manifest)
        self.profiler = StepProfiler(recipe.train.profile_steps, self.url, hooks.say)
        self._start_engine()
        self.guard = BadStepGuard(self.url, self.control, self.writer.wait)
        self._shown_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # If a single rank failed, the other ranks' threads may never finish.
        if kind is None or issubclass(kind, UnrecoverableError):
            self.writer.wait()
            self.recorder.close()
        self.engine.destroy()

    # ---- Starting ----

    def _start_engine(self) -> None:
        """Build model and engine, and load the newest intact checkpoint if there is one."""
        train = self.recipe.train
        torch.manual_seed(train.seed)
        model = build_model(self.recipe)
        speed = self._speed_meter(model)
        if train.start is not None and not agreed_steps(self.url):
            self._load_start(model)
        model.to(self.device)
        use_kernel(model, self.recipe.model.attention, self.device)
        checkpoint_activations(
            model, train.activation_checkpointing, train.activation_checkpoint_every
        )
        if train.compile:
            compile_blocks(model)
        share = self.order.largest_share(self.world)
        self.micro_batches = math.ceil(share / (train.micro_batch_size or share))
        self.engine = Engine(model, train, self.rank, self.world, self.device, self.micro_batches)
        self.writer = CheckpointWriter(self.engine, self.hooks.say, self.hooks.doing)
        self.hooks.doing("loading the newest checkpoint", slow=True)
        state = load_newest(self.engine, self.url, self.hooks.say)
        self.step = self.first_step = 0 if state is None else state.step
        self.recorder = Recorder(
            self.recipe,
            self.url,
            self.mlflow_run_id,
            speed,
            self.device,
            self.hooks,
            self.step,
            None if state is None else state.log,
            self._begin,
        )
        if state is None:
            self.writer.save_now(self.url, self._state(), before_commit=self.hooks.require_lease)
            return
        every = train.validate_every
        if every and self.step and self.step % every == 0:
            # The run may have stopped before this checkpoint was evaluated.
            self.control.pending_validation.append(self.step)
        if state.interval is not None and self.rank == 0:
            self.recorder.losses.restore(state.interval)

    def _speed_meter(self, model: Backbone) -> SpeedMeter:
        train = self.recipe.train
        peak_size = 512 if self.device.type == "cpu" else 8192
        dtype = torch.bfloat16 if "bf16" in train.precision else torch.float32
        peak = matmul_flops_per_s(self.device, dtype, peak_size) * self.world
        return SpeedMeter(train.batch_size, training_flops_per_image(model), peak)

    def _load_start(self, model: Backbone) -> None:
        """Load the weights to start from on rank 0; DeepSpeed hands them to the other ranks."""
        start = self.recipe.train.start
        assert start is not None
        if self.rank == 0:
            weights = read_weights(run_url(self.recipe, start.run), start.step, start.weights)
            taken = transfer_weights(model, weights, f"{start.run}@{start.step}")
            model.load_state_dict(taken, strict=False)

    # ---- Running ----

    def run(self) -> int:
        """Train to the last step or a stop request; returns the step, saved and logged.

        Raises:
            RollbackRequested: too many consecutive bad steps.
            UnrecoverableError: too many rollbacks, or checkpoints cannot be written.
        """
        train, recorder = self.recipe.train, self.recorder
        if self.step >= train.steps:
            return self.step
        cache = shard_cache(self.recipe.scaling, self.latents_url, self.manifest, self.hooks.say)
        with LatentLoader(
            self.latents_url,
            self.manifest,
            self.order,
            self.order.rank_streams(self.rank, self.world),
            self.step,
            self.build_batch,
            cache.read if cache else read_shard,
        ) as loader:
            self.hooks.report({"step": self.step})
            recorder.speed.restart(loader.wait_s)
            self._begin("data")
            for batch in loader:
                with self.profiler.step(self.step):
                    self._train_step(batch)
                self.step += 1
                self._show_step()
                last = self.step == train.steps
                if self.step % train.log_every == 0 or last:
                    checkpoint_s = self.writer.take_blocked_s()
                    bad_steps = self.guard.pop_count()
                    recorder.record(self.step, loader.wait_s, checkpoint_s, bad_steps)
                self._save_where_due(last)
                if last or self.control.stop:
                    break
                if self.control.resizing:
                    self._await_resize()
                self._begin("data")
        self.hooks.doing("finishing", slow=True)
        self._finish()
        return self.step

    def _begin(self, phase: str) -> None:
        """Note that a phase of the step begins; the first step compiles and fills caches."""
        self.hooks.doing(f"{phase} of step {self.step:,}", slow=self.step == self.first_step)

    def _show_step(self) -> None:
        """Report the step as progress, also between log records."""
        now_s = time.monotonic()
        if self.rank == 0 and now_s - self._shown_s >= REPORT_S:
            self._shown_s = now_s
            self.hooks.report({"step": self.step})

    def _train_step(self, batch: TrainingBatch) -> None:
        if self.step in self.guard.skipped:
            self.engine.update_ema(self.step)
            return
        losses, noise_levels = self._backward(batch)
        loss_sum = losses.double().sum()
        decision: Decision | None = None

        def accept(grad_norm: Tensor) -> tuple[bool, float]:
            nonlocal decision
            decision = self.control.decide(loss_sum, grad_norm)
            return decision.accept, decision.grad_norm

        with self.recorder.watch.phase("optimizer"):
            taken = self.engine.step(self.step, accept)
            self.engine.update_ema(self.step)
        if decision is None:
            raise RuntimeError(f"DeepSpeed took step {self.step} without computing its norm")
        self.control.follow(decision)
        if taken:
            self.guard.record_ok()
            self.recorder.add(losses, noise_levels, decision.grad_norm)
        else:
            self.guard.record_skip(batch.source, decision.loss, decision.grad_norm)

    def _backward(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Accumulate gradients of this rank's samples; their losses and noise levels in [0, 1]."""
        every = (*batch.tensors(), *batch.extras.values())
        tensors = [v.to(self.device, non_blocking=True) for v in every]
        watch, losses, noise_levels = self.recorder.watch, [], []
        if batch.augmentation is not None:
            with watch.phase("forward"):
                tensors[0] = augment(tensors[0], batch.augmentation)
        chunks = zip(*(v.tensor_split(self.micro_batches) for v in tensors), strict=True)
        for number, (x0, t, noise, y, *rest) in enumerate(chunks):
            weight = 1.0 / self.recipe.train.batch_size
            if not len(t):  # this rank has fewer samples than there are micro-batches
                (x0, t, noise, y, *rest), weight = (v[:1] for v in tensors), 0.0
            extras = dict(zip(batch.extras, rest, strict=True))
            with watch.phase("forward"):
                noisy = self.objective.noisy(x0, t, noise)
                output = self.engine.forward(*self.objective.precondition(noisy, t), y, **extras)
                loss = self.objective.loss(output, x0, t, noise)
            if weight:
                losses.append(loss.detach())
                noise_levels.append(self.objective.level(t))
            with watch.phase("backward"):
                last = number == self.micro_batches - 1
                self.engine.backward(loss.sum() * weight, last)
        return torch.cat(losses), torch.cat(noise_levels)

    # ---- Saving ----

    def _save_where_due(self, last: bool) -> None:
        train, control = self.recipe.train, self.control
        if train.ema_snapshot_every and self.step % train.ema_snapshot_every == 0:
            names = tuple(train.power_profiles())
            self.writer.save(storage.join(self.url, SNAPSHOTS), self._state(), names)
        preempted = control.preempted
        due = self.step % train.checkpoint_every == 0 or control.save_due or control.resizing
        if due or last or control.stop or preempted:
            self._save()
        if preempted:
            self.writer.wait()
            if not self.writer.failures:
                control.saved_for_preemption()
                self.hooks.say(f"Node preemption announced; checkpoint saved at step {self.step:,}")

    def _await_resize(self) -> None:
        """Wait until the checkpoint just begun is committed, and then to be replaced."""
        started_s = time.monotonic()
        self.writer.wait()
        self.hooks.doing("waiting to be replaced", slow=True)
        self.hooks.await_resize(saved=not self.writer.failures)
        self.control.resizing = False
        self.recorder.speed.pause(time.monotonic() - started_s)

    def _save(self) -> None:
        """Write the log, then the checkpoint that covers it, then apply retention."""
        train, log, started_s = self.recipe.train, self.recorder.log, time.monotonic()
        step, records = self.step, len(self.recorder.log.records)

        def write_log() -> None:  # in the checkpoint's thread: training may have added records
            self.hooks.require_lease()
            if records:
                storage.write_text(log.url, log.text(records))

        def retain() -> None:
            self.hooks.saved(step)
            if train.validate_every and step % train.validate_every == 0:
                self.control.pending_validation.append(step)
            try:
                waiting = self.control.awaiting_validation()
                prune(self.url, train.keep_checkpoints, train.keep_every, waiting)
            except (OSError, DiffitError) as error:
                self.hooks.say(f"Could not remove old checkpoints: {error}")

        self.control.save_due = False
        self.control.saved()
        self.writer.save(
            self.url,
            self._state(),
            before_parts=self.hooks.require_lease,
            before_commit=write_log,
            after_commit=retain,
        )
        # Waiting for a checkpoint does not count toward step time.
        self.recorder.speed.pause(time.monotonic() - started_s)

    def _state(self) -> State:
        interval = None
        if self.step % self.recipe.train.log_every and self.step != self.recipe.train.steps:
            interval = tuple(tuple(row) for row in self.recorder.losses.total().tolist())
        return State(
            step=self.step,
            images_seen=self.step * self.recipe.train.batch_size,
            optimizer_steps=self.engine.optimizer_steps(),
            recipe_hash=self.recipe.train_hash(),
            mlflow_run_id=self.mlflow_run_id,
            world_size=self.world,
            zero_stage=self.recipe.train.zero_stage,
            interval=interval,
            log=self.recorder.log.mark(),
        )

    def _finish(self) -> None:
        """Wait for the last checkpoint; retry it once if it failed.

        Raises:
            UnrecoverableError: it cannot be written.
        """
        self.writer.wait()
        if self.step not in agreed_steps(self.url, self.control.group):
            self.writer.failures = []
            self._save()
            self.writer.wait()
            if self.writer.failures:
                raise UnrecoverableError(self.writer.failures[-1])
        if not self.control.stop:
            self.control.validate_pending()
