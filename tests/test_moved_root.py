"""A copied, moved or renamed project is read and written where it is, never where it was."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from diffit_train.api import encode as encode_latents
from diffit_train.cli.main import app, exit_status
from diffit_train.cli.verify import check
from diffit_train.config import load_recipe
from diffit_train.data.reconstructions import draw_reconstructions
from diffit_train.evaluation.evaluate import evaluate_run
from diffit_train.evaluation.result import Evaluation
from diffit_train.reports.compare import compare_store
from diffit_train.runs.import_export import export_weights
from diffit_train.runs.run import Run, open_run
from diffit_train.tracking import Tracker
from tests.conftest import tiny_recipe
from tests.in_process import in_process

FEW = ("evaluate.samples=4",)


def _hashes(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def _recorded(root: Path) -> set[Path]:
    """The folders that MLflow's database names."""
    with sqlite3.connect(root / "mlflow.db") as database:
        urls = [
            *database.execute("SELECT artifact_location FROM experiments WHERE name = 'demo'"),
            *database.execute("SELECT artifact_uri FROM runs"),
            *database.execute("SELECT source FROM model_versions"),
        ]
    database.close()
    return {Path(unquote(urlsplit(url).path)) for (url,) in urls}


@pytest.fixture(scope="module")
def original(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an evaluation and a registered model."""
    root = tmp_path_factory.mktemp("of users") / "original"
    shutil.copytree(trained, root)
    with in_process():
        evaluate_run(open_run(tiny_recipe(root, *FEW), "tiny"), ["0"])
        evaluate_run(open_run(tiny_recipe(root), "tiny"), ["12"])
    return root


@pytest.mark.usefixtures("here")
def test_every_command_keeps_to_a_copy(original: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a copy"
    shutil.copytree(original, copy)
    before = _hashes(original)
    shard = copy / "latents" / "digits" / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    url = str(copy / "latents" / "digits")
    assert list(check(url, remove=True)["removed"]) == [shard.name]
    encode_latents(tiny_recipe(copy))
    draw_reconstructions(url, str(copy / "verify.png"))
    assert shard.read_bytes() == whole
    recipe = tiny_recipe(copy, *FEW)
    assert Run(recipe.storage.root, "tiny").recipe.storage.root == str(copy)
    assert load_recipe(str(copy / "runs" / "tiny" / "recipe.yaml")).storage.root == str(copy)
    (made,) = evaluate_run(open_run(recipe, "tiny"), ["12"])
    assert made.grid.startswith(str(copy))
    kept = Evaluation(open_run(recipe, "tiny"), 0).read()
    assert kept is not None
    assert Path(kept.grid).is_relative_to(copy)
    assert Path(kept.grid).exists()
    grid = copy / "mlflow-artifacts" / made.mlflow_run_id / "artifacts" / "grid.png"
    assert grid.exists()
    exported = export_weights(open_run(recipe, "tiny"), 8, "ema", None)
    assert exported.startswith(str(copy))
    assert str(original).encode() not in Path(exported).read_bytes()
    words = ["sample", "evaluate.sampler.steps=2", "--run", "tiny", "--root", str(copy)]
    words += ["--class", "a", "--seeds", "0", "--out", str(copy / "samples")]
    assert exit_status(lambda: app(words)) == 0
    assert (copy / "samples" / "class0000-seed000000.png").exists()
    page = str(tmp_path / "page.html")
    compare_store(str(copy), None, None, None, html=page)
    assert Path(page).read_text().count("data:image/png") >= 2
    assert all(path.is_relative_to(copy) for path in _recorded(copy))
    assert _hashes(original) == before


def test_a_renamed_project_finds_its_artifacts_and_models(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    moved = tmp_path / "second"
    tracker = Tracker.of(tiny_recipe(moved))
    assert all(path.is_relative_to(moved) for path in _recorded(moved))
    version = tracker.client.get_model_version_by_alias("demo-tiny", "best")
    assert Path(unquote(urlsplit(version.source).path)).exists()
    result = Evaluation(open_run(tiny_recipe(moved), "tiny"), 12).read()
    assert result is not None
    assert tracker.artifact(result.mlflow_run_id, "grid.png") == Path(result.grid).read_bytes()
    assert not (tmp_path / "first").exists()


def test_a_project_reached_by_a_link_stays_as_it_is(original: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(original)
    before = _recorded(original)
    Tracker.of(tiny_recipe(link))
    assert _recorded(original) == before


def test_what_is_stored_names_no_root(original: Path) -> None:
    for name in ("runs/tiny/recipe.yaml", "latents/digits/recipe.yaml"):
        assert str(original.parent) not in (original / name).read_text()
    for path in original.rglob("result.json"):
        assert str(original.parent) not in path.read_text()
