"""One rank's training: a function of recipe and seed, not of world size or restarts."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from diffit_train import storage
from diffit_train.data.augment import augment
from diffit_train.data.loader import LatentLoader, SampleOrder
from diffit_train.data.manifest import latents_url, load_manifest
from diffit_train.data.shards import read_shard, shard_cache
from diffit_train.diffusion.objective import load_objective
from diffit_train.errors import DiffitError
from diffit_train.models.attention_kernels import enable_determinism, kernel_name
from diffit_train.models.backbone import Backbone
from diffit_train.models.build import build_model
from diffit_train.models.cost import training_flops_per_image
from diffit_train.models.transfer import transfer_weights
from diffit_train.models.wrap import checkpoint_activations, compile_blocks, use_kernel
from diffit_train.runs.checkpoints import Checkpoint, State
from diffit_train.runs.lease import Lease
from diffit_train.runs.run import Run
from diffit_train.training.batch import BatchBuilder, TrainingBatch
from diffit_train.training.checkpointer import (
    CheckpointWriter,
    UnrecoverableError,
    agreed_steps,
    load_newest,
)
from diffit_train.training.control import ControlPlane, Decision, Requests
from diffit_train.training.engine import Engine
from diffit_train.training.guard import BadStepGuard, RollbackRequested, require_lease
from diffit_train.training.recorder import Recorder, StepProfiler
from diffit_train.training.stall import StallGuard
from diffit_train.training.telemetry import SpeedMeter, matmul_flops_per_s

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What a finished step tells whoever runs the training; on every rank.

    Attributes:
        step: steps trained so far.
        stop: all ranks are to save and exit.
        check_preemption: all ranks are to look whether a node is about to be preempted.
        phases: seconds a step by phase of this rank, at the end of a log interval.
        record: the log's new record, on rank 0 at the end of a log interval.
    """

    step: int
    stop: bool = False
    check_preemption: bool = False
    phases: Mapping[str, float] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


