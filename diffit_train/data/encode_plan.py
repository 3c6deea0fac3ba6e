"""Encoding that is under way: its plan, its shards to make, and the parts that are finished.

`parts/` below the latents holds plan.json, which says what they are of, and a file for each shard
that is done. The manifest, once written, takes their place.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from diffit_train import storage
from diffit_train.config import Recipe, dump_recipe
from diffit_train.data.shards import (
    INPUTS,
    MANIFEST,
    MANIFEST_SCHEMA,
    REJECTED,
    Manifest,
    ShardEntry,
    Totals,
    latents_url,
    require_recipe,
    shard_name,
)
from diffit_train.data.sources import ImageList, Item, Place, list_images
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import say

PLAN = "plan.json"
# The input of the plan under which bad shards are made again.
REPAIR = "repair"
# Left by a run that found too many unreadable images: their shards are to be read again.
RETRY = "retry-rejected"


class Plan(storage.Record):
    """parts/plan.json: what the unfinished latents are of; `appended_to` images were there."""

    recipe_hash: str
    input_sha256: str
    appended_to: int


class Rejected(storage.Record):
    """An image that could not be read."""

    path: str
    reason: str


class EncodedPart(storage.Record):
    """A finished shard; `entry` is None where none of its images could be read.

    `total` and `squares` are sums over the scaled, sampled latents of each channel.
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
class EncodeJob:
    """What is to be encoded.

    Attributes:
        listing: of the source; its items are those to encode.
        before: names and labels of the images whose keys come first, encoded earlier.
        base: the manifest that is appended to.
    """

    listing: ImageList
    before: list[tuple[str, int]] = field(default_factory=list, repr=False)
    base: Manifest | None = None

    @property
    def inputs(self) -> list[tuple[str, int]]:
        """Names and labels in the order of the keys."""
        return self.before + [(item.name, item.label) for item in self.listing.items]

    def shard_ranges(self, images_per_shard: int) -> list[tuple[int, int, int]]:
        """Number, first key and end key of each shard to encode."""
        segments = self.base.segments if self.base else []
        ranges = shard_ranges([*segments, len(self.listing)], images_per_shard)
        return [r for r in ranges if r[1] >= len(self.before)]


def shard_ranges(segments: Sequence[int], images_per_shard: int) -> list[tuple[int, int, int]]:
    """Number, first key and end key of every shard; no shard holds images of two segments."""
    ranges: list[tuple[int, int, int]] = []
    first = 0
    for size in segments:
        for start in range(first, first + size, images_per_shard):
            ranges.append((len(ranges), start, min(start + images_per_shard, first + size)))
        first += size
    return ranges


def find_work(recipe: Recipe, done: Manifest | None) -> EncodeJob | None:
    """What there is to encode; None where nothing is to be appended.

    Args:
        done: finished latents to append to.

    Raises:
        UserError: bad input; or images that were encoded are gone or labelled anew.
    """
    listing = list_images(recipe)
    if done is None:
        return EncodeJob(listing)
    # A commit that was cut off may have left more than the manifest knows of.
    before = read_inputs(latents_url(recipe))[: done.totals.input]
    known = dict(before)
    here = {item.name: item.label for item in listing.items}
    changed = [name for name, label in before if here.get(name) != label]
    if changed:
        raise UserError(
            f"{len(changed):,} encoded images are gone from {listing.url} or have another label, "
            f"as {changed[0]}; appending only adds: choose another data.name to encode anew"
        )
    if list(listing.classes) != done.classes:
        raise UserError(
            f"the classes of {listing.url} are not those of the latents; choose another data.name"
        )
    new = [item for item in listing.items if item.name not in known]
    return EncodeJob(replace(listing, items=new), before, done) if new else None


def make_plan(recipe: Recipe, url: str, work: EncodeJob) -> Plan:
    """The plan, checked against that of what is under way; `write_plan` makes it binding.

    A plan without a finished shard binds nobody, so a recipe that failed at once can be mended.

    Raises:
        UserError: other images or another recipe are being encoded there.
    """
    plan = Plan(
        recipe_hash=recipe.encode_hash(),
        input_sha256=storage.digest(work.inputs),
        appended_to=len(work.before),
    )
    found = read_plan(url)
    if found is None or found.input_sha256 == REPAIR:
        return plan
    require_recipe(recipe, found.recipe_hash)
    if found != plan:
        raise UserError(
            f"the images of {work.listing.url} have changed since encoding to {url} began; "
            f"choose another data.name, or delete {storage.join(url, 'parts')}"
        )
    return plan


def read_plan(url: str) -> Plan | None:
    """The plan of what is under way; None where no shard of it is finished."""
    folder = storage.join(url, "parts")
    names = set(storage.list_names(folder))
    if PLAN not in names or not names - {PLAN, RETRY}:
        return None
    return Plan.model_validate(storage.read_json(storage.join(folder, PLAN)))


