"""The chunks that an evaluation is generated, stored and read in; and samples.npz from them.

A chunk is a range of whole batches, named by its first image and the one after its last. The ranges
may change between runs: existing chunks are kept, the rest is generated.

    images-FIRST-STOP.npy          all images, if they are kept
    grid-FIRST-STOP.npy            else those of the grid, if the chunk has any
    chunk-FIRST-STOP.safetensors   measurements, one row per image
    chunk-FIRST-STOP.json          the record that commits them
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load, save

from diffit_train import storage
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.committed import (
    Committed,
    commit,
    images_bytes,
    read_committed,
    read_images,
    read_record,
    write_record,
)

# Measured arrays: labels and features always, the others if the feature network provides them.
LABELS = "labels"
FEATURES = "features"
SPATIAL = "spatial"
LOGITS = "logits"
PREDICTIONS = "seen"
_CHUNK_NAME = re.compile(r"chunk-(\d{7})-(\d{7})\.json")


class Range(NamedTuple):
    """Images from `first` up to, not including, `stop`."""

    first: int
    stop: int

    @property
    def size(self) -> int:
        """Number of images."""
        return self.stop - self.first


@dataclass(frozen=True)
class Layout:
    """The ranges of an evaluation.

    Args:
        samples: images in total.
        batch_size: images per batch. Every batch is generated in full, so that an image does not
            depend on the total; images beyond `samples` are dropped.
        batches: batches per chunk.
    """

    samples: int
    batch_size: int
    batches: int

    def missing(self, existing: list[Range]) -> list[Range]:
        """Ranges that `existing` does not cover, cut into chunks.

        Raises:
            DiffitError: two existing ranges overlap.
        """
        found: list[Range] = []
        covered = 0
        for part in [*sorted(existing), Range(self.samples, self.samples)]:
            if part.first < covered:
                raise DiffitError(
                    f"images {part.first} to {covered - 1} are in two chunks; delete "
                    f"{record_name(part)}"
                )
            found += self._cut(covered, part.first)
            covered = part.stop
        return found

    def _cut(self, first: int, stop: int) -> Iterator[Range]:
        size = self.batch_size * self.batches
        for start in range(first, stop, size):
            yield Range(start, min(start + size, stop))


def record_name(part: Range) -> str:
    """File of a chunk's record."""
    return f"chunk-{part.first:07d}-{part.stop:07d}.json"


def chunk_name(part: Range) -> str:
    """File of a chunk's measurements."""
    return f"chunk-{part.first:07d}-{part.stop:07d}.safetensors"


def images_name(part: Range) -> str:
    """File of a chunk's images, uint8 (n, R, R, 3)."""
    return f"images-{part.first:07d}-{part.stop:07d}.npy"


def grid_name(part: Range) -> str:
    """File of a chunk's images in the grid, uint8 (m, R, R, 3), where the others are not kept."""
    return f"grid-{part.first:07d}-{part.stop:07d}.npy"


def committed_chunks(url: str, with_images: bool = False) -> list[Range]:
    """The complete chunks in an evaluation's folder, in order.

    Args:
        with_images: only those that keep all their images.
    """
    names = storage.list_names(url)
    matches = [_CHUNK_NAME.fullmatch(name) for name in names]
    parts = sorted(Range(int(m[1]), int(m[2])) for m in matches if m)
    kept = set(names) if with_images else set()
    return [part for part in parts if not with_images or images_name(part) in kept]


def write_chunk(
    url: str,
    part: Range,
    key: str,
    pixels: np.ndarray,
    measured: dict[str, np.ndarray],
    kept: Sequence[int] | None = None,
) -> None:
    """Commit a chunk.

    Args:
        key: key of the evaluation, stored to detect chunks of another one.
        pixels: (n, R, R, 3) uint8.
        measured: arrays with one row per image.
        kept: rows of `pixels` to keep; None for all.
    """
    files = {}
    if kept is None:
        files[images_name(part)] = images_bytes(pixels)
    elif len(kept):
        files[grid_name(part)] = images_bytes(pixels[list(kept)])
    rows = {name: np.ascontiguousarray(values) for name, values in measured.items()}
    files[chunk_name(part)] = save(rows)
    commit(storage.join(url, record_name(part)), files, {"key": key})


def read_chunk(url: str, part: Range, key: str) -> dict[str, np.ndarray]:
    """A chunk's measurements.

    Raises:
        DiffitError: they are damaged, or belong to another evaluation.
    """
    record = _record(url, part)
    if record.about != {"key": key}:
        name = storage.join(url, record_name(part))
        raise DiffitError(f"{name} belongs to another evaluation; delete it and evaluate again")
    rows: dict[str, np.ndarray] = load(read_committed(storage.join(url, chunk_name(part)), record))
    return rows


def read_chunk_images(url: str, part: Range) -> np.ndarray:
    """A chunk's images, (n, R, R, 3) uint8.

    Raises:
        DiffitError: they are damaged.
    """
    return read_images(storage.join(url, images_name(part)), _record(url, part))


def read_grid_images(url: str, part: Range, rows: Sequence[int]) -> np.ndarray:
    """A chunk's images in the grid, (m, R, R, 3) uint8.

    Args:
        rows: their rows in the chunk.

    Raises:
        DiffitError: they are damaged.
    """
    record = _record(url, part)
    if grid_name(part) in record.files:
        return read_images(storage.join(url, grid_name(part)), record)
    return np.asarray(read_chunk_images(url, part)[list(rows)])


def keep_only(url: str, part: Range, rows: Sequence[int]) -> None:
    """Remove a chunk's images, except for those in some rows."""
    record = _record(url, part)
    files = dict(record.files)
    if images_name(part) not in files:
        return
    if len(rows):
        grid = images_bytes(read_chunk_images(url, part)[list(rows)])
        storage.write_bytes(storage.join(url, grid_name(part)), grid)
        files[grid_name(part)] = storage.sha256_bytes(grid)
    del files[images_name(part)]
    record = Committed(files=files, about=record.about)
    write_record(storage.join(url, record_name(part)), record)
    storage.remove(storage.join(url, images_name(part)))


def remove_chunk(url: str, part: Range) -> None:
    """Remove a chunk, its record first."""
    for name in (record_name(part), chunk_name(part), images_name(part), grid_name(part)):
        storage.remove(storage.join(url, name))


def _record(url: str, part: Range) -> Committed:
    return read_record(storage.join(url, record_name(part)))


def write_samples(url: str, target: str, samples: int, labels: list[np.ndarray]) -> str:
    """Write a samples file in ADM's format: `arr_0`, uint8 (N, R, R, 3), and `arr_1`, the labels.

    Holds one chunk in memory at a time. Returns the file's SHA-256.

    Args:
        labels: labels of each chunk.

    Raises:
        UserError: images were not kept.
    """
    parts = committed_chunks(url)
    if parts != committed_chunks(url, with_images=True):
        raise UserError(
            f"samples.npz needs all images, but {url} keeps only those of the grid "
            "(evaluate.keep_images=grid); delete that folder and rerun with --npz: the same images "
            "are generated again"
        )
    shape = (samples, *read_chunk_images(url, parts[0]).shape[1:])
    with storage.atomic_file(target) as path:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts:
                    file.write(read_chunk_images(url, part).tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.save(file, np.concatenate(labels))
        return storage.sha256_file(path)
