"""Encoding in progress: the plan, the shards to encode, and the finished parts.

`parts/` in the folder of the latents holds plan.json, which identifies the input, and one file
per finished shard. The manifest, once written, replaces them.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from pydantic import ValidationError

from diffit_train import storage
from diffit_train.config import Recipe, stored_text
from diffit_train.data.encode_order import encode_order, order_digest
from diffit_train.data.shards import (
    INPUTS,
    MANIFEST,
    MANIFEST_SCHEMA,
    RECIPE,
    REJECTED,
    Manifest,
    ShardEntry,
    Totals,
    latents_url,
    load_manifest,
    require_recipe,
    shard_name,
)
from diffit_train.data.sources import ImageList, Item, list_images
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import say

R = TypeVar("R", bound=storage.Record)
PLAN = "plan.json"
# `input_sha256` of the plan of a repair.
REPAIR = "repair"
# Marker left by a run that found too many unreadable images: read their shards again.
RETRY = "retry-rejected"


class Plan(storage.Record):
    """parts/plan.json: recipe, input and order of the encoding.

    `appended_to` images came before it. `order` is as in the manifest's `orders`.
    """

    recipe_hash: str
    input_sha256: str
    appended_to: int
    order: str


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
        listing: the images to encode.
        before: names and labels of the images encoded earlier, whose keys come first.
        base: the manifest to append to.
    """

    listing: ImageList
    before: list[tuple[str, int]] = field(default_factory=list, repr=False)
    base: Manifest | None = None

    @property
    def inputs(self) -> list[tuple[str, int]]:
        """Names and labels in key order."""
        return self.before + [(item.name, item.label) for item in self.listing.items]

    def positions(self, images_per_shard: int) -> np.ndarray:
        """Positions in the listing, (n,), in the order of the shards."""
        items, first = self.listing.items, len(self.before)
        return encode_order(items, self.listing.kind, images_per_shard, first)

    def order(self, images_per_shard: int) -> str:
        """Entry in the manifest's `orders`."""
        return order_digest(self.positions(images_per_shard) + len(self.before))


def shard_ranges(segments: Sequence[int], images_per_shard: int) -> list[tuple[int, int, int]]:
    """Number, and range in the order of encoding, of every shard; none spans two segments."""
    ranges: list[tuple[int, int, int]] = []
    first = 0
    for size in segments:
        for start in range(first, first + size, images_per_shard):
            ranges.append((len(ranges), start, min(start + images_per_shard, first + size)))
        first += size
    return ranges


def find_work(recipe: Recipe, done: Manifest | None) -> EncodeJob | None:
    """What there is to encode; None if there is nothing to append.

    Args:
        done: finished latents to append to.

    Raises:
        UserError: bad input; or encoded images were removed or relabeled.
    """
    listing = list_images(recipe)
    if done is None:
        return EncodeJob(listing)
    # An interrupted commit may have left more entries than the manifest counts.
    before = read_inputs(latents_url(recipe))[: done.totals.input]
    known = dict(before)
    here = {item.name: item.label for item in listing.items}
    changed = [name for name, label in before if here.get(name) != label]
    if changed:
        raise UserError(
            f"{len(changed):,} encoded images were removed from {listing.url} or relabeled, such "
            f"as {changed[0]}; --append only adds images: choose another data.name to re-encode"
        )
    if list(listing.classes) != done.classes:
        raise UserError(
            f"the classes of {listing.url} are not those of the latents; choose another data.name"
        )
    new = [item for item in listing.items if item.name not in known]
    return EncodeJob(replace(listing, items=new), before, done) if new else None


def make_plan(recipe: Recipe, url: str, work: EncodeJob) -> Plan:
    """The plan, checked against that of an encoding in progress; `write_plan` stores it.

    A stored plan without a finished shard is ignored, so that a recipe that failed immediately
    can be fixed.

    Raises:
        UserError: other images or another recipe are being encoded there.
    """
    plan = Plan(
        recipe_hash=recipe.encode_hash(),
        input_sha256=storage.digest(work.inputs),
        appended_to=len(work.before),
        order=work.order(recipe.data.images_per_shard),
    )
    found = read_plan(url)
    if found is None or found.input_sha256 == REPAIR:
        return plan
    require_recipe(recipe, found.recipe_hash)
    if found != plan:
        raise UserError(
            f"the images of {work.listing.url} have changed since encoding to {url} started; "
            f"choose another data.name, or delete {storage.join(url, 'parts')}"
        )
    return plan


