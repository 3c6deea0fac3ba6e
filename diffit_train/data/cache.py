"""Copies of remote latent shards on a node's disk, at most so many bytes of them.

The ranks of a node share the folder. A file is named by the SHA-256 of what it holds and is
verified whenever it is read, so nobody needs to know who wrote it.
"""

from __future__ import annotations

import contextlib
import getpass
import tempfile
from pathlib import Path

from diffit_train import storage
from diffit_train.data.shards import Shard, ShardEntry, parse_shard, read_shard_bytes


class ShardCache:
    """Read shards through a folder that holds those used last.

    Args:
        folder: where the copies are; empty for the node's temporary folder.
        limit_bytes: of all copies together.
    """

    def __init__(self, folder: str, limit_bytes: int) -> None:
        default = Path(tempfile.gettempdir()) / f"diffit-shards-{getpass.getuser()}"
        self.folder = Path(folder) if folder else default
        self.limit_bytes = limit_bytes
        self.hits = self.misses = 0

    def read(self, url: str, entry: ShardEntry) -> Shard:
        """A shard, from the folder or else from `url`; errors as `read_shard`."""
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
        """What the copy holds; None where there is none, or a damaged one, which is removed."""
        try:
            data = copy.read_bytes()
            copy.touch()  # used last
        except FileNotFoundError:
            return None
        if storage.sha256_bytes(data) != entry.sha256:
            copy.unlink(missing_ok=True)
            return None
        return data

    def _make_room(self, needed: int) -> None:
        """Remove the copies used longest ago; other ranks may be doing the same."""
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
