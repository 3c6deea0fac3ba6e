"""Latents in the order of training: a function of recipe and step, not of workers or restarts.

In an epoch the shards are permuted and laid end to end; the row of samples is cut into lanes of
equal length; in a lane, samples are shuffled window by window. A global batch takes the same
number of samples from every lane, and a rank serves a stretch of neighboring lanes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np

from diffit_train.data.shards import Manifest, Shard, ShardEntry, read_shard
from diffit_train.errors import UserError

T = TypeVar("T")

# Streams of randomness, so that no two uses of one seed meet.
_SHARDS, _WINDOW, _DRAW = 0, 1, 2


def _generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed))))


class SampleOrder:
    """Which sample stands where in training.

    Args:
        counts: images of each shard.
        batch_size: of a global batch; a multiple of `lanes`.
        lanes: at most this many; reduced to its largest divisor that the shards can fill.
        window: samples of a lane that are shuffled together.
        seed: of the run.

    Raises:
        UserError: there are fewer samples than a batch takes.
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
                f"train.batch_size is {batch_size}, but there are only {self.samples} images"
            )
        self.per_lane = batch_size // self.lanes
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def lane_samples(self, step: int, lane: int) -> list[tuple[int, int]]:
        """(shard, offset in the shard) of each sample that a lane gives to a step's batch."""
        epoch, turn = divmod(step, self.steps_per_epoch)
        shards, starts = self._permuted(epoch)
        length = self.steps_per_epoch * self.per_lane
        first = turn * self.per_lane
        places = [
            lane * length + self._shuffled(epoch, lane, place, length)
            for place in range(first, first + self.per_lane)
        ]
        rows = np.searchsorted(starts, places, side="right") - 1
        return [
            (int(shards[row]), int(place - starts[row]))
            for row, place in zip(rows, places, strict=True)
        ]

    def shards_per_window(self) -> int:
        """The most shards that a window can touch: the smallest ones, and one cut at each end."""
        whole = np.searchsorted(np.cumsum(np.sort(self.counts)), self.window, side="right")
        return int(whole) + 2

    def rank_lanes(self, rank: int, world: int) -> range:
        """The lanes that a rank serves, neighbors; some have one more where it does not divide.

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
        """Images of a batch that the most burdened of so many ranks takes."""
        return self.per_lane * max(len(self.rank_lanes(rank, world)) for rank in range(world))

    def _permuted(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the place in the row where each of them begins."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = _generator(self.seed, _SHARDS, epoch).permutation(len(self.counts))
            ends = np.cumsum(self.counts[shards])
            self._epoch = (epoch, shards, ends - self.counts[shards])
            self._windows: dict[tuple[int, int], np.ndarray] = {}
        return self._epoch[1], self._epoch[2]

    def _shuffled(self, epoch: int, lane: int, place: int, length: int) -> int:
        """Where the sample that comes at `place` of a lane stood before the shuffle."""
        number, offset = divmod(place, self.window)
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
    """Timesteps, noise, posterior noise, flips and dropped labels from (seed, step, lane) alone."""
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
    """A rank's part of a global batch, lane after lane."""

    step: int
    lanes: range
    keys: np.ndarray  # (n,) int64, input indices of the images
    shards: tuple[str, ...]  # names of the shards that they came from
    moments: np.ndarray  # (n, F, 2C, h, w) float32
    labels: np.ndarray  # (n,) int64


class LatentLoader(Generic[T]):
    """Iterate over a rank's batches from a step on, read and prepared ahead by a thread.

    Args:
        url: folder of the latents.
        lanes: those of the rank, as `SampleOrder.rank_lanes` has them.
        prepare: what the thread makes of a batch, which is what iteration gives.
        read: how a shard is read.
        prefetch: batches read ahead.

    `wait_s` is the time that the consumer has waited so far.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            except Exception as error:  # raised again where the batch was asked for
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
        """This rank's part of the batch of a step."""
        places = [p for lane in self.lanes for p in self.order.lane_samples(step, lane)]
        samples = [(self._shard(number), offset) for number, offset in places]
        return Batch(
            step=step,
            lanes=self.lanes,
            keys=np.array([shard.keys[offset] for shard, offset in samples]),
            shards=tuple(sorted({self.manifest.shards[number].name for number, _ in places})),
            moments=np.stack([s.moments[offset] for s, offset in samples]).astype(np.float32),
            labels=np.array([shard.labels[offset] for shard, offset in samples]),
        )

    def _shard(self, number: int) -> Shard:
        """A shard, from the cache of those used last or read anew."""
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        shard = self.read(self.url, self.manifest.shards[number])
        self._shards[number] = shard
        while len(self._shards) > self._capacity:
            self._shards.popitem(last=False)
        return shard