def read_plan(url: str) -> Plan | None:
    """The plan of the encoding in progress; None if none of its shards is finished."""
    folder = storage.join(url, "parts")
    names = set(storage.list_names(folder))
    if PLAN not in names or not names - {PLAN, RETRY}:
        return None
    return _read_record(Plan, storage.join(folder, PLAN), f"delete {folder}")


def write_plan(url: str, plan: Plan) -> None:
    """Store the plan that the following parts belong to; idempotent."""
    storage.write_text(storage.join(url, "parts", PLAN), plan.model_dump_json(indent=1))


def read_encoded_parts(url: str) -> dict[int, EncodedPart]:
    """Finished shards that have a tar file of the recorded size."""
    storage.remove_temporary(url)
    folder = storage.join(url, "parts")
    names = set(storage.list_names(folder)) - {PLAN}
    found = [
        _read_record(EncodedPart, storage.join(folder, name), "delete it")
        for name in sorted(names - {RETRY})
    ]
    if RETRY in names:
        for part in found:
            if part.rejected:
                storage.remove(storage.join(folder, f"{shard_name(part.number)}.json"))
        found = [part for part in found if not part.rejected]
        storage.remove(storage.join(folder, RETRY))
    return {p.number: p for p in found if p.entry is None or _is_whole(url, p.entry)}


def _read_record(record: type[R], url: str, remedy: str) -> R:
    try:
        return record.model_validate_json(storage.read_bytes(url))
    except ValidationError as error:
        raise DiffitError(
            f"{url} is damaged: {error.errors()[0]['msg']}; {remedy}, and run `diffit encode` again"
        ) from error


def _is_whole(url: str, entry: ShardEntry) -> bool:
    shard = storage.join(url, entry.name)
    return storage.exists(shard) and storage.size_bytes(shard) == entry.bytes


def shard_tasks(recipe: Recipe, work: EncodeJob) -> list[ShardTask]:
    """All shards of the job."""
    skip, items, size = len(work.before), work.listing.items, recipe.data.images_per_shard
    positions = work.positions(size)
    segments = work.base.segments if work.base else []
    tasks = []
    for number, first, end in shard_ranges([*segments, len(items)], size):
        if first >= skip:
            here = positions[first - skip : end - skip].tolist()
            tasks.append(ShardTask(number, [skip + p for p in here], [items[p] for p in here]))
    return tasks


def repair_tasks(manifest: Manifest, listing: ImageList, names: Sequence[str]) -> list[ShardTask]:
    """These shards of finished latents.

    Args:
        listing: all encoded images, in key order.

    Raises:
        UserError: the order of encoding cannot be found again.
    """
    keys, first, size = [], 0, manifest.images_per_shard
    for count, order in zip(manifest.segments, manifest.orders, strict=True):
        items = listing.items[first : first + count]
        positions = encode_order(items, listing.kind, size, first)
        if order_digest(positions + first) != order:
            raise UserError(
                f"the row groups of {listing.url} are not those that were encoded, so the "
                "images of a shard cannot be found again; restore the files, or re-encode "
                "under another data.name"
            )
        keys += (positions + first).tolist()
        first += count
    return [
        ShardTask(number, keys[start:end], [listing.items[key] for key in keys[start:end]])
        for number, start, end in shard_ranges(manifest.segments, size)
        if shard_name(number) in names
    ]


def count_images(tasks: Sequence[ShardTask]) -> int:
    """Number of images in these shards."""
    return sum(len(task.items) for task in tasks)


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
        if storage.digest(inputs[: manifest.totals.input]) != manifest.input_sha256:
            raise ValueError(f"it is not the list of {MANIFEST}")
        return inputs
    except (OSError, ValueError, TypeError, EOFError, zlib.error) as error:
        raise DiffitError(
            f"{name} is missing or damaged ({error}); delete it, and run `diffit encode` again"
        ) from error


def restore_inputs(url: str, manifest: Manifest, listing: ImageList) -> None:
    """Write the list of encoded images again.

    Raises:
        UserError: the source does not list what was encoded.
    """
    inputs = [(item.name, item.label) for item in listing.items]
    if storage.digest(inputs) != manifest.input_sha256:
        raise UserError(
            f"{url}/{INPUTS} is missing, and {listing.url} does not list what was encoded; the "
            "shards can be trained on, but re-encode under another data.name to append to them"
        )
    _write_inputs(url, inputs)


