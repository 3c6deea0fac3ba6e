"""The sharded checkpoint format: reading, writing, retention.

    runs/RUN/checkpoints/step-0000001000/
        KIND/rank-00000-of-00002.safetensors   1-D float32 pieces named by parameter
        index.json     where the pieces of every parameter lie, and the sha256 of each
        state.json     step, images seen, recipe hash, MLflow run
        commit.json    sha256 of the two above; written last

KIND is a state name. A piece is a slice of a flattened parameter, so a checkpoint can be read at
any world size. A reader of a part reads and verifies the pieces that hold some of it, and no other.
Training writes it, evaluation reads it; neither imports the other. No pickle.
"""

from __future__ import annotations

import errno
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from diffit_train import storage
from diffit_train.errors import DiffitError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHECKPOINT_SCHEMA = 1
STEP_DIGITS = 10
# Neighboring pieces of a file are read together, up to this size: one request to an object store.
READ_BYTES = 16 * 2**20
# Requests in flight per reader; each holds that much in memory.
READERS = 8
# What a piece holds: one of STATES, or the name of an EMA.
StateName = str
STATES: tuple[StateName, ...] = ("master", "exp_avg", "exp_avg_sq")
M = TypeVar("M", bound=BaseModel)


class DamagedCheckpoint(DiffitError):
    """A committed checkpoint is corrupt; never raised because storage is unreachable."""

    def __init__(self, url: str, what: str) -> None:
        super().__init__(f"checkpoint {url} is damaged: {what}")
        self.what = what


class Piece(storage.Record):
    """`length` elements of a flattened parameter from `offset`, and the file that holds them.

    Attributes:
        file: name of the file in the folder of each kind.
        start: byte of the file at which they begin.
        sha256: of their bytes, by kind.
    """

    file: str
    offset: int
    length: int
    start: int
    sha256: dict[StateName, str] = Field(default_factory=dict)


class Parameter(storage.Record):
    """A parameter's shape and its pieces, in ascending order without gaps."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Index(storage.Record):
    """Contents of a checkpoint; one created from imported weights holds only `ema`."""

    schema_version: int
    kinds: tuple[StateName, ...]
    parameters: dict[str, Parameter]


class LogMark(storage.Record):
    """The number of records of log.jsonl up to the checkpoint, and the SHA-256 of their lines."""

    records: int
    sha256: str


class State(storage.Record):
    """Training progress at the checkpoint.

    Attributes:
        optimizer_steps: Adam's own step count.
        interval: loss sums since the last log record, if the checkpoint falls between two.
        log: what recognizes its log; None in imported ones.
    """

    step: int
    images_seen: int
    optimizer_steps: int
    recipe_hash: str
    mlflow_run_id: str
    world_size: int
    zero_stage: int
    interval: tuple[tuple[float, ...], ...] | None = None
    log: LogMark | None = None


class Commit(storage.Record):
    """The commit marker."""

    index_sha256: str
    state_sha256: str


@dataclass(frozen=True)
class Slice:
    """A slice of a flattened parameter."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True)
class OwnedSlice:
    """A slice of a flattened parameter on this rank, and the tensors that hold its state.

    Attributes:
        values: 1-D views of the slice's length, by state name.
    """

    slice: Slice
    values: dict[StateName, Tensor]


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"step-{step:0{STEP_DIGITS}d}"


def checkpoint_url(run_url: str, step: int) -> str:
    """Folder of a run's checkpoint."""
    return storage.join(run_url, "checkpoints", step_name(step))


def reconstructed_url(run_url: str, sigma_rel: float, step: int) -> str:
    """File for an EMA reconstructed from a run's snapshots."""
    return storage.join(run_url, "export", f"ema-{sigma_rel:g}-{step:010d}.safetensors")


def committed_steps(run_url: str) -> list[int]:
    """Steps of the run's committed checkpoints, ascending."""
    folder = storage.join(run_url, "checkpoints")
    steps = (
        re.fullmatch(rf"step-([0-9]{{{STEP_DIGITS}}})", name) for name in storage.list_names(folder)
    )
    found = [int(match[1]) for match in steps if match]
    return [
        s for s in found if storage.exists(storage.join(checkpoint_url(run_url, s), "commit.json"))
    ]


