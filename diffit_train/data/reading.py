"""Images of a source: their bytes, fetched ahead by threads, decoded and cropped.

Images are read in the order of encoding, a permutation of the source: each one is a request of its
own, and the latency of many requests overlaps.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from diffit_train.data import preprocess
from diffit_train.data.preprocess import Array, Decoder, UnreadableImage
from diffit_train.data.sources import Item, Source

# Threads that read, and images that they may be ahead.
THREADS, AHEAD = 16, 64
# A file's own errors when it is opened: a dangling link, a loop of links, a socket.
_OF_THE_FILE = frozenset(
    {
        errno.ENOENT,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.EACCES,
        errno.EPERM,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENXIO,
    }
)


@dataclass(frozen=True)
class Images:
    """Indices of readable images, their pixels (n, R, R, 3) uint8, and the rejected images."""

    kept: list[int]
    pixels: Array
    rejected: list[tuple[int, str]]


def read_items(
    source: Source,
    items: Sequence[Item],
    resolution: int,
    *,
    decoders: int = 1,
    decoder: Decoder | None = None,
    threads: int = THREADS,
    ahead: int = AHEAD,
) -> Images:
    """Read, decode and crop images; unreadable ones are rejected with a reason.

    Args:
        items: the images; one with a problem is rejected unread.
        decoders: threads that decode at the same time, each on a CPU core.
        decoder: from bytes and resolution to pixels; None: `pixels_from`.
        threads: threads that read.
        ahead: number of images that they may be ahead.

    Raises:
        OSError: reading failed for a reason unrelated to the image, such as a lost connection.
    """
    gate = threading.Semaphore(decoders)
    rejected = [(number, item.problem) for number, item in enumerate(items) if item.problem]
    readable = [number for number, item in enumerate(items) if not item.problem]
    read = source.open([items[number] for number in readable])

    def pixels_of(item: Item) -> Array:
        data = read(item.location)
        with gate:
            return (decoder or preprocess.pixels_from)(data, resolution)

    kept, pixels = [], []
    pool = ThreadPoolExecutor(threads, thread_name_prefix="images")
    try:
        jobs = ((number, pool.submit(pixels_of, items[number])) for number in readable)
        running = deque(itertools.islice(jobs, ahead + 1))
        while running:
            number, job = running.popleft()
            try:
                pixels.append(job.result())
                kept.append(number)
            except UnreadableImage as error:
                rejected.append((number, str(error)))
            except OSError as error:
                if error.errno not in _OF_THE_FILE and not isinstance(error, FileNotFoundError):
                    raise
                rejected.append((number, f"{type(error).__name__}: {error.strerror or error}"))
            running.extend(itertools.islice(jobs, 1))
    finally:
        pool.shutdown(cancel_futures=True)
    none = np.zeros((0, resolution, resolution, 3), np.uint8)
    return Images(kept, np.stack(pixels) if pixels else none, sorted(rejected))


def read_batches(
    source: Source, items: Sequence[Item], resolution: int, size: int, decoders: int = 1
) -> Iterator[tuple[int, Images]]:
    """Images by `size` items: index of the first, and `read_items` of them.

    A thread reads the next ones while the caller computes.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        jobs = (
            (n, pool.submit(read_items, source, items[n : n + size], resolution, decoders=decoders))
            for n in range(0, len(items), size)
        )
        running = deque(itertools.islice(jobs, 1))
        while running:
            start, job = running.popleft()
            images = job.result()
            running.extend(itertools.islice(jobs, 1))
            yield start, images
