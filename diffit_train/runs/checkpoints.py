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
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError

from diffit_train import storage
from diffit_train.errors import DiffitError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHECKPOINT_SCHEMA = 1
COMMIT = "commit.json"
# Stands for the step of the newest checkpoint.
NEWEST = "newest"
# Folder of EMA snapshots under a run, in the checkpoint format.
SNAPSHOTS = "ema-snapshots"
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


def reconstructed_url(run_url: str, sigma_rel: float, step: int) -> str:
    """File for an EMA reconstructed from a run's snapshots."""
    return storage.join(run_url, "export", f"ema-{sigma_rel:g}-{step:010d}.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint; its state and index are read and verified once.

    Attributes:
        folder: of the run, or of its EMA snapshots.
    """

    folder: str
    step: int

    @property
    def url(self) -> str:
        """Its folder."""
        return storage.join(self.folder, "checkpoints", step_name(self.step))

    @cached_property
    def commit(self) -> Commit:
        """commit.json.

        Raises:
            DiffitError: it was never finished, or is damaged.
        """
        try:
            data = storage.read_bytes(storage.join(self.url, COMMIT))
            return Commit.model_validate_json(data)
        except FileNotFoundError as error:
            raise DiffitError(
                f"checkpoint {self.url} is not committed: it was never finished"
            ) from error
        except ValidationError as error:
            raise DamagedCheckpoint(self.url, "commit.json is not a commit marker") from error

    @property
    def digest(self) -> str:
        """SHA-256 that identifies its contents: the hash of its index."""
        return self.commit.index_sha256

    @cached_property
    def state(self) -> State:
        """state.json, its hash verified."""
        return _read_model(State, self.url, "state.json", self.commit.state_sha256)

    @cached_property
    def index(self) -> Index:
        """index.json, its hash verified."""
        index = _read_model(Index, self.url, "index.json", self.commit.index_sha256)
        if index.schema_version != CHECKPOINT_SCHEMA:
            raise DiffitError(
                f"{self.url} has schema {index.schema_version}, but this version reads "
                f"{CHECKPOINT_SCHEMA}; install the version that wrote it"
            )
        return index

    @property
    def weights(self) -> list[str]:
        """Names of its weights: raw, and its EMAs."""
        kinds = [kind for kind in self.index.kinds if kind not in STATES[1:]]
        return ["raw" if kind == "master" else kind for kind in kinds]

    def load(self, weights: str) -> dict[str, Tensor]:
        """Every trainable parameter in full, by name, in fp32; reads no other state's bytes.

        Args:
            weights: `raw` for the master weights, or the name of an EMA.

        Raises:
            UserError: the checkpoint has no such weights, or some are NaN or infinite.
            DiffitError: a file is missing or damaged.
        """
        from diffit_train.models.published import require_finite

        if weights not in self.weights:
            imported = "" if "raw" in self.weights else ": its weights were imported"
            raise UserError(
                f"checkpoint {self.url} has no weights {weights!r}, only "
                f"{', '.join(self.weights)}{imported}"
            )
        shapes = {name: p.shape for name, p in self.index.parameters.items()}
        wanted = [Slice(name, 0, math.prod(shape)) for name, shape in shapes.items()]
        kind: StateName = "master" if weights == "raw" else weights
        flat = self.read(wanted, (kind,))[kind]
        tensors = {s.name: t.view(shapes[s.name]) for s, t in zip(wanted, flat, strict=True)}
        require_finite(tensors, f"{weights} of {self.url}")
        return tensors

    def read(
        self, wanted: Sequence[Slice], kinds: tuple[StateName, ...]
    ) -> dict[StateName, list[Tensor]]:
        """For each state name, the wanted slices as 1-D float32 tensors, in the order given.

        Raises:
            UserError, DiffitError: as `fill`.
        """
        import torch

        out = {kind: [torch.empty(s.length) for s in wanted] for kind in kinds}
        targets = [{kind: out[kind][number] for kind in kinds} for number in range(len(wanted))]
        self.fill(list(zip(wanted, targets, strict=True)), kinds)
        return out

    def fill(
        self,
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
        index = self.index
        absent = [kind for kind in kinds if kind not in index.kinds]
        if absent:
            raise UserError(
                f"checkpoint {self.url} holds no {', '.join(absent)}, only {', '.join(index.kinds)}"
                + ("" if "master" in index.kinds else ": its weights were imported")
            )
        pieces: dict[tuple[StateName, str, int], _Request] = {}
        for part, targets in wanted:
            if part.name not in index.parameters:
                raise DiffitError(
                    f"{self.url} has no parameter {part.name!r}: it holds a different model"
                )
            for piece in index.parameters[part.name].pieces:
                start = max(part.offset, piece.offset)
                length = min(part.offset + part.length, piece.offset + piece.length) - start
                if length <= 0:
                    continue
                for kind in kinds:
                    target = targets[kind][start - part.offset :][:length]
                    key = (kind, piece.file, piece.start)
                    read = pieces.setdefault(key, _Request(kind, piece))
                    read.targets.append((start - piece.offset, target))
        _read_pieces(self.url, list(pieces.values()))

    def find_corruption(self) -> str | None:
        """What is damaged, or None; reads every byte.

        Raises:
            DiffitError: it could not be checked, for example because storage is unreachable.
        """
        try:
            _ = self.state
            pieces = [piece for p in self.index.parameters.values() for piece in p.pieces]
            wanted = [_Request(kind, piece) for piece in pieces for kind in self.index.kinds]
            _read_pieces(self.url, wanted)
        except DamagedCheckpoint as error:
            return error.what
        return None

    def write_commit(
        self,
        state: State,
        shapes: Mapping[str, torch.Size],
        ranks: Sequence[Mapping[str, Piece]],
        kinds: tuple[StateName, ...],
    ) -> None:
        """Write the index, the state and, last, the commit marker of what the ranks wrote."""
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
        hashes = {}
        for file, record in (("index", index), ("state", state)):
            data = json.dumps(record.model_dump(mode="json"), indent=1).encode()
            storage.write_bytes(storage.join(self.url, f"{file}.json"), data)
            hashes[f"{file}_sha256"] = storage.sha256_bytes(data)
        storage.write_json(storage.join(self.url, COMMIT), Commit(**hashes).model_dump())

    def revoke(self) -> None:
        """Remove the commit marker, so that the checkpoint is not used any more."""
        storage.remove(storage.join(self.url, COMMIT))

    def remove(self) -> None:
        """Remove it, the commit marker first: a half-removed checkpoint never looks complete."""
        self.revoke()
        storage.remove(self.url)


class Checkpoints:
    """The committed checkpoints of a run by step, listed once: one request for 1,000 files.

    Args:
        folder: of the run, or of its EMA snapshots.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @cached_property
    def _by_step(self) -> dict[int, Checkpoint]:
        files = storage.sizes(storage.join(self.folder, "checkpoints"))
        names = (re.fullmatch(rf"step-([0-9]{{{STEP_DIGITS}}})/{COMMIT}", name) for name in files)
        steps = sorted(int(match[1]) for match in names if match)
        return {step: Checkpoint(self.folder, step) for step in steps}

    def refresh(self) -> Self:
        """List them again when they are next asked for."""
        self.__dict__.pop("_by_step", None)
        return self

    @property
    def steps(self) -> list[int]:
        """Their steps, ascending."""
        return list(self._by_step)

    @property
    def latest(self) -> Checkpoint | None:
        """The newest one."""
        return self._by_step[self.steps[-1]] if self._by_step else None

    @property
    def latest_step(self) -> int:
        """Its step; 0 if there is none."""
        return max(self._by_step, default=0)

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_step)

    def __len__(self) -> int:
        return len(self._by_step)

    def __contains__(self, step: object) -> bool:
        return step in self._by_step

    def __getitem__(self, step: int | str) -> Checkpoint:
        """The checkpoint of a step, or the `newest`.

        Raises:
            UserError: there is none.
        """
        if not self._by_step:
            raise UserError(f"{self.folder} has no committed checkpoint; run `diffit train` first")
        if step == NEWEST:
            return self._by_step[self.steps[-1]]
        if isinstance(step, str) and not step.isdigit():
            raise UserError(f"--step is {step!r}, but must be a step number or {NEWEST!r}")
        if int(step) not in self._by_step:
            known = ", ".join(map(str, self))
            raise UserError(
                f"{self.folder} has no committed checkpoint at step {step}; it has: {known}"
            )
        return self._by_step[int(step)]

    def prune(self, keep: int, every: int | None = None, protected: Iterable[int] = ()) -> None:
        """Remove all but step 0, the newest `keep`, and permanent ones.

        Args:
            every: checkpoints at multiples of this many steps are kept permanently.
            protected: steps that are still needed, for example for a pending evaluation.
        """
        needed = set(protected)
        for step in [s for s in self.refresh() if s > 0][:-keep]:
            if step not in needed and not (every is not None and step % every == 0):
                self._by_step[step].remove()
        self.refresh()

    def remove_unfinished(self) -> None:
        """Remove those that were never committed."""
        folder = storage.join(self.folder, "checkpoints")
        committed = map(step_name, self.refresh())
        for name in set(storage.list_names(folder)).difference(committed):
            storage.remove(storage.join(folder, name))


