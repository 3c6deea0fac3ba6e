"""Write and load sharded checkpoints: each rank writes what it owns, the commit marker last."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from diffit_train import storage
from diffit_train.errors import DiffitError
from diffit_train.runs.checkpoints import (
    STATES,
    Checkpoint,
    Checkpoints,
    DamagedCheckpoint,
    Piece,
    State,
    StateName,
    hash_pieces,
    piece_file,
    pieces_bytes,
    place_pieces,
    write_pieces,
)
from diffit_train.runs.lease import LostLeaseError
from diffit_train.training.engine import Engine

logger = logging.getLogger(__name__)

# Consecutive failed checkpoints before training stops: storage may be unavailable for a while.
FAILED_SAVES = 3


class UnrecoverableError(DiffitError):
    """Raised on all ranks; restarting the workers would only raise it again."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class _Saving:
    """A checkpoint in progress: this rank's part is on disk, the thread does the rest."""

    checkpoint: Checkpoint
    state: State
    kinds: tuple[StateName, ...]
    pieces: dict[str, Piece]
    before_parts: Callable[[], None]
    before_commit: Callable[[], None]
    after_commit: Callable[[], None]


class CheckpointWriter:
    """Writes an engine's checkpoints in two phases.

    `save` writes this rank's part to a local file; training waits only for that. A thread then
    hashes it, uploads or renames it, and agrees with the other ranks' threads, and rank 0
    commits. All ranks must make the same calls in the same order.

    Args:
        engine: whose state to write.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # The threads use their own group: their collectives must not mix with training's.
        self.group = dist.new_group(backend="gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.blocked_s = 0.0
        self.failures: list[str] = []
        self._thread: threading.Thread | None = None
        self._broken: BaseException | None = None

    def save(
        self,
        checkpoint: Checkpoint,
        state: State,
        kinds: Sequence[StateName] | None = None,
        before_parts: Callable[[], None] = _nothing,
        before_commit: Callable[[], None] = _nothing,
        after_commit: Callable[[], None] = _nothing,
    ) -> None:
        """Start a checkpoint, once the previous one is done.

        Args:
            kinds: state names to write; None for everything.
            before_parts: called by rank 0's thread before any rank's part gets its name.
            before_commit, after_commit: called by rank 0's thread around the commit; the second
                must not raise. After a LostLeaseError of the others, no checkpoint is tried again.

        Raises:
            UnrecoverableError: too many consecutive checkpoints failed.
        """
        started_s = time.monotonic()
        self.wait()
        if len(self.failures) >= FAILED_SAVES:
            raise UnrecoverableError(self.failures[-1])
        kinds = tuple(kinds or (*STATES, *self.engine.train.ema))
        owned = self.engine.owned()
        url, name = checkpoint.url, piece_file(self.rank, self.world)
        pieces = place_pieces(owned, name)
        saving = _Saving(
            checkpoint, state, kinds, pieces, before_parts, before_commit, after_commit
        )
        stack, error = contextlib.ExitStack(), None
        paths: dict[StateName, Path] = {}
        try:
            for kind in kinds:
                atomic = storage.atomic_file(storage.join(url, kind, name), pieces_bytes(owned))
                paths[kind] = stack.enter_context(atomic)
                write_pieces(paths[kind], owned, kind)
        except Exception as problem:
            error = problem
        self._thread = threading.Thread(
            target=self._in_thread,
            args=(saving, stack, paths, error),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()
        self.blocked_s += time.monotonic() - started_s

    def wait(self) -> None:
        """Return once no checkpoint is in progress.

        Raises:
            DiffitError: the ranks could not agree on one, as another rank has died.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._broken is not None:
            raise DiffitError(f"a checkpoint could not be agreed on: {self._broken}")

    def take_blocked_s(self) -> float:
        """Seconds that checkpoints blocked training since the last call."""
        seconds, self.blocked_s = self.blocked_s, 0.0
        return seconds

    def save_now(self, checkpoint: Checkpoint, state: State, **rest: Any) -> None:
        """Write a checkpoint and return once it is committed.

        Raises:
            UnrecoverableError: it could not be written.
        """
        self.save(checkpoint, state, **rest)
        started_s = time.monotonic()
        self.wait()
        self.blocked_s += time.monotonic() - started_s
        if self.failures:
            raise UnrecoverableError(self.failures[-1])

    def _in_thread(self, saving: _Saving, *rest: Any) -> None:
        try:
            self._finish(saving, *rest)
        # A collective that failed: this rank must not go on without the others.
        except BaseException as problem:
            self._broken = problem

    def _finish(
        self,
        saving: _Saving,
        stack: contextlib.ExitStack,
        paths: dict[StateName, Path],
        error: Exception | None,
    ) -> None:
        """Hash, upload, agree, commit; runs in a thread on every rank."""
        mine: dict[str, Piece] | str
        refused, final = self._refused(saving)
        try:
            with stack:
                if refused is not None:
                    raise DiffitError(refused)
                if error is not None:
                    raise error
                mine = hash_pieces(saving.pieces, paths)
        except Exception as problem:
            mine = f"rank {self.rank}: {problem}"
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, mine, group=self.group)
        failed = [part for part in everyone if isinstance(part, str)]
        if refused is not None:  # the same on every rank
            failed = failed[:1]
        if not failed and self.rank == 0:
            try:
                saving.before_commit()
                saving.checkpoint.write_commit(
                    saving.state, self.engine.shapes, everyone, saving.kinds
                )
            except Exception as problem:
                failed, final = [f"rank 0: {problem}"], isinstance(problem, LostLeaseError)
        verdict: list[Any] = [failed, final]
        dist.broadcast_object_list(verdict, src=0, group=self.group)
        if not verdict[0]:
            self.failures = []
            if self.rank == 0:
                saving.after_commit()
            return
        text = f"checkpoint {saving.checkpoint.url} could not be written: {'; '.join(verdict[0])}"
        self.failures += [text] * (FAILED_SAVES if verdict[1] else 1)
        if self.rank == 0:
            logger.info(f"Save failed: {text}")

    def _refused(self, saving: _Saving) -> tuple[str | None, bool]:
        """Why rank 0 may not write the checkpoint, None if it may; and whether for good."""
        answer: list[Any] = [None, False]
        if self.rank == 0:
            try:
                saving.before_parts()
            except Exception as problem:
                answer = [str(problem), isinstance(problem, LostLeaseError)]
        dist.broadcast_object_list(answer, src=0, group=self.group)
        return answer[0], answer[1]