def require_step(run_url: str, step: int | None) -> int:
    """The requested step, or the newest.

    Raises:
        UserError: the run has no such committed checkpoint.
    """
    steps = committed_steps(run_url)
    if not steps:
        raise UserError(f"{run_url} has no committed checkpoint; run `diffit train` first")
    if step is None:
        return steps[-1]
    if step not in steps:
        known = ", ".join(str(s) for s in steps)
        raise UserError(f"{run_url} has no committed checkpoint at step {step}; it has: {known}")
    return step


def read_state(run_url: str, step: int) -> State:
    """state.json of a committed checkpoint, its hash verified."""
    url = checkpoint_url(run_url, step)
    return _read_model(State, url, "state.json", _commit(url).state_sha256)


def read_index(run_url: str, step: int) -> Index:
    """index.json of a committed checkpoint, its hash verified."""
    url = checkpoint_url(run_url, step)
    index = _read_model(Index, url, "index.json", _commit(url).index_sha256)
    if index.schema_version != CHECKPOINT_SCHEMA:
        raise DiffitError(
            f"{url} has schema {index.schema_version}, but this version reads {CHECKPOINT_SCHEMA}; "
            "install the version that wrote it"
        )
    return index


def damage(run_url: str, step: int) -> str | None:
    """What is damaged in a committed checkpoint, or None; reads every byte.

    Raises:
        DiffitError: it could not be checked, for example because storage is unreachable.
    """
    try:
        read_state(run_url, step)
        index = read_index(run_url, step)
        _read_pieces(
            checkpoint_url(run_url, step),
            [
                _Wanted(kind, piece)
                for parameter in index.parameters.values()
                for piece in parameter.pieces
                for kind in index.kinds
            ],
        )
    except DamagedCheckpoint as error:
        return error.what
    return None


def checkpoint_digest(run_url: str, step: int) -> str:
    """SHA-256 that identifies a checkpoint's contents: the hash of its index."""
    return _commit(checkpoint_url(run_url, step)).index_sha256


def weights_of(index: Index) -> list[str]:
    """Names of the weights in a checkpoint: raw, and its EMAs."""
    kinds = [kind for kind in index.kinds if kind not in STATES[1:]]
    return ["raw" if kind == "master" else kind for kind in kinds]


def read_weights(run_url: str, step: int, kind: str) -> dict[str, Tensor]:
    """Every trainable parameter in full, by name, in fp32; reads no other kind's bytes.

    Args:
        kind: `raw` for the master weights, or the name of an EMA.

    Raises:
        UserError: the checkpoint has no such weights, or some are NaN or infinite.
        DiffitError: a file is missing or damaged.
    """
    from diffit_train.models.published import require_finite

    index = read_index(run_url, step)
    known = weights_of(index)
    if kind not in known:
        imported = "" if "raw" in known else ": its weights were imported"
        raise UserError(
            f"checkpoint {checkpoint_url(run_url, step)} has no weights {kind!r}, only "
            f"{', '.join(known)}{imported}"
        )
    wanted = [Slice(name, 0, math.prod(p.shape)) for name, p in index.parameters.items()]
    source: StateName = "master" if kind == "raw" else kind
    flat = read_slices(run_url, step, wanted, (source,))[source]
    weights = {
        s.name: t.view(index.parameters[s.name].shape) for s, t in zip(wanted, flat, strict=True)
    }
    require_finite(weights, f"{kind} of {checkpoint_url(run_url, step)}")
    return weights


def read_slices(
    run_url: str, step: int, wanted: list[Slice], kinds: tuple[StateName, ...]
) -> dict[StateName, list[Tensor]]:
    """For each state name, the wanted slices as 1-D float32 tensors, in the order given.

    Raises:
        UserError, DiffitError: as `fill_slices`.
    """
    import torch

    out = {kind: [torch.empty(s.length) for s in wanted] for kind in kinds}
    targets = [{kind: out[kind][number] for kind in kinds} for number in range(len(wanted))]
    fill_slices(run_url, step, list(zip(wanted, targets, strict=True)), kinds)
    return out