class Trainer:
    """Iterates over the steps of a run, from the newest intact checkpoint to the recipe's last.

    It writes checkpoints where they are due, skips bad steps and rolls back. Whoever runs it calls
    `finish` after the last step; to stop earlier, `save` before that. torch.distributed must be
    initialized; all ranks must make the same calls.

    Args:
        run: with its recipe.
        lease: of the run.
        mlflow_run_id: the MLflow run that rank 0 logs to.
        device: where the model runs.
        stall: learns what this rank begins; None: nobody watches.

    Attributes:
        step: steps trained so far.
        requests: of whoever runs this, from any thread; only rank 0's count.
        saved_s: when the newest checkpoint was committed, as `time.monotonic` says; on rank 0.
    """

    def __init__(
        self,
        run: Run,
        lease: Lease,
        mlflow_run_id: str,
        device: torch.device,
        stall: StallGuard | None = None,
    ) -> None:
        self.run, self.recipe, self.url = run, run.recipe, run.url
        recipe = run.recipe
        if recipe.train.deterministic:
            enable_determinism(kernel_name(recipe.model.attention, device))
        self.device, self.stall = device, stall
        self.lease, self.mlflow_run_id = lease, mlflow_run_id
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._doing("starting", slow=True)
        self.requests = Requests()
        self.control = ControlPlane(recipe.train, self.requests)
        require_lease(lease, self.control)
        self.objective = load_objective(recipe.diffusion)
        self.latents_url = latents_url(recipe)
        self.manifest = load_manifest(self.latents_url)
        self.build_batch = BatchBuilder(recipe, self.manifest, self.objective, device)
        self.order = SampleOrder.of(recipe, self.manifest)
        self.profiler = StepProfiler(recipe.train.profile_steps, self.url)
        self.saved_s = time.monotonic()
        self._start_engine()

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
        if train.start is not None and not agreed_steps(self.run.checkpoints):
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
        self.writer = CheckpointWriter(self.engine)
        self.guard = BadStepGuard(self.lease, self.control, self.writer.wait)
        self._doing("loading the newest checkpoint", slow=True)
        state = load_newest(self.engine, self.run.checkpoints)
        self.step = self.first_step = self._begun_step = 0 if state is None else state.step
        self.recorder = Recorder(
            self.recipe,
            self.lease,
            self.mlflow_run_id,
            speed,
            self.device,
            self.step,
            None if state is None else state.log,
        )
        if state is None:
            checkpoint = Checkpoint(self.url, 0)
            self.writer.save_now(checkpoint, self._state(), before_commit=self.lease.require)
            return
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
            weights = Run(self.run.root, start.run).checkpoints[start.step].load(start.weights)
            taken = transfer_weights(model, weights, f"{start.run}@{start.step}")
            model.load_state_dict(taken, strict=False)

    # ---- Running ----

    def __iter__(self) -> Iterator[Step]:
        """Train step by step.

        Raises:
            UnrecoverableError: too many rollbacks, or checkpoints cannot be written.
        """
        while self.step < self.recipe.train.steps:
            rolled_back = False
            try:
                yield from self._steps()
            except RollbackRequested:
                rolled_back = True
            if rolled_back:  # after the exception, whose frames hold the engine
                self._roll_back()

    def _roll_back(self) -> None:
        logger.info("Rolling back to the last checkpoint")
        self.recorder.close()
        self.engine.destroy()
        del self.engine, self.writer, self.guard, self.recorder
        gc.collect()
        self._start_engine()

    def _steps(self) -> Iterator[Step]:
        """Steps up to the last one or a rollback."""
        train, recorder = self.recipe.train, self.recorder
        cache = shard_cache(self.recipe.scaling, self.latents_url, self.manifest, logger.info)
        with LatentLoader(
            self.latents_url,
            self.manifest,
            self.order,
            self.order.rank_streams(self.rank, self.world),
            self.step,
            self.build_batch,
            cache.read if cache else read_shard,
        ) as loader:
            recorder.speed.restart(loader.wait_s)
            for batch in loader:
                # The first step compiles and fills caches.
                self._doing(f"step {self.step:,}", slow=self.step == self.first_step)
                with self.profiler.step(self.step):
                    decision = self._train_step(batch)
                self.step += 1
                last = self.step == train.steps
                phases: Mapping[str, float] = {}
                record: Mapping[str, Any] = {}
                if self.step % train.log_every == 0 or last:
                    blocked_s, skipped = self.writer.take_blocked_s(), self.guard.pop_count()
                    phases, record = recorder.record(self.step, loader.wait_s, blocked_s, skipped)
                if train.ema_snapshot_every and self.step % train.ema_snapshot_every == 0:
                    names = tuple(train.power_profiles())
                    snapshot = Checkpoint(self.run.snapshots.folder, self.step)
                    self.writer.save(snapshot, self._state(), names)
                timed = decision is not None and decision.save
                if self.step % train.checkpoint_every == 0 or timed or last:
                    self.save()
                stop = decision is not None and decision.stop
                check = decision is not None and decision.check_preemption
                yield Step(self.step, stop, check, phases, record)
                if last:
                    return

    def _doing(self, what: str, slow: bool = False) -> None:
        if self.stall is not None:
            self.stall.doing(what, slow)

    def _train_step(self, batch: TrainingBatch) -> Decision | None:
        """Train a step; returns what the ranks decided, None where an earlier rollback skips it."""
        if self.step in self.guard.skipped:
            self.engine.update_ema(self.step)
            return None
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
        if taken:
            self.guard.record_ok()
            self.recorder.add(losses, noise_levels, decision.grad_norm)
        else:
            self.guard.record_skip(batch.source, decision.loss, decision.grad_norm)
        return decision

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

    def save(self) -> None:
        """Begin a checkpoint of this step, unless there is one; its thread also prunes older ones.

        Raises:
            UnrecoverableError: too many consecutive checkpoints failed.
        """
        if self.step == self._begun_step:
            return
        self._begun_step = self.step
        log, started_s = self.recorder.log, time.monotonic()
        records = len(log.records)

        def write_log() -> None:  # in the checkpoint's thread: training may have added records
            self.lease.require()
            if records:
                storage.write_text(log.url, log.text(records))

        self._doing("saving a checkpoint", slow=True)
        self.control.saved()
        self.writer.save(
            Checkpoint(self.url, self.step),
            self._state(),
            before_parts=self.lease.require,
            before_commit=write_log,
            after_commit=self._prune,
        )
        # Waiting for a checkpoint does not count toward step time.
        self.recorder.speed.pause(time.monotonic() - started_s)

    def wait(self) -> bool:
        """Return once no checkpoint is in progress; whether the last one was committed."""
        self._doing("waiting for a checkpoint", slow=True)
        self.writer.wait()
        return not self.writer.failures

    def _prune(self) -> None:
        """Apply retention; on rank 0, in the checkpoint's thread."""
        self.saved_s = time.monotonic()
        train, validated = self.recipe.train, self.requests.validated
        every, checkpoints = train.validate_every, self.run.checkpoints.refresh()
        try:
            later = [step for step in checkpoints if step > validated]
            waiting = [step for step in later if every and step % every == 0]
            checkpoints.prune(train.keep_checkpoints, train.keep_every, waiting)
        except (OSError, DiffitError) as error:
            logger.info(f"Could not remove old checkpoints: {error}")

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

    def finish(self) -> None:
        """Wait for the checkpoint of this step; retry it once if it failed.

        Raises:
            UnrecoverableError: it cannot be written.
        """
        self.wait()
        if self.step not in agreed_steps(self.run.checkpoints, self.control.group):
            self.writer.failures, self._begun_step = [], -1
            self.save()
            if not self.wait():
                raise UnrecoverableError(self.writer.failures[-1])
        self._doing("sending the last points", slow=True)
