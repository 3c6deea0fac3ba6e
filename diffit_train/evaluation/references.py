"""References: which one a recipe means, and the statistics of its real images.

A reference is a file in ADM's or EDM's format, downloaded or not, or computed from the images of
`data.source`. Its statistics are kept under ROOT/references, named by a hash of everything that
they depend on; downloads are kept there as well, verified by SHA-256 at each later use.
"""

from __future__ import annotations

import functools
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import urlsplit

import numpy as np
from safetensors.numpy import load, save

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.evaluate import DATASET
from diffit_train.data.manifest import (
    MANIFEST,
    Manifest,
    latents_url,
    load_manifest,
    read_inputs,
    recipe_of,
)
from diffit_train.data.reading import read_batches
from diffit_train.data.sources import ImageList, Item, Source
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.chunks import FEATURES, SPATIAL
from diffit_train.evaluation.committed import (
    Committed,
    DamagedFile,
    commit,
    find_record,
    read_committed,
    read_record,
    write_record,
)
from diffit_train.evaluation.download import download
from diffit_train.evaluation.features import features_digest
from diffit_train.evaluation.metrics import FeatureStats
from diffit_train.progress import Progress, say

if TYPE_CHECKING:
    from diffit_train.evaluation.feature_networks import FeatureNetwork

# Maximum number of parts of a source, and minimum number of images per part: the sums of 2048
# features are 32 MB, however many images there are.
MOST_PARTS = 64
SMALLEST_PART = 512
# Part of every identity, so that files of an earlier layout are ignored.
LAYOUT = 3
# Images per batch of the network.
BATCH = 64


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


class StoredReference(NamedTuple):
    """Where the statistics of a reference are stored, or will be.

    `identity` is stored with them. `digest` identifies the reference to the user: the SHA-256 of a
    file, else a hash of images and features.
    """

    url: str
    identity: str
    digest: str

    @property
    def exists(self) -> bool:
        """Whether they are there."""
        return is_stored(self.url)

    @property
    def parts(self) -> str:
        """Folder of the parts while they are computed."""
        return f"{self.url}.parts"

    def write(self, reference: Reference) -> None:
        """Commit the statistics."""
        tensors = {"mean": reference.pool.mean, "covariance": reference.pool.covariance}
        if reference.spatial is not None:
            tensors["spatial_mean"] = reference.spatial.mean
            tensors["spatial_covariance"] = reference.spatial.covariance
        if reference.features is not None:
            tensors["features"] = reference.features
        about = {"identity": self.identity, "count": str(reference.count or "")}
        _commit(self.url, tensors, about)

    def read(self) -> Reference:
        """Read the statistics.

        Raises:
            DiffitError: they are damaged, or have another identity.
        """
        rows, about = _read(self.url)
        if about["identity"] != self.identity:
            raise DiffitError(f"{self.url} is for other images; delete it and evaluate again")
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


# ---- Which reference is meant ----


