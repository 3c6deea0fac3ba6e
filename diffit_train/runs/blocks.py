"""Files that are hashed in blocks: a reader of a part verifies just the blocks it reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffit_train import storage

# Small, so that a rank which needs a part of a file reads little else; large enough for one request
# to an object store to be worth its latency.
BLOCK_BYTES = 16 * 2**20
# Requests in flight per reader; each holds one block in memory.
READERS = 8


class DamagedFile(Exception):
    """A file is missing, or differs from its recorded size or hashes."""


class FileEntry(storage.Record):
    """Size of a file, and the SHA-256 of each of its blocks; the last block may be shorter."""

    bytes: int
    block_bytes: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """Bytes `start` to `stop` of a file, and what takes them.

    Attributes:
        take: called with parts of the range: their offset in it, and the bytes. A part may turn
            out to be damaged later, so nothing may be used before the reading returns.
    """

    start: int
    stop: int
    take: Callable[[int, bytes], None]


def hash_blocks(path: Path) -> FileEntry:
    """The entry of a local file."""
    blocks, size = [], 0
    with path.open("rb") as file:
        while data := file.read(BLOCK_BYTES):
            blocks.append(storage.sha256_bytes(data))
            size += len(data)
    return FileEntry(bytes=size, block_bytes=BLOCK_BYTES, blocks=tuple(blocks))


def read_ranges(
    base: str, entries: Mapping[str, FileEntry], wanted: Mapping[str, Sequence[Range]]
) -> None:
    """Read ranges of several files, each block that holds a part of one exactly once.

    Args:
        base: folder of the files.
        entries: by file name relative to `base`.
        wanted: the ranges to read, by file name.

    Raises:
        DamagedFile: a file is missing or damaged in a block that was read.
    """
    needed = [
        (name, number, ranges)
        for name, all_ranges in wanted.items()
        for number, ranges in _by_block(entries[name], all_ranges).items()
    ]
    _in_parallel(lambda name: _check_size(base, name, entries[name]), wanted)
    _in_parallel(lambda block: _read_block(base, entries[block[0]], *block), needed)


def verify(base: str, entries: Mapping[str, FileEntry]) -> None:
    """Read every byte of the files.

    Raises:
        DamagedFile: one is missing or damaged.
    """
    everything = {name: [Range(0, e.bytes, lambda _, __: None)] for name, e in entries.items()}
    read_ranges(base, entries, everything)


def _in_parallel(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Do all work in threads; the first error is raised, and no further work is started."""
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for _ in pool.map(work, items):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _by_block(entry: FileEntry, ranges: Iterable[Range]) -> dict[int, list[Range]]:
    """The ranges that overlap each block, by the block's number."""
    found: dict[int, list[Range]] = {}
    for wanted in ranges:
        if wanted.start < wanted.stop:
            first, last = (p // entry.block_bytes for p in (wanted.start, wanted.stop - 1))
            for number in range(first, last + 1):
                found.setdefault(number, []).append(wanted)
    return found


def _check_size(base: str, name: str, entry: FileEntry) -> None:
    try:
        size = storage.size_bytes(storage.join(base, name))
    except FileNotFoundError as error:
        raise DamagedFile(f"{name} is missing") from error
    if size != entry.bytes:
        raise DamagedFile(f"{name} has {size:,} bytes instead of {entry.bytes:,}")


def _read_block(
    base: str, entry: FileEntry, name: str, number: int, ranges: Sequence[Range]
) -> None:
    """Hash a block, a part at a time, and hand out what is wanted of it."""
    url = storage.join(base, name)
    start = number * entry.block_bytes
    stop, digest = min(start + entry.block_bytes, entry.bytes), hashlib.sha256()
    for position in range(start, stop, BLOCK_BYTES):
        data = storage.read_range(url, position, min(position + BLOCK_BYTES, stop))
        digest.update(data)
        for wanted in ranges:
            first = max(position, wanted.start)
            last = min(position + len(data), wanted.stop)
            if first < last:
                wanted.take(first - wanted.start, data[first - position : last - position])
    if number >= len(entry.blocks) or digest.hexdigest() != entry.blocks[number]:
        raise DamagedFile(f"{name} differs from its recorded sha256")
