"""`diffit encode`: Ray Data reads images in CPU tasks and encodes them in a pool of actors.

Each row of the pipeline is a shard. Its contents depend only on recipe and input, not on the
worker. A shard is committed by writing its tar file and then its part file in `parts/`; a rerun
encodes only the shards without one. The manifest, written last, merges and replaces all parts.
"""

from __future__ import annotations

import logging
import re
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from diffit_train import ray_session, storage
from diffit_train.config import Recipe, stored_text
from diffit_train.config.data import FORMATS
from diffit_train.data.autoencoder import is_path
from diffit_train.data.encode_plan import (
    REPAIR,
    RETRY,
    EncodedPart,
    EncodeJob,
    Plan,
    Rejected,
    ShardTask,
    commit_manifest,
    count_images,
    encoded_items,
    find_work,
    make_plan,
    read_encoded_parts,
    read_plan,
    repair_tasks,
    restore_inputs,
    shard_tasks,
    write_plan,
)
from diffit_train.data.hub import require_from_hub
from diffit_train.data.isolated import IsolatedDecoder
from diffit_train.data.preprocess import Images, to_model_range
from diffit_train.data.randomness import generator
from diffit_train.data.reading import read_items
from diffit_train.data.shards import (
    INPUTS,
    MANIFEST,
    RECIPE,
    Manifest,
    ShardEntry,
    as_float,
    finished_manifest,
    latents_url,
    missing_files,
    shard_name,
    write_shard,
)
from diffit_train.data.sources import ImageList, Source, list_images
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import Progress, say

# Shards of images being read for each actor. On a GPU it encodes faster than one core decodes.
READ_SHARDS, GPU_READ_SHARDS = 1, 3
# A lost node counts as an attempt.
READER_ATTEMPTS = 8
MIN_QUEUED_BYTES = 256 * 2**20


def encode(recipe: Recipe, address: str | None = None, append: bool = False) -> Manifest:
    """Encode the recipe's images on the Ray cluster at `address`. Rerun it to resume.

    Args:
        append: encode images added since the latents were finished, as new shards.

    Raises:
        UserError: bad input (nothing was written), or too many unreadable images.
        DiffitError: a shard could not be encoded.
    """
    done = finished_manifest(recipe)
    if done is not None:
        done = _restore(recipe, done, address)
        if not append:
            return done
    work = find_work(recipe, done)
    if work is None:
        assert done is not None
        say("No new images to append")
        return done
    _check_listed(recipe, work.listing)
    _require_autoencoder(recipe)
    storage.require_writable(recipe.storage.root)
    url = latents_url(recipe)
    with _cluster(recipe, address):
        parts = _encode_parts(recipe, url, work)
    return commit_manifest(recipe, url, work, parts)


def _restore(recipe: Recipe, manifest: Manifest, address: str | None) -> Manifest:
    """Write again what was removed of finished latents.

    Raises:
        UserError: the images have changed since they were encoded.
    """
    url = latents_url(recipe)
    missing = missing_files(url, manifest)
    if missing:
        say(f"Writing again what is missing: {', '.join(missing[:8])}")
    if RECIPE in missing:
        storage.write_text(storage.join(url, RECIPE), stored_text(recipe))
    if not set(missing) - {RECIPE}:
        return manifest
    listing = list_images(recipe)
    if INPUTS in missing:
        restore_inputs(url, manifest, listing)
    shards = [name for name in missing if name not in (RECIPE, INPUTS)]
    return _restore_shards(recipe, manifest, listing, shards, address) if shards else manifest


def _restore_shards(
    recipe: Recipe, manifest: Manifest, listing: ImageList, names: list[str], address: str | None
) -> Manifest:
    """Encode shards again, and write the manifest if other hardware gave other bytes."""
    url = latents_url(recipe)
    plan = read_plan(url)
    if plan is not None and plan.input_sha256 != REPAIR:
        raise UserError(f"encoding to {url} is in progress; finish it first with --append")
    listing = encoded_items(url, listing)
    tasks = repair_tasks(manifest, listing, names)
    _require_autoencoder(recipe)
    plan = Plan(recipe_hash=recipe.encode_hash(), input_sha256=REPAIR, appended_to=0, order="")
    restored: dict[str, ShardEntry] = {}
    known = {manifest.autoencoder_sha256}
    with (
        _cluster(recipe, address),
        Progress("encode", count_images(tasks), "images") as progress,
    ):
        for part in _encode_missing(recipe, listing, plan, tasks, known):
            if part.entry is not None:
                restored[part.entry.name] = part.entry
            progress.update(sum(entry.count for entry in restored.values()))
    shards = [restored.get(entry.name, entry) for entry in manifest.shards]
    for before in manifest.shards:
        after = restored.get(before.name)
        if before.name in names and (after is None or after.count != before.count):
            raise DiffitError(
                f"{before.name} held {before.count} images, but {after.count if after else 0} are "
                "readable now; restore the source and run the same command again"
            )
        if after is not None and before.sha256 != after.sha256:
            say(f"{before.name} has other bytes than before (different hardware?)")
    manifest = manifest.model_copy(update={"shards": shards})
    storage.write_text(storage.join(url, MANIFEST), manifest.model_dump_json(indent=1))
    storage.remove(storage.join(url, "parts"))
    return manifest


