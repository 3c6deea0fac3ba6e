"""A size-limited cache of remote latent shards on a node's disk.

The ranks of a node share the folder. Files are named by the SHA-256 of their contents and
verified on every read, so the ranks need no coordination.
"""

from __future__ import annotations

import contextlib
import getpass
import tempfile
from pathlib import Path

from diffit_train import storage
from diffit_train.data.shards import Shard, ShardEntry, parse_shard, read_shard_bytes


class ShardCache:
    """Reads shards through a folder of the most recently used ones.

    Args:
        folder: folder of the copies; empty for a default in the node's temporary folder.
        limit_bytes: total size of the copies.
    """

    def __init__(self, folder: str, limit_bytes: int) -> None:
        default = Path(tempfile.gettempdir()) / f"diffit-shards-{getpass.getuser()}"
        self.folder = Path(folder) if folder else default
        self.limit_bytes = limit_bytes
        self.hits = self.misses = 0

    def read(self, url: str, entry: ShardEntry) -> Shard:
        """A shard, from the cache if possible, else from `url`; errors as `read_shard`."""
        name, copy = storage.join(url, entry.name), self.folder / f"{entry.sha256}.tar"
        data = self._copied(copy, entry)
        if data is None:
            self.misses += 1
            data = read_shard_bytes(url, entry)
            if entry.bytes <= self.limit_bytes:
                self._make_room(entry.bytes)
                storage.write_bytes(str(copy), data)
        else:
            self.hits += 1
        return parse_shard(name, entry, data)

    def _copied(self, copy: Path, entry: ShardEntry) -> bytes | None:
        """Contents of the copy; None if it is missing or damaged (then it is removed)."""
        try:
            data = copy.read_bytes()
            copy.touch()  # mark as most recently used
        except FileNotFoundError:
            return None
        if storage.sha256_bytes(data) != entry.sha256:
            copy.unlink(missing_ok=True)
            return None
        return data

    def _make_room(self, needed: int) -> None:
        """Evict the least recently used copies; other ranks may be doing the same."""
        copies = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                copies.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total + needed <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size
