"""Chunks: existing ranges are kept, the rest is generated once; and samples.npz from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffit_train.errors import DiffitError
from diffit_train.evaluation.chunks import (
    FEATURES,
    LABELS,
    Layout,
    Range,
    chunk_name,
    committed_chunks,
    images_name,
    read_chunk,
    read_chunk_images,
    write_chunk,
    write_samples,
)


@given(
    samples=st.integers(1, 300),
    batch=st.integers(1, 40),
    batches=st.integers(1, 5),
    earlier=st.integers(1, 5),
    lost=st.sets(st.integers(0, 60)),
)
def test_missing_ranges_complete_the_existing_ones(
    samples: int, batch: int, batches: int, earlier: int, lost: set[int]
) -> None:
    whole = Layout(samples, batch, earlier).missing([])
    assert [i for part in whole for i in range(*part)] == list(range(samples))
    there = [part for number, part in enumerate(whole) if number not in lost]
    missing = Layout(samples, batch, batches).missing(there)
    made = sorted([*there, *missing])
    assert [i for part in made for i in range(*part)] == list(range(samples))
    # Every batch starts at the same image as in an uninterrupted evaluation.
    assert all(part.first % batch == 0 for part in missing)
    assert all(part.size <= batch * batches for part in missing)


def test_overlapping_chunks_are_named() -> None:
    with pytest.raises(DiffitError, match=r"images 4 to 7 .* chunk-0000004-0000012"):
        Layout(12, 4, 1).missing([Range(0, 8), Range(4, 12)])


def _write(folder: Path, part: Range, key: str = "key") -> np.ndarray:
    pixels = np.random.default_rng(part.first).integers(0, 256, (part.size, 4, 4, 3), np.uint8)
    labels = np.arange(*part, dtype=np.int64) % 3
    features = pixels[:, 0, 0].astype(np.float32)
    write_chunk(str(folder), part, key, pixels, {LABELS: labels, FEATURES: features})
    return pixels


def test_chunks_round_trip(tmp_path: Path) -> None:
    parts = [Range(0, 8), Range(8, 12)]
    pixels = np.concatenate([_write(tmp_path, part) for part in parts])
    (tmp_path / "chunk-0000012-0000016.safetensors.tmp-dead").write_bytes(b"half")
    # Images without committed measurements are not a chunk.
    np.save(tmp_path / images_name(Range(12, 16)), pixels[:4])
    assert committed_chunks(str(tmp_path)) == parts
    rows = read_chunk(str(tmp_path), parts[1], "key")
    assert rows[LABELS].tolist() == [2, 0, 1, 2]
    assert rows[FEATURES].dtype == np.float32
    assert np.array_equal(read_chunk_images(str(tmp_path), parts[0]), pixels[:8])
    target = tmp_path / "samples.npz"
    labels = [read_chunk(str(tmp_path), part, "key")[LABELS] for part in parts]
    write_samples(str(tmp_path), str(target), 12, labels)
    with np.load(target) as file:
        assert sorted(file) == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], pixels)
        assert file["arr_1"].tolist() == [i % 3 for i in range(12)]


def test_broken_chunks_are_named(tmp_path: Path) -> None:
    part = Range(0, 4)
    _write(tmp_path, part)
    with pytest.raises(DiffitError, match=r"chunk-0000000-0000004\S*json"):
        read_chunk(str(tmp_path), part, "other")
    with pytest.raises(DiffitError, match=r"chunk-0000000-0000009"):
        read_chunk(str(tmp_path), Range(0, 9), "key")
    images = tmp_path / images_name(part)
    images.write_bytes(images.read_bytes()[:-5])
    with pytest.raises(DiffitError, match=r"images-0000000-0000004.npy"):
        read_chunk_images(str(tmp_path), part)
    file = tmp_path / chunk_name(part)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DiffitError, match=r"chunk-0000000-0000004"):
        read_chunk(str(tmp_path), part, "key")