@contextmanager
def _cluster(recipe: Recipe, address: str | None) -> Iterator[None]:
    with ray_session.connected(address):
        ray_session.require(
            *recipe.scaling.needs("encode"), "encoding", recipe.scaling.node_wait_timeout_s
        )
        yield


def _encode_parts(recipe: Recipe, url: str, work: EncodeJob) -> dict[int, EncodedPart]:
    """All parts: those of earlier runs, and those encoded now."""
    plan = make_plan(recipe, url, work)
    parts, total = read_encoded_parts(url), len(work.listing)
    tasks = [task for task in shard_tasks(recipe, work) if task.number not in parts]
    known = {part.autoencoder_sha256 for part in parts.values()}
    if work.base:
        known.add(work.base.autoencoder_sha256)
    done = total - count_images(tasks)
    with Progress("encode", total, "images", done) as progress:
        for part in _encode_missing(recipe, work.listing, plan, tasks, known):
            parts[part.number] = part
            done += (part.entry.count if part.entry else 0) + len(part.rejected)
            progress.update(done)
            _check_rejected(recipe, url, parts, total)
    return parts


def _require_autoencoder(recipe: Recipe) -> None:
    """Fail early if the autoencoder is not fitted yet, or on a hub that cannot be reached."""
    source = recipe.autoencoder.source
    if recipe.autoencoder.kind == "identity":
        return
    url = storage.resolve(recipe.storage.root, source)
    if url != source and not storage.exists(storage.join(url, "config.json")):
        raise UserError(
            f"autoencoder {url} does not exist; run `diffit fit autoencoder`, or set "
            "autoencoder.source to a folder in diffusers' format or a hub id"
        )
    if url == source and not is_path(source):
        require_from_hub(source)


def _encode_missing(
    recipe: Recipe,
    listing: ImageList,
    plan: Plan,
    tasks: Sequence[ShardTask],
    known_autoencoders: set[str],
) -> Iterator[EncodedPart]:
    """Run the pipeline over these shards; yields parts in completion order."""
    if not tasks:
        return
    scaling, data = recipe.scaling, recipe.data
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    _quiet_ray_data()
    # Backpressure: readers pause while this many bytes of images wait for actors, so that memory
    # does not grow with the input. Per actor: the shard it encodes, the next, and those being read;
    # Ray Data counts each row twice in the pipeline.
    shard_bytes = data.images_per_shard * data.resolution**2 * 3
    reading = GPU_READ_SHARDS if scaling.gpus_per_actor else READ_SHARDS
    waiting = 2 * (2 + reading) * scaling.encode_actors * shard_bytes
    context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=max(waiting, MIN_QUEUED_BYTES)
    )
    # A full actor pool must leave CPUs for the readers that feed it. Requesting a different number
    # of CPUs also keeps Ray Data from fusing readers into actors.
    actors, cpus = scaling.encode_actors, ray.cluster_resources()["CPU"]
    actor_cpus = min(0.9, cpus / (2 * actors))
    reader_cpus = min(1.0, cpus - actors * actor_cpus)
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts).remote()
    rows = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
    encoded = rows.map(
        _read_shard_images,
        fn_args=(listing.source, data.resolution, attempts),
        num_cpus=reader_cpus,
    ).map(
        _Encoder,
        fn_constructor_args=(recipe, plan, known_autoencoders),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(actors, len(tasks))),
        num_cpus=actor_cpus,
        num_gpus=scaling.gpus_per_actor or None,
        **(
            {}
            if scaling.gpus_per_actor
            else {"runtime_env": {"env_vars": ray_session.KEEP_FREED_MEMORY}}
        ),
    )
    try:
        for row in encoded.iter_rows():
            if isinstance(row["part"], DiffitError):
                raise row["part"]
            yield row["part"]
    except ray.exceptions.RayError as error:
        raise DiffitError(
            f"a shard could not be encoded: {_reason(error)}; rerun the same command to resume"
        ) from error


