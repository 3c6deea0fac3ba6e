"""Statistics of the real images: computed once from a source, or read from ADM's or EDM's files.

Both are kept under ROOT/references, named by a hash of everything they depend on.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError
from safetensors.numpy import load, save

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.evaluate import DATASET
from diffit_train.data.manifest import MANIFEST, Manifest, latents_url, load_manifest, read_inputs
from diffit_train.data.reading import read_batches
from diffit_train.data.sources import IMAGE_COLUMN, ImageList, Item, Source
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.chunks import FEATURES, SPATIAL
from diffit_train.evaluation.committed import DamagedFile, commit, read_committed, read_record
from diffit_train.evaluation.feature_networks import FeatureNetwork
from diffit_train.evaluation.features import features_digest
from diffit_train.evaluation.metrics import FeatureStats
from diffit_train.evaluation.reference_files import (
    fetch_reference,
    opened_reference,
    reference_file,
)
from diffit_train.progress import Progress, say

# Maximum number of parts of a source, and minimum number of images per part: the sums of 2048
# features are 32 MB, however many images there are.
MOST_PARTS = 64
SMALLEST_PART = 512
# Part of every identity, so that files of an earlier layout are ignored.
LAYOUT = 2
# Images per batch of the network.
BATCH = 64
# Mean and covariance in ADM's and EDM's files; the last two are of the spatial features.
_ADM_KEYS = ("mu", "sigma", "mu_s", "sigma_s")


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D), float64."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images.

    `pool` and `spatial` are over all `count` images; `features` (n, D) of some of them are kept for
    precision and recall. Values that a reference file does not hold are None.
    """

    pool: Statistics
    spatial: Statistics | None
    features: np.ndarray | None
    count: int | None


@dataclass(frozen=True)
class ReferencePart:
    """Sums over one part of the source's images, and the features of the kept ones."""

    pool: FeatureStats
    spatial: FeatureStats | None
    features: np.ndarray


class FoundReference(NamedTuple):
    """A stored reference.

    `identity` is stored in it. `digest` identifies it to the user: the SHA-256 of a file, else a
    hash of images and features.
    """

    url: str
    identity: str
    digest: str

    def read(self) -> Reference:
        """Its statistics; errors as `read_reference`."""
        return read_reference(self.url, self.identity)


class KnownListing(storage.Record):
    """references/listings/INPUT.json: the digest of the source that latents were encoded from.

    With it, nobody has to list a million images to name their reference.
    """

    input_sha256: str
    source: str
    listing_sha256: str


@dataclass(frozen=True)
class PartTask:
    """A part of a source, measured in one task; `kept` are indices into `items`."""

    number: int
    source: Source
    items: Sequence[Item]
    kept: Sequence[int]
    resolution: int


def reference_url(recipe: Recipe, identity: str) -> str:
    """File of a reference."""
    section = recipe.evaluate.features
    name = f"{recipe.data.name}-{section.name}-{identity[:12]}.safetensors"
    return storage.join(recipe.storage.root, "references", name)


def source_identity(recipe: Recipe, listing_sha256: str) -> str:
    """Hash of everything that a reference of an image source depends on.

    Args:
        listing_sha256: digest of the listing of its images.
    """
    return storage.digest(
        [
            LAYOUT,
            listing_sha256,
            features_digest(recipe),
            recipe.data.resolution,
            recipe.evaluate.reference_images,
        ]
    )


def encoded_identity(recipe: Recipe) -> str | None:
    """The `source_identity` of the images that the recipe's latents were encoded from.

    None if they are not encoded, or were never listed for a reference.
    """
    manifest = _manifest(recipe)
    if manifest is None:
        return None
    try:
        data = storage.read_bytes(_listing_url(recipe, manifest))
        known = KnownListing.model_validate_json(data)
    except (FileNotFoundError, ValidationError):
        return None  # listed, and written, again
    if (known.input_sha256, known.source) != (manifest.input_sha256, _source_name(recipe)):
        return None
    return source_identity(recipe, known.listing_sha256)


def remember_listing(recipe: Recipe, listing: ImageList) -> None:
    """Store the listing's digest for `encoded_identity`, if it lists what was encoded."""
    manifest = _manifest(recipe)
    if manifest is None:
        return
    if not _lists_what_was_encoded(recipe, manifest, listing):
        say(
            f"the images of {listing.url} have changed since they were encoded; the reference is "
            "of the images as they are now"
        )
        return
    known = KnownListing(
        input_sha256=manifest.input_sha256,
        source=_source_name(recipe),
        listing_sha256=listing.digest(),
    )
    storage.write_text(_listing_url(recipe, manifest), known.model_dump_json())


