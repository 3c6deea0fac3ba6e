"""Latent shards, schema 1: WebDataset tar files and their manifest. Does not import torch.

Each image has two members: KEY.latent.npy, float16 (F, 2C, h, w), the posterior's mean then its
log-variance, unscaled, with the flipped image second if F = 2; and KEY.cls, the label in ASCII.
Without a posterior the latent is (F, C, h, w); pixels are uint8. KEY is the nine-digit index of the
image in the sorted input; images appended later continue the numbering. Images lie in the order of
a seeded permutation of the input (`encode_order`). The same content gives the same bytes: order,
times, owners and modes are fixed.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationError

from diffit_train import storage
from diffit_train.config import Recipe, load_recipe_text
from diffit_train.errors import DataError, DiffitError, UserError

MANIFEST_SCHEMA = 1
MANIFEST = "manifest.json"
# Names and labels of all input images in key order, one JSON pair per line.
INPUTS = "inputs.jsonl.gz"
REJECTED = "rejected.jsonl"
RECIPE = "recipe.yaml"


class ShardEntry(storage.Record):
    """A committed shard; `first_index` is the input index of its first image."""

    name: str
    count: int
    bytes: int
    sha256: str
    first_index: int


class Totals(storage.Record):
    """Image counts; input = written + rejected."""

    input: int
    written: int
    rejected: int


class Manifest(storage.Record):
    """Contents and provenance of the shards.

    `mean` and `std` are of the scaled, sampled latents, by channel. `segments` are the numbers of
    input images of the first encoding and of each append; `orders` has for each the SHA-256 of its
    keys in the order of the shards.
    """

    schema_version: int
    recipe_hash: str
    autoencoder: str
    autoencoder_sha256: str
    scale: float
    channels: int
    height: int
    width: int
    frames: int
    posterior: bool = True
    images_per_shard: int
    segments: list[int]
    orders: list[str]
    classes: list[str]
    input_sha256: str
    shards: list[ShardEntry]
    totals: Totals
    mean: list[float]
    std: list[float]

    @property
    def member_shape(self) -> tuple[int, int, int, int]:
        """Shape of an image's latent member."""
        channels = self.channels * (2 if self.posterior else 1)
        return self.frames, channels, self.height, self.width

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the data set."""
        return storage.digest([[s.sha256 for s in self.shards], self.classes, self.scale])

    @property
    def samples_digest(self) -> str:
        """SHA-256 of what decides which sample comes when; a repaired shard does not change it."""
        counts = [shard.count for shard in self.shards]
        encoded = [self.input_sha256, self.autoencoder_sha256, self.scale, self.frames]
        return storage.digest([self.segments, self.orders, counts, *encoded])


def latents_url(recipe: Recipe) -> str:
    """Folder of the recipe's latents."""
    return storage.join(recipe.storage.root, "latents", recipe.data.name)


def load_manifest(url: str) -> Manifest:
    """The manifest of a folder of latents.

    Raises:
        UserError: it does not exist, so encoding has not finished.
        DiffitError: it is damaged or has another schema.
    """
    name = storage.join(url, MANIFEST)
    try:
        manifest = Manifest.model_validate_json(storage.read_bytes(name))
    except FileNotFoundError as error:
        raise UserError(f"no finished latents in {url}; run `diffit encode`") from error
    except ValidationError as error:
        raise DiffitError(
            f"{name} is damaged: {error}; delete it and run `diffit encode`"
        ) from error
    if manifest.schema_version != MANIFEST_SCHEMA:
        raise DiffitError(
            f"{name} has schema {manifest.schema_version}; this version reads {MANIFEST_SCHEMA}"
        )
    return manifest


def finished_manifest(recipe: Recipe) -> Manifest | None:
    """The manifest if the recipe's latents are complete; None if they need encoding.

    Raises:
        UserError: the folder holds the latents of another recipe.
    """
    url = latents_url(recipe)
    if not storage.exists(storage.join(url, MANIFEST)):
        return None
    manifest = load_manifest(url)
    require_recipe(recipe, manifest.recipe_hash)
    return manifest