def _quiet_ray_data() -> None:
    """Ray Data would report for every process that rows hold Python objects."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@dataclass(frozen=True)
class ReadShard:
    """The images of a shard, and why there are none if its source cannot be read."""

    task: ShardTask
    images: Images
    error: DiffitError | None = None


def _reason(error: ray.exceptions.RayError) -> str:
    """The line of the root exception in a chain of remote ones."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", line)]
    return (named or lines[-1:] or [type(error).__name__])[0]


class _Attempts:
    """Actor: counts how often the reading of a shard began, which Ray does not tell its tasks."""

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Note that a shard is being read; returns how often it was before."""
        self.begun[number] += 1
        return self.begun[number] - 1


def _read_shard_images(
    row: dict[str, Any], source: Source, resolution: int, attempts: Any = None
) -> dict[str, Any]:
    """Read, decode and crop the images of one shard: {"task"} to {"read"}.

    Ray repeats a task whose process dies, without limit. From the second attempt on, images are
    decoded in a child process: one that kills its decoder is rejected. An error is returned: Ray
    Data would wrap a raised one beyond recognition.
    """
    _quiet_ray_data()
    task = row["task"]
    attempt = 0 if attempts is None else ray.get(attempts.begin.remote(task.number))
    isolated = IsolatedDecoder() if attempt else None
    try:
        if not FORMATS.is_plugged(source.kind):
            _require_source(source.url)
        _require_few_attempts(source.url, task.number, attempt)
        images = read_items(source, task.items, resolution, decoder=isolated)
        return {"read": ReadShard(task, images)}
    except DiffitError as error:
        none = Images([], np.zeros((0, resolution, resolution, 3), np.uint8), [])
        return {"read": ReadShard(task, none, error)}
    finally:
        if isolated:
            isolated.close()


def _require_source(source: str) -> None:
    """Fail if this node lacks the source; otherwise every image would look unreadable."""
    if storage.is_local(source) and not storage.exists(source):
        raise UserError(
            f"data.source {source} does not exist on node {socket.gethostname()} of the cluster; "
            "set it to a path that every node can read, such as s3://bucket/prefix"
        )


def _require_few_attempts(source: str, number: int, attempt: int) -> None:
    if attempt >= READER_ATTEMPTS:
        raise DiffitError(
            f"the process that reads the images of {shard_name(number)} from {source} died "
            f"{attempt} times; see its log and the memory of its node, then rerun the command"
        )


class _Encoder:
    """Actor: runs the autoencoder and writes shards."""

    def __init__(self, recipe: Recipe, plan: Plan, known_autoencoders: set[str]) -> None:
        _quiet_ray_data()
        self.recipe = recipe
        self.error: DiffitError | None = None
        try:
            self._load(known_autoencoders)
        # Raised from the constructor, it would reach the driver only as a dead actor.
        except DiffitError as error:
            self.error = error
        else:
            # Only now, so that an unusable autoencoder leaves nothing behind.
            write_plan(self.url, plan)

    def _load(self, known_autoencoders: set[str]) -> None:
        import torch

        from diffit_train.data.autoencoder import load_autoencoder

        gpu = self.recipe.scaling.gpus_per_actor > 0
        if not gpu:
            torch.set_num_threads(self.recipe.scaling.encode_threads)
        self.autoencoder = load_autoencoder(self.recipe, torch.device("cuda" if gpu else "cpu"))
        self.sha256 = self.autoencoder.weight_hash()
        self.url = latents_url(self.recipe)
        if known_autoencoders - {self.sha256}:
            raise UserError(
                f"autoencoder {self.autoencoder.id} has changed since encoding to {self.url} "
                f"started; delete {self.url} to start over"
            )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode a shard: {"read"} to {"part"}, which is an error if it failed."""
        read: ReadShard = row["read"]
        try:
            if error := read.error or self.error:
                raise error
            return {"part": self._encode(read.task, read.images)}
        except DiffitError as error:
            return {"part": error}

    def _encode(self, task: ShardTask, images: Images) -> EncodedPart:
        """Encode and commit a shard."""
        number, items, kept = task.number, task.items, images.kept
        moments = self._moments(images.pixels)
        entry = None
        if kept:
            keys = [task.keys[position] for position in kept]
            labels = [items[position].label for position in kept]
            entry = write_shard(self.url, number, keys, moments, labels)
        total, squares = self._statistics(number, moments)
        part = EncodedPart(
            number=number,
            entry=entry,
            rejected=[
                Rejected(path=_readable(items[position].name), reason=reason)
                for position, reason in images.rejected
            ],
            autoencoder_sha256=self.sha256,
            scale=self.autoencoder.scale,
            shape=moments.shape[1:],
            total=total,
            squares=squares,
        )
        url = storage.join(self.url, "parts", f"{shard_name(number)}.json")
        storage.write_text(url, part.model_dump_json())
        return part

    def _moments(self, pixels: np.ndarray) -> np.ndarray:
        """(n, R, R, 3) uint8 to (n, F, 2C, h, w) float16, in batches of a fixed size.

        The identity keeps pixels as uint8.
        """
        size, section = self.recipe.latent_size, self.recipe.autoencoder
        frames = 2 if self.recipe.data.flip else 1
        if section.kind == "identity":
            planes = pixels.transpose(0, 3, 1, 2)
            return np.stack([planes, planes[..., ::-1]][:frames], axis=1)
        members = section.latent_channels * (2 if section.kind == "kl" else 1)
        shape = (len(pixels), frames, members, size, size)
        out = np.empty(shape, dtype=np.float16)
        batch = section.batch_size
        for start in range(0, len(pixels), batch):
            x = to_model_range(pixels[start : start + batch])
            for frame in range(frames):
                flipped = np.ascontiguousarray(x[..., ::-1]) if frame else x
                out[start : start + batch, frame] = self.autoencoder.encode_moments(flipped)
        if not np.isfinite(out).all():
            raise DiffitError(
                f"autoencoder {self.autoencoder.id} produces NaN or infinite latents in "
                f"{self.recipe.autoencoder.precision}; set autoencoder.precision=fp32"
            )
        return out

    def _statistics(self, number: int, moments: np.ndarray) -> tuple[list[float], list[float]]:
        """Sums and sums of squares of the scaled, sampled latents, by channel."""
        import torch

        from diffit_train.data.autoencoder import sample_latent

        flat = as_float(moments.reshape(-1, *moments.shape[2:]))
        random = generator(number)
        channels = self.recipe.autoencoder.latent_channels
        noise = random.standard_normal((len(flat), channels, *flat.shape[2:]))
        tensors = torch.from_numpy(flat), torch.from_numpy(noise)
        sampled = sample_latent(*tensors, self.autoencoder.scale).double().numpy()
        return sampled.sum((0, 2, 3)).tolist(), (sampled**2).sum((0, 2, 3)).tolist()