def fill_slices(
    run_url: str,
    step: int,
    wanted: Sequence[tuple[Slice, Mapping[StateName, Tensor]]],
    kinds: tuple[StateName, ...],
) -> None:
    """Read slices into existing 1-D tensors of any device and precision.

    Only what holds part of them is read, and verified while it is read; after an error, the
    tensors hold anything.

    Raises:
        UserError: the checkpoint lacks one of the states, for example because it was imported.
        DiffitError: a file is missing or damaged, or a parameter is not in the checkpoint.
    """
    index = read_index(run_url, step)
    url = checkpoint_url(run_url, step)
    absent = [kind for kind in kinds if kind not in index.kinds]
    if absent:
        raise UserError(
            f"checkpoint {url} holds no {', '.join(absent)}, only {', '.join(index.kinds)}"
            + ("" if "master" in index.kinds else ": its weights were imported")
        )
    pieces: dict[tuple[StateName, str, int], _Wanted] = {}
    for part, targets in wanted:
        if part.name not in index.parameters:
            raise DiffitError(f"{url} has no parameter {part.name!r}: it holds a different model")
        for piece in index.parameters[part.name].pieces:
            start, length = _overlap(part, piece)
            if length <= 0:
                continue
            for kind in kinds:
                target = targets[kind][start - part.offset :][:length]
                key = (kind, piece.file, piece.start)
                found = pieces.setdefault(key, _Wanted(kind, piece))
                found.targets.append((start - piece.offset, target))
    _read_pieces(url, list(pieces.values()))


def _overlap(part: Slice, piece: Piece) -> tuple[int, int]:
    start = max(part.offset, piece.offset)
    return start, min(part.offset + part.length, piece.offset + piece.length) - start


@dataclass(frozen=True)
class _Wanted:
    """A kind of a piece to read, and 1-D tensors to fill from an element of it on."""

    kind: StateName
    piece: Piece
    targets: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def file(self) -> str:
        """Its file, relative to the checkpoint."""
        return f"{self.kind}/{self.piece.file}"

    @property
    def stop(self) -> int:
        """The byte of the file behind it."""
        return self.piece.start + 4 * self.piece.length


def _read_pieces(url: str, wanted: Sequence[_Wanted]) -> None:
    """Read pieces in threads, verify each, and fill its tensors; the first error is raised."""
    rows = _rows([one for one in wanted if one.piece.length])
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for _ in pool.map(lambda row: _read_row(url, row), rows):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _rows(wanted: Sequence[_Wanted]) -> Iterator[list[_Wanted]]:
    """Pieces that follow each other in a file, together up to `READ_BYTES`."""
    row: list[_Wanted] = []
    for one in sorted(wanted, key=lambda one: (one.file, one.piece.start)):
        follows = row and (row[-1].file, row[-1].stop) == (one.file, one.piece.start)
        if row and not (follows and one.stop - row[0].piece.start <= READ_BYTES):
            yield row
            row = []
        row.append(one)
    if row:
        yield row


def _read_row(url: str, row: Sequence[_Wanted]) -> None:
    import torch

    file, start = row[0].file, row[0].piece.start
    try:
        data = storage.read_range(storage.join(url, file), start, row[-1].stop)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(url, f"{file} is missing") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # it ends before
            raise
        data = b""
    for one in row:
        part = data[one.piece.start - start : one.stop - start]
        if storage.sha256_bytes(part) != one.piece.sha256.get(one.kind):
            raise DamagedCheckpoint(url, f"{file} differs from its recorded sha256")
        if not one.targets:
            continue
        values = torch.frombuffer(bytearray(part), dtype=torch.float32)
        with torch.no_grad():  # this mode belongs to the thread
            for offset, target in one.targets:
                target.copy_(values[offset : offset + len(target)])


def _commit(url: str) -> Commit:
    try:
        return Commit.model_validate_json(storage.read_bytes(storage.join(url, "commit.json")))
    except FileNotFoundError as error:
        raise DiffitError(f"checkpoint {url} is not committed: it was never finished") from error
    except ValidationError as error:
        raise DamagedCheckpoint(url, "commit.json is not a commit marker") from error


def _read_model(model: type[M], url: str, file: str, sha256: str) -> M:
    try:
        data = storage.read_bytes(storage.join(url, file))
    except FileNotFoundError as error:
        raise DamagedCheckpoint(url, f"{file} is missing") from error
    if storage.sha256_bytes(data) != sha256:
        raise DamagedCheckpoint(url, f"{file} differs from its recorded sha256")
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise DamagedCheckpoint(url, f"{file}: {error.error_count()} invalid fields") from error


# Folder of EMA snapshots under a run, in the checkpoint format.
SNAPSHOTS = "ema-snapshots"


def piece_file(rank: int, world: int) -> str:
    """Name of a rank's file in the folder of each kind."""
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def place_pieces(slices: Iterable[OwnedSlice], file: str) -> dict[str, Piece]:
    """Where a rank's slices lie in its files, one for each parameter that it holds a part of."""
    slices = list(slices)
    start, out = len(_header(slices)), {}
    for part in (s.slice for s in slices):
        out[part.name] = Piece(file=file, offset=part.offset, length=part.length, start=start)
        start += 4 * part.length
    return out


