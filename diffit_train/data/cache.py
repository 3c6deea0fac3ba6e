"""A size-limited cache of remote latent shards on a node's disk.

The ranks of a node share the folder. Files are named by the SHA-256 of their contents, appear
complete, and are verified on every read. Of the ranks that want the same shard at once, one
downloads it; the lock only saves requests, so a lost or stale one does no harm.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from diffit_train import storage
from diffit_train.config.scaling import Scaling
from diffit_train.data.shards import Manifest, Shard, ShardEntry, parse_shard, read_shard_bytes
from diffit_train.errors import UserError

# An automatic cache leaves this part of the disk free.
KEPT_FREE = 0.2
# Longest wait for another rank's download; it may have been stopped.
LOCK_WAIT_S = 60.0
# A temporary file of this age belongs to a killed rank.
STALE_S = 3600.0
# File systems in memory, where copies would take the memory that training needs.
_IN_MEMORY = ("tmpfs", "ramfs")


class ShardCache:
    """Reads shards through a folder of the most recently used ones.

    Args:
        folder: folder of the copies; empty for a default in the node's temporary folder.
        limit_bytes: total size of the copies.
        keep_free: fraction of the disk that copies leave free.

    Attributes:
        hits: shards read from the folder.
        misses: shards downloaded.
    """

    def __init__(self, folder: str, limit_bytes: int, keep_free: float = 0.0) -> None:
        self.folder = cache_folder(folder)
        self.limit_bytes, self.keep_free = limit_bytes, keep_free
        self.hits = self.misses = 0
        self._counting, self._storing = threading.Lock(), threading.Lock()

    def read(self, url: str, entry: ShardEntry) -> Shard:
        """A shard, from the cache if possible, else from `url`; errors as `read_shard`."""
        data = self._copied(entry)
        if data is None and entry.bytes <= self.limit_bytes:
            self.folder.mkdir(parents=True, exist_ok=True)  # the node's cleaner may remove it
            with _locked(self.folder / f"{entry.sha256}.lock"):
                data = self._copied(entry)  # another rank may have stored it meanwhile
                if data is None:
                    data = self._downloaded(url, entry)
                    self._store(entry, data)
        elif data is None:
            data = self._downloaded(url, entry)
        return parse_shard(storage.join(url, entry.name), entry, data)

    def _copy(self, entry: ShardEntry) -> Path:
        return self.folder / f"{entry.sha256}.tar"

    def _copied(self, entry: ShardEntry) -> bytes | None:
        """Contents of the copy; None if it is missing or damaged (then it is removed)."""
        copy = self._copy(entry)
        try:
            data = copy.read_bytes()
            copy.touch()  # mark as most recently used
        except FileNotFoundError:
            return None
        if storage.sha256_bytes(data) != entry.sha256:
            copy.unlink(missing_ok=True)
            return None
        with self._counting:
            self.hits += 1
        return data

    def _downloaded(self, url: str, entry: ShardEntry) -> bytes:
        with self._counting:
            self.misses += 1
        return read_shard_bytes(url, entry)

    def _store(self, entry: ShardEntry, data: bytes) -> None:
        """Commit a copy if there is room; a full disk must not end training."""
        with self._storing:
            if not self._make_room(entry.bytes):
                return
            with contextlib.suppress(storage.DiskFullError):
                storage.write_bytes(str(self._copy(entry)), data)

    def _make_room(self, needed: int) -> bool:
        """Evict the least recently used copies; whether there is room then.

        Other ranks may be doing the same.
        """
        copies = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == ".tar":
                    copies.append((status.st_mtime_ns, status.st_size, path))
                elif (
                    storage.TEMPORARY_MARK in path.name and time.time() - status.st_mtime > STALE_S
                ):
                    path.unlink(missing_ok=True)
        disk = shutil.disk_usage(self.folder)
        total = sum(size for _, size, _ in copies)
        room = min(self.limit_bytes - total, disk.free - int(self.keep_free * disk.total))
        for _, size, path in sorted(copies):
            if room >= needed:
                break
            path.unlink(missing_ok=True)
            room += size
        return room >= needed


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, which a killed process gives up; without it after a while."""
    lock = FileLock(path, timeout=LOCK_WAIT_S)
    with contextlib.suppress(Timeout):
        lock.acquire()
    try:
        yield
    finally:
        # Those that wait then find the copy and leave.
        path.unlink(missing_ok=True)
        lock.release()


def cache_folder(folder: str) -> Path:
    """`scaling.shard_cache_folder`, or its default in the node's temporary folder."""
    default = Path(tempfile.gettempdir()) / f"diffit-shards-{getpass.getuser()}"
    return Path(folder) if folder else default


def shard_cache(
    scaling: Scaling, url: str, manifest: Manifest, say: Callable[[str], None]
) -> ShardCache | None:
    """The cache of `scaling` for the latents at `url`; None without one.

    Where `scaling.shard_cache_gib` is null, remote latents are cached as far as the disk has room,
    except in a folder that is in memory or cannot be written.

    Raises:
        UserError: a size is set, but the folder cannot be written.
    """
    if storage.is_local(url) or scaling.shard_cache_gib == 0:
        return None
    folder = cache_folder(scaling.shard_cache_folder)
    problem = _unusable(folder)
    if scaling.shard_cache_gib is not None:
        if problem:
            raise UserError(f"scaling.shard_cache_folder {folder} {problem}; choose another")
        limit = int(scaling.shard_cache_gib * storage.GIB)
        return ShardCache(scaling.shard_cache_folder, limit)
    if not problem and _file_system(folder) in _IN_MEMORY:
        problem = "is in memory"
    if problem:
        say(
            f"Shards are not cached: {folder} {problem}; set scaling.shard_cache_folder to a "
            "folder on the node's disk"
        )
        return None
    size = sum(shard.bytes for shard in manifest.shards)
    return ShardCache(scaling.shard_cache_folder, size, KEPT_FREE)


def _unusable(folder: Path) -> str:
    """Why copies cannot be written to a folder; empty if they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot be created ({error.strerror})"
    return "" if os.access(folder, os.W_OK | os.X_OK) else "cannot be written"


def _file_system(folder: Path) -> str:
    """Type of the file system that a folder is on; empty where the kernel does not say."""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except FileNotFoundError:
        return ""
    here, found = folder.resolve(), (0, "")
    for line in mounts:
        _, point, kind, *_ = line.split(" ")
        if here.is_relative_to(point.replace("\\040", " ")):
            found = max(found, (len(point), kind), key=lambda each: each[0])
    return found[1]