def missing_files(url: str, manifest: Manifest) -> list[str]:
    """Names of files of finished latents that were removed; `diffit encode` writes them again."""
    names = {RECIPE, INPUTS, *(shard.name for shard in manifest.shards)}
    return sorted(names - set(storage.list_names(url)))


def recipe_of(url: str) -> Recipe:
    """The recipe stored in a folder ROOT/latents/NAME; its root and `data.name` are these.

    Raises:
        UserError: it is missing or damaged, or the folder is not in a project.
    """
    if not storage.parent(url).endswith("/latents"):
        raise UserError(
            f"{url} is not in ROOT/latents/, so its images and autoencoder cannot be located; move "
            "it there"
        )
    name, fix = storage.join(url, RECIPE), "delete it, and run `diffit encode` again"
    try:
        text = storage.read_bytes(name).decode()
        recipe = load_recipe_text(text, name, root=storage.parent(url, 2))
    except FileNotFoundError as error:
        raise UserError(f"{name} is missing; run `diffit encode` again") from error
    except (UnicodeDecodeError, UserError) as error:
        raise UserError(f"{name} is damaged: {error}; {fix}") from error
    if recipe.encode_hash() != load_manifest(url).recipe_hash:
        raise UserError(f"{name} is damaged: its hash is not that of {MANIFEST}; {fix}")
    data = recipe.data.model_copy(update={"name": url.rstrip("/").rsplit("/", 1)[-1]})
    return recipe.model_copy(update={"data": data})


def require_recipe(recipe: Recipe, recipe_hash: str) -> None:
    """Refuse latents encoded with another recipe.

    Raises:
        UserError: with both hashes.
    """
    if recipe_hash != recipe.encode_hash():
        raise UserError(
            f"latents {latents_url(recipe)} were encoded with another recipe (hash "
            f"{recipe_hash[:12]}, this recipe's is {recipe.encode_hash()[:12]}); use the data and "
            "autoencoder sections they were encoded with, choose another data.name, or delete that "
            "folder to encode again"
        )


@dataclass(frozen=True)
class Shard:
    """Keys (n,), moments (n, F, 2C, h, w) float16 or uint8, and labels (n,) int64."""

    keys: np.ndarray
    moments: np.ndarray
    labels: np.ndarray


def as_float(moments: np.ndarray) -> np.ndarray:
    """Moments in float32; pixels, stored as uint8, in [-1, 1]."""
    values = moments.astype(np.float32)
    return values / np.float32(127.5) - np.float32(1.0) if moments.dtype == np.uint8 else values


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.tar"


