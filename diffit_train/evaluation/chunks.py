"""The chunks that an evaluation is generated, stored and read in; and samples.npz from them.

A chunk is a range of whole batches, named by its first image and the one after its last. Its images
are committed before their measurements, so a chunk with measurements is complete. The ranges may
change between runs: existing chunks are kept, the rest is generated.

    chunk-FIRST-STOP.safetensors   measurements, one row per image
    images-FIRST-STOP.npy          all images, if they are kept
    grid-FIRST-STOP.npy            else those of the grid, if the chunk has any
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from diffit_train import storage
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.stored_arrays import (
    DamagedArrays,
    read_arrays,
    read_images,
    write_arrays,
    write_images,
)

# Measured arrays: labels and features always, the others if the feature network provides them.
LABELS = "labels"
FEATURES = "features"
SPATIAL = "spatial"
LOGITS = "logits"
PREDICTIONS = "seen"
_CHUNK_NAME = re.compile(r"chunk-(\d{7})-(\d{7})\.safetensors")


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
                    f"{chunk_name(part)}"
                )
            found += self._cut(covered, part.first)
            covered = part.stop
        return found

    def _cut(self, first: int, stop: int) -> Iterator[Range]:
        size = self.batch_size * self.batches
        for start in range(first, stop, size):
            yield Range(start, min(start + size, stop))


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
    if kept is None:
        write_images(storage.join(url, images_name(part)), pixels)
    elif len(kept):
        write_images(storage.join(url, grid_name(part)), pixels[list(kept)])
    write_arrays(storage.join(url, chunk_name(part)), measured, {"key": key})


def read_chunk(url: str, part: Range, key: str) -> dict[str, np.ndarray]:
    """A chunk's measurements.

    Raises:
        DiffitError: they are damaged, or belong to another evaluation.
    """
    name = storage.join(url, chunk_name(part))
    try:
        rows, metadata = read_arrays(name)
    except (FileNotFoundError, DamagedArrays) as error:
        raise DiffitError(f"{name} is damaged ({error}); delete it and evaluate again") from error
    if metadata != {"key": key}:
        raise DiffitError(f"{name} belongs to another evaluation; delete it and evaluate again")
    for tensor, values in rows.items():
        if values.ndim == 0 or len(values) != part.size:
            raise DiffitError(
                f"{name} holds {tensor} of shape {values.shape}, not {part.size} rows; delete it "
                "and evaluate again"
            )
    return rows


def read_chunk_images(url: str, part: Range) -> np.ndarray:
    """A chunk's images, (n, R, R, 3) uint8.

    Raises:
        DiffitError: they are damaged.
    """
    return _read_images(url, images_name(part), part, part.size)


def read_grid_images(url: str, part: Range, rows: Sequence[int]) -> np.ndarray:
    """A chunk's images in the grid, (m, R, R, 3) uint8.

    Args:
        rows: their rows in the chunk.

    Raises:
        DiffitError: they are damaged.
    """
    if storage.exists(storage.join(url, grid_name(part))):
        return _read_images(url, grid_name(part), part, len(rows))
    return np.asarray(read_chunk_images(url, part)[list(rows)])


def keep_only(url: str, part: Range, rows: Sequence[int]) -> None:
    """Remove a chunk's images, except for those in some rows."""
    images = storage.join(url, images_name(part))
    if not storage.exists(images):
        return
    if len(rows):
        write_images(storage.join(url, grid_name(part)), read_chunk_images(url, part)[list(rows)])
    storage.remove(images)


def _read_images(url: str, file: str, part: Range, count: int) -> np.ndarray:
    name = storage.join(url, file)
    try:
        pixels = read_images(name)
    except (FileNotFoundError, DamagedArrays) as error:
        raise DiffitError(
            f"{name} is damaged ({error}); delete it and {chunk_name(part)}, and evaluate again"
        ) from error
    if len(pixels) != count:
        raise DiffitError(
            f"{name} holds {len(pixels)} images, not {count}; delete it and {chunk_name(part)}, "
            "and evaluate again"
        )
    return pixels


def write_samples(url: str, target: str, samples: int, labels: list[np.ndarray]) -> None:
    """Write a samples file in ADM's format: `arr_0`, uint8 (N, R, R, 3), and `arr_1`, the labels.

    Holds one chunk in memory at a time.

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
    with (
        storage.atomic_file(target) as path,
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(read_chunk_images(url, part).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.save(file, np.concatenate(labels))
