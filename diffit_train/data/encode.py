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
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from diffit_train import ray_session, storage
from diffit_train.config import Recipe, stored_text
from diffit_train.data.autoencoder_source import require_autoencoder
from diffit_train.data.encode_plan import (
    EncodedPart,
    EncodeJob,
    Plan,
    Rejected,
    ShardTask,
    commit_manifest,
    find_work,
    read_encoded_parts,
    rejected_images,
    require_plan,
    write_plan,
)
from diffit_train.data.manifest import (
    INPUTS,
    RECIPE,
    Manifest,
    finished_manifest,
    latents_url,
    missing_files,
    write_inputs,
)
from diffit_train.data.preprocess import IsolatedDecoder, to_model_range
from diffit_train.data.randomness import generator
from diffit_train.data.reading import Images, read_items
from diffit_train.data.shards import as_float, shard_name, write_shard
from diffit_train.data.sources import Source
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import Progress, say

# Shards of images being read for each actor. On a GPU it encodes faster than one core decodes.
READ_SHARDS, GPU_READ_SHARDS = 1, 3
# A lost node counts as an attempt.
READER_ATTEMPTS = 8
MIN_QUEUED_BYTES = 256 * 2**20


def encode(recipe: Recipe, address: str | None = None, append: bool = False) -> Manifest:
    """Encode the recipe's images on the Ray cluster at `address`. Rerun it to resume.

    What was removed of finished latents is encoded again.

    Args:
        append: encode images added since the latents were finished, as new shards.

    Raises:
        UserError: bad input (nothing was written), or too many unreadable images.
        DiffitError: a shard could not be encoded.
    """
    base, url = finished_manifest(recipe), latents_url(recipe)
    missing = missing_files(url, base) if base else []
    if missing:
        say(f"Rebuilding what is missing: {', '.join(missing[:8])}")
    if RECIPE in missing:
        storage.write_text(storage.join(url, RECIPE), stored_text(recipe))
    if base and not append and not set(missing) - {RECIPE}:
        return base
    job = find_work(recipe, base, missing, append)
    if base and INPUTS in missing:
        write_inputs(url, job.inputs[: base.totals.input])
    if base and not job.tasks:
        if append:
            say("No new images to append")
        return base
    items = [item for task in job.tasks for item in task.items]
    _check_rejected(recipe, job, [(item.name, item.problem) for item in items if item.problem])
    require_autoencoder(recipe)
    storage.require_writable(recipe.storage.root)
    with ray_session.connected(address):
        ray_session.require(
            *recipe.scaling.needs("encode"), "encoding", recipe.scaling.node_wait_timeout_s
        )
        require_plan(recipe, url, job)
        parts = read_encoded_parts(recipe, url, job)
        done = sum(part.images for part in parts.values())
        with Progress("encode", job.images, "images", done) as progress:
            for part in _encode_missing(recipe, job, parts):
                parts[part.number] = part
                done += part.images
                progress.update(done)
                rejected = rejected_images(job, parts.values())
                _check_rejected(recipe, job, [(item.path, item.reason) for item in rejected])
    return commit_manifest(recipe, url, job, parts)


def _check_rejected(recipe: Recipe, job: EncodeJob, rejected: Sequence[tuple[str, str]]) -> None:
    """Stop early on broken input.

    Args:
        rejected: names and reasons.

    Raises:
        UserError: there are too many; with the first ones.
    """
    if len(rejected) > job.rejectable(recipe):
        raise UserError(
            f"{len(rejected):,} of {job.images:,} images cannot be used, more than "
            f"data.max_rejected_fraction={recipe.data.max_rejected_fraction:g} allows; fix them, "
            f"data.num_classes ({recipe.data.num_classes}) or the limit:"
            + "".join(f"\n  {name}: {reason}" for name, reason in rejected[:5])
        )


def _encode_missing(
    recipe: Recipe, job: EncodeJob, parts: dict[int, EncodedPart]
) -> Iterator[EncodedPart]:
    """Run the pipeline over the shards without a part; yields parts in completion order."""
    tasks = [task for task in job.tasks if task.number not in parts]
    if not tasks:
        return
    known = {part.autoencoder_sha256 for part in parts.values()}
    if job.base:
        known.add(job.base.autoencoder_sha256)
    scaling, data = recipe.scaling, recipe.data
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    _quiet_ray_data()
    # Backpressure: readers pause while this many bytes of images wait for actors, so that memory
    # does not grow with the input. Per actor: the shard it encodes, the next, and those being read;
    # Ray Data counts each row twice in the pipeline.
    shards = 2 + (GPU_READ_SHARDS if scaling.gpus_per_actor else READ_SHARDS)
    queued = 2 * shards * scaling.encode_actors * data.images_per_shard * data.resolution**2 * 3
    context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=max(queued, MIN_QUEUED_BYTES)
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
        fn_args=(job.listing.source, data.resolution, attempts),
        num_cpus=reader_cpus,
    ).map(
        _Encoder,
        fn_constructor_args=(recipe, job.plan(recipe), known),
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
        """Count an attempt; returns the number of earlier ones."""
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
        # Without its source, a node would find every image unreadable.
        if not source.exists():
            raise UserError(
                f"data.source {source.url} does not exist on node {socket.gethostname()} of the "
                "cluster; set it to a path that every node can read, such as s3://bucket/prefix"
            )
        if attempt >= READER_ATTEMPTS:
            raise DiffitError(
                f"the process that reads the images of {shard_name(task.number)} from {source.url} "
                f"died {attempt} times; see its log and the memory of its node, then rerun the "
                "command"
            )
        return {
            "read": ReadShard(task, read_items(source, task.items, resolution, decoder=isolated))
        }
    except DiffitError as error:
        none = Images([], np.zeros((0, resolution, resolution, 3), np.uint8), [])
        return {"read": ReadShard(task, none, error)}
    finally:
        if isolated:
            isolated.close()


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
            # Local file names may contain bytes that are not UTF-8.
            rejected=[
                Rejected(
                    path=items[n].name.encode("utf-8", "backslashreplace").decode(), reason=why
                )
                for n, why in images.rejected
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
