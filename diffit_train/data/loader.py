"""Latents in training order, which depends on recipe and step, not on workers or restarts.

Each epoch, the shards are permuted and concatenated, and the sequence of samples is cut into
shuffle streams of equal length; within a stream, samples are shuffled window by window. A global
batch takes the same number of samples from every stream, and a rank serves a contiguous range of
streams. Their windows are staggered, so that shards are needed one by one.
"""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, NamedTuple, Self, TypeVar

import numpy as np

from diffit_train.config import Recipe
from diffit_train.data.manifest import Manifest, ShardEntry
from diffit_train.data.randomness import SHARD_ORDER, WINDOW, generator
from diffit_train.data.shards import Shard, as_float, read_shard
from diffit_train.errors import UserError

T = TypeVar("T")

# Threads of a rank that read shards.
READERS = 16
# The golden ratio's fraction, times 2^64: its multiples spread evenly over any range of streams.
_GOLDEN = 0x9E3779B97F4A7C15


class Window(NamedTuple):
    """Samples of a stream that are shuffled together: its steps, and the shards they lie in."""

    first_step: int
    last_step: int
    shards: tuple[int, ...]


class SampleOrder:
    """The order of samples in training.

    Args:
        counts: number of images in each shard.
        batch_size: global batch size; a multiple of `streams`.
        streams: most shuffle streams; reduced to the largest divisor not above the shard count.
        window: samples of a stream that are shuffled together.
        seed: the run's seed.

    Raises:
        UserError: there are fewer samples than a batch needs.
    """

    def __init__(
        self,
        counts: Sequence[int],
        batch_size: int,
        streams: int,
        window: int,
        seed: int,
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.samples, self.batch_size = int(self.counts.sum()), batch_size
        self.window, self.seed = window, seed
        self.streams = max(
            d for d in range(1, streams + 1) if streams % d == 0 and d <= len(counts)
        )
        self.steps_per_epoch = self.samples // batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"train.batch_size is {batch_size}, but there are only {self.samples} images; "
                "lower it"
            )
        self.per_stream = batch_size // self.streams
        self.length = self.steps_per_epoch * self.per_stream  # of a stream
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        # By stream: epoch, number and permutation of the window read last.
        self._last: dict[int, tuple[int, int, np.ndarray]] = {}

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        manifest: Manifest,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> Self:
        """The order of a recipe's training on latents, or that with another batch size or seed."""
        return cls(
            [entry.count for entry in manifest.shards],
            recipe.train.batch_size if batch_size is None else batch_size,
            recipe.data.shuffle_streams,
            recipe.data.shuffle_window,
            recipe.train.seed if seed is None else seed,
        )

    def stream_samples(self, step: int, stream: int) -> list[tuple[int, int]]:
        """(shard, offset in the shard) of each sample of a stream in a step's batch."""
        epoch, epoch_step = divmod(step, self.steps_per_epoch)
        shards, starts = self._permuted(epoch)
        first = epoch_step * self.per_stream
        indices = [
            stream * self.length + self._shuffled(epoch, stream, index)
            for index in range(first, first + self.per_stream)
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

    def windows(self, stream: int, step: int) -> Iterator[Window]:
        """The windows of a stream from the one that holds its first sample of a step; endless."""
        epoch, epoch_step = divmod(step, self.steps_per_epoch)
        shift = self._shift(stream)
        number = (epoch_step * self.per_stream + shift) // self.window
        while True:
            start = max(0, number * self.window - shift)
            stop = min(self.length, (number + 1) * self.window - shift)
            if start >= self.length:
                epoch, number = epoch + 1, 0
                continue
            shards, starts = self._permuted(epoch)
            first, last = np.searchsorted(
                starts, stream * self.length + np.array([start, stop - 1]), side="right"
            )
            begin = epoch * self.steps_per_epoch
            yield Window(
                first_step=begin + start // self.per_stream,
                last_step=begin + (stop - 1) // self.per_stream,
                shards=tuple(shards[first - 1 : last].tolist()),
            )
            number += 1

    def _shift(self, stream: int) -> int:
        """How much shorter than the others a stream's first window is."""
        staggered = (stream * _GOLDEN % 2**64) * self.window >> 64
        return staggered if self.length > self.window else 0

    def rank_streams(self, rank: int, world: int) -> range:
        """The contiguous streams of a rank; some ranks have one more if they do not divide evenly.

        Raises:
            UserError: there are more ranks than streams.
        """
        if world > self.streams:
            raise UserError(
                f"{world} workers cannot share the {self.streams} shuffle streams of "
                f"{len(self.counts)} shards; lower scaling.workers, or encode with "
                "fewer data.images_per_shard"
            )
        return range(rank * self.streams // world, (rank + 1) * self.streams // world)

    def largest_share(self, world: int) -> int:
        """Images per batch on the rank with the largest share."""
        return self.per_stream * max(len(self.rank_streams(rank, world)) for rank in range(world))

    def _permuted(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the index of each one's first sample."""
        if epoch not in self._epochs:
            shards = generator(self.seed, SHARD_ORDER, epoch).permutation(len(self.counts))
            ends = np.cumsum(self.counts[shards])
            # The loader looks ahead into the next epoch.
            self._epochs = {e: v for e, v in self._epochs.items() if abs(e - epoch) <= 1}
            self._epochs[epoch] = (shards, ends - self.counts[shards])
        return self._epochs[epoch]

    def _shuffled(self, epoch: int, stream: int, index: int) -> int:
        """The index in the stream before shuffling of the sample that is at `index` after it."""
        shift = self._shift(stream)
        number = (index + shift) // self.window
        start = max(0, number * self.window - shift)
        if stream not in self._last or self._last[stream][:2] != (epoch, number):
            size = min(self.length, (number + 1) * self.window - shift) - start
            random = generator(self.seed, WINDOW, epoch, stream, number)
            self._last[stream] = (epoch, number, random.permutation(size))
        return start + int(self._last[stream][2][index - start])


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch, ordered by stream."""

    step: int
    streams: range
    keys: np.ndarray  # (n,) int64, input indices of the images
    shards: tuple[str, ...]  # names of their shards
    moments: np.ndarray  # (n, F, 2C, h, w) float32
    labels: np.ndarray  # (n,) int64


class LatentLoader(Generic[T]):
    """Iterates over a rank's batches from a given step; a thread prepares them ahead.

    The order is known, so other threads read shards before the windows that need them begin, as
    many as memory for `SampleOrder.shards_per_window` shards a stream allows.

    Args:
        url: folder of the latents.
        streams: the rank's streams, from `SampleOrder.rank_streams`.
        prepare: called by the thread on each batch; iteration yields its results.
        read: reads a shard.
        prefetch: number of batches to prepare ahead.
        readers: number of threads that read shards.
        look_ahead: whether shards are read before they are needed.

    Attributes:
        wait_s: total time the consumer has waited.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        order: SampleOrder,
        streams: range,
        start_step: int,
        prepare: Callable[[Batch], T],
        read: Callable[[str, ShardEntry], Shard] = read_shard,
        prefetch: int = 4,
        readers: int = READERS,
        look_ahead: bool = True,
    ) -> None:
        self.url, self.manifest, self.order = url, manifest, order
        self.prepare, self.read = prepare, read
        self.streams = streams
        self.step = start_step
        self.wait_s = 0.0
        self._capacity = len(self.streams) * order.shards_per_window()
        self._look_ahead = look_ahead
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="shards")
        self._shards: dict[int, Future[Shard]] = {}
        # Windows of the streams in the order of their first step, and the last step of each shard.
        self._coming: Iterator[Window] = iter(())
        self._next: Window | None = None
        self._needed_until: dict[int, int] = {}
        self._position = -1
        self._queue: queue.Queue[T | BaseException] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="latents", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
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
        self._fetch(step)
        picked = [p for stream in self.streams for p in self.order.stream_samples(step, stream)]
        samples = [(self._shards[number].result(), offset) for number, offset in picked]
        return Batch(
            step=step,
            streams=self.streams,
            keys=np.array([shard.keys[offset] for shard, offset in samples]),
            shards=tuple(sorted({self.manifest.shards[number].name for number, _ in picked})),
            moments=np.stack([as_float(s.moments[offset]) for s, offset in samples]),
            labels=np.array([shard.labels[offset] for shard, offset in samples]),
        )

    def _fetch(self, step: int) -> None:
        """Start reading the shards of the windows of a step, and of later ones as memory allows."""
        if step != self._position + 1 or self._next is None:
            self._coming = heapq.merge(*(self.order.windows(n, step) for n in self.streams))
            self._next = next(self._coming)
            self._needed_until = dict.fromkeys(self._shards, -1)
        self._position = step
        for number in [n for n, last in self._needed_until.items() if last < step]:
            del self._needed_until[number]
            self._shards.pop(number)
        while self._next.first_step <= step or (self._look_ahead and self._has_room(self._next)):
            for number in self._next.shards:
                if number not in self._shards:
                    entry = self.manifest.shards[number]
                    self._shards[number] = self._pool.submit(self.read, self.url, entry)
                last = self._needed_until.get(number, -1)
                self._needed_until[number] = max(last, self._next.last_step)
            self._next = next(self._coming)

    def _has_room(self, window: Window) -> bool:
        new = sum(number not in self._shards for number in window.shards)
        within_next_epoch = window.first_step < self._position + self.order.steps_per_epoch
        return within_next_epoch and len(self._shards) + new <= self._capacity
