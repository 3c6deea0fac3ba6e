"""`diffit encode`: Ray Data reads pictures on CPU tasks and encodes them in a pool of actors.

A row of the pipeline is a shard. Its contents follow from recipe and input alone, whoever makes
it; it is committed by the tar file and then by its part file in `parts/`, so a rerun makes only
the shards without one. The manifest, written last, takes in all parts and replaces them.
"""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray

from diffit_train import cluster, storage
from diffit_train.config import Recipe
from diffit_train.data.parts import (
    RETRY,
    Part,
    Plan,
    Rejected,
    commit_manifest,
    count_pictures,
    make_plan,
    read_parts,
    shard_specs,
    write_plan,
)
from diffit_train.data.preprocess import read_pictures, to_model_range
from diffit_train.data.shards import (
    Manifest,
    finished,
    latents_url,
    shard_name,
    write_shard,
)
from diffit_train.data.sources import PictureList, list_pictures
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import Progress


def encode(recipe: Recipe, address: str | None = None) -> Manifest:
    """Encode the recipe's pictures on the Ray cluster at `address`. Rerunning continues.

    Raises:
        UserError: bad input; nothing was written. Or too many unreadable pictures.
        DiffitError: a shard could not be made.
    """
    done = finished(recipe)
    if done is not None:
        return done
    listing = list_pictures(recipe)
    _require_autoencoder(recipe)
    with cluster.connected(address):
        scaling = recipe.scaling
        cluster.require(1, scaling.encode_actors * scaling.gpus_per_actor, "encoding")
        parts = _encode_parts(recipe, listing)
    return commit_manifest(recipe, latents_url(recipe), listing, parts)


def _encode_parts(recipe: Recipe, listing: PictureList) -> dict[int, Part]:
    """All parts: those of earlier runs, and those made now, as they finish."""
    url = latents_url(recipe)
    plan = make_plan(recipe, url, listing)
    parts = read_parts(url)
    specs = [s for s in shard_specs(recipe, listing) if s["number"] not in parts]
    known = {part.autoencoder_sha256 for part in parts.values()}
    done = len(listing) - count_pictures(specs)
    with Progress("encode", len(listing), "pictures", done) as progress:
        for part in _encode_missing(recipe, plan, specs, known):
            parts[part.number] = part
            done += (part.entry.count if part.entry else 0) + len(part.rejected)
            progress.update(done)
            _check_rejected(recipe, url, parts, len(listing))
    return parts


def _require_autoencoder(recipe: Recipe) -> None:
    """Say early that the autoencoder of a `root:` reference has not been fitted yet."""
    source = recipe.autoencoder.source
    url = storage.resolve(recipe.storage.root, source)
    if url != source and not storage.exists(storage.join(url, "config.json")):
        raise UserError(
            f"there is no autoencoder in {url}; run `diffit autoencoder fit`, or set "
            "autoencoder.source to a folder in diffusers' format or a hub id"
        )


def _encode_missing(
    recipe: Recipe, plan: Plan, specs: list[dict[str, Any]], known_autoencoders: set[str]
) -> Iterator[Part]:
    """Run the pipeline over the shards that are missing, in whatever order they finish."""
    if not specs:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # A full pool of actors must leave processors for the readers that feed it. An amount other
    # than the readers' also keeps Ray Data from fusing them into the actors.
    actors, cpus = recipe.scaling.encode_actors, ray.cluster_resources()["CPU"]
    actor_cpus = min(0.9, cpus / (2 * actors))
    reader_cpus = min(1.0, cpus - actors * actor_cpus)
    source = storage.resolve(recipe.storage.root, recipe.data.source)
    rows = ray.data.from_items(
        [{"spec": json.dumps(spec)} for spec in specs], override_num_blocks=len(specs)
    )
    encoded = rows.map(
        _read_shard_pictures, fn_args=(source, recipe.data.resolution), num_cpus=reader_cpus
    ).map(
        _Encoder,
        fn_constructor_args=(
            recipe.model_dump(mode="json"),
            plan.model_dump(),
            sorted(known_autoencoders),
        ),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=actor_cpus,
        num_gpus=recipe.scaling.gpus_per_actor or None,
    )
    try:
        for row in encoded.iter_rows():
            _raise_failure(row["failure"])
            yield Part.model_validate_json(row["part"])
    except ray.exceptions.RayError as error:
        raise DiffitError(
            f"a shard could not be encoded: {_reason(error)}; the same command continues"
        ) from error


def _failure(error: DiffitError) -> str:
    """An error as part of a row: Ray Data would wrap one that is raised beyond recognition."""
    return json.dumps({"user": isinstance(error, UserError), "message": str(error)})


def _raise_failure(text: str) -> None:
    if text:
        failure = json.loads(text)
        raise (UserError if failure["user"] else DiffitError)(failure["message"])


def _reason(error: ray.exceptions.RayError) -> str:
    """The line of the exception that began a chain of remote ones."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", line)]
    return (named or lines[-1:] or [type(error).__name__])[0]


def _read_shard_pictures(row: dict[str, Any], source: str, resolution: int) -> dict[str, Any]:
    """CPU task: read, decode and crop the pictures of one shard."""
    spec = json.loads(row["spec"])
    failure = _source_failure(source)
    urls = (storage.join(source, path) for path in spec["paths"] if not failure)
    pictures = read_pictures(storage.read_bytes, urls, resolution)
    return {
        "spec": row["spec"],
        "kept": json.dumps(pictures.kept),
        "rejected": json.dumps(pictures.rejected),
        "pixels": pictures.pixels.tobytes(),
        "failure": failure,
    }


def _source_failure(source: str) -> str:
    """What is wrong with this node: else all of a shard's pictures would pass for unreadable."""
    if not storage.is_local(source) or storage.exists(source):
        return ""
    return _failure(
        UserError(
            f"data.source {source} is not there on node {socket.gethostname()} of the cluster; "
            "give a place that every node reads, as s3://bucket/prefix"
        )
    )


