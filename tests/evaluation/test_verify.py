"""Damaged evaluations and references are named, removed, and computed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffit_train.cli.integrity import remove_damaged, verify
from diffit_train.evaluation.chunks import LABELS, Range, committed_chunks, write_chunk
from diffit_train.evaluation.references import Reference, Statistics, StoredReference
from diffit_train.evaluation.result import GRID, Result, write_result
from diffit_train.storage import sha256_bytes


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """An evaluation of two chunks, with a grid."""
    for part in (Range(0, 4), Range(4, 8)):
        pixels = np.full((4, 2, 2, 3), part.first, np.uint8)
        write_chunk(str(tmp_path), part, "key", pixels, {LABELS: np.arange(4)})
    (tmp_path / GRID).write_bytes(b"a grid")
    result = Result(
        run="one",
        step=4,
        key="key",
        samples=8,
        metrics={"fd_digits": 1.5},
        grid=GRID,
        seconds=1.0,
        keep_images="all",
        nfe=3.0,
        evaluate={},
        reference_digest="r",
        features_digest="f",
        recipe_hash="h",
        mlflow_run_id="m",
        files={GRID: sha256_bytes(b"a grid")},
    )
    write_result(str(tmp_path), result)
    return tmp_path


def _half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("name", "part", "removed", "damage"),
    [
        ("chunk-0000004-0000008.safetensors", "chunk-0000004-0000008.json", 1, _half),
        ("images-0000004-0000008.npy", "chunk-0000004-0000008.json", 1, Path.unlink),
        ("chunk-0000004-0000008.json", "chunk-0000004-0000008.json", 1, _half),
        ("grid.png", "grid.png", 0, _half),
        ("result.json", "result.json", 0, _half),
    ],
)
def test_what_is_damaged_goes_with_the_result(
    evaluation: Path, name: str, part: str, removed: int, damage: Callable[[Path], None]
) -> None:
    url = str(evaluation)
    assert verify(url) == []
    damage(evaluation / name)
    found = verify(url)
    assert [one.check.name for one in found] == [part]
    assert "diffit evaluate" in found[0].check.rebuild
    assert remove_damaged(found) == []
    assert committed_chunks(url) == [Range(0, 4), Range(4, 8)][: 2 - removed]
    assert not (evaluation / "result.json").exists()
    assert len(list(evaluation.glob("*0000004-0000008*"))) == 3 * (1 - removed)
    assert verify(url) == []


def test_damaged_references_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "references"
    pool = Statistics(np.zeros(3), np.eye(3))
    stored = [StoredReference(f"{folder}/{name}.safetensors", "i", "d") for name in ("one", "two")]
    for reference in stored:
        reference.write(Reference(pool, None, None, 8))
    assert verify(str(folder)) == verify(str(tmp_path)) == []
    _half(folder / "two.safetensors")
    (found,) = verify(str(tmp_path))
    assert found.check.name == "references/two.safetensors.json"
    assert found.reason == "two.safetensors differs from its recorded sha256"
    remove_damaged([found])
    assert [reference.exists for reference in stored] == [True, False]
    assert not (folder / "two.safetensors").exists()