@dataclass(frozen=True)
class ReferenceSource:
    """What a recipe's `evaluate.reference` means.

    Attributes:
        file: the reference file; None if the reference is computed from `data.source`.
        web: where the file is downloaded from, once; "" if it is no download.
    """

    recipe: Recipe
    file: str | None
    web: str = ""

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Resolve the recipe's reference."""
        reference, root = recipe.evaluate.reference, recipe.storage.root
        if reference == DATASET:
            return cls(recipe, None)
        if not reference.startswith(("http://", "https://")):
            return cls(recipe, storage.resolve(root, reference))
        name = PurePosixPath(urlsplit(reference).path)
        # Different URLs may end in the same name.
        number = storage.sha256_bytes(reference.encode())[:8]
        kept = f"{name.stem or 'reference'}-{number}{name.suffix}"
        return cls(recipe, storage.join(root, "references", kept), reference)

    @property
    def identity(self) -> str | None:
        """What identifies the reference wherever it is: a file's SHA-256, or `dataset`.

        None if it has not been downloaded yet, so nothing can have been measured against it.

        Raises:
            UserError: the file does not exist.
        """
        if self.file is None:
            return DATASET
        if self.web:
            record = find_record(f"{self.file}.json")
            return record.files.get(self.file.rsplit("/", 1)[-1], "") if record else None
        if not storage.exists(self.file):
            raise UserError(f"evaluate.reference {self.file} does not exist")
        return _sha256(self.file, storage.fingerprint(self.file))

    def check(self) -> None:
        """Check a file before anything is generated; download it if needed.

        Raises:
            DiffitError: the downloaded file is damaged.
            UserError: it is missing, cannot be downloaded, has another format, is for other
                features or another resolution, or holds too few images.
        """
        features = self.recipe.evaluate.features
        if self.file is None:
            return
        if not features.published:
            raise UserError(
                f"evaluate.reference {self.recipe.evaluate.reference} holds statistics of the "
                "published Inception's features, but evaluate.features.name is "
                f"{features.name!r}; set evaluate.reference={DATASET}, or "
                "evaluate.features.name=inception and evaluate.features.kind=inception"
            )
        if self.web and find_record(f"{self.file}.json") is None:
            self._download(self.file)
        if not storage.exists(self.file):
            raise UserError(f"evaluate.reference {self.file} does not exist")
        with self.open():
            pass

    def _download(self, file: str) -> None:
        parts = urlsplit(self.web)
        name = PurePosixPath(parts.path).name
        public = parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1], query="").geturl()
        try:
            with storage.atomic_file(file) as path:
                download(self.web, path, "reference file")
                if not zipfile.is_zipfile(path):
                    raise OSError(f"received {path.stat().st_size:,} bytes, not an .npz file")
                sha256 = storage.sha256_file(path)
        except (OSError, HTTPException) as error:
            raise UserError(
                f"cannot download evaluate.reference {public} ({error}); try again, or download "
                f"{name} elsewhere, put it where every worker can read it, and set "
                "evaluate.reference to that path or s3://bucket/key; or set "
                f"evaluate.reference={DATASET} to compare with statistics of data.source, which is "
                "not comparable with published results"
            ) from error
        files = {file.rsplit("/", 1)[-1]: sha256}
        write_record(f"{file}.json", Committed(files=files, about={"url": public}))

    @contextmanager
    def open(self) -> Iterator[ReferenceFile]:
        """Open the file; a download is verified.

        Raises:
            DiffitError: a download is damaged.
            UserError: the file cannot be used with the recipe.
        """
        assert self.file is not None
        recorded = self.identity if self.web else None
        with storage.local_copy(self.file) as path:
            if recorded is not None:
                if not path.is_file():
                    raise DamagedFile(self.file, "it is missing")
                if storage.sha256_file(path) != recorded:
                    raise DamagedFile(self.file, "it differs from its recorded sha256")
            try:
                archive = zipfile.ZipFile(path)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"evaluate.reference {path} is not an .npz file ({error}); use one in ADM's or "
                    "EDM's format"
                ) from error
            with archive:
                yield ReferenceFile(self.recipe, archive)

    def stored(self, listing: ImageList | None = None) -> StoredReference | None:
        """Where the reference's statistics are stored, or will be.

        Args:
            listing: the images of `data.source`, which may be millions. Without it they are those
                that the recipe's latents were encoded from; None without such latents.
        """
        recipe, evaluate = self.recipe, self.recipe.evaluate
        images = self.identity if self.file else self._images(listing)
        if images is None:
            return None
        identity = storage.digest(
            [
                LAYOUT,
                images,
                recipe.data.columns.image,
                features_digest(recipe),
                recipe.data.resolution,
                evaluate.reference_images,
            ]
        )
        name = f"{recipe.data.name}-{evaluate.features.name}-{identity[:12]}.safetensors"
        url = storage.join(recipe.storage.root, "references", name)
        return StoredReference(url, identity, images if self.file else identity)

    def _images(self, listing: ImageList | None) -> str | None:
        """Digest of names and labels of the images of `data.source`."""
        url, manifest = latents_url(self.recipe), self._manifest()
        encoded = manifest.input_sha256 if manifest else None
        if listing is None:
            return encoded
        pairs = [(item.name, item.label) for item in listing.items]
        listed = storage.digest(pairs)
        if manifest is None or listed == encoded:
            return listed
        # Images that were appended come last in the latents.
        if len(pairs) == manifest.totals.input and sorted(read_inputs(url)) == sorted(pairs):
            return encoded
        say(
            f"the images of {listing.url} have changed since they were encoded; the reference is "
            "of the images as they are now"
        )
        return listed

    def _manifest(self) -> Manifest | None:
        """The manifest of latents that were encoded from these images."""
        url = latents_url(self.recipe)
        if not storage.exists(storage.join(url, MANIFEST)):
            return None
        manifest, data = load_manifest(url), self.recipe.data
        if manifest.recipe_hash != self.recipe.encode_hash():
            return None
        encoded = recipe_of(url).data
        same = (encoded.source, encoded.columns) == (data.source, data.columns)
        return manifest if same else None


