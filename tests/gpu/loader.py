"""Steps fed by the loader from shards of latents, against steps on a fixed batch."""

from __future__ import annotations

import functools
import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data.loader import LatentLoader, SampleOrder
from diffit_train.data.manifest import Manifest, ShardEntry
from diffit_train.data.shards import Shard, read_shard, shard_name
from diffit_train.training.batch import BatchBuilder, TrainingBatch
from tests.benchmarks.common import synchronize
from tests.gpu.kit import Report, start_ranks
from tests.gpu.training import WARMUP, Steps, fixed_batch, token_count, variants
from tests.made import make_manifest

# Seconds that a shard takes from remote storage.
REMOTE_S = 0.25


def run(report: Report) -> None:
    """The recipe at 256 tokens, with shards on this machine's disk and with slow ones."""
    machine = report.machine
    recipe = machine.recipe(256, *variants(machine, 256)["bf16"])
    with tempfile.TemporaryDirectory() as name:
        start_ranks(Path(name), machine.device)
        folder = Path(name) / "latents"
        manifest = write_latents(recipe, folder, shards=4 if machine.tiny else 32)
        for what, shard_s in (("local shards", 0.0), (f"shards {REMOTE_S} s away", REMOTE_S)):
            body = functools.partial(fed, report, recipe, folder, manifest, what, shard_s)
            report.attempt(what, body, needs_s=50)


def fed(
    report: Report, recipe: Recipe, folder: Path, manifest: Manifest, what: str, shard_s: float
) -> None:
    """Share of time in which steps wait for the loader.

    Args:
        shard_s: seconds by which reading a shard is delayed.
    """
    machine = report.machine
    device = machine.device
    steps = Steps(recipe, device)
    fixed = [part.to(device) for part in fixed_batch(recipe)]
    count = 50 if machine.cuda else 5

    def timed(take: Callable[[], None]) -> float:
        synchronize(device)
        started_s = time.perf_counter()
        for _ in range(count):
            take()
        synchronize(device)
        return time.perf_counter() - started_s

    for _ in range(WARMUP):
        steps.take(fixed)
    alone_s = timed(lambda: steps.take(fixed))

    def read(url: str, entry: ShardEntry) -> Shard:
        time.sleep(shard_s)
        return read_shard(url, entry)

    order = SampleOrder.of(recipe, manifest)
    build = BatchBuilder(recipe, manifest, steps.objective, device)
    started_s = time.perf_counter()
    with LatentLoader(
        str(folder), manifest, order, order.rank_streams(0, 1), 0, build, read
    ) as latents:
        batches = iter(latents)
        first: TrainingBatch = next(batches)
        first_s = time.perf_counter() - started_s
        steps.take(first.tensors())
        waited_s = latents.wait_s
        fed_s = timed(lambda: steps.take(next(batches).tensors()))
        waited_s = latents.wait_s - waited_s
    report.add(
        f"loader, {token_count(recipe):,} tokens, {recipe.train.batch_size} images a step",
        what=what,
        steps_per_s=count / fed_s,
        data_wait=waited_s / fed_s,
        to_a_fixed_batch=fed_s / alone_s,
        first_batch_s=first_s,
    )
    steps.engine.destroy()


def write_latents(recipe: Recipe, folder: Path, shards: int) -> Manifest:
    """Shards of random latents; with Python's own tar, as webdataset may be absent."""
    folder.mkdir(parents=True, exist_ok=True)
    random, count = np.random.default_rng(0), recipe.data.images_per_shard
    side, channels = recipe.latent_size, recipe.autoencoder.latent_channels
    frames, entries = 2 if recipe.data.flip else 1, []
    for number in range(shards):
        moments = random.standard_normal((count, frames, 2 * channels, side, side), np.float32)
        file, first = folder / shard_name(number), number * count
        with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, values in enumerate(moments.astype(np.float16), start=first):
                latent = io.BytesIO()
                np.save(latent, values, allow_pickle=False)
                label = str(key % recipe.data.num_classes).encode()
                for kind, content in (("latent.npy", latent.getvalue()), ("cls", label)):
                    member = tarfile.TarInfo(f"{key:09d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        size, sha256 = file.stat().st_size, storage.sha256_file(file)
        entries.append(
            ShardEntry(name=file.name, count=count, bytes=size, sha256=sha256, first_index=first)
        )
    classes = [str(number) for number in range(recipe.data.num_classes)]
    return make_manifest(entries, channels, side, frames=frames, classes=classes)
