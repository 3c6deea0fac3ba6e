"""Conformance: ADM's rounding against its algorithm in numpy, and a small self-check."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.inception import Inception
from diffit_train.evaluation.metrics import precision_recall
from tests import conformance, half_precision
from tests.half_precision import precision_recall_half

Array = np.ndarray


def _adm_distances(u: Array, v: Array) -> Array:
    """One block, value by value in the dtypes of ADM's graph."""

    def in_type(u: Array, v: Array) -> Array:
        zero, two = u.dtype.type(0), u.dtype.type(2)
        out = np.empty((len(u), len(v)), u.dtype)
        for i, x in enumerate(u):
            for j, y in enumerate(v):
                # Sums are rounded once, at the end.
                lengths = [u.dtype.type((z * z).astype(np.float64).sum()) for z in (x, y)]
                product = u.dtype.type(x.astype(np.float64) @ y.astype(np.float64))
                out[i, j] = max(lengths[0] - two * product + lengths[1], zero)
        return out

    with np.errstate(all="ignore"):
        half = in_type(u.astype(np.float16), v.astype(np.float16))
        if np.isfinite(half).all():
            return half.astype(np.float32)
        return in_type(u.astype(np.float32), v.astype(np.float32))


def _adm(real: Array, fake: Array, k: int, block: int) -> tuple[float, float]:
    """ADM's manifold_radii and evaluate_pr."""

    def blocks(u: Array, v: Array) -> Array:
        return np.vstack(
            [
                np.hstack(
                    [
                        _adm_distances(u[i : i + block], v[j : j + block])
                        for j in range(0, len(v), block)
                    ]
                )
                for i in range(0, len(u), block)
            ]
        )

    radii = [np.sort(blocks(rows, rows), axis=1)[:, k] for rows in (real, fake)]
    between = blocks(real, fake)
    precision = (between <= radii[0][:, None]).any(0).mean()
    return float(precision), float((between <= radii[1]).any(1).mean())


def _features(seed: int, count: int, scale: float) -> Array:
    """Features like Inception's: not negative, many near 0."""
    random = np.random.default_rng(seed)
    return (scale * random.exponential(0.4, (count, 24))).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("scale", "block"),
    # Blocks of several rows; at 120 some squared norms exceed float16's 65,504, so that some
    # blocks are computed in float32 and others are not.
    [(1.0, 100), (1.0, 16), (120.0, 100), (120.0, 9)],
)
def test_it_matches_adms_algorithm(
    seed: int, scale: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_precision, "BLOCK_ROWS", block)
    monkeypatch.setattr(half_precision, "_ROWS", 7)
    real, fake = _features(seed, 45, scale), 1.1 * _features(seed + 100, 60, scale)
    fake = fake.astype(np.float32)
    if scale > 1:
        half = real.astype(np.float16)
        lengths = (half.astype(np.float32) ** 2).sum(1)
        assert (lengths > 65_504).any()
        assert (lengths < 60_000).any()
    expected = _adm(real, fake, 3, block)
    assert 0 < expected[0] < 1
    assert precision_recall_half(real, fake, 3) == expected


def test_its_rounding_is_visible() -> None:
    """Points close together but far from 0 are indistinguishable in float16."""
    real, fake = (1.5 + 0.02 * _features(seed, 200, 1.0) for seed in (0, 1))
    exact, rounded = precision_recall(real, fake, 3), precision_recall_half(real, fake, 3)
    assert rounded == _adm(real, fake, 3, 10_000)
    assert max(abs(a - b) for a, b in zip(exact, rounded, strict=True)) > 0.01


# ---- The self-check ----


def _pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def test_the_self_check_measures_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = Inception().eval()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    real, fake = _pixels(5, 2), _pixels(7, 3)
    mean = np.random.default_rng(0).normal(size=2048)
    alike = 0.25 * np.eye(2048)
    np.savez(tmp_path / "reference.npz", arr_0=real, mu=mean, sigma=alike)
    with pytest.raises(UserError, match=r"sample batch.*found: nothing"):
        conformance.conform(str(tmp_path))
    np.savez(tmp_path / "samples.npz", images=fake)
    with pytest.raises(UserError, match=r"cannot read arr_0 of \S*samples\.npz"):
        conformance.conform(str(tmp_path))
    np.savez(tmp_path / "samples.npz", arr_0=fake)
    with torch.no_grad():
        rows = network(torch.from_numpy(fake)).pool.double().numpy()
    # All eigenvalues of the real covariance are equal; only six of the other are not 0.
    spread = np.linalg.svd(rows - rows.mean(0), compute_uv=False) / np.sqrt(len(rows) - 1)
    distance = ((rows.mean(0) - mean) ** 2).sum() + (spread**2).sum()
    distance += 0.25 * 2048 - 2 * 0.5 * spread.sum()
    # Precision and recall are rounded like ADM's evaluator, and the table says so.
    with torch.no_grad():
        known = network(torch.from_numpy(real)).pool.numpy()
    precision, recall = precision_recall_half(known, rows.astype(np.float32), 3)
    rounded = {"precision": precision, "recall": recall}
    expected = {"metrics": {"fd_own": float(distance), **rounded}, "relative": 1e-6}
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    answer = conformance.conform(str(tmp_path))
    assert {row["metric"]: (row["arithmetic"], row["verdict"]) for row in answer["metrics"]} == {
        "fd_own": ("float64", "pass"),
        "precision": ("float16 distances, as ADM", "pass"),
        "recall": ("float16 distances, as ADM", "pass"),
    }
    assert answer["all"].keys() == {"fd_own", "precision", "recall", "kd_own"}

    expected = {"metrics": {"fd_own": float(distance)}, "relative": 1e-6}
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    monkeypatch.setattr(conformance, "_metrics", lambda *_: {"fd_own": float(distance) * 1.001})
    with pytest.raises(DiffitError, match="fd_own differ from the expected"):
        conformance.conform(str(tmp_path))
    (tmp_path / "expected.json").write_text('{"metrics": {"fid": 3.0}}')
    with pytest.raises(UserError, match="expects fid, but the metrics are fd_own"):
        conformance.conform(str(tmp_path))
    (tmp_path / "expected.json").write_text('{"metric": {}}')
    with pytest.raises(UserError, match=r"expected\.json: metrics: Field required"):
        conformance.conform(str(tmp_path))
    (tmp_path / "more.npz").write_bytes(b"no")
    with pytest.raises(UserError, match=r"more\.npz is not an \.npz file"):
        conformance.conform(str(tmp_path))


def test_published_metrics_pass_within_tolerance() -> None:
    published = conformance.PUBLISHED_METRICS
    assert published.passes("fid", 3.95)
    assert not published.passes("fid", 3.97)
    assert published.passes("recall", 0.5350)
    assert not published.passes("recall", 0.5370)
