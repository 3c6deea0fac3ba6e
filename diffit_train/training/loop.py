"""The training loop of one rank: a function of recipe and seed, not of ranks or restarts."""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data.autoencoder import scaled_sample
from diffit_train.data.cache import ShardCache
from diffit_train.data.loader import Batch, LatentLoader, SampleOrder, draw
from diffit_train.data.shards import Manifest, latents_url, load_manifest, read_shard
from diffit_train.diffusion.objective import build_objective
from diffit_train.errors import DiffitError
from diffit_train.models.backbone import Backbone
from diffit_train.models.build import build_model
from diffit_train.models.cost import training_flops_per_image
from diffit_train.models.transfer import transfer_weights
from diffit_train.models.wrap import checkpoint_activations, compile_blocks, use_kernel
from diffit_train.runs.checkpoints import SNAPSHOTS, State, read_weights, remove_old
from diffit_train.runs.identity import run_url
from diffit_train.tracking import MetricsOutbox
from diffit_train.training.checkpointer import (
    CheckpointWriter,
    UnrecoverableError,
    agreed_steps,
    load_checkpoint,
    load_weights,
    newest_whole,
)
from diffit_train.training.engine import Engine, learning_rate
from diffit_train.training.log import (
    SkippedSteps,
    TrainingLog,
    append_bad_step,
    as_metrics,
    mark_unsent,
)
from diffit_train.training.telemetry import (
    LossMeter,
    SpeedMeter,
    Stopwatch,
    matmul_flops_per_s,
    peak_memory_bytes,
)

# Seconds between looks whether Ray has announced a preemption.
PREEMPTION_POLL_S = 1.0
GIB = 2**30


class Surroundings(Protocol):
    """What a rank's training hears from, and tells, whoever runs it."""

    def report(self, record: dict[str, Any]) -> None:
        """A record of the log, on rank 0, for the progress line."""

    def say(self, text: str) -> None:
        """A line for the user, on rank 0."""

    def stop_wanted(self) -> bool:
        """Whether training should save and leave; asked on rank 0."""

    def preempted(self) -> bool:
        """Whether a node is about to be taken away; all ranks ask together."""

    def validate(self, step: int) -> None:
        """A committed checkpoint is to be evaluated beside training; all ranks say so together."""


class RollbackRequested(Exception):
    """Too many bad steps in a row: to the last checkpoint, and past these batches."""