def _lists_what_was_encoded(recipe: Recipe, manifest: Manifest, listing: ImageList) -> bool:
    pairs = [(item.name, item.label) for item in listing.items]
    if storage.digest(pairs) == manifest.input_sha256:
        return True
    # Images that were appended come last there.
    return len(pairs) == manifest.totals.input and (
        sorted(read_inputs(latents_url(recipe))[: len(pairs)]) == sorted(pairs)
    )


def _manifest(recipe: Recipe) -> Manifest | None:
    """The manifest of the recipe's latents; None without latents of this recipe."""
    url = latents_url(recipe)
    if not storage.exists(storage.join(url, MANIFEST)):
        return None
    manifest = load_manifest(url)
    return manifest if manifest.recipe_hash == recipe.encode_hash() else None


def _listing_url(recipe: Recipe, manifest: Manifest) -> str:
    name = storage.digest([manifest.input_sha256, _source_name(recipe)])[:12]
    return storage.join(recipe.storage.root, "references", "listings", f"{name}.json")


def _source_name(recipe: Recipe) -> str:
    """The source, and the column of its images where the recipe names one."""
    column = recipe.data.columns.image
    return recipe.data.source + (f"#{column}" if column != IMAGE_COLUMN else "")


def file_identity(recipe: Recipe, sha256: str) -> str:
    """Hash of everything that a reference read from a file depends on."""
    return storage.digest(
        [LAYOUT, "file", sha256, features_digest(recipe), recipe.evaluate.reference_images]
    )


# ---- From images ----


def kept_images(recipe: Recipe, listing: ImageList) -> list[int]:
    """Indices of the images whose features are kept.

    They are evenly spaced over the listing, which is sorted by class.
    """
    wanted = min(recipe.evaluate.reference_images, len(listing))
    spread = np.linspace(0, len(listing) - 1, wanted).round().astype(int)
    return sorted(set(spread.tolist()))


