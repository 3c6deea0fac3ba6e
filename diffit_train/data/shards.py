"""Latent shards, schema 1: WebDataset tar files, and a cache of them. Does not import torch.

Each image has two members: KEY.latent.npy, float16 (F, 2C, h, w), the posterior's mean then its
log-variance, unscaled, with the flipped image second if F = 2; and KEY.cls, the label in ASCII.
Without a posterior the latent is (F, C, h, w); pixels are uint8. KEY is the nine-digit index of the
image in the sorted input; images appended later continue the numbering. Images lie in the order of
a seeded permutation of the input (`encode_order`). The same content gives the same bytes: order,
times, owners and modes are fixed.
"""

from __future__ import annotations

import contextlib
import getpass
import io
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from filelock import FileLock, Timeout

from diffit_train import storage
from diffit_train.config.scaling import Scaling
from diffit_train.data.manifest import Manifest, ShardEntry
from diffit_train.errors import DataError, UserError

# An automatic cache leaves this part of the disk free.
KEPT_FREE = 0.2
# Longest wait for another rank's download; it may have been stopped.
LOCK_WAIT_S = 60.0
# A temporary file of this age belongs to a killed rank.
STALE_S = 3600.0
# File systems in memory, where copies would take the memory that training needs.
_IN_MEMORY = ("tmpfs", "ramfs")
# Bytes of a tar's headers, and of what its members are padded to a multiple of.
BLOCK = 512
_FIX = "run `diffit verify FOLDER --remove`, then `diffit encode` again"


@dataclass(frozen=True)
class Shard:
    """Keys (n,), moments (n, F, 2C, h, w) float16 or uint8, and labels (n,) int64."""

    keys: np.ndarray
    moments: np.ndarray
    labels: np.ndarray


def as_float(moments: np.ndarray) -> np.ndarray:
    """Moments in float32; pixels, stored as uint8, in [-1, 1]."""
    values = moments.astype(np.float32)
    return values / np.float32(127.5) - np.float32(1.0) if moments.dtype == np.uint8 else values


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.tar"


def write_shard(
    url: str, number: int, keys: Sequence[int], moments: np.ndarray, labels: Sequence[int]
) -> ShardEntry:
    """Write and commit one shard.

    Args:
        url: folder of the latents.
        keys: input indices of the images.
        moments: (n, F, 2C, h, w); stored as float16, pixels as uint8.
        labels: (n,).
    """
    # By default webdataset's decoders unpickle and its readers run shell commands.
    os.environ.setdefault("WDS_SECURE", "1")
    from webdataset import TarWriter

    name = shard_name(number)
    needed = moments.size * (1 if moments.dtype == np.uint8 else 2) + 2048 * (len(keys) + 5)
    with storage.atomic_file(storage.join(url, name), needed) as path:
        with (
            path.open("wb") as file,
            TarWriter(
                file, user="diffit", group="diffit", mode=0o644, mtime=0, encoder=False
            ) as tar,
        ):
            for key, values, label in zip(keys, moments, labels, strict=True):
                latent = io.BytesIO()
                stored = values if values.dtype == np.uint8 else values.astype(np.float16)
                np.save(latent, stored, allow_pickle=False)
                members = {"latent.npy": latent.getvalue(), "cls": str(int(label)).encode()}
                tar.write({"__key__": f"{key:09d}", **members})
        return ShardEntry(
            name=name,
            count=len(keys),
            bytes=path.stat().st_size,
            sha256=storage.sha256_file(path),
            first_index=keys[0],
        )


def read_shard(url: str, entry: ShardEntry) -> Shard:
    """Read a shard and verify its size, hash and count.

    Raises:
        DataError: it is missing or damaged.
    """
    return parse_shard(storage.join(url, entry.name), entry, read_shard_bytes(url, entry))


def read_shard_bytes(url: str, entry: ShardEntry) -> bytes:
    """Read a shard's tar and verify its size and hash; errors as `read_shard`."""
    name = storage.join(url, entry.name)
    try:
        # One byte more than there should be, to notice more.
        data = storage.read_sized(name, entry.bytes + 1)
    except FileNotFoundError as error:
        raise DataError(f"shard {name} is missing; {_FIX}") from error
    if len(data) != entry.bytes or storage.sha256_bytes(data) != entry.sha256:
        raise DataError(f"shard {name} differs from its recorded size or sha256; {_FIX}")
    return data


def parse_shard(name: str, entry: ShardEntry, data: bytes) -> Shard:
    """The images in a shard's tar; errors as `read_shard`."""
    latents, labels = _shard_members(name, data)
    if len(latents) != entry.count or latents.keys() != labels.keys():
        raise DataError(f"shard {name} holds {len(latents)} images, not {entry.count}; {_FIX}")
    keys = np.array([int(key) for key in latents])
    return Shard(keys, np.stack(list(latents.values())), np.array([labels[k] for k in latents]))


