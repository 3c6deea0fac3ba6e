"""Evaluations: any number of actors, interrupted or not, the same figures; and their comparison."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from diffit_train.checkpoints import read_state
from diffit_train.command import evaluate as evaluate_command
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.fleet import Fleet, evaluate
from diffit_train.evaluation.report import collect, compare_store
from diffit_train.evaluation.result import Result, evaluation_key, evaluation_url, finished
from diffit_train.tracking import Tracker
from tests.conftest import tiny_recipe


@pytest.fixture(scope="module")
def evaluated(trained: Path) -> tuple[Path, list[Result]]:
    """The project with evaluations of its first and last checkpoint."""
    return trained, evaluate(tiny_recipe(trained), "tiny", [0, 12])


def _copy(root: Path, target: Path) -> Path:
    for name in ("pictures", "autoencoders", "features", "runs"):
        shutil.copytree(root / name, target / name)
    shutil.copy(root / "mlflow.db", target)
    return target


def test_a_result_has_figures_a_grid_and_an_mlflow_child(
    evaluated: tuple[Path, list[Result]],
) -> None:
    root, results = evaluated
    recipe = tiny_recipe(root)
    assert [r.step for r in results] == [0, 12]
    assert results[0].metrics.keys() == {"fd_digits", "precision", "recall", "label_agreement"}
    for result in results:
        assert finished(recipe, "tiny", result.step) == result
        assert result.metrics["fd_digits"] > 0
        assert Image.open(result.grid).size[0] > 300
        tracker = Tracker.of(recipe)
        child = next(r for r in tracker.runs() if r.run_id == result.mlflow_run_id)
        parent = read_state(str(root / "runs" / "tiny"), result.step).mlflow_run_id
        assert (child.parent_id, child.status) == (parent, "FINISHED")
        assert child.params["evaluate.sampler.steps"] == "3"
        logged = {f"eval/{name}": value for name, value in result.metrics.items()}
        assert child.metrics == pytest.approx(logged)
        for name, value in logged.items():
            assert dict(tracker.history(parent, name))[result.step] == pytest.approx(value)
        files = [f.path for f in tracker.client.list_artifacts(result.mlflow_run_id)]
        assert files == ["grid.png"]


def test_figures_are_those_of_the_pictures(evaluated: tuple[Path, list[Result]]) -> None:
    """Agreement counted again from the chunks' files alone."""
    from safetensors.numpy import load_file

    _, (_, result) = evaluated
    folder = Path(result.grid).parent
    chunks = [load_file(path) for path in sorted(folder.glob("chunk-*.safetensors"))]
    assert [len(chunk["labels"]) for chunk in chunks] == [4, 4, 4]
    labels = np.concatenate([chunk["labels"] for chunk in chunks])
    assert labels.tolist() == [i % 3 for i in range(12)]
    seen = np.concatenate([chunk["seen"] for chunk in chunks])
    assert result.metrics["label_agreement"] == (labels == seen).mean()
    assert chunks[0]["pixels"].shape == (4, 16, 16, 3)


def test_two_actors_and_an_interruption_give_the_same_figures(
    evaluated: tuple[Path, list[Result]], tmp_path: Path
) -> None:
    root, (_, result) = evaluated
    recipe = tiny_recipe(_copy(root, tmp_path), "scaling.evaluate_actors=2")
    (again,) = evaluate(recipe, "tiny", [12])
    assert again.metrics == result.metrics
    assert again.key == result.key

    folder = Path(again.grid).parent
    for name in ("result.json", "chunk-00001.safetensors"):
        (folder / name).unlink()
    (folder / "chunk-00002.safetensors.tmp-killed").write_bytes(b"half")
    before = {p: p.stat().st_mtime_ns for p in folder.glob("chunk-*")}
    (resumed,) = evaluate(recipe, "tiny", [12])
    assert resumed.metrics == result.metrics
    assert resumed.mlflow_run_id == again.mlflow_run_id
    history = Tracker.of(recipe).history(resumed.mlflow_run_id, "eval/fd_digits")
    assert len(history) == 1
    kept = {p: p.stat().st_mtime_ns for p in before if p.exists()}
    assert kept == {p: t for p, t in before.items() if "tmp" not in p.name}