def load_checkpoint(engine: Engine, checkpoint: Checkpoint) -> State:
    """Load master weights, moments and EMA, from any world size and ZeRO stage (collective).

    Each rank reads what it owns, so all together read every byte once; the weights that the model
    computes with are made from the master weights.

    Raises:
        DamagedCheckpoint: on all ranks; the engine then holds anything.
        DiffitError: it could not be read, for example because storage is unreachable.
    """
    problem: str | None = None
    state = None
    try:
        state = checkpoint.state
        kinds = (*STATES, *engine.train.ema)
        checkpoint.fill([(s.slice, s.values) for s in engine.owned()], kinds)
    except DamagedCheckpoint as error:
        problem = error.what
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    damages = [text for text in problems if text is not None]
    if damages or state is None:
        raise DamagedCheckpoint(checkpoint.url, damages[0])
    engine.publish_owned()
    engine.set_optimizer_steps(state.optimizer_steps)
    return state


def agreed_steps(checkpoints: Checkpoints, group: dist.ProcessGroup | None = None) -> list[int]:
    """The committed steps as rank 0 sees them (collective)."""
    steps: list[Any] = [checkpoints.refresh().steps if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(steps, group=group)
    return list(steps[0])


def load_newest(engine: Engine, checkpoints: Checkpoints) -> State | None:
    """Load the newest committed checkpoint that is intact (collective); None without checkpoints.

    A damaged checkpoint is logged and loses its commit marker, so that training writes it again
    at that step.

    Raises:
        DiffitError: all checkpoints are damaged.
    """
    steps = agreed_steps(checkpoints)
    while steps:
        checkpoint = Checkpoint(checkpoints.folder, steps.pop())
        try:
            return load_checkpoint(engine, checkpoint)
        except DamagedCheckpoint as error:
            if not steps:
                raise DiffitError(
                    f"{error}; there is no earlier checkpoint; choose another --run"
                ) from error
            if dist.get_rank() == 0:
                logger.info(f"Resuming from step {steps[-1]:,}: {error}")
                checkpoint.revoke()
            dist.barrier()
    return None
