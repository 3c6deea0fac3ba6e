"""Encoding that is under way: its plan, its shards to make, and the parts that are finished.

`parts/` below the latents holds plan.json, which says what they are of, and a file for each shard
that is done. The manifest, once written, takes their place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from diffit_train import storage
from diffit_train.config import Recipe, dump_recipe
from diffit_train.data.shards import (
    MANIFEST,
    REJECTED,
    SCHEMA,
    Manifest,
    ShardEntry,
    Totals,
    require_recipe,
    shard_name,
)
from diffit_train.data.sources import PictureList
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import say

PLAN = "plan.json"
# Left by a run that found too many unreadable pictures: their shards are to be read again.
RETRY = "retry-rejected"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Plan(_Strict):
    """parts/plan.json: what the unfinished latents are of."""

    recipe_hash: str
    input_sha256: str


class Rejected(_Strict):
    """A picture that could not be read."""

    path: str
    reason: str


class Part(_Strict):
    """A finished shard; `entry` is None where none of its pictures could be read.

    `total` and `squares` are sums over the scaled, sampled latents of each channel.
    """

    number: int
    entry: ShardEntry | None
    rejected: list[Rejected]
    autoencoder_sha256: str
    scale: float
    shape: tuple[int, int, int, int]  # F, C, h, w
    total: list[float]
    squares: list[float]


def make_plan(recipe: Recipe, url: str, listing: PictureList) -> Plan:
    """The plan, checked against that of what is under way; `write_plan` makes it binding.

    A plan without a finished shard binds nobody, so a recipe that failed at once can be mended.

    Raises:
        UserError: other pictures or another recipe are being encoded there.
    """
    plan = Plan(recipe_hash=recipe.encode_hash(), input_sha256=listing.digest())
    folder = storage.join(url, "parts")
    names = set(storage.list_names(folder))
    if PLAN not in names or not names - {PLAN, RETRY}:
        return plan
    found = Plan.model_validate(storage.read_json(storage.join(folder, PLAN)))
    require_recipe(recipe, found.recipe_hash)
    if found != plan:
        raise UserError(
            f"the pictures of {listing.url} have changed since encoding to {url} began; choose "
            f"another data.name, or delete {url}"
        )
    return plan


def write_plan(url: str, plan: Plan) -> None:
    """Say what the parts that follow are of; written again, it is the same."""
    storage.write_text(storage.join(url, "parts", PLAN), plan.model_dump_json(indent=2))


def read_parts(url: str) -> dict[int, Part]:
    """Finished shards whose tar file is there with its recorded size."""
    storage.remove_temporary(url)
    folder = storage.join(url, "parts")
    names = set(storage.list_names(folder)) - {PLAN}
    found = [
        Part.model_validate(storage.read_json(storage.join(folder, name)))
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


def shard_specs(recipe: Recipe, listing: PictureList) -> list[dict[str, Any]]:
    """What each shard is made of."""
    size = recipe.data.pictures_per_shard
    return [
        {
            "number": number,
            "first": first,
            "paths": list(listing.paths[first : first + size]),
            "labels": list(listing.labels[first : first + size]),
        }
        for number, first in enumerate(range(0, len(listing), size))
    ]


def count_pictures(specs: list[dict[str, Any]]) -> int:
    """Pictures of all these shards."""
    return sum(len(spec["paths"]) for spec in specs)


def commit_manifest(
    recipe: Recipe, url: str, listing: PictureList, parts: dict[int, Part]
) -> Manifest:
    """Write rejected.jsonl, recipe.yaml and, last, the manifest; then the parts may go."""
    ordered = [parts[number] for number in sorted(parts)]
    shards = [part.entry for part in ordered if part.entry is not None]
    rejected = [item for part in ordered for item in part.rejected]
    written = sum(shard.count for shard in shards)
    if not written:
        raise UserError(f"no picture of {listing.url} can be read: {rejected[0].reason}")
    if written + len(rejected) != len(listing):
        raise DiffitError(
            f"{written} written and {len(rejected)} rejected pictures do not add up to the "
            f"{len(listing)} of {listing.url}; delete {url} and encode again"
        )
    frames, channels, height, width = ordered[0].shape
    values = written * frames * height * width
    mean = np.sum([part.total for part in ordered], axis=0) / values
    std = np.sqrt(np.sum([part.squares for part in ordered], axis=0) / values - mean**2)
    manifest = Manifest(
        schema_version=SCHEMA,
        recipe_hash=recipe.encode_hash(),
        autoencoder=recipe.autoencoder.source,
        autoencoder_sha256=ordered[0].autoencoder_sha256,
        scale=ordered[0].scale,
        channels=channels,
        height=height,
        width=width,
        frames=frames,
        classes=list(listing.classes),
        input_sha256=listing.digest(),
        shards=shards,
        totals=Totals(input=len(listing), written=written, rejected=len(rejected)),
        mean=mean.tolist(),
        std=std.tolist(),
    )
    lines = "".join(item.model_dump_json() + "\n" for item in rejected)
    storage.write_text(storage.join(url, REJECTED), lines)
    storage.write_text(storage.join(url, "recipe.yaml"), dump_recipe(recipe))
    storage.write_text(storage.join(url, MANIFEST), manifest.model_dump_json(indent=1) + "\n")
    storage.remove(storage.join(url, "parts"))
    if rejected:
        place = storage.shown(storage.join(url, REJECTED))
        say(f"{len(rejected):,} pictures could not be read; see {place}")
    return manifest
