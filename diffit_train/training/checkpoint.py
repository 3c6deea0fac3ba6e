"""Write and load sharded checkpoints: every rank its own pieces, the commit marker last."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from diffit_train import storage
from diffit_train.checkpoints import (
    SCHEMA,
    STATES,
    Commit,
    FileEntry,
    Index,
    Kind,
    Parameter,
    Piece,
    Slice,
    State,
    checkpoint_url,
    committed_steps,
    damage,
    fill_slices,
    read_state,
)
from diffit_train.errors import DiffitError
from diffit_train.training.engine import Engine, Stretch

# Checkpoints in a row that may fail before training stops: storage may be away for a while.
FAILED_SAVES = 3


class GivingUp(DiffitError):
    """What all ranks find alike, and would find again if they were started anew."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class _Saving:
    """A checkpoint on its way: this rank's part is on the disk, the rest is the thread's."""

    url: str
    state: State
    kinds: tuple[Kind, ...]
    pieces: list[tuple[str, int, int]]
    name: str
    before_commit: Callable[[], None]
    after_commit: Callable[[], None]


class CheckpointWriter:
    """Writes checkpoints of an engine, in two parts.

    `save` writes this rank's part to a local file, which is all that training waits for. A thread
    hashes it, uploads or renames it, and agrees with the other ranks' threads; then rank 0
    commits. All ranks must make the same calls in the same order.

    Args:
        say: told what went wrong where training goes on nevertheless.
    """

    def __init__(self, engine: Engine, say: Callable[[str], None] = lambda text: None) -> None:
        self.engine, self.say = engine, say
        # A group of the threads' own: their collectives must not meet those of training.
        self.group = dist.new_group(backend="gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.blocked_s = 0.0
        self.failures: list[str] = []
        self._thread: threading.Thread | None = None

    def save(
        self,
        run_url: str,
        state: State,
        kinds: Sequence[Kind] | None = None,
        before_commit: Callable[[], None] = _nothing,
        after_commit: Callable[[], None] = _nothing,
    ) -> None:
        """Begin a checkpoint, once the one before it is done.

        Args:
            kinds: what to write; None for everything.
            before_commit, after_commit: called by rank 0's thread around the commit; the second
                must not raise.

        Raises:
            GivingUp: too many checkpoints in a row could not be written.
        """
        started_s = time.monotonic()
        self.wait()
        if len(self.failures) >= FAILED_SAVES:
            raise GivingUp(self.failures[-1])
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
        """Return when no checkpoint is on its way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def save_now(self, run_url: str, state: State, **rest: Any) -> None:
        """Write a checkpoint and return when it is committed.

        Raises:
            GivingUp: it could not be written.
        """
        self.save(run_url, state, **rest)
        started_s = time.monotonic()
        self.wait()
        self.blocked_s += time.monotonic() - started_s
        if self.failures:
            raise GivingUp(self.failures[-1])

    def _finish(
        self,
        saving: _Saving,
        stack: contextlib.ExitStack,
        path: Path | None,
        error: Exception | None,
    ) -> None:
        """Hash, upload, agree, commit; on every rank, in a thread."""
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
            self.say(text)


def write_pieces(path: Path, stretches: Iterable[Stretch], kinds: Sequence[Kind]) -> None:
    """Write stretches as a safetensors file of 1-D tensors named KIND/PARAMETER.

    The library's own writer wants every tensor in memory apart from the others, which would be
    a second copy of the state; here one stretch at a time passes through the memory of the host.
    """
    stretches = list(stretches)
    header: dict[str, Any] = {}
    place = 0
    for kind in kinds:
        for stretch in stretches:
            size = 4 * stretch.slice.length
            header[f"{kind}/{stretch.slice.name}"] = {
                "dtype": "F32",
                "shape": [stretch.slice.length],
                "data_offsets": [place, place + size],
            }
            place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for kind in kinds:
            for stretch in stretches:
                values = stretch.values[kind].detach().to("cpu", torch.float32)
                values.contiguous().numpy().tofile(file)


def save_whole(
    values: dict[Kind, dict[str, torch.Tensor]],
    shapes: dict[str, torch.Size],
    run_url: str,
    state: State,
) -> None:
    """Write a checkpoint from whole tensors, by kind and parameter, in this process alone."""
    url, name = checkpoint_url(run_url, state.step), "rank-00000-of-00001.safetensors"
    stretches = [
        Stretch(Slice(key, 0, shape.numel()), {k: v[key].reshape(-1) for k, v in values.items()})
        for key, shape in shapes.items()
    ]
    with storage.atomic_file(storage.join(url, name)) as path:
        write_pieces(path, stretches, tuple(values))
        entry = FileEntry(bytes=path.stat().st_size, sha256=storage.sha256_file(path))
    pieces = [(key, 0, shape.numel()) for key, shape in shapes.items()]
    part: dict[str, Any] = {"name": name, "entry": entry.model_dump(), "pieces": pieces}
    commit_checkpoint(url, state, shapes, [part], tuple(values))


def load_checkpoint(engine: Engine, run_url: str, step: int) -> State:
    """Fill this rank's master weights, moments and averages; any world size, any ZeRO stage.

    The model itself must have been given the checkpoint's weights before the engine was made.
    """
    state = read_state(run_url, step)
    owned = engine.owned()
    _fill(owned, run_url, step, (*STATES, *engine.train.ema))
    _fill(engine.replicated(), run_url, step, STATES)
    engine.set_optimizer_steps(state.optimizer_steps)
    return state


def load_weights(model: nn.Module, run_url: str, step: int) -> None:
    """Give a model the master weights of a checkpoint, without a second copy of them."""
    wanted = [
        (Slice(name, 0, p.numel()), {"master": p.detach().view(-1)})
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    fill_slices(run_url, step, wanted, ("master",))


def _fill(stretches: list[Stretch], run_url: str, step: int, kinds: tuple[Kind, ...]) -> None:
    if stretches:
        fill_slices(run_url, step, [(s.slice, s.values) for s in stretches], kinds)


def agreed_steps(run_url: str, group: dist.ProcessGroup | None = None) -> list[int]:
    """The run's committed steps as rank 0 sees them, on all ranks, which must call it together."""
    steps: list[Any] = [committed_steps(run_url) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(steps, group=group)
    return list(steps[0])


def newest_whole(run_url: str, say: Callable[[str], None]) -> int | None:
    """Step of the newest committed checkpoint that is not damaged; None where there is none.

    All ranks must call it; they share out the reading. A damaged one is named and loses its
    commit marker, so that training writes it again when it comes by.

    Raises:
        DiffitError: there are checkpoints, and all of them are damaged.
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
            raise DiffitError(f"{problems[0]}; there is no checkpoint before it")
        if rank == 0:
            say(f"{problems[0]}; going on from step {earlier[-1]:,}")
            storage.remove(storage.join(checkpoint_url(run_url, step), "commit.json"))
        dist.barrier()
    return None


def remove_old(run_url: str, keep: int, every: int | None = None) -> None:
    """Remove all but the newest `keep` committed checkpoints, that of step 0, and those for good.

    The commit marker goes first, so a half-removed checkpoint is never taken for a whole one.

    Args:
        every: checkpoints at multiples of so many steps are kept for good.
    """
    for step in [s for s in committed_steps(run_url) if s > 0][:-keep]:
        if every is not None and step % every == 0:
            continue
        url = checkpoint_url(run_url, step)
        storage.remove(storage.join(url, "commit.json"))
        storage.remove(url)


def commit_checkpoint(
    url: str,
    state: State,
    shapes: dict[str, torch.Size],
    parts: list[dict[str, Any]],
    kinds: tuple[Kind, ...],
) -> None:
    """Write index, state and, last, the commit marker over the files that ranks have written."""
    by_name: dict[str, list[Piece]] = {name: [] for name in shapes}
    for part in parts:
        file = str(part["name"])
        for name, offset, length in part["pieces"]:
            by_name[name].append(Piece(file=file, offset=offset, length=length))
    index = Index(
        schema_version=SCHEMA,
        kinds=kinds,
        files={str(p["name"]): FileEntry.model_validate(p["entry"]) for p in parts},
        parameters={
            name: Parameter(
                shape=tuple(shapes[name]),
                pieces=tuple(sorted(pieces, key=lambda piece: piece.offset)),
            )
            for name, pieces in by_name.items()
        },
    )
    _require_whole(index)
    texts = {
        "index.json": json.dumps(index.model_dump(mode="json"), indent=1).encode(),
        "state.json": json.dumps(state.model_dump(mode="json"), indent=1).encode(),
    }
    for file, data in texts.items():
        storage.write_bytes(storage.join(url, file), data)
    commit = Commit(
        index_sha256=storage.sha256_bytes(texts["index.json"]),
        state_sha256=storage.sha256_bytes(texts["state.json"]),
    )
    storage.write_json(storage.join(url, "commit.json"), commit.model_dump())


def _require_whole(index: Index) -> None:
    """Pieces must cover each parameter without gap or overlap; else a checkpoint would lie."""
    for name, parameter in index.parameters.items():
        end = 0
        for piece in parameter.pieces:
            if piece.offset != end:
                raise RuntimeError(f"checkpoint pieces of {name} leave a gap or overlap at {end}")
            end += piece.length
        expected = 1
        for side in parameter.shape:
            expected *= side
        if end != expected:
            raise RuntimeError(f"checkpoint pieces of {name} hold {end} of {expected} elements")