@functools.cache
def _sha256(file: str, fingerprint: str) -> str:
    with storage.local_copy(file) as path:
        return storage.sha256_file(path)


# ---- From a file ----


class ReferenceFile:
    """An open reference file: ADM's `mu`, `sigma`, `mu_s`, `sigma_s`, `arr_0`; EDM's first two.

    Raises:
        UserError: its shapes, values or images are not those that the recipe needs.
    """

    def __init__(self, recipe: Recipe, archive: zipfile.ZipFile) -> None:
        self.archive, self.title = archive, f"evaluate.reference {archive.filename}"
        self.names = {name.removesuffix(".npy") for name in archive.namelist()}
        if not {"mu", "sigma"} <= self.names:
            raise UserError(
                f"{self.title} holds {', '.join(sorted(self.names)) or 'nothing'}, but must hold "
                "mu and sigma, as ADM's and EDM's files do"
            )
        self.pool = Statistics(self._array("mu", 2048), self._array("sigma", 2048, 2048))
        self.spatial: Statistics | None = None
        if "mu_s" in self.names:
            self.spatial = Statistics(self._array("mu_s", 2023), self._array("sigma_s", 2023, 2023))
        self.kept = recipe.evaluate.reference_images if "arr_0" in self.names else 0
        if self.kept:
            self._check_images(self.kept, recipe.data.resolution)

    def read(self, extract: Callable[[np.ndarray], np.ndarray]) -> Reference:
        """The reference, with the features of the file's first images if it has images.

        Args:
            extract: images (B, R, R, 3) uint8 to features (B, D).
        """
        rows = []
        if self.kept:
            with (
                opened_array(self.archive) as (file, shape, _),
                Progress("reference", self.kept, "images") as progress,
            ):
                for pixels in batches(file, (self.kept, *shape[1:])):
                    rows.append(extract(pixels))
                    progress.update(progress.done + len(pixels))
        return Reference(self.pool, self.spatial, np.concatenate(rows) if rows else None, None)

    def _array(self, key: str, *shape: int) -> np.ndarray:
        if key not in self.names:
            raise UserError(f"{key} of {self.title} is missing; use a complete file")
        try:
            with self.archive.open(f"{key}.npy") as file:
                values = np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"cannot read {key} of {self.title}: {error}") from error
        if values.shape != shape:
            raise UserError(
                f"{key} of {self.title} has shape {values.shape}, but must have shape {shape}; the "
                "file is for other features than Inception's"
            )
        values = np.asarray(values, dtype=np.float64)
        if not np.isfinite(values).all():
            raise UserError(f"{key} of {self.title} is not finite")
        return values

    def _check_images(self, wanted: int, side: int) -> None:
        with opened_array(self.archive) as (_, shape, dtype):
            pass
        if dtype != np.uint8 or len(shape) != 4 or shape[1:] != (side, side, 3):
            raise UserError(
                f"arr_0 of {self.title} is {dtype} of shape {shape}, but must be uint8 images of "
                f"data.resolution {side}"
            )
        if shape[0] < wanted:
            raise UserError(
                f"{self.title} holds {shape[0]:,} images, but evaluate.reference_images is "
                f"{wanted:,}; set it to at most {shape[0]}"
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
        old = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
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


# ---- From the images of data.source, in parts ----


@dataclass(frozen=True)
class PartTask:
    """A part of a source, measured in one task; `kept` are indices into `items`."""

    number: int
    source: Source
    items: Sequence[Item]
    kept: Sequence[int]
    resolution: int

    @property
    def name(self) -> str:
        """File of the part."""
        return f"part-{self.number:05d}.safetensors"


@dataclass
class ReferenceSums:
    """Sums over images of a source, and the features of those that are kept.

    Without images, or before the first, there are no sums.
    """

    pool: FeatureStats | None = None
    spatial: FeatureStats | None = None
    features: list[np.ndarray] = field(default_factory=list)

    def add(self, more: ReferenceSums) -> None:
        """Add the sums over the next images."""
        for name in ("pool", "spatial"):
            mine, theirs = getattr(self, name), getattr(more, name)
            setattr(self, name, mine + theirs if mine and theirs else mine or theirs)
        self.features += more.features


def part_tasks(recipe: Recipe, listing: ImageList) -> list[PartTask]:
    """The parts of a source, in order.

    The images whose features are kept are evenly spaced over the listing, which is sorted by class.
    """
    size = max(SMALLEST_PART, -(-len(listing) // MOST_PARTS))
    count = min(recipe.evaluate.reference_images, len(listing))
    kept = np.unique(np.linspace(0, len(listing) - 1, count).round().astype(int))
    return [
        PartTask(
            number,
            listing.source,
            listing.items[start : start + size],
            (kept[(kept >= start) & (kept < start + size)] - start).tolist(),
            recipe.data.resolution,
        )
        for number, start in enumerate(range(0, len(listing), size))
    ]


def measure_part(network: FeatureNetwork, task: PartTask, decoders: int = 1) -> ReferenceSums:
    """Sums over the images of a part that can be read.

    Args:
        decoders: threads that decode images while the network computes.
    """
    wanted, sums = set(task.kept), ReferenceSums()
    for start, images in read_batches(task.source, task.items, task.resolution, BATCH, decoders):
        if not images.kept:
            continue
        rows = network.extract(images.pixels)
        spatial = FeatureStats.of(rows[SPATIAL]) if SPATIAL in rows else None
        kept = [row for row, index in enumerate(images.kept) if start + index in wanted]
        sums.add(ReferenceSums(FeatureStats.of(rows[FEATURES]), spatial, [rows[FEATURES][kept]]))
    return sums


def write_part(target: str, part: ReferenceSums) -> None:
    """Commit a part; a part without images is a file without tensors."""
    tensors = {"features": np.concatenate(part.features)} if part.features else {}
    for name, sums in (("pool", part.pool), ("spatial", part.spatial)):
        if sums is not None:
            tensors |= {f"{name}_total": sums.total, f"{name}_outer": sums.outer}
    _commit(target, tensors, {"count": str(part.pool.count if part.pool else 0)})


def read_reference_parts(url: str, tasks: Sequence[PartTask]) -> Iterator[ReferenceSums]:
    """The parts of all tasks, in order; FileNotFoundError if one is missing."""
    for task in tasks:
        file = storage.join(url, task.name)
        try:
            rows, about = _read(file)
        except DamagedFile as error:
            if is_stored(file) and storage.exists(file):
                raise
            # Not measured yet, or removed by a concurrent evaluation that has finished.
            raise FileNotFoundError(file) from error
        if count := int(about["count"]):
            sums = {
                name: FeatureStats(count, rows[f"{name}_total"], rows[f"{name}_outer"])
                for name in ("pool", "spatial")
                if f"{name}_total" in rows
            }
            yield ReferenceSums(sums["pool"], sums.get("spatial"), [rows["features"]])


def joined(parts: Iterable[ReferenceSums], url: str) -> Reference:
    """The reference from all parts of a source, in order; holds one part in memory at a time.

    Raises:
        UserError: fewer than two images could be read.
    """
    total = ReferenceSums()
    for part in parts:
        total.add(part)
    pool, spatial = total.pool, total.spatial
    if pool is None or pool.count < 2:
        raise UserError(f"fewer than two images in {url} can be read")
    return Reference(
        Statistics(pool.mean, pool.covariance),
        Statistics(spatial.mean, spatial.covariance) if spatial else None,
        np.concatenate(total.features),
        pool.count,
    )
