"""The bounded cache of remote shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffit_train import storage
from diffit_train.data.cache import ShardCache
from diffit_train.data.shards import ShardEntry, write_shard
from diffit_train.errors import DiffitError

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
    cache = ShardCache(str(tmp_path), SHARDS * entries[0].bytes)
    first = [cache.read(url, entry) for entry in entries]
    assert (cache.hits, cache.misses) == (0, SHARDS)
    for entry in entries:
        storage.remove(storage.join(url, entry.name))
    for entry, before in zip(entries, first, strict=True):
        again = cache.read(url, entry)
        assert np.array_equal(again.moments, before.moments)
        assert np.array_equal(again.keys, before.keys)
    assert (cache.hits, cache.misses) == (SHARDS, SHARDS)


def test_the_cache_respects_its_size_limit(
    remote: tuple[str, list[ShardEntry]], tmp_path: Path
) -> None:
    url, entries = remote
    limit = 3 * entries[0].bytes
    cache = ShardCache(str(tmp_path), limit)
    for entry in entries:
        cache.read(url, entry)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    kept = {path.stem for path in tmp_path.iterdir()}
    assert kept == {entry.sha256 for entry in entries[-3:]}
    ShardCache(str(tmp_path / "small"), 10).read(url, entries[0])
    assert not (tmp_path / "small").exists()


def test_a_damaged_copy_is_downloaded_again(
    remote: tuple[str, list[ShardEntry]], tmp_path: Path
) -> None:
    url, entries = remote
    cache = ShardCache(str(tmp_path), 10**9)
    whole = cache.read(url, entries[0])
    copy = tmp_path / f"{entries[0].sha256}.tar"
    copy.write_bytes(copy.read_bytes()[:-100])
    assert np.array_equal(cache.read(url, entries[0]).moments, whole.moments)
    assert storage.sha256_file(copy) == entries[0].sha256
    copy.write_bytes(b"x")
    storage.remove(storage.join(url, entries[0].name))
    with pytest.raises(DiffitError, match=r"shard-000000\.tar is missing"):
        cache.read(url, entries[0])