def _tar_bytes(moments: np.ndarray) -> int:
    """Size of a shard: two members for each image, a header and whole blocks of 512 bytes each."""

    def blocks(size: int) -> int:
        return BLOCK * (1 + -(-size // BLOCK))

    npy_header = 128
    latents = (values.size * (1 if values.dtype == np.uint8 else 2) for values in moments)
    size = sum(blocks(npy_header + latent) + blocks(1) for latent in latents)
    return -(-(size + 1024) // 10240) * 10240  # the end of an archive, in whole records


def write_shard(
    url: str, number: int, keys: Sequence[int], moments: np.ndarray, labels: Sequence[int]
) -> ShardEntry:
    """Write and commit one shard.

    Args:
        url: folder of the latents.
        keys: input indices of the images.
        moments: (n, F, 2C, h, w); stored as float16, pixels as uint8.
        labels: (n,).
    """
    # By default webdataset's decoders unpickle and its readers run shell commands.
    os.environ.setdefault("WDS_SECURE", "1")
    from webdataset import TarWriter

    name = shard_name(number)
    with storage.atomic_file(storage.join(url, name), _tar_bytes(moments)) as path:
        with (
            path.open("wb") as file,
            TarWriter(
                file, user="diffit", group="diffit", mode=0o644, mtime=0, encoder=False
            ) as tar,
        ):
            for key, values, label in zip(keys, moments, labels, strict=True):
                latent = io.BytesIO()
                stored = values if values.dtype == np.uint8 else values.astype(np.float16)
                np.save(latent, stored, allow_pickle=False)
                members = {"latent.npy": latent.getvalue(), "cls": str(int(label)).encode()}
                tar.write({"__key__": f"{key:09d}", **members})
        return ShardEntry(
            name=name,
            count=len(keys),
            bytes=path.stat().st_size,
            sha256=storage.sha256_file(path),
            first_index=keys[0],
        )


def read_shard(url: str, entry: ShardEntry) -> Shard:
    """Read a shard and verify its size, hash and count.

    Raises:
        DataError: it is missing or damaged.
    """
    return parse_shard(storage.join(url, entry.name), entry, read_shard_bytes(url, entry))


def read_shard_bytes(url: str, entry: ShardEntry) -> bytes:
    """Read a shard's tar and verify its size and hash; errors as `read_shard`."""
    name = storage.join(url, entry.name)
    try:
        # One byte more than there should be, to notice more.
        data = storage.read_sized(name, entry.bytes + 1)
    except FileNotFoundError as error:
        raise DataError(f"shard {name} is missing; {_FIX}") from error
    if len(data) != entry.bytes or storage.sha256_bytes(data) != entry.sha256:
        raise DataError(f"shard {name} differs from its recorded size or sha256; {_FIX}")
    return data


def parse_shard(name: str, entry: ShardEntry, data: bytes) -> Shard:
    """The images in a shard's tar; errors as `read_shard`."""
    latents, labels = _shard_members(name, data)
    if len(latents) != entry.count or latents.keys() != labels.keys():
        raise DataError(f"shard {name} holds {len(latents)} images, not {entry.count}; {_FIX}")
    keys = np.array([int(key) for key in latents])
    return Shard(keys, np.stack(list(latents.values())), np.array([labels[k] for k in latents]))


# Bytes of a tar's headers, and of what its members are padded to a multiple of.
BLOCK = 512
_FIX = "run `diffit verify FOLDER --remove`, then `diffit encode` again"


def _shard_members(name: str, data: bytes) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Latents and labels by key, in tar order.

    Raises:
        DataError: a member does not belong to the schema.
    """
    latents: dict[str, np.ndarray] = {}
    labels: dict[str, int] = {}
    header, like = b"", np.zeros(0)
    for member, start, size in _plain_members(data) or _members(data):
        key, _, kind = member.partition(".")
        content = data[start : start + size]
        if kind == "cls":
            labels[key] = int(content)
        elif kind != "latent.npy":
            raise DataError(f"shard {name} has an unexpected member {member}; {_FIX}")
        elif header and content.startswith(header) and len(content) - len(header) == like.nbytes:
            # Fast path: parsing .npy headers is slow, and nearly all are identical.
            values = np.frombuffer(content, like.dtype, offset=len(header))
            latents[key] = values.reshape(like.shape)
        else:
            like = latents[key] = np.load(io.BytesIO(content), allow_pickle=False)
            header = content[: len(content) - like.nbytes]
    return latents, labels


def _members(data: bytes) -> list[tuple[str, int, int]]:
    """Name, start and size of each member of any tar."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar]


def _plain_members(data: bytes) -> list[tuple[str, int, int]] | None:
    """As `_members` of a tar of plain files with short names, as `write_shard` makes; else None.

    For such headers (POSIX ustar), tarfile would take most of the time of reading a shard. What
    they say is not checked against their checksums: the hash of the whole shard is.
    """
    found, start = [], 0
    while start + BLOCK <= len(data):
        header = data[start : start + BLOCK]
        if header == bytes(BLOCK):  # the end
            break
        plain = header[156:157] == b"0" and header[257:262] == b"ustar" and not header[345]
        try:
            name = header[:100].partition(b"\0")[0].decode()
            size = int(header[124:136].rstrip(b" \0"), 8)
        except ValueError:
            return None
        start += BLOCK
        if not plain or size < 0 or start + size > len(data):
            return None
        found.append((name, start, size))
        start += -(-size // BLOCK) * BLOCK
    return found
