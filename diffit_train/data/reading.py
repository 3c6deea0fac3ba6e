"""Images of a source: their bytes, fetched ahead by threads, decoded and cropped.

Images are read in the order of encoding, a permutation of the source: each one is a request of its
own, and the latency of many requests overlaps.
"""

from __future__ import annotations

import functools
import os
import stat
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from diffit_train import storage
from diffit_train.config.data import FORMATS
from diffit_train.data import plugged, preprocess
from diffit_train.data.sources import Item, Location, Source
from diffit_train.data.sources.cifar10 import read_image
from diffit_train.data.sources.parquet import read_rows
from diffit_train.data.sources.zips import DamagedMember, read_member
from diffit_train.errors import UserError

# Threads that read, and images that they may be ahead.
THREADS, AHEAD = 16, 64
# Row groups of parquet that are in memory at once, whole.
WHOLE_ROW_GROUPS = 4


class ImageReader:
    """Reads the bytes of a source's images by location; threads may share it.

    Args:
        source: where they are.
        items: the images that will be read, each once. Of a parquet file's row group, all of them
            are taken at once.
    """

    def __init__(self, source: Source, items: Sequence[Item]) -> None:
        self.url, self.kind, column = source
        own = FORMATS.is_plugged(self.kind)
        self._plugged = plugged.open_source(self.kind, self.url) if own else None
        self._groups: dict[tuple[str, int], _RowGroup] = {}
        if self.kind == "parquet":
            rows = defaultdict(set)
            for item in items:
                rows[item.location.file, item.location.size].add(item.location.start)
            gate = threading.Semaphore(WHOLE_ROW_GROUPS)
            self._groups = {
                (file, group): _RowGroup(self._file(file), group, column, sorted(wanted), gate)
                for (file, group), wanted in rows.items()
            }

    def read(self, location: Location) -> bytes:
        """The bytes of an image.

        Raises:
            OSError: the file cannot be read.
            UnreadableImage: it is not a regular file, or too large for an image.
        """
        if self._plugged is not None:
            data = plugged.read_image(self.kind, self._plugged, location.start)
            _check_size(len(data))
            return data
        if self.kind == "parquet":
            return self._groups[location.file, location.size].take(location.start)
        if self.kind == "cifar10":
            return read_image(self.url, location)
        url, start, size = self._file(location.file), location.start, location.size
        if self.kind == "folder" and size < 0:
            return _read_regular(url)
        _check_size(size)
        if self.kind == "folder":
            return storage.read_sized(url, size)
        if self.kind == "zip":
            try:
                return read_member(url, location)
            except DamagedMember as error:
                raise preprocess.UnreadableImage(str(error)) from error
        return storage.read_range(url, start, start + size) if size else b""

    def _file(self, name: str) -> str:
        return storage.join(self.url, name) if name else self.url


def _read_regular(url: str) -> bytes:
    """A local file; a FIFO would block the reader, and a device may have no end."""
    path = storage.local_path(url)
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise preprocess.UnreadableImage("not a regular file")
        _check_size(found.st_size)
        return file.read(found.st_size)


def _check_size(size: int) -> None:
    if size > preprocess.MAX_FILE_BYTES:
        raise preprocess.UnreadableImage(
            f"{size:,} bytes are more than the {preprocess.MAX_FILE_BYTES:,} of the largest image"
        )


class _RowGroup:
    """Some rows of a row group, read when the first of them is taken."""

    def __init__(
        self, url: str, group: int, column: str, rows: list[int], gate: threading.Semaphore
    ) -> None:
        self.url, self.group, self.column, self.rows, self.gate = url, group, column, rows, gate
        self._lock = threading.Lock()
        self._values: dict[int, bytes] | None = None
        self._problem = ""

    def take(self, row: int) -> bytes:
        """The bytes of a row, which are kept no longer.

        Raises:
            UnreadableImage: the row group is damaged.
        """
        with self._lock:
            if self._values is None and not self._problem:
                try:
                    with self.gate:
                        self._values = storage.with_retries(self.url, self._read)
                except UserError as error:
                    self._problem = str(error)
            if self._values is None:
                raise preprocess.UnreadableImage(self._problem)
            return self._values.pop(row)

    def _read(self) -> dict[int, bytes]:
        return read_rows(self.url, self.group, self.rows, self.column)


def read_items(
    source: Source,
    items: Sequence[Item],
    resolution: int,
    decoders: int = 1,
    threads: int = THREADS,
    decoder: preprocess.Decoder | None = None,
) -> preprocess.Images:
    """Read, decode and crop images of a source; see `preprocess.read_images`.

    Args:
        decoders: threads that decode at the same time, each on a CPU core.
        threads: threads that read.
        decoder: see `preprocess.read_images`.
    """
    read = ImageReader(source, [item for item in items if not item.problem]).read
    reads = [functools.partial(read, item.location) for item in items]
    problems = [item.problem for item in items]
    with ThreadPoolExecutor(threads, thread_name_prefix="images") as pool:
        return preprocess.read_images(reads, resolution, problems, pool, AHEAD, decoders, decoder)


def read_batches(
    source: Source,
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
            return pool.submit(read_items, source, here, resolution, decoders)

        coming = submit(0) if items else None
        for start in starts:
            assert coming is not None
            images = coming.result()
            coming = submit(start + size) if start + size < len(items) else None
            yield start, images