def write_pieces(path: Path, slices: Iterable[OwnedSlice], kind: StateName) -> None:
    """Write a kind of a rank's slices as a safetensors file of 1-D tensors.

    The library's own writer needs every tensor in memory separately, a second copy of the state;
    this one moves one slice at a time through host memory.
    """
    import torch

    slices = list(slices)
    with path.open("wb") as file:
        file.write(_header(slices))
        for part in slices:
            values = part.values[kind].detach().to("cpu", torch.float32)
            file.write(values.contiguous().numpy().data)


def hash_pieces(pieces: Mapping[str, Piece], files: Mapping[StateName, Path]) -> dict[str, Piece]:
    """The pieces with the hashes of their bytes in a rank's files, one for each kind."""
    hashes: dict[str, dict[StateName, str]] = {name: {} for name in pieces}
    for kind, path in files.items():
        with path.open("rb") as file:
            for name, piece in pieces.items():
                file.seek(piece.start)
                hashes[name][kind] = storage.sha256_bytes(file.read(4 * piece.length))
    return {name: p.model_copy(update={"sha256": hashes[name]}) for name, p in pieces.items()}


def pieces_bytes(slices: Iterable[OwnedSlice]) -> int:
    """Size of a kind of a rank's slices, without the header."""
    return sum(4 * part.slice.length for part in slices)


def _header(slices: Sequence[OwnedSlice]) -> bytes:
    """The safetensors header of a file of 1-D float32 tensors."""
    header: dict[str, Any] = {}
    offset = 0
    for part in (s.slice for s in slices):
        size = 4 * part.length
        header[part.name] = {
            "dtype": "F32",
            "shape": [part.length],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def save_whole(
    values: dict[StateName, dict[str, Tensor]],
    shapes: dict[str, torch.Size],
    run_url: str,
    state: State,
) -> None:
    """Write a checkpoint from full tensors, by state name and parameter, in a single process."""
    url, name = checkpoint_url(run_url, state.step), piece_file(0, 1)
    slices = [
        OwnedSlice(Slice(key, 0, shape.numel()), {k: v[key].reshape(-1) for k, v in values.items()})
        for key, shape in shapes.items()
    ]
    with ExitStack() as stack:
        files: dict[StateName, Path] = {}
        for kind in values:
            file = storage.atomic_file(storage.join(url, kind, name), pieces_bytes(slices))
            files[kind] = stack.enter_context(file)
            write_pieces(files[kind], slices, kind)
        pieces = hash_pieces(place_pieces(slices, name), files)
    commit_checkpoint(url, state, shapes, [pieces], tuple(values))


def prune(run_url: str, keep: int, every: int | None = None, protected: Iterable[int] = ()) -> None:
    """Remove all committed checkpoints except step 0, the newest `keep`, and permanent ones.

    The commit marker is removed first, so a half-removed checkpoint never looks complete.

    Args:
        every: checkpoints at multiples of this many steps are kept permanently.
        protected: steps that are still needed, for example because their evaluation is pending.
    """
    needed = set(protected)
    for step in [s for s in committed_steps(run_url) if s > 0][:-keep]:
        if step in needed or (every is not None and step % every == 0):
            continue
        url = checkpoint_url(run_url, step)
        storage.remove(storage.join(url, "commit.json"))
        storage.remove(url)


def remove_unfinished(run_url: str) -> None:
    """Remove the checkpoints and snapshots of a run that were never committed."""
    for base in (run_url, storage.join(run_url, SNAPSHOTS)):
        folder, committed = storage.join(base, "checkpoints"), map(step_name, committed_steps(base))
        for name in set(storage.list_names(folder)).difference(committed):
            storage.remove(storage.join(folder, name))
    storage.remove_temporary(run_url)


def commit_checkpoint(
    url: str,
    state: State,
    shapes: dict[str, torch.Size],
    ranks: Sequence[Mapping[str, Piece]],
    kinds: tuple[StateName, ...],
) -> None:
    """Write the index, the state and, last, the commit marker for the pieces the ranks wrote."""
    by_name: dict[str, list[Piece]] = {name: [] for name in shapes}
    for pieces in ranks:
        for name, piece in pieces.items():
            by_name[name].append(piece)
    index = Index(
        schema_version=CHECKPOINT_SCHEMA,
        kinds=kinds,
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
    """Check that the pieces cover each parameter without gap or overlap."""
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