def _readable(name: str) -> str:
    """A name as valid text: local file names may contain bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _check_rejected(recipe: Recipe, url: str, parts: dict[int, EncodedPart], total: int) -> None:
    """Stop early on broken input.

    Raises:
        UserError: with the first reasons; a rerun reads the affected shards again.
    """
    rejected = [item for part in parts.values() for item in part.rejected]
    if len(rejected) <= recipe.data.max_rejected_fraction * total:
        return
    # A marker for the rerun: actors may still be writing parts with rejected images.
    storage.write_text(storage.join(url, "parts", RETRY), "")
    raise _too_many(recipe, [(item.path, item.reason) for item in rejected], total)


def _check_listed(recipe: Recipe, listing: ImageList) -> None:
    """Stop before anything starts if the listing shows too many problems, such as wrong labels.

    Raises:
        UserError: with the first ones.
    """
    wrong = [(item.name, item.problem) for item in listing.items if item.problem]
    if len(wrong) > recipe.data.max_rejected_fraction * len(listing.items):
        raise _too_many(recipe, wrong, len(listing.items))


def _too_many(recipe: Recipe, wrong: Sequence[tuple[str, str]], total: int) -> UserError:
    """An error for too many unusable images, given by name and reason."""
    return UserError(
        f"{len(wrong):,} of {total:,} images cannot be used, more than data.max_rejected_fraction="
        f"{recipe.data.max_rejected_fraction:g} allows; fix them, data.num_classes "
        f"({recipe.data.num_classes}) or the limit:"
        + "".join(f"\n  {name}: {reason}" for name, reason in wrong[:5])
    )
