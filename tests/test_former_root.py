"""A root that the version before 0.1.0 wrote keeps working under today's names.

roots/before-0.1.0.tar.xz is a tiny project of that version: images in `pictures/`, latents, a run
of 12 steps, an export and three evaluations, tracked in MLflow by the names of that version.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch

from diffit_train.commands.data import fit_features
from diffit_train.commands.encode import encode_latents
from diffit_train.commands.train import train_run
from diffit_train.commands.verify import check_latents
from diffit_train.commands.weights import recipe_of_weights
from diffit_train.compare.comparison import compare_store
from diffit_train.config import Recipe
from diffit_train.data.autoencoder_fit import fit_autoencoder
from diffit_train.data.shards import finished_manifest
from diffit_train.data.sources import list_images
from diffit_train.errors import UserError
from diffit_train.runs.checkpoints import checkpoint_url, read_weights
from diffit_train.runs.identity import check_recipe, run_url, stored_recipe
from diffit_train.storage import remove
from tests.conftest import tiny_recipe

ARCHIVE = Path(__file__).parent / "roots" / "before-0.1.0.tar.xz"
# As the run was trained, by today's names.
CHANGES = ("train.checkpoint_every=6", "train.max_consecutive_bad_steps=4")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "project"


def _recipe(root: Path) -> Recipe:
    return tiny_recipe(root, *CHANGES)


def test_what_is_there_is_recognized(root: Path) -> None:
    recipe = _recipe(root)
    identity = check_recipe(recipe, "tiny")
    assert identity is not None
    assert identity.recipe_hash == recipe.train_hash()
    manifest = finished_manifest(recipe)
    assert manifest is not None
    assert manifest.images_per_shard == 5
    stored = stored_recipe(run_url(recipe, "tiny"))
    assert stored.train.max_consecutive_bad_steps == 4
    assert stored.evaluate.num_neighbors == 3
    # Neither is fitted again.
    assert "reconstruction_mse" in fit_autoencoder(recipe)
    assert fit_features(recipe).resolution == 16


def test_images_are_found_once_their_folder_is_renamed(root: Path) -> None:
    recipe = _recipe(root)
    with pytest.raises(UserError, match=r"images/digits does not exist.*/pictures/digits"):
        list_images(recipe)
    (root / "pictures").rename(root / "images")
    assert len(list_images(recipe).items) == 24
    assert check_latents(str(root / "latents" / "digits"), None, False)["images"] == 24


def test_an_export_says_what_it_holds(root: Path) -> None:
    (file,) = (root / "runs" / "tiny" / "export").glob("*.safetensors")
    recipe = recipe_of_weights(str(file), None, (), str(root))
    assert recipe.train_hash() == _recipe(root).train_hash()


def test_evaluations_are_compared_by_todays_names(root: Path) -> None:
    plot = root / "compare.png"
    comparison = compare_store(str(root), None, None, str(plot), selection=["tiny"])
    (run,) = comparison.as_json()["runs"]
    assert len(run["evaluations"]) == 3
    for evaluation in run["evaluations"]:
        assert 0 <= evaluation["classifier_accuracy"] <= 1
        assert evaluation["nfe"] in (3, 6)
    settings = [e.settings for e in comparison.evaluations]
    assert all("num_neighbors" in s and "neighbours" not in s for s in settings)
    assert plot.stat().st_size > 0


def test_training_resumes_to_the_same_weights(root: Path, ray_session: None) -> None:
    recipe = _recipe(root)
    url = run_url(recipe, "tiny")
    before = read_weights(url, 12, "raw")
    log = Path(url, "log.jsonl")
    curve = [json.loads(line)["loss"] for line in log.open()]
    remove(checkpoint_url(url, 12))
    assert encode_latents(recipe)["written"] == 24
    assert train_run(recipe, "tiny")["step"] == 12
    after = read_weights(url, 12, "raw")
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-6)
    assert [json.loads(line)["loss"] for line in log.open()] == pytest.approx(curve, rel=1e-4)