class _Encoder:
    """Actor: the autoencoder, and the writing of shards."""

    def __init__(
        self, recipe: dict[str, Any], plan: dict[str, Any], known_autoencoders: list[str]
    ) -> None:
        self.recipe = Recipe.model_validate(recipe)
        self.failure: DiffitError | None = None
        try:
            self._load(known_autoencoders)
        # Raised from a constructor, it would reach the driver as a dead actor.
        except DiffitError as error:
            self.failure = error
        else:
            # Not before: an autoencoder that cannot serve leaves nothing behind.
            write_plan(self.url, Plan.model_validate(plan))

    def _load(self, known_autoencoders: list[str]) -> None:
        import torch

        from diffit_train.data.autoencoder import load_autoencoder

        gpu = self.recipe.scaling.gpus_per_actor > 0
        self.autoencoder = load_autoencoder(self.recipe, torch.device("cuda" if gpu else "cpu"))
        self.sha256 = self.autoencoder.weight_hash()
        self.url = latents_url(self.recipe)
        if set(known_autoencoders) - {self.sha256}:
            raise UserError(
                f"the autoencoder {self.autoencoder.id} has changed since encoding to {self.url} "
                f"began; delete {self.url} to begin again"
            )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            _raise_failure(row["failure"])
            if self.failure is not None:
                raise self.failure
            return {"part": self._encode(row), "failure": ""}
        except DiffitError as error:
            return {"part": "", "failure": _failure(error)}

    def _encode(self, row: dict[str, Any]) -> str:
        """Encode and commit a shard; its part."""
        spec, kept = json.loads(row["spec"]), json.loads(row["kept"])
        number, size = spec["number"], self.recipe.data.resolution
        pixels = np.frombuffer(row["pixels"], dtype=np.uint8).reshape(len(kept), size, size, 3)
        moments = self._moments(pixels)
        entry = None
        if kept:
            keys = [spec["first"] + position for position in kept]
            labels = [spec["labels"][position] for position in kept]
            entry = write_shard(self.url, number, keys, moments, labels)
        total, squares = self._statistics(number, moments)
        frames, channels2, height, width = moments.shape[1:]
        part = Part(
            number=number,
            entry=entry,
            rejected=[
                Rejected(path=spec["paths"][position], reason=reason)
                for position, reason in json.loads(row["rejected"])
            ],
            autoencoder_sha256=self.sha256,
            scale=self.autoencoder.scale,
            shape=(frames, channels2 // 2, height, width),
            total=total,
            squares=squares,
        )
        text = part.model_dump_json(indent=1)
        storage.write_text(storage.join(self.url, "parts", f"{shard_name(number)}.json"), text)
        return text

    def _moments(self, pixels: np.ndarray) -> np.ndarray:
        """(n, R, R, 3) uint8 to (n, F, 2C, h, w) float16, in batches of a fixed size."""
        size = self.recipe.latent_size
        frames = 2 if self.recipe.data.flip else 1
        shape = (len(pixels), frames, 2 * self.recipe.autoencoder.latent_channels, size, size)
        out = np.empty(shape, dtype=np.float16)
        batch = self.recipe.autoencoder.batch_size
        for start in range(0, len(pixels), batch):
            x = to_model_range(pixels[start : start + batch])
            for frame in range(frames):
                turned = np.ascontiguousarray(x[..., ::-1]) if frame else x
                out[start : start + batch, frame] = self.autoencoder.encode_moments(turned)
        if not np.isfinite(out).all():
            raise DiffitError(
                f"the autoencoder {self.autoencoder.id} gives latents that are not finite in "
                f"{self.recipe.autoencoder.precision}; try autoencoder.precision=fp32"
            )
        return out

    def _statistics(self, number: int, moments: np.ndarray) -> tuple[list[float], list[float]]:
        """Sums and sums of squares of scaled, sampled latents, by channel."""
        import torch

        from diffit_train.data.autoencoder import scaled_sample

        flat = moments.reshape(-1, *moments.shape[2:])
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([number])))
        noise = random.standard_normal((len(flat), flat.shape[1] // 2, *flat.shape[2:]))
        tensors = torch.from_numpy(flat).float(), torch.from_numpy(noise)
        sampled = scaled_sample(*tensors, self.autoencoder.scale).double().numpy()
        return sampled.sum((0, 2, 3)).tolist(), (sampled**2).sum((0, 2, 3)).tolist()


def _check_rejected(recipe: Recipe, url: str, parts: dict[int, Part], total: int) -> None:
    """Stop before a night is wasted on a broken input.

    Raises:
        UserError: with the first reasons; the shards concerned are read again by a rerun.
    """
    rejected = [item for part in parts.values() for item in part.rejected]
    limit = recipe.data.max_rejected_fraction
    if len(rejected) <= limit * total:
        return
    # Left as a mark and not done here, since actors may still be writing such parts.
    storage.write_text(storage.join(url, "parts", RETRY), "")
    first = "".join(f"\n  {item.path}: {item.reason}" for item in rejected[:5])
    raise UserError(
        f"{len(rejected):,} of {total:,} pictures cannot be read, more than "
        f"data.max_rejected_fraction={limit:g} allows; mend them or raise the limit:{first}"
    )