def encoded_items(url: str, listing: ImageList) -> ImageList:
    """The listing of what was encoded, in key order.

    Raises:
        UserError: encoded images were removed or relabeled.
    """
    here, inputs = {item.name: item for item in listing.items}, read_inputs(url)
    gone = [name for name, label in inputs if name not in here or here[name].label != label]
    if gone:
        raise UserError(
            f"{len(gone):,} encoded images were removed from {listing.url} or relabeled, such as "
            f"{gone[0]}; restore them, or re-encode under another data.name"
        )
    return replace(listing, items=[here[name] for name, _ in inputs])


def _write_inputs(url: str, inputs: list[tuple[str, int]]) -> None:
    text = "".join(json.dumps(pair) + "\n" for pair in inputs)
    # No timestamp in the header, so that the same list gives the same bytes.
    storage.write_bytes(storage.join(url, INPUTS), gzip.compress(text.encode(), mtime=0))


def commit_manifest(
    recipe: Recipe, url: str, work: EncodeJob, parts: dict[int, EncodedPart]
) -> Manifest:
    """Write rejected.jsonl, the inputs, recipe.yaml and, last, the manifest; remove the parts."""
    base, listing = work.base, work.listing
    ordered = [parts[number] for number in sorted(parts)]
    new = [part.entry for part in ordered if part.entry is not None]
    rejected = sorted(
        (item for part in ordered for item in part.rejected), key=lambda item: item.path
    )
    if not new:
        raise UserError(f"no image in {listing.url} can be read: {rejected[0].reason}")
    if sum(shard.count for shard in new) + len(rejected) != len(listing):
        raise DiffitError(
            f"{sum(shard.count for shard in new)} written and {len(rejected)} rejected images do "
            f"not add up to the {len(listing)} images in {listing.url}; delete {url}/parts and "
            "encode again"
        )
    shards = [*(base.shards if base else []), *new]
    written = sum(shard.count for shard in shards)
    lines = "".join(item.model_dump_json() + "\n" for item in rejected)
    if base:
        earlier_lines = storage.read_bytes(storage.join(url, REJECTED)).decode().split("\n")
        kept = earlier_lines[: base.totals.rejected]
        lines = "".join(line + "\n" for line in kept) + lines
    frames, members, height, width = ordered[0].shape
    values = written * frames * height * width
    total = np.sum([part.total for part in ordered], axis=0)
    squares = np.sum([part.squares for part in ordered], axis=0)
    if base:
        earlier = base.totals.written * frames * height * width
        total += np.array(base.mean) * earlier
        squares += (np.array(base.std) ** 2 + np.array(base.mean) ** 2) * earlier
    mean = total / values
    std = np.sqrt(squares / values - mean**2)
    inputs = work.inputs
    manifest = Manifest(
        schema_version=MANIFEST_SCHEMA,
        recipe_hash=recipe.encode_hash(),
        autoencoder=recipe.autoencoder.name,
        autoencoder_sha256=ordered[0].autoencoder_sha256,
        scale=ordered[0].scale,
        channels=recipe.autoencoder.latent_channels,
        height=height,
        width=width,
        frames=frames,
        posterior=members != recipe.autoencoder.latent_channels,
        images_per_shard=recipe.data.images_per_shard,
        segments=[*(base.segments if base else []), len(listing)],
        orders=[*(base.orders if base else []), work.order(recipe.data.images_per_shard)],
        classes=list(listing.classes),
        input_sha256=storage.digest(inputs),
        shards=shards,
        totals=Totals(input=len(inputs), written=written, rejected=len(inputs) - written),
        mean=mean.tolist(),
        std=std.tolist(),
    )
    storage.write_text(storage.join(url, REJECTED), lines)
    _write_inputs(url, inputs)
    storage.write_text(storage.join(url, RECIPE), stored_text(recipe))
    storage.write_text(storage.join(url, MANIFEST), manifest.model_dump_json(indent=1))
    storage.remove(storage.join(url, "parts"))
    if rejected:
        name = storage.display_path(storage.join(url, REJECTED))
        say(f"{len(rejected):,} images could not be read; see {name}")
    return manifest
