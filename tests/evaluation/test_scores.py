"""Sums over chunks that come in any order equal those of one pass."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from diffit_train.config import Recipe, load_recipe
from diffit_train.errors import DiffitError
from diffit_train.evaluation import chunks, scores
from diffit_train.evaluation.chunks import FEATURES, LABELS, LOGITS, SPATIAL, Layout, Range
from diffit_train.evaluation.metrics import FeatureStats, InceptionScore, frechet_distance
from diffit_train.evaluation.scores import Scorer, Sums, grid_images, grid_rows, read_grid

SAMPLES = 1000
DIMS = 24


def _recipe(samples: int = SAMPLES) -> Recipe:
    return load_recipe("imagenet256", [f"evaluate.samples={samples}", "evaluate.reference=dataset"])


def _rows() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    scale = np.geomspace(0.5, 30.0, DIMS)
    return {
        LABELS: np.arange(SAMPLES, dtype=np.int64) % 1000,
        FEATURES: (random.standard_normal((SAMPLES, DIMS)) * scale + 3).astype(np.float32),
        SPATIAL: random.standard_normal((SAMPLES, 7)).astype(np.float32),
        LOGITS: random.standard_normal((SAMPLES, 5)).astype(np.float32),
    }


def _write(folder: Path, parts: list[Range]) -> None:
    rows = _rows()
    for part in parts:
        pixels = np.zeros((part.size, 2, 2, 3), np.uint8)
        mine = {name: values[slice(*part)] for name, values in rows.items()}
        chunks.write_chunk(str(folder), part, "key", pixels, mine, kept=())


def _suite(folder: Path, order: list[list[Range]]) -> Sums:
    with ThreadPoolExecutor(2) as executor:
        scorer = Scorer(_recipe(), str(folder), "key", executor)
        taken = 0
        for parts in order:
            assert not scorer.complete
            scorer.add(parts)
            taken += sum(part.size for part in parts)
            assert scorer.taken == taken
        assert scorer.complete
        return scorer.finish()


def test_merged_sums_equal_those_of_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Groups that neither chunks nor splits of the Inception score are aligned with.
    monkeypatch.setattr(scores, "GROUP", 150)
    found = []
    for number, batches in enumerate((1, 5)):
        folder = tmp_path / str(batches)
        parts = Layout(SAMPLES, 32, batches).missing([])
        _write(folder, parts)
        shuffled = [parts[i] for i in np.random.default_rng(number).permutation(len(parts))]
        found.append(_suite(folder, [shuffled[:3], *[[part] for part in shuffled[3:]]]))
    rows, suite = _rows(), found[0]
    assert suite.moments is not None
    whole = rows[FEATURES].astype(np.float64)
    np.testing.assert_allclose(suite.moments.mean, whole.mean(0), rtol=1e-12)
    exact = np.cov(whole, rowvar=False)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert np.abs((suite.moments.covariance - exact) / scale).max() < 1e-12
    one = FeatureStats.of(rows[FEATURES])
    np.testing.assert_allclose(suite.moments.outer, one.outer, rtol=1e-12)
    real = np.zeros(DIMS), np.eye(DIMS)
    distance = frechet_distance(suite.moments.mean, suite.moments.covariance, *real)
    assert distance == pytest.approx(frechet_distance(one.mean, one.covariance, *real), rel=1e-11)
    score = InceptionScore()
    score.add(rows[LOGITS])
    assert suite.score.value() == pytest.approx(score.value(), rel=1e-12)
    assert np.array_equal(np.concatenate(suite.features), rows[FEATURES])
    # Not the order of the chunks, nor their size, changes a bit.
    assert found[1].moments is not None
    assert np.array_equal(found[1].moments.outer, suite.moments.outer)
    assert found[1].score.value() == suite.score.value()


def test_a_chunk_that_is_not_finite_is_named(tmp_path: Path) -> None:
    rows = _rows()
    rows[FEATURES][700] = np.nan
    pixels = np.zeros((SAMPLES, 2, 2, 3), np.uint8)
    chunks.write_chunk(str(tmp_path), Range(0, SAMPLES), "key", pixels, rows, kept=())
    with pytest.raises(DiffitError, match="the features of images 0 to 999 are not finite"):
        _suite(tmp_path, [[Range(0, SAMPLES)]])


def test_the_grids_images_are_kept_and_found(tmp_path: Path) -> None:
    recipe = _recipe(300)
    wanted = grid_images(recipe)
    assert len(wanted) == 10
    pixels = np.arange(300, dtype=np.uint32).view(np.uint8).reshape(300, 2, 2, 1)
    pixels = np.repeat(pixels, 3, axis=-1)
    parts = [Range(0, 128), Range(128, 256), Range(256, 300)]
    for part in parts:
        mine = {LABELS: np.zeros(part.size, np.int64)}
        # The first chunk is of a run that kept everything.
        kept = grid_rows(recipe, part) if part.first else None
        chunks.write_chunk(str(tmp_path), part, "key", pixels[slice(*part)], mine, kept)
    assert chunks.committed_chunks(str(tmp_path)) == parts
    assert chunks.committed_chunks(str(tmp_path), with_images=True) == parts[:1]
    expected = {label: pixels[row] for label, row in wanted.items()}
    for _ in range(2):
        shown = read_grid(recipe, str(tmp_path))
        assert {label: np.stack(row).tolist() for label, row in shown.items()} == {
            label: images.tolist() for label, images in expected.items()
        }
        chunks.keep_only(str(tmp_path), parts[0], grid_rows(recipe, parts[0]))
    assert not list(tmp_path.glob("images-*"))
