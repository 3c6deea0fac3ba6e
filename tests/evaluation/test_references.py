"""ADM's and EDM's reference files, and a small version of the published self-check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffit_train.config import load_recipe
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.references import (
    Reference,
    ReferenceSource,
    Statistics,
    StoredReference,
)

SIDE = 32


def _source(root: Path, *changes: str) -> ReferenceSource:
    small = [f"data.resolution={SIDE}", "evaluate.reference_images=6", *changes]
    return ReferenceSource.of(load_recipe("imagenet256", small, root=str(root)))


def _statistics(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    found = {}
    for mean, covariance, dims in (("mu", "sigma", 2048), ("mu_s", "sigma_s", 2023)):
        found[mean] = random.normal(size=dims)
        found[covariance] = np.diag(random.uniform(0.1, 1.0, dims))
    return found


def _pixels(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def test_adms_and_edms_files_are_read(tmp_path: Path) -> None:
    found, pixels = _statistics(), _pixels(9)
    adm, edm = tmp_path / "adm.npz", tmp_path / "edm.npz"
    np.savez(adm, arr_0=pixels, **found)
    np.savez(edm, mu=found["mu"], sigma=found["sigma"])
    source = _source(tmp_path, f"evaluate.reference={adm}")
    source.check()
    with source.open() as opened:
        read = opened.read(lambda batch: batch.reshape(len(batch), -1)[:, :5])
    assert np.array_equal(read.pool.mean, found["mu"])
    assert read.spatial is not None
    assert np.array_equal(read.spatial.covariance, found["sigma_s"])
    # The first six images, as set in the recipe.
    assert np.array_equal(read.features, pixels[:6].reshape(6, -1)[:, :5])
    with _source(tmp_path, f"evaluate.reference={edm}").open() as opened:
        bare = opened.read(lambda batch: batch)
    assert (bare.spatial, bare.features, bare.count) == (None, None, None)
    assert np.array_equal(bare.pool.covariance, found["sigma"])


def test_unusable_reference_files_are_reported(tmp_path: Path) -> None:
    found = _statistics()
    file = tmp_path / "reference.npz"
    source = _source(tmp_path, f"evaluate.reference={file}")
    with pytest.raises(UserError, match="does not exist"):
        source.check()
    file.write_bytes(b"PK no archive")
    with pytest.raises(UserError, match=r"is not an \.npz file"):
        source.check()
    for content, words in (
        ({"arr_0": _pixels(6)}, r"holds arr_0, but must hold mu and sigma"),
        (
            {**found, "mu": np.zeros(64)},
            r"mu of .* has shape \(64,\), but must have shape \(2048,\)",
        ),
        ({k: v for k, v in found.items() if k != "sigma_s"}, "sigma_s of .* is missing"),
        ({**found, "mu": np.full(2048, np.nan)}, "mu of .* is not finite"),
        ({**found, "arr_0": _pixels(5)}, r"holds 5 images, but .*reference_images is 6"),
        ({**found, "arr_0": _pixels(6)[:, :16, :16]}, r"must be uint8 images .* 32"),
        ({**found, "arr_0": _pixels(6) / 2.0}, "is float64 of shape"),
        ({**found, "mu": np.array([None])}, "cannot read mu of"),
        ({**found, "arr_0": np.asfortranarray(_pixels(6))}, "is in Fortran order"),
    ):
        np.savez(file, **content)
        with pytest.raises(UserError, match=words):
            source.check()
    own = ("evaluate.features.kind=classifier", "evaluate.features.source=root:x")
    other = _source(tmp_path, f"evaluate.reference={file}", "evaluate.features.name=own", *own)
    with pytest.raises(UserError, match=r"published Inception's features, but .* is 'own'"):
        other.check()


def test_a_stored_reference_round_trips(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pool = Statistics(random.normal(size=4), random.normal(size=(4, 4)))
    whole = Reference(pool, pool, random.normal(size=(3, 4)).astype(np.float32), 7)
    for number, reference in enumerate((whole, Reference(pool, None, None, None))):
        url = str(tmp_path / f"{number}.safetensors")
        stored = StoredReference(url, "identity", "digest")
        stored.write(reference)
        again = stored.read()
        assert again.count == reference.count
        assert np.array_equal(again.pool.covariance, pool.covariance)
        assert (again.spatial is None, again.features is None) == (bool(number), bool(number))
        with pytest.raises(DiffitError, match="is for other images"):
            stored._replace(identity="other").read()
    file = tmp_path / "0.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DiffitError, match="is damaged"):
        stored._replace(url=str(file)).read()