def test_a_dead_actors_chunks_are_made_by_another(
    evaluated: tuple[Path, list[Result]], tmp_path: Path
) -> None:
    root, (_, result) = evaluated
    recipe = tiny_recipe(_copy(root, tmp_path))
    run_url = str(tmp_path / "runs" / "tiny")
    key = evaluation_key(recipe, run_url, 12)
    url = evaluation_url(recipe, "tiny", 12, key)
    fleet = Fleet(recipe, "tiny")
    ray.kill(fleet.actors[0])
    fleet.generate(12, url, key)
    fleet.close()
    (again,) = evaluate(recipe, "tiny", [12])
    assert again.metrics == result.metrics


def test_other_settings_are_another_evaluation(evaluated: tuple[Path, list[Result]]) -> None:
    root, _ = evaluated
    run_url = str(root / "runs" / "tiny")
    plain = evaluation_key(tiny_recipe(root), run_url, 12)
    for change in ("evaluate.seed=1", "evaluate.guidance.scale=2", "evaluate.weights=raw"):
        assert evaluation_key(tiny_recipe(root, change), run_url, 12) != plain
    assert evaluation_key(tiny_recipe(root), run_url, 0) != plain
    assert evaluation_key(tiny_recipe(root, "scaling.evaluate_actors=2"), run_url, 12) == plain


def test_a_chunk_of_another_evaluation_is_refused(
    evaluated: tuple[Path, list[Result]], tmp_path: Path
) -> None:
    root, (first, last) = evaluated
    recipe = tiny_recipe(_copy(root, tmp_path))
    folder = Path(evaluation_url(recipe, "tiny", 12, last.key))
    folder.mkdir(parents=True)
    shutil.copy(Path(first.grid).parent / "chunk-00001.safetensors", folder)
    with pytest.raises(DiffitError, match=r"chunk-00001\.safetensors is of another evaluation"):
        evaluate(recipe, "tiny", [12])


@pytest.mark.parametrize(
    ("run", "steps", "overrides", "words"),
    [
        ("none", [], [], "there is no run 'none'"),
        ("tiny", ["5"], [], "no committed checkpoint of step 5; it has: 0, 4, 8, 12"),
        ("tiny", ["last"], [], "--step is 'last'"),
        ("tiny", [], ["evaluate.features.source=root:features/none"], "diffit features fit"),
        ("tiny", [], ["scaling.evaluate_actors=9"], "evaluation needs 9 CPUs"),
        ("tiny", [], ["train.lr=7"], "another recipe"),
    ],
)
def test_bad_input_writes_nothing(
    trained: Path, run: str, steps: list[str], overrides: list[str], words: str
) -> None:
    recipe = tiny_recipe(trained, "evaluate.seed=99", *overrides)
    before = sorted((trained / "evaluations").rglob("*"))
    with pytest.raises(UserError, match=words):
        evaluate_command(recipe, run, steps)
    assert sorted((trained / "evaluations").rglob("*")) == before


def test_runs_are_compared(
    evaluated: tuple[Path, list[Result]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root, results = evaluated
    tracker = Tracker.of(tiny_recipe(root))
    tracker.training_run("demo", "another", "other", {"train.lr": 0.5, "scaling.workers": 9}, {})
    rows = {row.record.name: row for row in collect(tracker, "demo")}
    assert rows["tiny"].last_step == 12
    assert rows["tiny"].differences["train.lr"] == "0.003"
    assert rows["other"].differences["train.lr"] == "0.5"
    assert "scaling.workers" not in rows["tiny"].differences
    comparison = compare_store(str(root), None, "demo", tmp_path / "curves.png")
    value = next(r for r in comparison.as_json()["runs"] if r["name"] == "tiny")
    assert [e["step"] for e in value["evaluations"]] == [0, 12]
    assert [e["samples"] for e in value["evaluations"]] == [12, 12]
    expected = results[1].metrics["fd_digits"]
    assert value["evaluations"][1]["fd_digits"] == pytest.approx(expected)
    assert Image.open(tmp_path / "curves.png").size[0] > 600
    comparison.print_table()
    printed = capsys.readouterr().out
    assert results[1].key in printed
    assert "samples" in printed
    assert "0.003" in printed


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*mlflow\.db; train first"):
        compare_store(str(tmp_path), None, None, None)
    with pytest.raises(UserError, match=r"--tracking-uri, as http.* or sqlite:////"):
        compare_store("s3://bucket/project", None, None, None)
    with pytest.raises(UserError, match=r"--root is 's3:/bucket/project': .* s3://…"):
        compare_store("s3:/bucket/project", None, None, None)
    Tracker(f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(UserError, match="no training run"):
        compare_store(str(tmp_path), None, None, None)
