"""The bounded cache of remote shards."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from diffit_train import storage
from diffit_train.config.scaling import Scaling
from diffit_train.data import shards as shards_module
from diffit_train.data.manifest import Manifest, ShardEntry
from diffit_train.data.shards import ShardCache, read_shard_bytes, shard_cache, write_shard
from diffit_train.errors import DiffitError, UserError

SHARDS = 6


@pytest.fixture
def remote() -> tuple[str, list[ShardEntry]]:
    """Shards of equal size in fsspec's memory."""
    url, entries = "memory://cache-test", []
    random = np.random.default_rng(0)
    for number in range(SHARDS):
        keys = range(number * 4, number * 4 + 4)
        moments = random.normal(size=(4, 1, 4, 2, 2))
        entries.append(write_shard(url, number, keys, moments, [key % 3 for key in keys]))
    return url, entries


def test_cached_shards_are_read_from_disk(
    remote: tuple[str, list[ShardEntry]], tmp_path: Path
) -> None:
    url, entries = remote
    cache = ShardCache(tmp_path, SHARDS * entries[0].bytes)
    first = [cache.read(url, entry) for entry in entries]
    for entry in entries:
        storage.remove(storage.join(url, entry.name))
    for entry, before in zip(entries, first, strict=True):
        again = cache.read(url, entry)
        assert np.array_equal(again.moments, before.moments)
        assert np.array_equal(again.keys, before.keys)


def test_the_cache_respects_its_size_limit(
    remote: tuple[str, list[ShardEntry]], tmp_path: Path
) -> None:
    url, entries = remote
    limit = 3 * entries[0].bytes
    cache = ShardCache(tmp_path, limit)
    for entry in entries:
        cache.read(url, entry)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    kept = {path.stem for path in tmp_path.iterdir()}
    assert kept == {entry.sha256 for entry in entries[-3:]}
    ShardCache(tmp_path / "small", 10).read(url, entries[0])
    assert not (tmp_path / "small").exists()


def test_a_damaged_copy_is_downloaded_again(
    remote: tuple[str, list[ShardEntry]], tmp_path: Path
) -> None:
    url, entries = remote
    cache = ShardCache(tmp_path, 10**9)
    whole = cache.read(url, entries[0])
    copy = tmp_path / f"{entries[0].sha256}.tar"
    copy.write_bytes(copy.read_bytes()[:-100])
    assert np.array_equal(cache.read(url, entries[0]).moments, whole.moments)
    assert storage.sha256_file(copy) == entries[0].sha256
    copy.write_bytes(b"x")
    storage.remove(storage.join(url, entries[0].name))
    with pytest.raises(DiffitError, match=r"shard-000000\.tar"):
        cache.read(url, entries[0])


def _read_in_turn(folder: str, url: str, entries: list[ShardEntry], reads: str) -> None:
    """A rank whose downloads take a while; it appends a line for each to the file `reads`."""

    def slow(url: str, entry: ShardEntry) -> bytes:
        with Path(reads).open("a") as file:
            file.write(f"{entry.name}\n")
        time.sleep(0.2)
        return read_shard_bytes(url, entry)

    shards_module.read_shard_bytes = slow  # type: ignore[assignment]
    cache = ShardCache(Path(folder), 10**9)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda entry: cache.read(url, entry), entries))


def test_ranks_of_a_node_download_each_shard_once(tmp_path: Path) -> None:
    url, reads = str(tmp_path / "latents"), tmp_path / "reads"
    moments = np.random.default_rng(0).normal(size=(4, 1, 4, 2, 2))
    entries = [write_shard(url, number, range(4), moments + number, [0] * 4) for number in range(4)]
    arguments = (str(tmp_path / "copies"), url, entries, str(reads))
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=_read_in_turn, args=arguments) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert sorted(reads.read_text().split()) == [entry.name for entry in entries]
    copies = sorted(path.name for path in (tmp_path / "copies").iterdir())
    assert copies == sorted(f"{entry.sha256}.tar" for entry in entries)


def test_a_stopped_rank_does_not_hold_up_the_others(
    remote: tuple[str, list[ShardEntry]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, entries = remote
    handle = os.open(tmp_path / f"{entries[0].sha256}.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    monkeypatch.setattr(shards_module, "LOCK_WAIT_S", 0.1)
    cache = ShardCache(tmp_path, 10**9)
    try:
        assert len(cache.read(url, entries[0]).keys) == entries[0].count
    finally:
        os.close(handle)


def test_copies_leave_room_on_the_disk(
    remote: tuple[str, list[ShardEntry]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, entries = remote
    size = entries[0].bytes

    def usage(folder: Path) -> shutil._ntuple_diskusage:
        used = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
        return shutil._ntuple_diskusage(10 * size, used, 10 * size - used)

    monkeypatch.setattr(shards_module.shutil, "disk_usage", usage)
    cache = ShardCache(tmp_path, 10**9, keep_free=0.75)
    for entry in entries:
        cache.read(url, entry)
    kept = {path.stem for path in tmp_path.iterdir()}
    assert kept == {entry.sha256 for entry in entries[-2:]}


def test_a_full_disk_does_not_end_training(
    remote: tuple[str, list[ShardEntry]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(url: str, data: bytes) -> None:
        raise storage.DiskFullError("the disk is full")

    url, entries = remote
    monkeypatch.setattr(storage, "write_bytes", full)
    assert len(ShardCache(tmp_path, 10**9).read(url, entries[0]).keys) == entries[0].count
    assert not list(tmp_path.iterdir())


def test_temporary_files_of_killed_ranks_are_removed(
    remote: tuple[str, list[ShardEntry]], tmp_path: Path
) -> None:
    url, entries = remote
    old, new = tmp_path / f"a.tar{storage.TEMPORARY_MARK}1", tmp_path / "b.tar.tmp-2"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    ShardCache(tmp_path, 10**9).read(url, entries[0])
    assert not old.exists()
    assert new.exists()


def _manifest(entries: list[ShardEntry]) -> Manifest:
    return Manifest.model_construct(shards=entries)


def test_remote_latents_are_cached_by_default(
    remote: tuple[str, list[ShardEntry]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, entries = remote
    messages: list[str] = []

    def made(url: str, **keys: object) -> ShardCache | None:
        scaling = Scaling(shard_cache_folder=str(tmp_path / "c"), **keys)  # type: ignore[arg-type]
        return shard_cache(scaling, url, _manifest(entries), messages.append)

    automatic = made(url)
    assert automatic is not None
    assert automatic.limit_bytes == sum(entry.bytes for entry in entries)
    assert automatic.keep_free == 0.2
    assert made(str(tmp_path)) is None
    assert made(url, shard_cache_gib=0) is None
    chosen = made(url, shard_cache_gib=2)
    assert chosen is not None
    assert (chosen.limit_bytes, chosen.keep_free) == (2 * storage.GIB, 0.0)
    assert not messages
    monkeypatch.setattr(shards_module, "_file_system", lambda folder: "tmpfs")
    assert made(url) is None
    assert "is in memory; set scaling.shard_cache_folder" in messages[0]
    (tmp_path / "c").rmdir()
    (tmp_path / "c").write_text("a file")
    assert made(url) is None
    with pytest.raises(UserError, match="cannot be created"):
        made(url, shard_cache_gib=2)


def test_the_file_system_of_a_folder_is_found() -> None:
    if not Path("/proc/self/mounts").exists():
        pytest.skip("no /proc on this system")
    assert shards_module._file_system(Path("/proc/self")) == "proc"
    assert shards_module._file_system(Path("/")) not in ("", "proc")