def part_tasks(recipe: Recipe, listing: ImageList) -> Iterator[PartTask]:
    """The parts of a source, in order."""
    size = max(SMALLEST_PART, -(-len(listing) // MOST_PARTS))
    indices = np.array(kept_images(recipe, listing))
    for number, start in enumerate(range(0, len(listing), size)):
        kept = indices[(indices >= start) & (indices < start + size)] - start
        items = listing.items[start : start + size]
        side = recipe.data.resolution
        yield PartTask(number, listing.source, items, kept.tolist(), side)


def measure_part(
    network: FeatureNetwork, task: PartTask, decoders: int = 1
) -> ReferencePart | None:
    """Sums over one part of a source; None if none of its images can be read.

    Args:
        decoders: threads that decode images while the network computes.
    """
    wanted, chosen = set(task.kept), []
    pool: FeatureStats | None = None
    spatial: FeatureStats | None = None
    batches = read_batches(task.source, task.items, task.resolution, BATCH, decoders)
    for start, images in batches:
        if not images.kept:
            continue
        rows = network.extract(images.pixels)
        pool = added(pool, rows[FEATURES])
        if SPATIAL in rows:
            spatial = added(spatial, rows[SPATIAL])
        here = [row for row, index in enumerate(images.kept) if start + index in wanted]
        chosen.append(rows[FEATURES][here])
    return None if pool is None else ReferencePart(pool, spatial, np.concatenate(chosen))


def added(sums: FeatureStats | None, rows: np.ndarray) -> FeatureStats:
    """The sums plus those of more rows (n, D)."""
    return FeatureStats.of(rows) if sums is None else sums + FeatureStats.of(rows)


def part_name(task: PartTask) -> str:
    """File of a part."""
    return f"part-{task.number:05d}.safetensors"


def write_part(target: str, part: ReferencePart | None) -> None:
    """Commit a part; a part without images is a file without tensors."""
    tensors: dict[str, np.ndarray] = {}
    if part is not None:
        tensors["features"] = part.features
        for name, sums in (("pool", part.pool), ("spatial", part.spatial)):
            if sums is not None:
                tensors |= {f"{name}_total": sums.total, f"{name}_outer": sums.outer}
    _commit(target, tensors, {"count": str(part.pool.count if part else 0)})


def read_reference_parts(url: str, tasks: Sequence[PartTask]) -> Iterator[ReferencePart]:
    """The parts of all tasks, in order; FileNotFoundError if one is missing."""
    for task in tasks:
        file = storage.join(url, part_name(task))
        try:
            rows, about = _read(file)
        except DamagedFile as error:
            if is_stored(file) and storage.exists(file):
                raise
            # Not measured yet, or removed by a concurrent evaluation that has finished.
            raise FileNotFoundError(file) from error
        if count := int(about["count"]):
            sums = {
                key: FeatureStats(count, rows[f"{key}_total"], rows[f"{key}_outer"])
                for key in ("pool", "spatial")
                if f"{key}_total" in rows
            }
            yield ReferencePart(sums["pool"], sums.get("spatial"), rows["features"])


def joined(parts: Iterable[ReferencePart], url: str) -> Reference:
    """The reference from all parts of a source, in order; holds one part in memory at a time.

    Raises:
        UserError: fewer than two images could be read.
    """
    pool: FeatureStats | None = None
    spatial: FeatureStats | None = None
    features = []
    for part in parts:
        pool = part.pool if pool is None else pool + part.pool
        if part.spatial is not None:
            spatial = part.spatial if spatial is None else spatial + part.spatial
        features.append(part.features)
    if pool is None or pool.count < 2:
        raise UserError(f"fewer than two images in {url} can be read")
    return Reference(
        Statistics(pool.mean, pool.covariance),
        None if spatial is None else Statistics(spatial.mean, spatial.covariance),
        np.concatenate(features),
        pool.count,
    )


# ---- From a file in ADM's or EDM's format ----


def check_reference_file(recipe: Recipe) -> None:
    """Check the recipe's reference file before anything is generated; download it if needed.

    Raises:
        DiffitError: the downloaded file is damaged.
        UserError: it is missing, cannot be downloaded, has another format, is for other features
            or another resolution, or holds too few images.
    """
    url = reference_file(recipe)
    if url is None:
        return
    if not recipe.evaluate.features.published:
        raise UserError(
            f"evaluate.reference {recipe.evaluate.reference} holds statistics of the published "
            "Inception's features, but evaluate.features.name is "
            f"{recipe.evaluate.features.name!r}; set evaluate.reference={DATASET}, or "
            "evaluate.features.name=inception and evaluate.features.kind=inception"
        )
    fetch_reference(recipe)
    if not storage.exists(url):
        raise UserError(f"evaluate.reference {url} does not exist")
    with opened_reference(recipe, url) as path, opened_npz(recipe, path):
        pass


@dataclass(frozen=True)
class NpzReference:
    """An open reference file: ADM's `mu`, `sigma`, `mu_s`, `sigma_s`, `arr_0`; EDM's first two."""

    archive: zipfile.ZipFile
    statistics: dict[str, np.ndarray]
    images: bool

    def read(self, recipe: Recipe, extract: Callable[[np.ndarray], np.ndarray]) -> Reference:
        """The reference, with the features of the file's first images if it has images.

        Args:
            extract: images (B, R, R, 3) uint8 to features (B, D).
        """
        found, spatial, features = self.statistics, None, None
        if "mu_s" in found:
            spatial = Statistics(found["mu_s"], found["sigma_s"])
        if self.images:
            features = self._measured(recipe.evaluate.reference_images, extract)
        return Reference(Statistics(found["mu"], found["sigma"]), spatial, features, None)

    def _measured(self, wanted: int, extract: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        rows = []
        with (
            opened_array(self.archive) as (file, shape, _),
            Progress("reference", wanted, "images") as progress,
        ):
            for pixels in batches(file, (wanted, *shape[1:])):
                rows.append(extract(pixels))
                progress.update(progress.done + len(pixels))
        return np.concatenate(rows)


@contextmanager
def opened_npz(recipe: Recipe, path: Path) -> Iterator[NpzReference]:
    """A reference file, its shapes, values and images checked against the recipe.

    Raises:
        UserError: it cannot be used.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"evaluate.reference {path} is not an .npz file ({error}); use one in ADM's or EDM's "
            "format"
        ) from error
    with archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        if not {"mu", "sigma"} <= names:
            raise UserError(
                f"evaluate.reference {path} holds {', '.join(sorted(names)) or 'nothing'}, but "
                "must hold mu and sigma, as ADM's and EDM's files do"
            )
        found = {key: _member(archive, key, path) for key in _ADM_KEYS if key in names}
        _check_statistics(found, path)
        if "arr_0" in names:
            _check_images(recipe, archive, path)
        yield NpzReference(archive, found, "arr_0" in names)


def _member(archive: zipfile.ZipFile, key: str, path: Path) -> np.ndarray:
    try:
        with archive.open(f"{key}.npy") as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"cannot read {key} of evaluate.reference {path}: {error}") from error
    return np.asarray(values, dtype=np.float64)


def _check_statistics(found: dict[str, np.ndarray], path: Path) -> None:
    for mean, covariance, dims in (("mu", "sigma", 2048), ("mu_s", "sigma_s", 2023)):
        if mean not in found:
            continue
        for key, shape in ((mean, (dims,)), (covariance, (dims, dims))):
            values = found.get(key)
            if values is None or values.shape != shape:
                actual = "is missing" if values is None else f"has shape {values.shape}"
                raise UserError(
                    f"{key} of evaluate.reference {path} {actual}, but must have shape {shape}; "
                    "the file is for other features than Inception's"
                )
            if not np.isfinite(values).all():
                raise UserError(f"{key} of evaluate.reference {path} is not finite")


def _check_images(recipe: Recipe, archive: zipfile.ZipFile, path: Path) -> None:
    wanted, side = recipe.evaluate.reference_images, recipe.data.resolution
    with opened_array(archive) as (_, shape, dtype):
        pass
    if dtype != np.uint8 or len(shape) != 4 or shape[1:] != (side, side, 3):
        raise UserError(
            f"arr_0 of evaluate.reference {path} is {dtype} of shape {shape}, but must be uint8 "
            f"images of data.resolution {side}"
        )
    if shape[0] < wanted:
        raise UserError(
            f"evaluate.reference {path} holds {shape[0]:,} images, but "
            f"evaluate.reference_images is {wanted:,}; set it to at most {shape[0]}"
        )


@contextmanager
def opened_array(
    archive: zipfile.ZipFile,
) -> Iterator[tuple[Any, tuple[int, ...], np.dtype[Any]]]:
    """`arr_0` of an .npz file: a stream of its data, its shape and its dtype.

    Raises:
        UserError: it is missing, damaged, or in Fortran order.
    """
    try:
        file = archive.open("arr_0.npy")
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read arr_0 of {archive.filename}: {error}") from error
    if fortran:
        raise UserError(f"arr_0 of {archive.filename} is in Fortran order, but must be in C order")
    with file:
        yield file, shape, dtype


def batches(file: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The first images of an .npy stream, in batches.

    Args:
        file: stream, positioned at the data.
        shape: (number of images, R, R, 3).
    """
    for start in range(0, shape[0], BATCH):
        pixels = np.empty((min(BATCH, shape[0] - start), *shape[1:]), np.uint8)
        try:
            data = file.read(pixels.nbytes)
        except (EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"cannot read the images from {start} on: {error}") from error
        if len(data) != pixels.nbytes:
            raise UserError(
                f"the array of images is truncated in image {start + len(data) // pixels[0].nbytes}"
            )
        pixels.reshape(-1)[:] = np.frombuffer(data, np.uint8)
        yield pixels


# ---- Stored references ----


def write_reference(url: str, identity: str, reference: Reference) -> None:
    """Commit a reference."""
    tensors = {"mean": reference.pool.mean, "covariance": reference.pool.covariance}
    if reference.spatial is not None:
        tensors["spatial_mean"] = reference.spatial.mean
        tensors["spatial_covariance"] = reference.spatial.covariance
    if reference.features is not None:
        tensors["features"] = reference.features
    _commit(url, tensors, {"identity": identity, "count": str(reference.count or "")})


def read_reference(url: str, identity: str) -> Reference:
    """Read a stored reference.

    Raises:
        DiffitError: it is damaged, or has another identity.
    """
    rows, about = _read(url)
    if about["identity"] != identity:
        raise DiffitError(f"{url} is for other images; delete it and evaluate again")
    spatial = None
    if "spatial_mean" in rows:
        spatial = Statistics(rows["spatial_mean"], rows["spatial_covariance"])
    pool = Statistics(rows["mean"], rows["covariance"])
    return Reference(pool, spatial, rows.get("features"), int(about["count"] or 0) or None)


def is_stored(url: str) -> bool:
    """Whether a reference, or a part of one, is complete."""
    return storage.exists(f"{url}.json")


def _commit(url: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
    rows = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    commit(f"{url}.json", {url.rsplit("/", 1)[-1]: save(rows)}, about)


def _read(url: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    record = read_record(f"{url}.json")
    return load(read_committed(url, record)), record.about