def _shard_members(name: str, data: bytes) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Latents and labels by key, in tar order.

    Raises:
        DataError: a member does not belong to the schema.
    """
    latents: dict[str, np.ndarray] = {}
    labels: dict[str, int] = {}
    header, like = b"", np.zeros(0)
    for member, start, size in _members(data):
        key, _, kind = member.partition(".")
        content = data[start : start + size]
        if kind == "cls":
            labels[key] = int(content)
        elif kind != "latent.npy":
            raise DataError(f"shard {name} has an unexpected member {member}; {_FIX}")
        elif header and content.startswith(header) and len(content) - len(header) == like.nbytes:
            # Fast path: parsing .npy headers is slow, and nearly all are identical.
            values = np.frombuffer(content, like.dtype, offset=len(header))
            latents[key] = values.reshape(like.shape)
        else:
            like = latents[key] = np.load(io.BytesIO(content), allow_pickle=False)
            header = content[: len(content) - like.nbytes]
    return latents, labels


def _members(data: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, start and size of each member of a tar as `write_shard` writes it.

    tarfile would take most of the time of reading a shard. The hash of the shard covers headers.
    """
    start = 0
    while (header := data[start : start + BLOCK]) != bytes(BLOCK):
        start += BLOCK
        size = int(header[124:136].rstrip(b" \0"), 8)
        yield header[:100].partition(b"\0")[0].decode(), start, size
        start += -(-size // BLOCK) * BLOCK


class ShardCache:
    """A size-limited cache of remote shards, the most recently used ones, on a node's disk.

    The ranks of a node share the folder. Files are named by the SHA-256 of their contents, appear
    complete, and are verified on every read. Of the ranks that want the same shard at once, one
    downloads it; the lock only saves requests, so a lost or stale one does no harm.

    Args:
        limit_bytes: total size of the copies.
        keep_free: fraction of the disk that copies leave free.
    """

    def __init__(self, folder: Path, limit_bytes: int, keep_free: float = 0.0) -> None:
        self.folder, self.limit_bytes, self.keep_free = folder, limit_bytes, keep_free
        self._storing = threading.Lock()

    def read(self, url: str, entry: ShardEntry) -> Shard:
        """A shard, from the cache if possible, else from `url`; errors as `read_shard`."""
        data = self._copied(entry)
        if data is None and entry.bytes <= self.limit_bytes:
            self.folder.mkdir(parents=True, exist_ok=True)  # the node's cleaner may remove it
            lock = FileLock(self.folder / f"{entry.sha256}.lock", timeout=LOCK_WAIT_S)
            with contextlib.suppress(Timeout):
                lock.acquire()
            try:
                data = self._copied(entry)  # another rank may have stored it meanwhile
                if data is None:
                    data = read_shard_bytes(url, entry)
                    self._store(entry, data)
            finally:
                # Those that wait then find the copy and leave.
                Path(lock.lock_file).unlink(missing_ok=True)
                lock.release()
        elif data is None:
            data = read_shard_bytes(url, entry)
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
        if storage.sha256_bytes(data) == entry.sha256:
            return data
        copy.unlink(missing_ok=True)
        return None

    def _store(self, entry: ShardEntry, data: bytes) -> None:
        """Commit a copy if there is room; a full disk must not end training.

        Evicts the least recently used copies; other ranks may be doing the same.
        """
        with self._storing, contextlib.suppress(storage.DiskFullError):
            copies = []
            for path in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    if path.suffix == ".tar":
                        copies.append((status.st_mtime_ns, status.st_size, path))
                    elif (
                        storage.TEMPORARY_MARK in path.name
                        and time.time() - status.st_mtime > STALE_S
                    ):
                        path.unlink(missing_ok=True)
            disk = shutil.disk_usage(self.folder)
            total = sum(size for _, size, _ in copies)
            room = min(self.limit_bytes - total, disk.free - int(self.keep_free * disk.total))
            for _, size, path in sorted(copies):
                if room >= entry.bytes:
                    break
                path.unlink(missing_ok=True)
                room += size
            if room >= entry.bytes:
                storage.write_bytes(str(self._copy(entry)), data)


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
    default = Path(tempfile.gettempdir()) / f"diffit-shards-{getpass.getuser()}"
    folder = Path(scaling.shard_cache_folder) if scaling.shard_cache_folder else default
    problem = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            problem = "cannot be written"
    except OSError as error:
        problem = f"cannot be created ({error.strerror})"
    if scaling.shard_cache_gib is not None:
        if problem:
            raise UserError(f"scaling.shard_cache_folder {folder} {problem}; choose another")
        return ShardCache(folder, int(scaling.shard_cache_gib * storage.GIB))
    if not problem and _file_system(folder) in _IN_MEMORY:
        problem = "is in memory"
    if problem:
        say(
            f"Shards are not cached: {folder} {problem}; set scaling.shard_cache_folder to a "
            "folder on the node's disk"
        )
        return None
    return ShardCache(folder, sum(shard.bytes for shard in manifest.shards), KEPT_FREE)


def _file_system(folder: Path) -> str:
    """Type of the file system that a folder is on; empty where the system does not tell."""
    here = folder.resolve()
    mounts = [
        (len(mount.mountpoint), mount.fstype)
        for mount in psutil.disk_partitions(all=True)
        if here.is_relative_to(mount.mountpoint)
    ]
    return max(mounts, default=(0, ""))[1]
