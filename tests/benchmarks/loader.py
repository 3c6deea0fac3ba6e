"""Images per second from latent shards: our loader, webdataset, tarfile; local and from S3.

    python -m tests.benchmarks.loader [--images 16384] [--paced-steps 600] [--paced-rounds 2]

Members are those of ImageNet at 256x256: (1, 8, 32, 32) float16. The loader verifies each shard's
hash, shuffles, and assembles batches; the other two only iterate. S3 is a SeaweedFS server.

Then one rank of eight at a fixed pace: batches of 256 over ImageNet's 2,503 shards, where reading a
shard only sleeps. Reading ahead against one shard after another; first on a
virtual clock, then measured.
"""

from __future__ import annotations

import argparse
import heapq
import io
import os
import tarfile
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from diffit_train import storage
from diffit_train.data.loader import Batch, LatentLoader, SampleOrder
from diffit_train.data.manifest import Manifest, ShardEntry
from diffit_train.data.shards import Shard, write_shard
from tests.benchmarks.common import print_table
from tests.made import make_manifest
from tests.s3 import BUCKET, S3Server

BATCH, LANES, PER_SHARD = 256, 64, 512
SHARD_S, STEPS_PER_S = 0.25, 16
# Batches that a loader prepares ahead.
PREFETCH = 4


def write_latents(url: str, images: int) -> Manifest:
    """Random latents in shards."""
    random = np.random.default_rng(0)
    shards = []
    for number in range(images // PER_SHARD):
        moments = random.standard_normal((PER_SHARD, 1, 8, 32, 32)).astype(np.float16)
        keys = range(number * PER_SHARD, (number + 1) * PER_SHARD)
        shards.append(write_shard(url, number, keys, moments, [0] * PER_SHARD))
    return make_manifest(shards, channels=4, side=32)


def with_loader(url: str, manifest: Manifest) -> float:
    """One epoch of whole batches."""
    counts = [shard.count for shard in manifest.shards]
    order = SampleOrder(counts, BATCH, LANES, 1024, seed=0)
    steps = sum(counts) // BATCH
    start = time.perf_counter()
    with LatentLoader(
        url, manifest, order, order.rank_streams(0, 1), 0, lambda batch: batch
    ) as loader:
        for number, _ in enumerate(loader, start=1):
            if number == steps:
                break
    return steps * BATCH / (time.perf_counter() - start)


def _decoded(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data)).astype(np.float32)


def with_webdataset(url: str, manifest: Manifest) -> float:
    """Plain iteration in shard order."""
    import webdataset

    names = [storage.join(url, shard.name) for shard in manifest.shards]
    start, count = time.perf_counter(), 0
    if storage.is_local(url):
        for sample in webdataset.WebDataset(names, shardshuffle=False):
            _decoded(sample["latent.npy"])
            count += 1
    else:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        # webdataset itself opens s3:// only through a shell command; use fsspec here.
        for name in names:
            with storage.open_file(name) as file:
                for sample in group_by_keys(tar_file_expander([{"url": name, "stream": file}])):
                    _decoded(sample["latent.npy"])
                    count += 1
    return count / (time.perf_counter() - start)


def with_tarfile(url: str, manifest: Manifest) -> float:
    """The standard library's tarfile, member by member."""
    start, count = time.perf_counter(), 0
    for shard in manifest.shards:
        with (
            storage.open_file(storage.join(url, shard.name)) as file,
            tarfile.open(fileobj=file, mode="r|") as tar,
        ):
            for member in tar:
                opened = tar.extractfile(member)
                if opened is not None and member.name.endswith(".npy"):
                    _decoded(opened.read())
                    count += 1
    return count / (time.perf_counter() - start)


def paced_loader(streams: int, readers: int, look_ahead: bool, steps: int) -> LatentLoader[Batch]:
    """The loader of one of 8 ranks, amid an epoch and over its end; a read only sleeps."""
    entry = ShardEntry(name="shard-000000.tar", count=PER_SHARD, bytes=0, sha256="", first_index=0)
    shards = [entry] * 2502 + [entry.model_copy(update={"count": 143})]
    shape = (PER_SHARD, 2, 8, 32, 32)
    shard = Shard(np.arange(PER_SHARD), np.zeros(shape, np.float16), np.zeros(PER_SHARD, np.int64))

    def read(url: str, entry: ShardEntry) -> Shard:
        time.sleep(SHARD_S)
        return shard

    manifest = make_manifest(shards, channels=4, side=32)
    order = SampleOrder([s.count for s in shards], BATCH, streams, 1024, 0)
    return LatentLoader(
        "",
        manifest,
        order,
        order.rank_streams(3, 8),
        order.steps_per_epoch - steps // 2,
        lambda batch: batch,
        read,
        readers=readers,
        look_ahead=look_ahead,
    )


