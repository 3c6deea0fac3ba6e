"""Write and load sharded checkpoints: each rank writes what it owns, the commit marker last."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from diffit_train import storage
from diffit_train.errors import DiffitError
from diffit_train.runs.checkpoints import (
    STATES,
    FileEntry,
    OwnedSlice,
    Slice,
    State,
    StateName,
    checkpoint_url,
    commit_checkpoint,
    committed_steps,
    damage,
    fill_slices,
    read_state,
    write_pieces,
)
from diffit_train.training.engine import Engine

# Consecutive failed checkpoints before training stops: storage may be unavailable for a while.
FAILED_SAVES = 3


class UnrecoverableError(DiffitError):
    """Raised on all ranks; restarting the workers would only raise it again."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class _Saving:
    """A checkpoint in progress: this rank's part is on disk, the thread does the rest."""

    url: str
    state: State
    kinds: tuple[StateName, ...]
    pieces: list[tuple[str, int, int]]
    name: str
    before_commit: Callable[[], None]
    after_commit: Callable[[], None]


class CheckpointWriter:
    """Writes an engine's checkpoints in two phases.

    `save` writes this rank's part to a local file; training waits only for that. A thread then
    hashes it, uploads or renames it, and agrees with the other ranks' threads, and rank 0
    commits. All ranks must make the same calls in the same order.

    Args:
        say: told about failures that training survives.
    """

    def __init__(self, engine: Engine, say: Callable[[str], None] = lambda text: None) -> None:
        self.engine, self.say = engine, say
        # The threads use their own group: their collectives must not mix with training's.
        self.group = dist.new_group(backend="gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.blocked_s = 0.0
        self.failures: list[str] = []
        self._thread: threading.Thread | None = None

    def save(
        self,
        run_url: str,
        state: State,
        kinds: Sequence[StateName] | None = None,
        before_commit: Callable[[], None] = _nothing,
        after_commit: Callable[[], None] = _nothing,
    ) -> None:
        """Start a checkpoint, once the previous one is done.

        Args:
            kinds: state names to write; None for everything.
            before_commit, after_commit: called by rank 0's thread around the commit; the second
                must not raise.

        Raises:
            UnrecoverableError: too many consecutive checkpoints failed.
        """
        started_s = time.monotonic()
        self.wait()
        if len(self.failures) >= FAILED_SAVES:
            raise UnrecoverableError(self.failures[-1])
        name = f"rank-{self.rank:05d}-of-{self.world:05d}.safetensors"
        kinds = tuple(kinds or (*STATES, *self.engine.train.ema))
        owned = self.engine.owned()
        url = checkpoint_url(run_url, state.step)
        pieces = [(s.slice.name, s.slice.offset, s.slice.length) for s in owned]
        saving = _Saving(url, state, kinds, pieces, name, before_commit, after_commit)
        stack, error = contextlib.ExitStack(), None
        try:
            path = stack.enter_context(storage.atomic_file(storage.join(url, name)))
            write_pieces(path, owned, kinds)
        except Exception as problem:
            error = problem
            path = None
        self._thread = threading.Thread(
            target=self._finish, args=(saving, stack, path, error), name="checkpoint", daemon=True
        )
        self._thread.start()
        self.blocked_s += time.monotonic() - started_s

    def wait(self) -> None:
        """Return once no checkpoint is in progress."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_blocked_s(self) -> float:
        """Seconds that checkpoints blocked training since the last call."""
        seconds, self.blocked_s = self.blocked_s, 0.0
        return seconds

    def save_now(self, run_url: str, state: State, **rest: Any) -> None:
        """Write a checkpoint and return once it is committed.

        Raises:
            UnrecoverableError: it could not be written.
        """
        self.save(run_url, state, **rest)
        started_s = time.monotonic()
        self.wait()
        self.blocked_s += time.monotonic() - started_s
        if self.failures:
            raise UnrecoverableError(self.failures[-1])

    def _finish(
        self,
        saving: _Saving,
        stack: contextlib.ExitStack,
        path: Path | None,
        error: Exception | None,
    ) -> None:
        """Hash, upload, agree, commit; runs in a thread on every rank."""
        mine: dict[str, Any] = {"name": saving.name, "pieces": saving.pieces}
        try:
            with stack:
                if error is not None or path is None:
                    raise error or OSError("no file")
                entry = FileEntry(bytes=path.stat().st_size, sha256=storage.sha256_file(path))
                mine["entry"] = entry.model_dump()
        except Exception as problem:
            mine = {"error": f"rank {self.rank}: {problem}"}
        everyone: list[dict[str, Any]] = [{} for _ in range(self.world)]
        dist.all_gather_object(everyone, mine, group=self.group)
        failed = [str(part["error"]) for part in everyone if "error" in part]
        if not failed and self.rank == 0:
            try:
                saving.before_commit()
                commit_checkpoint(
                    saving.url, saving.state, self.engine.shapes, everyone, saving.kinds
                )
            except Exception as problem:
                failed = [f"rank 0: {problem}"]
        verdict: list[Any] = [failed]
        dist.broadcast_object_list(verdict, src=0, group=self.group)
        if not verdict[0]:
            self.failures = []
            if self.rank == 0:
                saving.after_commit()
            return
        text = f"checkpoint {saving.url} could not be written: {'; '.join(verdict[0])}"
        self.failures.append(text)
        if self.rank == 0:
            self.say(f"Save failed: {text}")


def load_checkpoint(engine: Engine, run_url: str, step: int) -> State:
    """Load this rank's master weights, moments and EMA, from any world size and ZeRO stage.

    The checkpoint's weights must be loaded into the model before the engine is created.
    """
    state = read_state(run_url, step)
    owned = engine.owned()
    _fill(owned, run_url, step, (*STATES, *engine.train.ema))
    _fill(engine.replicated(), run_url, step, STATES)
    engine.set_optimizer_steps(state.optimizer_steps)
    return state


def load_master_weights(model: nn.Module, run_url: str, step: int) -> None:
    """Load a checkpoint's master weights into a model in place, without a second copy."""
    wanted = [
        (Slice(name, 0, p.numel()), {"master": p.detach().view(-1)})
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    fill_slices(run_url, step, wanted, ("master",))


def _fill(slices: list[OwnedSlice], run_url: str, step: int, kinds: tuple[StateName, ...]) -> None:
    if slices:
        fill_slices(run_url, step, [(s.slice, s.values) for s in slices], kinds)


def agreed_steps(run_url: str, group: dist.ProcessGroup | None = None) -> list[int]:
    """The run's committed steps as rank 0 sees them (collective)."""
    steps: list[Any] = [committed_steps(run_url) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(steps, group=group)
    return list(steps[0])


def newest_whole(run_url: str, say: Callable[[str], None]) -> int | None:
    """Step of the newest committed checkpoint that is intact; None without checkpoints.

    A collective: the ranks divide the reading among themselves. A damaged checkpoint is reported
    and loses its commit marker, so that training writes it again at that step.

    Raises:
        DiffitError: all checkpoints are damaged.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    steps = agreed_steps(run_url)
    for step in reversed(steps):
        found: list[str | None] = [None] * world
        dist.all_gather_object(found, damage(run_url, step, (rank, world)))
        problems = [text for text in found if text is not None]
        if not problems:
            return step
        earlier = [s for s in steps if s < step]
        if not earlier:
            raise DiffitError(
                f"{problems[0]}; there is no earlier checkpoint; choose another --run"
            )
        if rank == 0:
            say(f"Resuming from step {earlier[-1]:,}: {problems[0]}")
            storage.remove(storage.join(checkpoint_url(run_url, step), "commit.json"))
        dist.barrier()
    return None
