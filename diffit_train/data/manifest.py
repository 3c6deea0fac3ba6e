"""A folder of latents: its manifest, its list of encoded images and its recipe."""

from __future__ import annotations

import gzip
import json
import zlib

from pydantic import ValidationError

from diffit_train import storage
from diffit_train.config import Recipe, load_recipe_text
from diffit_train.errors import DiffitError, UserError

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


def read_inputs(url: str) -> list[tuple[str, int]]:
    """Names and labels of all encoded images, in key order.

    Raises:
        DiffitError: the list is missing or damaged.
    """
    name = storage.join(url, INPUTS)
    try:
        lines = gzip.decompress(storage.read_bytes(name)).decode("ascii").splitlines()
        inputs = [(str(path), int(label)) for path, label in map(json.loads, lines)]
        manifest = load_manifest(url)
        # An interrupted commit may have left more entries than the manifest counts.
        inputs = inputs[: manifest.totals.input]
        if storage.digest(inputs) != manifest.input_sha256:
            raise ValueError(f"it is not the list of {MANIFEST}")
        return inputs
    except (OSError, ValueError, TypeError, EOFError, zlib.error) as error:
        raise DiffitError(
            f"{name} is missing or damaged ({error}); delete it, and run `diffit encode` again"
        ) from error


def write_inputs(url: str, inputs: list[tuple[str, int]]) -> None:
    """Write names and labels of all encoded images, in key order."""
    text = "".join(json.dumps(pair) + "\n" for pair in inputs)
    # No timestamp in the header, so that the same list gives the same bytes.
    storage.write_bytes(storage.join(url, INPUTS), gzip.compress(text.encode(), mtime=0))
