"""Images of a source: their bytes, fetched ahead by threads, decoded and cropped.

Images are read in the order of encoding, a permutation of the source: each one is a request of its
own, and the latency of many requests overlaps.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from diffit_train import storage
from diffit_train.data import cifar10, preprocess
from diffit_train.data.sources import Item, Location, SourceKind, open_parquet

# Threads that read, and images that they may be ahead.
THREADS, AHEAD = 16, 64
# Row groups of parquet that are in memory at once, whole.
WHOLE_ROW_GROUPS = 4


class ImageReader:
    """Reads the bytes of a source's images by location; threads may share it.

    Args:
        url: the source.
        items: the images that will be read, each once. Of a parquet file's row group, all of them
            are taken at once.
    """

    def __init__(self, url: str, kind: SourceKind, items: Sequence[Item]) -> None:
        self.url, self.kind = url, kind
        self._groups: dict[tuple[str, int], _RowGroup] = {}
        if kind == "parquet":
            rows = defaultdict(set)
            for item in items:
                rows[item.location.file, item.location.size].add(item.location.start)
            gate = threading.Semaphore(WHOLE_ROW_GROUPS)
            self._groups = {
                (file, group): _RowGroup(self._file(file), group, sorted(wanted), gate)
                for (file, group), wanted in rows.items()
            }

    def read(self, location: Location) -> bytes:
        """The bytes of an image.

        Raises:
            OSError: the file cannot be read.
        """
        if self.kind == "parquet":
            return self._groups[location.file, location.size].take(location.start)
        url, start, size = self._file(location.file), location.start, location.size
        if self.kind != "folder":
            return storage.read_range(url, start, start + size) if size else b""
        return storage.read_bytes(url) if size < 0 else storage.read_sized(url, size)

    def _file(self, name: str) -> str:
        return storage.join(self.url, name) if name else self.url


class _RowGroup:
    """Some rows of a row group, read when the first of them is taken."""

    def __init__(self, url: str, group: int, rows: list[int], gate: threading.Semaphore) -> None:
        self.url, self.group, self.rows, self.gate = url, group, rows, gate
        self._lock = threading.Lock()
        self._values: dict[int, bytes] | None = None

    def take(self, row: int) -> bytes:
        """The bytes of a row, which are kept no longer."""
        with self._lock:
            if self._values is None:
                with self.gate:
                    self._values = storage.retried(self.url, self._read)
            return self._values.pop(row)

    def _read(self) -> dict[int, bytes]:
        with open_parquet(self.url) as table:
            column = table.read_row_group(self.group, columns=["image.bytes"])["image"]
        values = column.take(self.rows).combine_chunks().field("bytes").to_pylist()
        return {row: value or b"" for row, value in zip(self.rows, values, strict=True)}


def read_items(
    url: str,
    kind: SourceKind,
    items: Sequence[Item],
    resolution: int,
    decoders: int = 1,
    threads: int = THREADS,
) -> preprocess.Images:
    """Read, decode and crop images of a source; see `preprocess.read_images`.

    Args:
        decoders: threads that decode at the same time, each on a CPU core.
        threads: threads that read.
    """
    if kind == "cifar10":
        read: Callable[[Location], bytes] = functools.partial(cifar10.read_image, url)
    else:
        read = ImageReader(url, kind, [item for item in items if not item.problem]).read
    reads = [functools.partial(read, item.location) for item in items]
    problems = [item.problem for item in items]
    with ThreadPoolExecutor(threads, thread_name_prefix="images") as pool:
        return preprocess.read_images(reads, resolution, problems, pool, AHEAD, decoders)


def read_batches(
    url: str,
    kind: SourceKind,
    items: Sequence[Item],
    resolution: int,
    size: int,
    decoders: int = 1,
) -> Iterator[tuple[int, preprocess.Images]]:
    """Images by `size` items: index of the first, and `read_items` of them.

    A thread reads the next ones while the caller computes.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        starts = range(0, len(items), size)

        def submit(start: int) -> Future[preprocess.Images]:
            here = items[start : start + size]
            return pool.submit(read_items, url, kind, here, resolution, decoders)

        coming = submit(0) if items else None
        for start in starts:
            assert coming is not None
            images = coming.result()
            coming = submit(start + size) if start + size < len(items) else None
            yield start, images