class VirtualPool:
    """Threads that read on a clock of their own: `now` is set, and a read ends `SHARD_S` later."""

    def __init__(self, readers: int) -> None:
        self.now = 0.0
        self.free = [0.0] * readers
        self.done: dict[Future[Any], float] = {}

    def submit(self, *_: object) -> Future[Any]:
        """Begin a read when a thread is free."""
        future: Future[Any] = Future()
        self.done[future] = max(self.now, heapq.heappop(self.free)) + SHARD_S
        heapq.heappush(self.free, self.done[future])
        return future


def virtual_wait(streams: int, readers: int, look_ahead: bool, steps: int) -> float:
    """Share of time that a rank waits if nothing but reading takes time."""
    loader = paced_loader(streams, readers, look_ahead, steps)
    loader._pool.shutdown()
    pool = VirtualPool(readers)
    loader._pool = pool  # type: ignore[assignment]
    taken: list[float] = []  # when the consumer took each batch
    ready, waited = 0.0, 0.0
    for number in range(steps):
        step = loader.step + number
        # The thread goes on when the queue of `PREFETCH` batches has room.
        pool.now = max(ready, taken[number - PREFETCH - 1] if number > PREFETCH else 0.0)
        loader._fetch(step)
        needed = {
            n for stream in loader.streams for n, _ in loader.order.stream_samples(step, stream)
        }
        ready = max(pool.now, *(pool.done[loader._shards[n]] for n in needed))
        due = taken[-1] + 1 / STEPS_PER_S if taken else ready
        taken.append(max(ready, due))
        waited += taken[-1] - due
    return waited / (taken[-1] - taken[0])


def data_wait(streams: int, readers: int, look_ahead: bool, steps: int) -> tuple[float, float]:
    """Share of time one of 8 ranks waits at a fixed pace, and seconds to its first batch."""
    loader = paced_loader(streams, readers, look_ahead, steps)
    begun_s = time.perf_counter()
    with loader:
        for number, _ in enumerate(loader):
            now_s = time.perf_counter()
            if number == 0:
                first_s, waited_s, due_s = now_s - begun_s, loader.wait_s, now_s
            if number == steps:
                break
            due_s = max(due_s, now_s) + 1 / STEPS_PER_S
            time.sleep(max(0.0, due_s - time.perf_counter()))
        share = (loader.wait_s - waited_s) / (time.perf_counter() - begun_s - first_s)
    return share, first_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--paced-steps", type=int, default=600)
    parser.add_argument("--paced-rounds", type=int, default=2)
    parser.add_argument("--virtual-steps", type=int, default=4000)
    options = parser.parse_args()
    ways_to_wait = {
        "64 streams, one reader": (64, 1, False),
        "256 streams, one reader": (256, 1, False),
        "64 streams, 16 readers ahead": (64, 16, True),
        "256 streams, 16 readers ahead": (256, 16, True),
    }
    # The lowest of some rounds: other work on this machine also holds up the loader's threads.
    rounds = [
        {name: data_wait(*way, options.paced_steps) for name, way in ways_to_wait.items()}
        for _ in range(options.paced_rounds)
    ]
    waits = []
    for name in ways_to_wait:
        alone = virtual_wait(*ways_to_wait[name], options.virtual_steps)
        measured = ["-", "-"]
        if rounds:
            share, first = (min(values) for values in zip(*(r[name] for r in rounds), strict=True))
            measured = [f"{share:.2%}", f"{first:.2f}"]
        waits.append([name, f"{alone:.2%}", *measured])
    title = f"one of 8 ranks, 32 images a step, {STEPS_PER_S} steps/s, {SHARD_S} s a shard"
    columns = ["", "data wait if only reading takes time", "data wait", "first batch s"]
    print_table(title, columns, waits)
    if not options.images:
        return
    ways = {"diffit": with_loader, "webdataset": with_webdataset, "tarfile": with_tarfile}
    with tempfile.TemporaryDirectory() as name:
        server = S3Server(Path(name) / "s3")
        server.start()
        os.environ.update(server.environment())
        try:
            import s3fs

            s3fs.S3FileSystem().mkdir(BUCKET)
            rows = []
            for location, url in (("local", f"{name}/latents"), ("S3", f"s3://{BUCKET}/latents")):
                manifest = write_latents(url, options.images)
                best = dict.fromkeys(ways, 0.0)
                for _ in range(options.rounds):
                    for way, body in ways.items():
                        best[way] = max(best[way], body(url, manifest))
                rows += [
                    [f"{location}, {way}", f"{rate:,.0f}", f"{rate / best['webdataset']:.2f}"]
                    for way, rate in best.items()
                ]
        finally:
            server.stop()
    title = f"{options.images:,} images in shards of {PER_SHARD}, batches of {BATCH}"
    print_table(title, ["", "images/s", "to webdataset"], rows)


if __name__ == "__main__":
    main()
