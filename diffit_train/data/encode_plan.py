"""What there is to encode: the shards, the parts of an encoding in progress, and the commit.

`parts/` in the folder of the latents holds plan.json, which identifies the input, and one file
per finished shard. The manifest, once written, replaces them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from pydantic import ValidationError

from diffit_train import storage
from diffit_train.config import Recipe, stored_text
from diffit_train.data.manifest import (
    INPUTS,
    MANIFEST,
    MANIFEST_SCHEMA,
    RECIPE,
    REJECTED,
    Manifest,
    ShardEntry,
    Totals,
    latents_url,
    read_inputs,
    require_recipe,
    write_inputs,
)
from diffit_train.data.shards import shard_name
from diffit_train.data.sources import ImageList, Item, list_images
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import say

R = TypeVar("R", bound=storage.Record)
PLAN = "plan.json"
# Shards of a block of row groups. Each shard reads the whole block: more mix better, and read more.
BLOCK_SHARDS = 8
_IMAGES, _ROW_GROUPS = 0, 1


class Plan(storage.Record):
    """parts/plan.json: recipe, input and order of the encoding; `orders` as in the manifest."""

    recipe_hash: str
    input_sha256: str
    orders: list[str]


class Rejected(storage.Record):
    """An image that could not be read."""

    path: str
    reason: str


class EncodedPart(storage.Record):
    """A finished shard; `entry` is None if none of its images could be read.

    `total` and `squares` are per-channel sums over the scaled, sampled latents.
    """

    number: int
    entry: ShardEntry | None
    rejected: list[Rejected]
    autoencoder_sha256: str
    scale: float
    shape: tuple[int, int, int, int]  # of an image's member
    total: list[float]
    squares: list[float]

    @property
    def images(self) -> int:
        """Number of images, written or rejected."""
        return (self.entry.count if self.entry else 0) + len(self.rejected)


@dataclass(frozen=True)
class ShardTask:
    """A shard to encode: its images in the order of the file, and their keys."""

    number: int
    keys: list[int]
    items: list[Item]


@dataclass(frozen=True)
class EncodeJob:
    """What to encode.

    Attributes:
        listing: all images, in key order.
        tasks: shards to encode: those of new images, and finished ones that are missing.
        segments, orders: as in the manifest.
        base: the finished latents, if there are any.
        first_new: number of the first shard of new images.
    """

    listing: ImageList
    tasks: list[ShardTask] = field(repr=False)
    segments: list[int]
    orders: list[str]
    base: Manifest | None
    first_new: int

    @property
    def inputs(self) -> list[tuple[str, int]]:
        """Names and labels in key order."""
        return [(item.name, item.label) for item in self.listing.items]

    @property
    def images(self) -> int:
        """Number of images to encode."""
        return sum(len(task.items) for task in self.tasks)

    def rejectable(self, recipe: Recipe) -> float:
        """Most new images that may be rejected."""
        new = sum(len(task.items) for task in self.tasks if task.number >= self.first_new)
        return recipe.data.max_rejected_fraction * new

    def plan(self, recipe: Recipe) -> Plan:
        """What identifies the job."""
        digest = storage.digest(self.inputs)
        return Plan(recipe_hash=recipe.encode_hash(), input_sha256=digest, orders=self.orders)


def find_work(
    recipe: Recipe, base: Manifest | None, missing: Sequence[str] = (), append: bool = False
) -> EncodeJob:
    """What there is to encode.

    Args:
        base: the finished latents, if there are any.
        missing: files that were removed of them.
        append: encode images that they lack.

    Raises:
        UserError: bad input; or encoded images were removed or relabeled.
    """
    listing, size = list_images(recipe), recipe.data.images_per_shard
    items, segments = listing.items, [len(listing)]
    if base is not None:
        url, lost = latents_url(recipe), INPUTS in missing
        inputs = [(item.name, item.label) for item in items] if lost else read_inputs(url)
        if lost and storage.digest(inputs) != base.input_sha256:
            raise UserError(
                f"{url}/{INPUTS} is missing, and {listing.url} does not list what was encoded; the "
                "shards can be trained on, but re-encode under another data.name to append to them"
            )
        if list(listing.classes) != base.classes:
            raise UserError(
                f"the classes of {listing.url} are not those of the latents; choose another "
                "data.name"
            )
        known = {name for name, _ in inputs}
        new = [item for item in items if item.name not in known] if append else []
        items = encoded_items(listing, inputs) + new
        segments = [*base.segments, *([len(new)] if new else [])]
    keys: list[int] = []
    orders = []
    for count in segments:
        first = len(keys)
        here = items[first : first + count]
        order = first + encode_order(here, listing.source.grouped, size, first)
        orders.append(hashlib.sha256(np.ascontiguousarray(order, "<i8").tobytes()).hexdigest())
        keys += order.tolist()
    first_new = 0
    if base is not None:
        first_new = sum(-(-count // size) for count in base.segments)
        if (
            any(s.name in missing for s in base.shards)
            and orders[: len(base.orders)] != base.orders
        ):
            raise UserError(
                f"the row groups of {listing.url} are not those that were encoded, so the images "
                "of a shard cannot be located; restore the files, or re-encode under another "
                "data.name"
            )
    tasks: list[ShardTask] = []
    start = 0
    for segment in segments:
        end = start + segment
        for begin in range(start, end, size):
            number = len(tasks)
            shard = keys[begin : min(begin + size, end)]
            tasks.append(ShardTask(number, shard, [items[key] for key in shard]))
        start = end
    wanted = [t for t in tasks if t.number >= first_new or shard_name(t.number) in missing]
    listing = ImageList(listing.source, listing.classes, items)
    return EncodeJob(listing, wanted, segments, orders, base, first_new)


def encoded_items(listing: ImageList, inputs: list[tuple[str, int]]) -> list[Item]:
    """The listed images that were encoded, in key order.

    Raises:
        UserError: encoded images were removed or relabeled.
    """
    here = {item.name: item for item in listing.items}
    gone = [name for name, label in inputs if name not in here or here[name].label != label]
    if gone:
        raise UserError(
            f"{len(gone):,} encoded images were removed from {listing.url} or relabeled, such as "
            f"{gone[0]}; restore them, or re-encode under another data.name"
        )
    return [here[name] for name, _ in inputs]


def encode_order(
    items: Sequence[Item], grouped: bool, images_per_shard: int, first_key: int
) -> np.ndarray:
    """Positions in `items`, (n,) int64, in the order in which they are encoded.

    A seeded permutation, as sources are listed by class and training reads shards one after
    another. Images that are read in groups are permuted in two steps: groups to blocks of shards,
    then images within a block.

    Args:
        grouped: as in `Source`.
        first_key: key of the first item; appended images get a permutation of their own.
    """
    ranks = _random(len(items), _IMAGES, first_key)
    if not grouped:
        return np.argsort(ranks, kind="stable")
    groups = np.unique(
        [f"{item.location.file}:{item.location.size}" for item in items], return_inverse=True
    )[1]
    order = np.argsort(_random(int(groups.max()) + 1, _ROW_GROUPS, first_key), kind="stable")
    sizes = np.bincount(groups)[order]
    blocks = np.empty(len(order), dtype=np.int64)
    blocks[order] = (np.cumsum(sizes) - sizes) // (BLOCK_SHARDS * images_per_shard)
    return np.lexsort((ranks, blocks[groups]))


def _random(count: int, *seed: int) -> np.ndarray:
    # Raw bits and a stable sort: NumPy may change its own permutations from version to version.
    return np.random.Philox(np.random.SeedSequence(list(seed))).random_raw(count)


def require_plan(recipe: Recipe, url: str, job: EncodeJob) -> None:
    """Refuse a job where another one is in progress.

    A stored plan without a finished shard is ignored, so that a recipe that failed immediately
    can be fixed.

    Raises:
        UserError: other images or another recipe are being encoded there.
    """
    folder = storage.join(url, "parts")
    names = set(storage.list_names(folder))
    if PLAN not in names or not names - {PLAN}:
        return
    stored = _read_record(Plan, storage.join(folder, PLAN), f"delete {folder}")
    require_recipe(recipe, stored.recipe_hash)
    if stored != job.plan(recipe):
        raise UserError(
            f"the images of {job.listing.url} have changed since encoding to {url} started, or "
            f"--append was given to one command only; choose another data.name, or delete {folder}"
        )


def write_plan(url: str, plan: Plan) -> None:
    """Store the plan that the following parts belong to; idempotent."""
    storage.write_text(storage.join(url, "parts", PLAN), plan.model_dump_json(indent=1))


def read_encoded_parts(recipe: Recipe, url: str, job: EncodeJob) -> dict[int, EncodedPart]:
    """Finished shards that have a tar file of the recorded size.

    Where too many images were rejected, they are read again.
    """
    storage.remove_temporary(url)
    folder, parts = storage.join(url, "parts"), []
    for name in storage.list_names(folder):
        if name != PLAN:
            part = _read_record(EncodedPart, storage.join(folder, name), "delete it")
            shard = storage.join(url, shard_name(part.number))
            if part.entry is None or (
                storage.exists(shard) and storage.size_bytes(shard) == part.entry.bytes
            ):
                parts.append(part)
    if len(rejected_images(job, parts)) > job.rejectable(recipe):
        parts = [part for part in parts if not part.rejected]
    return {part.number: part for part in parts}


def rejected_images(job: EncodeJob, parts: Iterable[EncodedPart]) -> list[Rejected]:
    """Rejected new images, by path."""
    new = [part for part in parts if part.number >= job.first_new]
    return sorted((item for part in new for item in part.rejected), key=lambda item: item.path)


def _read_record(record: type[R], url: str, remedy: str) -> R:
    try:
        return record.model_validate_json(storage.read_bytes(url))
    except ValidationError as error:
        raise DiffitError(
            f"{url} is damaged: {error.errors()[0]['msg']}; {remedy}, and run `diffit encode` again"
        ) from error


def commit_manifest(
    recipe: Recipe, url: str, job: EncodeJob, parts: dict[int, EncodedPart]
) -> Manifest:
    """Write rejected.jsonl, the inputs, recipe.yaml and, last, the manifest; remove the parts."""
    base, listing = job.base, job.listing
    ordered = [parts[number] for number in sorted(parts)]
    new = [part for part in ordered if part.number >= job.first_new]
    shards = {shard.name: shard for shard in base.shards} if base else {}
    for part in ordered[: len(ordered) - len(new)]:
        _require_rebuilt(url, shards[shard_name(part.number)], part.entry)
    shards |= {part.entry.name: part.entry for part in ordered if part.entry is not None}
    rejected = rejected_images(job, new)
    if not shards:
        raise UserError(f"no image in {listing.url} can be read: {rejected[0].reason}")
    count = sum(part.images for part in ordered)
    if count != job.images:
        raise DiffitError(
            f"{count} written and rejected images do not add up to the {job.images} images to "
            f"encode of {listing.url}; delete {url}/parts and encode again"
        )
    kept = sorted(shards.values(), key=lambda shard: shard.name)
    if base is not None and not new:
        manifest = base.model_copy(update={"shards": kept})
    else:
        manifest = _manifest(recipe, job, kept, new)
        lines = [item.model_dump_json() for item in rejected]
        if base:
            earlier = storage.read_bytes(storage.join(url, REJECTED)).decode().split("\n")
            lines = earlier[: base.totals.rejected] + lines
        storage.write_text(storage.join(url, REJECTED), "".join(f"{line}\n" for line in lines))
        write_inputs(url, job.inputs)
        storage.write_text(storage.join(url, RECIPE), stored_text(recipe))
    storage.write_text(storage.join(url, MANIFEST), manifest.model_dump_json(indent=1))
    storage.remove(storage.join(url, "parts"))
    if rejected:
        name = storage.display_path(storage.join(url, REJECTED))
        say(f"{len(rejected):,} images could not be read; see {name}")
    return manifest


def _require_rebuilt(url: str, before: ShardEntry, after: ShardEntry | None) -> None:
    """Refuse a rebuilt shard that lacks images.

    Raises:
        DiffitError: with both counts; its part is removed, so that a rerun reads it again.
    """
    if after is None or after.count != before.count:
        storage.remove(storage.join(url, "parts", f"{before.name}.json"))
        raise DiffitError(
            f"{before.name} held {before.count} images, but {after.count if after else 0} are "
            "readable now; restore the source and run the same command again"
        )
    if before.sha256 != after.sha256:
        say(f"{before.name} has other bytes than before (different hardware?)")


def _manifest(
    recipe: Recipe, job: EncodeJob, shards: list[ShardEntry], new: list[EncodedPart]
) -> Manifest:
    """The manifest of all shards, of which these parts are new."""
    base, inputs = job.base, job.inputs
    written = sum(shard.count for shard in shards)
    frames, members, height, width = new[0].shape
    total = np.sum([part.total for part in new], axis=0)
    squares = np.sum([part.squares for part in new], axis=0)
    if base:
        earlier = base.totals.written * frames * height * width
        total += np.array(base.mean) * earlier
        squares += (np.array(base.std) ** 2 + np.array(base.mean) ** 2) * earlier
    values = written * frames * height * width
    mean = total / values
    return Manifest(
        schema_version=MANIFEST_SCHEMA,
        recipe_hash=recipe.encode_hash(),
        autoencoder=recipe.autoencoder.name,
        autoencoder_sha256=new[0].autoencoder_sha256,
        scale=new[0].scale,
        channels=recipe.autoencoder.latent_channels,
        height=height,
        width=width,
        frames=frames,
        posterior=members != recipe.autoencoder.latent_channels,
        images_per_shard=recipe.data.images_per_shard,
        segments=job.segments,
        orders=job.orders,
        classes=list(job.listing.classes),
        input_sha256=storage.digest(inputs),
        shards=shards,
        totals=Totals(input=len(inputs), written=written, rejected=len(inputs) - written),
        mean=mean.tolist(),
        std=np.sqrt(squares / values - mean**2).tolist(),
    )