@dataclass(frozen=True)
class _Request:
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


def _read_pieces(url: str, wanted: Sequence[_Request]) -> None:
    """Read pieces in threads, verify each, and fill its tensors; the first error is raised."""
    rows = _rows([request for request in wanted if request.piece.length])
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for _ in pool.map(lambda row: _read_row(url, row), rows):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _rows(wanted: Sequence[_Request]) -> Iterator[list[_Request]]:
    """Pieces that follow each other in a file, together up to `READ_BYTES`."""
    row: list[_Request] = []
    for request in sorted(wanted, key=lambda request: (request.file, request.piece.start)):
        follows = row and (row[-1].file, row[-1].stop) == (request.file, request.piece.start)
        if row and not (follows and request.stop - row[0].piece.start <= READ_BYTES):
            yield row
            row = []
        row.append(request)
    if row:
        yield row


def _read_row(url: str, row: Sequence[_Request]) -> None:
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
    for request in row:
        part = data[request.piece.start - start : request.stop - start]
        if storage.sha256_bytes(part) != request.piece.sha256.get(request.kind):
            raise DamagedCheckpoint(url, f"{file} differs from its recorded sha256")
        if not request.targets:
            continue
        values = torch.frombuffer(bytearray(part), dtype=torch.float32)
        with torch.no_grad():  # this mode belongs to the thread
            for offset, target in request.targets:
                target.copy_(values[offset : offset + len(target)])


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
    folder: str,
    state: State,
) -> None:
    """Write a checkpoint from full tensors, by state name and parameter, in a single process."""
    checkpoint, name = Checkpoint(folder, state.step), piece_file(0, 1)
    slices = [
        OwnedSlice(Slice(key, 0, shape.numel()), {k: v[key].reshape(-1) for k, v in values.items()})
        for key, shape in shapes.items()
    ]
    with ExitStack() as stack:
        files: dict[StateName, Path] = {}
        for kind in values:
            file = storage.atomic_file(
                storage.join(checkpoint.url, kind, name), pieces_bytes(slices)
            )
            files[kind] = stack.enter_context(file)
            write_pieces(files[kind], slices, kind)
        pieces = hash_pieces(place_pieces(slices, name), files)
    checkpoint.write_commit(state, shapes, [pieces], tuple(values))


def _require_whole(index: Index) -> None:
    """Check that the pieces cover each parameter without gap or overlap."""
    for name, parameter in index.parameters.items():
        end = 0
        for piece in parameter.pieces:
            if piece.offset != end:
                raise RuntimeError(f"checkpoint pieces of {name} leave a gap or overlap at {end}")
            end += piece.length
        expected = math.prod(parameter.shape)
        if end != expected:
            raise RuntimeError(f"checkpoint pieces of {name} hold {end} of {expected} elements")