def write_plan(url: str, plan: Plan) -> None:
    """Say what the parts that follow are of; written again, it is the same."""
    storage.write_text(storage.join(url, "parts", PLAN), plan.model_dump_json(indent=2))


def read_encoded_parts(url: str) -> dict[int, EncodedPart]:
    """Finished shards whose tar file is there with its recorded size."""
    storage.remove_temporary(url)
    folder = storage.join(url, "parts")
    names = set(storage.list_names(folder)) - {PLAN}
    found = [
        EncodedPart.model_validate(storage.read_json(storage.join(folder, name)))
        for name in sorted(names - {RETRY})
    ]
    if RETRY in names:
        for part in found:
            if part.rejected:
                storage.remove(storage.join(folder, f"{shard_name(part.number)}.json"))
        found = [part for part in found if not part.rejected]
        storage.remove(storage.join(folder, RETRY))
    return {p.number: p for p in found if p.entry is None or _is_whole(url, p.entry)}


def _is_whole(url: str, entry: ShardEntry) -> bool:
    shard = storage.join(url, entry.name)
    return storage.exists(shard) and storage.size_bytes(shard) == entry.bytes


def shard_spec(number: int, first: int, items: Sequence[Item]) -> dict[str, Any]:
    """What a shard is made of, as it travels to a task."""
    return {"number": number, "first": first, "items": [list(item) for item in items]}


def spec_items(spec: dict[str, Any]) -> list[Item]:
    """The images of a shard."""
    return [
        Item(name, label, Place(*place), problem) for name, label, place, problem in spec["items"]
    ]


def work_specs(recipe: Recipe, work: EncodeJob) -> list[dict[str, Any]]:
    """Every shard of the work."""
    skip, items = len(work.before), work.listing.items
    return [
        shard_spec(number, first, items[first - skip : end - skip])
        for number, first, end in work.shard_ranges(recipe.data.images_per_shard)
    ]


def count_images(specs: list[dict[str, Any]]) -> int:
    """Images of all these shards."""
    return sum(len(spec["items"]) for spec in specs)


def read_inputs(url: str) -> list[tuple[str, int]]:
    """Names and labels of all encoded images in the order of their keys.

    Raises:
        DiffitError: the list is missing or damaged.
    """
    name = storage.join(url, INPUTS)
    try:
        lines = gzip.decompress(storage.read_bytes(name)).decode("ascii").splitlines()
        return [(str(path), int(label)) for path, label in map(json.loads, lines)]
    except (FileNotFoundError, OSError, ValueError, EOFError) as error:
        raise DiffitError(
            f"{name} is missing or damaged ({error}); without it nothing can be appended or "
            "repaired, and the shards themselves are not concerned"
        ) from error


def _write_inputs(url: str, inputs: list[tuple[str, int]]) -> None:
    text = "".join(json.dumps(pair) + "\n" for pair in inputs)
    # No time in the header, so that the same list gives the same bytes.
    storage.write_bytes(storage.join(url, INPUTS), gzip.compress(text.encode(), mtime=0))


def commit_manifest(
    recipe: Recipe, url: str, work: EncodeJob, parts: dict[int, EncodedPart]
) -> Manifest:
    """Write rejected.jsonl, the inputs, recipe.yaml and, last, the manifest; then parts may go."""
    base, listing = work.base, work.listing
    ordered = [parts[number] for number in sorted(parts)]
    new = [part.entry for part in ordered if part.entry is not None]
    rejected = [item for part in ordered for item in part.rejected]
    if not new:
        raise UserError(f"no image of {listing.url} can be read: {rejected[0].reason}")
    if sum(shard.count for shard in new) + len(rejected) != len(listing):
        raise DiffitError(
            f"{sum(shard.count for shard in new)} written and {len(rejected)} rejected images do "
            f"not add up to the {len(listing)} of {listing.url}; delete {url}/parts and encode "
            "again"
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
        autoencoder=recipe.autoencoder.source,
        autoencoder_sha256=ordered[0].autoencoder_sha256,
        scale=ordered[0].scale,
        channels=recipe.autoencoder.latent_channels,
        height=height,
        width=width,
        frames=frames,
        posterior=members != recipe.autoencoder.latent_channels,
        images_per_shard=recipe.data.images_per_shard,
        segments=[*(base.segments if base else []), len(listing)],
        classes=list(listing.classes),
        input_sha256=storage.digest(inputs),
        shards=shards,
        totals=Totals(input=len(inputs), written=written, rejected=len(inputs) - written),
        mean=mean.tolist(),
        std=std.tolist(),
    )
    storage.write_text(storage.join(url, REJECTED), lines)
    _write_inputs(url, inputs)
    storage.write_text(storage.join(url, "recipe.yaml"), dump_recipe(recipe))
    storage.write_text(storage.join(url, MANIFEST), manifest.model_dump_json(indent=1) + "\n")
    storage.remove(storage.join(url, "parts"))
    if rejected:
        place = storage.display_path(storage.join(url, REJECTED))
        say(f"{len(rejected):,} images could not be read; see {place}")
    return manifest
