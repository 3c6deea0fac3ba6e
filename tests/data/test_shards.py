"""Shards: a standard format, identical bytes for identical content, damage detected."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffit_train.data.manifest import load_manifest
from diffit_train.data.shards import read_shard, write_shard
from diffit_train.errors import DiffitError, UserError


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 7),
    frames=st.integers(1, 2),
    side=st.integers(1, 3),
    first=st.integers(0, 10**8),
    seed=st.integers(0, 100),
)
def test_shards_round_trip(count: int, frames: int, side: int, first: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    keys = sorted(random.choice(1000, size=count, replace=False).tolist())
    keys = [first + key for key in keys]
    moments = random.normal(size=(count, frames, 4, side, side)).astype(np.float16)
    labels = random.integers(0, 1000, count).tolist()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        entry = write_shard(one, 3, keys, moments, labels)
        assert write_shard(two, 3, keys, moments, labels) == entry
        a, b = (Path(folder) / entry.name for folder in (one, two))
        assert a.read_bytes() == b.read_bytes()
        shard = read_shard(one, entry)
    assert shard.keys.tolist() == keys
    assert shard.labels.tolist() == labels
    np.testing.assert_array_equal(shard.moments, moments)
    assert shard.moments.dtype == np.float16


def test_any_tar_reader_reads_a_shard(tmp_path: Path) -> None:
    moments = np.arange(16, dtype=np.float16).reshape(2, 1, 8, 1, 1)
    entry = write_shard(str(tmp_path), 12, [5, 7], moments, [3, 9])
    assert (entry.name, entry.count, entry.first_index) == ("shard-000012.tar", 2, 5)
    with tarfile.open(tmp_path / entry.name) as tar:
        members = tar.getmembers()
        assert sorted(m.name for m in members) == [
            "000000005.cls",
            "000000005.latent.npy",
            "000000007.cls",
            "000000007.latent.npy",
        ]
        assert {(m.mtime, m.uname, m.gname, m.mode) for m in members} == {
            (0, "diffit", "diffit", 0o644)
        }
        assert tar.extractfile("000000007.cls").read() == b"9"
        latent = np.load(io.BytesIO(tar.extractfile("000000007.latent.npy").read()))
    np.testing.assert_array_equal(latent, moments[1])


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_reported(tmp_path: Path, damage: str) -> None:
    entry = write_shard(str(tmp_path), 0, [0], np.zeros((1, 1, 8, 2, 2), np.float16), [1])
    path = tmp_path / entry.name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[:-512])
    else:
        data[600] ^= 1
        path.write_bytes(data)
    with pytest.raises(DiffitError, match=r"shard-000000\.tar .*diffit verify"):
        read_shard(str(tmp_path), entry)


def test_unfinished_and_damaged_manifests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diffit encode"):
        load_manifest(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"schema_version": 1')
    with pytest.raises(DiffitError, match=r"manifest\.json"):
        load_manifest(str(tmp_path))
