"""Latents in training order, which depends on recipe and step, not on workers or restarts.

Each epoch, the shards are permuted and concatenated; the sequence of samples is split into lanes
of equal length; within a lane, samples are shuffled window by window. A global batch takes the
same number of samples from every lane, and a rank serves a contiguous range of lanes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import numpy as np

from diffit_train.data.shards import Manifest, Shard, ShardEntry, read_shard
from diffit_train.errors import UserError

T = TypeVar("T")

# Distinct random streams for the different uses of one seed.
_SHARDS, _WINDOW, _DRAW = 0, 1, 2


def _generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed))))


class SampleOrder:
    """The order of samples in training.

    Args:
        counts: number of images in each shard.
        batch_size: global batch size; a multiple of `lanes`.
        lanes: maximum number of lanes; reduced to its largest divisor not above the shard count.
        window: samples of a lane that are shuffled together.
        seed: the run's seed.

    Raises:
        UserError: there are fewer samples than a batch needs.
    """

    def __init__(
        self, counts: Sequence[int], batch_size: int, lanes: int, window: int, seed: int
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.samples, self.batch_size = int(self.counts.sum()), batch_size
        self.window, self.seed = window, seed
        self.lanes = max(d for d in range(1, lanes + 1) if lanes % d == 0 and d <= len(counts))
        self.steps_per_epoch = self.samples // batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"train.batch_size is {batch_size}, but there are only {self.samples} images; "
                "lower it"
            )
        self.per_lane = batch_size // self.lanes
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def lane_samples(self, step: int, lane: int) -> list[tuple[int, int]]:
        """(shard, offset in the shard) of each sample of a lane in a step's batch."""
        epoch, epoch_step = divmod(step, self.steps_per_epoch)
        shards, starts = self._permuted(epoch)
        length = self.steps_per_epoch * self.per_lane
        first = epoch_step * self.per_lane
        indices = [
            lane * length + self._shuffled(epoch, lane, index, length)
            for index in range(first, first + self.per_lane)
        ]
        rows = np.searchsorted(starts, indices, side="right") - 1
        return [
            (int(shards[row]), int(index - starts[row]))
            for row, index in zip(rows, indices, strict=True)
        ]

    def shards_per_window(self) -> int:
        """Most shards a window can touch: the smallest ones, plus a partial one at each end."""
        whole = np.searchsorted(np.cumsum(np.sort(self.counts)), self.window, side="right")
        return int(whole) + 2

    def rank_lanes(self, rank: int, world: int) -> range:
        """The contiguous lanes of a rank; some ranks have one more if they do not divide evenly.

        Raises:
            UserError: there are more ranks than lanes.
        """
        if world > self.lanes:
            raise UserError(
                f"{world} workers cannot share the {self.lanes} lanes of {len(self.counts)} "
                "shards; lower scaling.workers, or encode with fewer data.images_per_shard"
            )
        return range(rank * self.lanes // world, (rank + 1) * self.lanes // world)

    def largest_share(self, world: int) -> int:
        """Images per batch on the rank with the largest share."""
        return self.per_lane * max(len(self.rank_lanes(rank, world)) for rank in range(world))

    def _permuted(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the index of each one's first sample."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = _generator(self.seed, _SHARDS, epoch).permutation(len(self.counts))
            ends = np.cumsum(self.counts[shards])
            self._epoch = (epoch, shards, ends - self.counts[shards])
            self._windows: dict[tuple[int, int], np.ndarray] = {}
        return self._epoch[1], self._epoch[2]

    def _shuffled(self, epoch: int, lane: int, index: int, length: int) -> int:
        """The index in the lane before shuffling of the sample that is at `index` after it."""
        number, offset = divmod(index, self.window)
        start = number * self.window
        if (lane, number) not in self._windows:
            self._windows.pop((lane, number - 2), None)
            size = min(self.window, length - start)
            random = _generator(self.seed, _WINDOW, epoch, lane, number)
            self._windows[lane, number] = random.permutation(size)
        return start + int(self._windows[lane, number][offset])


@dataclass(frozen=True)
class Draws:
    """The randomness of a lane's n samples in a step."""

    t: np.ndarray  # (n,) int64, timesteps
    noise: np.ndarray  # (n, C, h, w) float32
    posterior: np.ndarray  # (n, C, h, w) float32, noise of the autoencoder's posterior
    flip: np.ndarray  # (n,) int64, which of the F frames
    drop: np.ndarray  # (n,) bool, whether the label is dropped


def draw(
    seed: int,
    step: int,
    lane: int,
    count: int,
    shape: tuple[int, int, int],
    frames: int,
    draw_timesteps: Callable[[np.random.Generator, int], np.ndarray],
    label_dropout: float,
) -> Draws:
    """Timesteps, noise, posterior noise, flips and label dropout, seeded by (seed, step, lane)."""
    random = _generator(seed, _DRAW, step, lane)
    return Draws(
        t=draw_timesteps(random, count),
        noise=random.standard_normal((count, *shape), dtype=np.float32),
        posterior=random.standard_normal((count, *shape), dtype=np.float32),
        flip=random.integers(frames, size=count),
        drop=random.random(count) < label_dropout,
    )


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch, ordered by lane."""

    step: int
    lanes: range
    keys: np.ndarray  # (n,) int64, input indices of the images
    shards: tuple[str, ...]  # names of their shards
    moments: np.ndarray  # (n, F, 2C, h, w) float32
    labels: np.ndarray  # (n,) int64


class LatentLoader(Generic[T]):
    """Iterates over a rank's batches from a given step; a thread reads and prepares them ahead.

    Args:
        url: folder of the latents.
        lanes: the rank's lanes, from `SampleOrder.rank_lanes`.
        prepare: called by the thread on each batch; iteration yields its results.
        read: reads a shard.
        prefetch: number of batches to read ahead.

    Attributes:
        wait_s: total time the consumer has waited.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        order: SampleOrder,
        lanes: range,
        start_step: int,
        prepare: Callable[[Batch], T],
        read: Callable[[str, ShardEntry], Shard] = read_shard,
        prefetch: int = 4,
    ) -> None:
        self.url, self.manifest, self.order = url, manifest, order
        self.prepare, self.read = prepare, read
        self.lanes = lanes
        self.step = start_step
        self.wait_s = 0.0
        self._capacity = len(self.lanes) * order.shards_per_window()
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._queue: queue.Queue[T | BaseException] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="latents", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while True:
            started_s = time.monotonic()
            item = self._queue.get()
            self.wait_s += time.monotonic() - started_s
            if isinstance(item, BaseException):
                raise item
            yield item

    def _read_ahead(self) -> None:
        step = self.step
        while not self._stop.is_set():
            try:
                item: T | BaseException = self.prepare(self.batch(step))
            except Exception as error:  # re-raised in the consumer
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def batch(self, step: int) -> Batch:
        """This rank's share of a step's batch."""
        picked = [p for lane in self.lanes for p in self.order.lane_samples(step, lane)]
        samples = [(self._shard(number), offset) for number, offset in picked]
        return Batch(
            step=step,
            lanes=self.lanes,
            keys=np.array([shard.keys[offset] for shard, offset in samples]),
            shards=tuple(sorted({self.manifest.shards[number].name for number, _ in picked})),
            moments=np.stack([s.moments[offset] for s, offset in samples]).astype(np.float32),
            labels=np.array([shard.labels[offset] for shard, offset in samples]),
        )

    def _shard(self, number: int) -> Shard:
        """A shard, from the in-memory LRU cache or read again."""
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        shard = self.read(self.url, self.manifest.shards[number])
        self._shards[number] = shard
        while len(self._shards) > self._capacity:
            self._shards.popitem(last=False)
        return shard