@dataclass(frozen=True)
class Drawn:
    """A rank's part of a batch with all its randomness: what a step is a function of."""

    x0: Tensor  # (n, C, h, w), scaled latents
    t: Tensor  # (n,)
    noise: Tensor  # as x0
    y: Tensor  # (n,), null where dropped

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four."""
        return self.x0, self.t, self.noise, self.y


@dataclass(frozen=True)
class Prepared:
    """A batch, and what was drawn for it."""

    batch: Batch
    drawn: Drawn


def train_to_the_end(
    recipe: Recipe, run: str, mlflow_run_id: str, device: torch.device, around: Surroundings
) -> int:
    """Train from wherever the run stands, also past bad batches; the step that was reached.

    That is the recipe's last one, or an earlier one where training was asked to stop.
    """
    while True:
        with Trainer(recipe, run, mlflow_run_id, device, around) as trainer:
            try:
                return trainer.run()
            except RollbackRequested:
                around.say("going back to the last checkpoint")
        del trainer
        gc.collect()


class Trainer:
    """One rank's training, from the newest whole checkpoint to the recipe's last step.

    torch.distributed must be initialised.

    Args:
        recipe: the run's recipe.
        run: the run's name.
        mlflow_run_id: the run that rank 0 logs to.
        device: where the model runs.
        around: what it hears and tells.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: str,
        mlflow_run_id: str,
        device: torch.device,
        around: Surroundings,
    ) -> None:
        self.recipe, self.device, self.around = recipe, device, around
        self.mlflow_run_id = mlflow_run_id
        self.url = run_url(recipe, run)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # Small numbers are agreed on apart from the GPUs' collectives.
        self.control = dist.new_group(backend="gloo")
        self.objective = build_objective(recipe.diffusion)
        self.latents_url = latents_url(recipe)
        self.manifest: Manifest = load_manifest(self.latents_url)
        self.order = SampleOrder(
            [entry.count for entry in self.manifest.shards],
            recipe.train.batch_size,
            recipe.data.lanes,
            recipe.data.shuffle_window,
            recipe.train.seed,
        )
        self.stop = self.preempted = False
        # On rank 0: steps whose checkpoints are committed and wait to be evaluated.
        self.to_validate: deque[int] = deque()
        self.polled_s = 0.0
        self.judged_loss = float("nan")
        self.profiler: torch.profiler.profile | None = None
        self.saved_for_preemption = False
        self.bad_in_row: list[int] = []
        self.skipped = 0
        self.grad_norm = float("nan")
        self.skipped_steps = SkippedSteps.read(self.url)
        self.watch = Stopwatch(device)
        self.losses = LossMeter(self.objective.timesteps, device)
        self._start_engine()
        self.log = TrainingLog(self.url, self.step)
        self.outbox: MetricsOutbox | None = None
        if self.rank == 0:
            # A restarted run repeats steps behind its checkpoint; the outbox drops their points.
            self.outbox = MetricsOutbox(recipe, mlflow_run_id, around.say)
            for record in self.log.records:
                self.outbox.put(record["step"], as_metrics(record))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Where one rank failed alone, the others' threads may never come to an end.
        if kind is None or issubclass(kind, UnrecoverableError):
            self.writer.wait()
            if self.outbox is not None and self.outbox.close():
                mark_unsent(self.url)
        self.engine.destroy()

    # ---- Starting ----

    def _start_engine(self) -> None:
        """Model, engine and position: of the newest whole checkpoint, or new ones."""
        train = self.recipe.train
        newest = newest_whole(self.url, self.around.say)
        torch.manual_seed(train.seed)
        model = build_model(self.recipe)
        self._measure_peak(model)
        if newest is not None:
            load_weights(model, self.url, newest)
        elif train.start is not None:
            model.load_state_dict(self._starting_weights(model), strict=False)
        model.to(self.device)
        use_kernel(model, self.recipe.model.attention, self.device)
        checkpoint_activations(
            model, train.activation_checkpointing, train.checkpoint_every_nth_block
        )
        if train.compile:
            compile_blocks(model)
        share = self.order.largest_share(self.world)
        self.micro_batches = math.ceil(share / (train.micro_batch_size or share))
        self.engine = Engine(model, train, self.rank, self.world, self.device, self.micro_batches)
        self.writer = CheckpointWriter(self.engine, self.around.say)
        self.step = 0
        if newest is None:
            self.writer.save_now(self.url, self._state())
        else:
            state = load_checkpoint(self.engine, self.url, newest)
            self.step = state.step
            every = train.validate_every
            if every and self.step and self.step % every == 0:
                self.to_validate.append(self.step)  # perhaps nobody came to it
            if state.interval is not None and self.rank == 0:
                self.losses.restore(state.interval)

    def _measure_peak(self, model: Backbone) -> None:
        train = self.recipe.train
        peak_size = 512 if self.device.type == "cpu" else 8192
        dtype = torch.float32 if train.precision == "fp32" else torch.bfloat16
        peak = matmul_flops_per_s(self.device, dtype, peak_size) * self.world
        flops = training_flops_per_image(model)
        self.speed = SpeedMeter(train.batch_size, flops, peak)

    def _starting_weights(self, model: Backbone) -> dict[str, Tensor]:
        start = self.recipe.train.start
        assert start is not None
        source = run_url(self.recipe, start.run)
        weights = read_weights(source, start.step, start.weights)
        return transfer_weights(model, weights, f"{start.run}@{start.step}")

    # ---- Running ----

    def run(self) -> int:
        """Train to the last step, or until asked to stop; the step reached, saved and logged.

        Raises:
            RollbackRequested: there were too many bad steps in a row; their batches are noted.
            UnrecoverableError: the same, too often; or checkpoints cannot be written.
        """
        train = self.recipe.train
        if self.step >= train.steps:
            return self.step
        cache = self._shard_cache()
        with LatentLoader(
            self.latents_url,
            self.manifest,
            self.order,
            self.rank,
            self.world,
            self.step,
            self._prepare,
            cache.read if cache else read_shard,
        ) as loader:
            self.around.report({"step": self.step})
            self.speed.restart(loader.wait_s)
            for prepared in loader:
                with self._profiled():
                    self._train_step(prepared)
                self.step += 1
                last = self.step == train.steps
                if self.step % train.log_every == 0 or last:
                    self._record(loader)
                self._save_where_due(last)
                if last or self.stop:
                    break
        self._finish()
        return self.step

    def _shard_cache(self) -> ShardCache | None:
        scaling = self.recipe.scaling
        if not scaling.shard_cache_gib or storage.is_local(self.latents_url):
            return None
        return ShardCache(scaling.shard_cache_folder, int(scaling.shard_cache_gib * GIB))

    def _train_step(self, prepared: Prepared) -> None:
        if self.step in self.skipped_steps:
            self.engine.update_ema(self.step)
            return
        drawn = [v.to(self.device, non_blocking=True) for v in prepared.drawn.tensors()]
        losses, timesteps = [], []
        chunks = zip(*(v.tensor_split(self.micro_batches) for v in drawn), strict=True)
        for number, (x0, t, noise, y) in enumerate(chunks):
            weight = 1.0 / self.recipe.train.batch_size
            if not len(t):  # this rank has fewer pictures than others have micro-batches
                (x0, t, noise, y), weight = (v[:1] for v in drawn), 0.0
            with self.watch.phase("forward"):
                noisy = self.objective.noisy(x0, t, noise)
                output = self.engine.forward(noisy, t, y)
                loss = self.objective.loss(output, x0, t, noise)
            if weight:
                losses.append(loss.detach())
                timesteps.append(t)
            with self.watch.phase("backward"):
                last = number == self.micro_batches - 1
                self.engine.backward(loss.sum() * weight, last)
        loss = torch.cat(losses)
        with self.watch.phase("optimizer"):
            taken = self.engine.step(self.step, lambda norm: self._judge(norm, loss))
            self.engine.update_ema(self.step)
        if taken:
            self.bad_in_row = []
            self.grad_norm = self.engine.grad_norm()
            self.losses.add(loss, torch.cat(timesteps))
        else:
            self._note_bad_step(prepared.batch)

    def _judge(self, norm: float, loss: Tensor) -> bool:
        """Whether to take a step; here, once a step, the ranks also agree on what to do next."""
        train = self.recipe.train
        mine = torch.zeros(4, dtype=torch.float64)
        mine[0] = float(loss.double().sum()) / train.batch_size
        if self.rank == 0:
            mine[1] = self.around.stop_wanted()
            now_s = time.monotonic()
            if now_s - self.polled_s > PREEMPTION_POLL_S:
                self.polled_s = now_s
                mine[2] = 1.0
            mine[3] = self.to_validate.popleft() if self.to_validate else 0.0
        dist.all_reduce(mine, group=self.control)
        mean, stop, poll, validated = mine.tolist()
        if validated:
            self.around.validate(int(validated))
        self.stop = self.stop or stop > 0
        if poll and not self.saved_for_preemption:
            self.preempted = self.around.preempted()
        self.judged_loss = mean
        good = math.isfinite(mean) and math.isfinite(norm)
        good = good and (train.loss_limit is None or mean <= train.loss_limit)
        return good and (train.grad_norm_limit is None or norm <= train.grad_norm_limit)

    def _note_bad_step(self, batch: Batch) -> None:
        """Report a step that was skipped; after too many in a row, roll back."""
        train = self.recipe.train
        self.skipped += 1
        self.bad_in_row.append(self.step)
        parts: list[Any] = [None] * self.world
        mine = {"shards": batch.shards, "keys": batch.keys.tolist()}
        dist.all_gather_object(parts, mine, group=self.control)
        if self.rank == 0:
            shards = sorted({name for part in parts for name in part["shards"]})
            record = {
                "step": self.step,
                "loss": str(self.judged_loss),
                "grad_norm": str(self.engine.grad_norm()),
                "shards": shards,
                "keys": sorted(key for part in parts for key in part["keys"]),
            }
            append_bad_step(self.url, record)
            self.around.say(
                f"step {self.step:,} skipped: loss {self.judged_loss:.4g}, gradient norm "
                f"{self.engine.grad_norm():.4g}; shards {', '.join(shards[:4])}"
                f"{' …' if len(shards) > 4 else ''}; keys in {self.url}/bad-steps.jsonl"
            )
        if len(self.bad_in_row) < train.bad_steps_in_row:
            return
        first = self.bad_in_row[0]
        if len(self.skipped_steps.ranges) >= train.max_rollbacks:
            raise UnrecoverableError(
                f"{len(self.bad_in_row)} steps in a row from {first:,} on had a loss or gradient "
                "that is no number or beyond its limit (times gone back to a checkpoint: "
                f"{len(self.skipped_steps.ranges)}); see {self.url}/bad-steps.jsonl; lower train.lr "
                "or set train.grad_clip in a new run, or raise train.max_rollbacks"
            )
        self.writer.wait()
        if self.rank == 0:
            self.skipped_steps.adding(first, self.step).write(self.url)
        dist.barrier(group=self.control)
        raise RollbackRequested

    # ---- Data ----

    def _prepare(self, batch: Batch) -> Prepared:
        """Timesteps, noise, posterior samples, flips and dropped labels, lane by lane.

        Called by the loader's thread.
        """
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
        drawn = (x0, joined("t"), joined("noise"), y)
        if self.device.type == "cuda":
            drawn = tuple(v.pin_memory() for v in drawn)  # type: ignore[assignment]
        return Prepared(batch, Drawn(*drawn))

    # ---- Telling ----

    def _record(self, loader: LatentLoader[Prepared]) -> None:
        """A record of the interval that ends at this step, to log, MLflow and progress line."""
        every = self.recipe.train.log_every
        steps = self.step % every or every
        values = self.losses.reduce()
        skipped, self.skipped = self.skipped, 0
        waited_s = loader.wait_s - self.speed.waited_before_s
        values |= self.speed.measure(steps, loader.wait_s)
        seconds = {f"{name}_s": s / steps for name, s in self.watch.take().items()}
        values |= seconds | {"data_s": waited_s / steps, "checkpoint_s": self.writer.blocked_s}
        self.writer.blocked_s = 0.0
        self.speed.restart(loader.wait_s)
        if self.rank != 0:
            return
        values["lr"] = learning_rate(self.recipe.train, self.step - 1)
        values["memory_gib"] = peak_memory_bytes(self.device) / GIB
        if math.isfinite(self.grad_norm):
            values["grad_norm"] = self.grad_norm
        if skipped:
            values["skipped_steps"] = skipped
        record = {"step": self.step, **values}
        self.log.append(record)
        if self.outbox is not None:
            self.outbox.put(self.step, as_metrics(record))
        self.around.report(record)

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        """Run a step under torch.profiler where the recipe wants a trace of it, on rank 0."""
        wanted = self.recipe.train.profile_steps
        if wanted is None or self.rank != 0 or not wanted[0] <= self.step <= wanted[1]:
            yield
            return
        if self.profiler is None:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        yield
        if self.step == wanted[1]:
            self.profiler.stop()
            folder = Path(tempfile.mkdtemp(prefix="diffit-profile-"))
            try:
                local = folder / "trace.json.gz"
                self.profiler.export_chrome_trace(str(local))
                url = storage.join(self.url, "profile", f"steps-{wanted[0]}-{wanted[1]}.json.gz")
                storage.write_bytes(url, local.read_bytes())
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            self.around.say(f"profile: {url}")

    # ---- Saving ----

    def _save_where_due(self, last: bool) -> None:
        train = self.recipe.train
        preempted = self.preempted and not self.saved_for_preemption
        if train.ema_snapshot_every and self.step % train.ema_snapshot_every == 0:
            kinds = tuple(train.power_profiles())
            url = storage.join(self.url, SNAPSHOTS)
            self.writer.save(url, self._state(), kinds)
        if self.step % train.checkpoint_every == 0 or last or self.stop or preempted:
            self._save()
        if preempted:
            self.saved_for_preemption = True
            self.writer.wait()
            self.around.say(f"a node is to be taken away; saved at step {self.step:,}")
            if self.writer.failures:
                self.saved_for_preemption = False

    def _save(self) -> None:
        """Log first, then the checkpoint that vouches for it, then what retention removes."""
        train, text, started_s = self.recipe.train, self.log.text(), time.monotonic()
        step = self.step

        def write_log() -> None:
            if self.log.records:
                storage.write_text(self.log.url, text)

        def retain() -> None:
            if train.validate_every and step % train.validate_every == 0:
                self.to_validate.append(step)
            try:
                remove_old(self.url, train.keep_checkpoints, train.keep_every)
            except (OSError, DiffitError) as error:
                self.around.say(f"old checkpoints could not be removed: {error}")

        self.writer.save(self.url, self._state(), before_commit=write_log, after_commit=retain)
        # Waiting for a checkpoint is none of a step's time.
        self.speed.pause(time.monotonic() - started_s)

    def _state(self) -> State:
        interval = None
        if self.step % self.recipe.train.log_every and self.step != self.recipe.train.steps:
            interval = tuple(tuple(row) for row in self.losses.total().tolist())
        return State(
            step=self.step,
            images_seen=self.step * self.recipe.train.batch_size,
            optimizer_steps=self.engine.optimizer_steps(),
            recipe_hash=self.recipe.train_hash(),
            mlflow_run_id=self.mlflow_run_id,
            world_size=self.world,
            zero_stage=self.recipe.train.zero_stage,
            interval=interval,
        )

    def _finish(self) -> None:
        """Wait for the last checkpoint; once more where it failed.

        Raises:
            UnrecoverableError: it cannot be written.
        """
        self.writer.wait()
        if self.step not in agreed_steps(self.url, self.control):
            self.writer.failures = []
            self._save()
            self.writer.wait()
            if self.writer.failures:
                raise UnrecoverableError(self.writer.failures[-1])
        if self.stop:
            return
        left: list[Any] = [list(self.to_validate)]
        dist.broadcast_object_list(left, group=self.control)
        for step in left[0]:
            self.around.validate(step)
