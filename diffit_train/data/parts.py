"""Encoding that is under way: its plan, its shards to make, and the parts that are finished.

`parts/` below the latents holds plan.json, which says what they are of, and a file for each shard
that is done. The manifest, once written, takes their place.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data.shards import ShardEntry, require_recipe, shard_name
from diffit_train.data.sources import PictureList
from diffit_train.errors import UserError

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


def open_plan(recipe: Recipe, url: str, listing: PictureList) -> None:
    """Write the plan, or check that what is under way has the same one.

    Raises:
        UserError: other pictures or another recipe are being encoded there.
    """
    plan = Plan(recipe_hash=recipe.encode_hash(), input_sha256=listing.digest())
    name = storage.join(url, "parts", PLAN)
    if not storage.exists(name):
        storage.write_text(name, plan.model_dump_json(indent=2))
        return
    found = Plan.model_validate(storage.read_json(name))
    require_recipe(recipe, found.recipe_hash)
    if found != plan:
        raise UserError(
            f"the pictures of {listing.url} have changed since encoding to {url} began; choose "
            f"another data.name, or delete {url}"
        )


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
