"""Evaluations: the same metrics with any number of actors and interruptions; and comparison."""

from __future__ import annotations

import csv
import itertools
import os
import shutil
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import unquote, urlsplit

import numpy as np
import psutil
import pytest
import ray
from mlflow.models import Model
from PIL import Image

from diffit_train import storage
from diffit_train.cli.sweep import run_sweep
from diffit_train.config import Recipe, load_recipe
from diffit_train.data.sources import list_images
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation import runner
from diffit_train.evaluation.actors import EvaluationTarget
from diffit_train.evaluation.best import register_best
from diffit_train.evaluation.chunks import Range, committed_chunks, read_chunk_images
from diffit_train.evaluation.evaluate import evaluate_run
from diffit_train.evaluation.generate import choose_labels
from diffit_train.evaluation.pool import EvaluationPool, Generation
from diffit_train.evaluation.result import (
    Evaluation,
    Result,
    evaluated_identity,
    evaluation_url,
)
from diffit_train.evaluation.runner import make_reference
from diffit_train.evaluation.scores import grid_images
from diffit_train.reports.collect import collect
from diffit_train.reports.compare import compare_store
from diffit_train.runs.checkpoints import Checkpoint
from diffit_train.runs.run import open_run
from diffit_train.tracking import Tracker
from tests.conftest import tiny_recipe
from tests.in_process import in_process

_TWO_BATCHES = ["scaling.evaluate_batches=2"]


def evaluate(recipe: Recipe, run: str, steps: list[int]) -> list[Result]:
    return runner.evaluate([Evaluation(open_run(recipe, run), step) for step in steps])


def _images(result: Result) -> np.ndarray:
    url = str(Path(result.grid).parent)
    return np.concatenate([read_chunk_images(url, part) for part in committed_chunks(url)])


@pytest.fixture(scope="module")
def evaluated(trained: Path) -> tuple[Path, list[Result]]:
    """The project, with evaluations of its first and last checkpoint, made in this process."""
    with in_process():
        return trained, evaluate(tiny_recipe(trained), "tiny", [0, 12])


def _copy(root: Path, target: Path) -> Path:
    for name in ("images", "autoencoders", "features", "runs"):
        shutil.copytree(root / name, target / name)
    shutil.copy(root / "mlflow.db", target)
    return target


def test_a_result_has_metrics_a_grid_and_an_mlflow_child(
    evaluated: tuple[Path, list[Result]],
) -> None:
    root, results = evaluated
    recipe = tiny_recipe(root)
    assert [r.step for r in results] == [0, 12]
    names = {"fd_digits", "kd_digits", "precision", "recall", "classifier_accuracy"}
    assert results[0].metrics.keys() == names
    # Three steps, each with and without the label.
    assert results[0].nfe == 6
    for result in results:
        assert Evaluation(open_run(recipe, "tiny"), result.step).read() == result
        assert result.metrics["fd_digits"] > 0
        assert Image.open(result.grid).size[0] > 300
        tracker = Tracker.of(recipe)
        child = next(r for r in tracker.runs() if r.run_id == result.mlflow_run_id)
        parent = Checkpoint(str(root / "runs" / "tiny"), result.step).state.mlflow_run_id
        assert (child.parent_id, child.status) == (parent, "FINISHED")
        assert child.params["evaluate.sampler.steps"] == "3"
        logged = {f"eval/{name}": value for name, value in result.metrics.items()}
        assert child.metrics == pytest.approx({**logged, "cost/nfe": 6})
        source = str(root / "runs" / "tiny")
        reference = child.tags["diffit.reference_digest"]
        assert result.reference_digest == reference
        assert list((root / "references").glob(f"digits-digits-{reference[:12]}.safetensors"))
        assert child.tags["diffit.checkpoint_digest"] == Checkpoint(source, result.step).digest
        inputs = tracker.client.get_run(result.mlflow_run_id).inputs.dataset_inputs
        assert [i.dataset.name.startswith("digits-digits-") for i in inputs] == [True]
        for name, value in logged.items():
            assert dict(tracker.history(parent, name))[result.step] == pytest.approx(value)
        files = [f.path for f in tracker.client.list_artifacts(result.mlflow_run_id)]
        assert files == ["grid.png"]


def test_metrics_match_the_images(evaluated: tuple[Path, list[Result]]) -> None:
    """Recompute the classifier accuracy from the chunk files alone."""
    from safetensors.numpy import load_file

    _, (_, result) = evaluated
    folder = Path(result.grid).parent
    chunks = [load_file(path) for path in sorted(folder.glob("chunk-*.safetensors"))]
    assert [len(chunk["labels"]) for chunk in chunks] == [4, 4, 4]
    labels = np.concatenate([chunk["labels"] for chunk in chunks])
    assert labels.tolist() == [i % 3 for i in range(12)]
    seen = np.concatenate([chunk["seen"] for chunk in chunks])
    assert result.metrics["classifier_accuracy"] == (labels == seen).mean()
    assert _images(result).shape == (12, 16, 16, 3)


@pytest.mark.usefixtures("here")
def test_random_labels_do_not_depend_on_chunks(
    evaluated: tuple[Path, list[Result]], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    root, _ = evaluated
    made = []
    for number, scaling in enumerate(([], _TWO_BATCHES)):
        project = _copy(root, tmp_path / str(number))
        recipe = tiny_recipe(project, "evaluate.labels=random", *scaling)
        (result,) = evaluate(recipe, "tiny", [12])
        folder = Path(result.grid).parent
        chunks = [load_file(path)["labels"] for path in sorted(folder.glob("chunk-*.safetensors"))]
        assert len(chunks) == (2 if scaling else 3)
        made.append((result.metrics, np.concatenate(chunks).tolist(), _images(result)))
        assert Image.open(result.grid).size[0] > 100
    (metrics, labels, pixels), again = made
    assert (metrics, labels) == again[:2]
    assert np.array_equal(pixels, again[2])
    assert labels == choose_labels("random", 0, range(12), 3).tolist()
    assert labels != [i % 3 for i in range(12)]


def test_the_grid_shows_the_first_classes_that_occur() -> None:
    recipe = load_recipe("imagenet256", ["evaluate.samples=40"])
    shown = grid_images(recipe)
    labels = choose_labels("random", 0, range(40), 1000).tolist()
    assert sorted(shown) == sorted(set(labels))[:10]
    # With fewer than ten classes among them, exactly those; with balanced labels, 0 to 9.
    assert len(grid_images(load_recipe("imagenet256", ["evaluate.samples=5"]))) == 5
    assert grid_images(load_recipe("demo"))[9] == list(range(9, 100, 10))


def test_two_actors_and_an_interruption_give_the_same_metrics(
    evaluated: tuple[Path, list[Result]], tmp_path: Path
) -> None:
    root, (_, result) = evaluated
    recipe = tiny_recipe(_copy(root, tmp_path), "scaling.evaluate_actors=2")
    (again,) = evaluate(recipe, "tiny", [12])
    assert again.metrics == result.metrics
    assert again.key == result.key
    assert np.array_equal(_images(again), _images(result))

    folder = Path(again.grid).parent
    for name in ("result", "chunk-0000000-0000004", "chunk-0000004-0000008"):
        (folder / f"{name}.json").unlink()
    (folder / "chunk-0000008-0000012.safetensors.tmp-killed").write_bytes(b"half")
    before = {p: p.stat().st_mtime_ns for p in folder.glob("chunk-*")}
    # With another chunk size, both missing batches form one chunk.
    recipe = tiny_recipe(tmp_path, "scaling.evaluate_batches=2")
    (resumed,) = evaluate(recipe, "tiny", [12])
    assert (folder / "chunk-0000000-0000008.safetensors").exists()
    assert resumed.metrics == result.metrics
    assert np.array_equal(_images(resumed), _images(result))
    assert resumed.mlflow_run_id == again.mlflow_run_id
    history = Tracker.of(recipe).history(resumed.mlflow_run_id, "eval/fd_digits")
    assert len(history) == 1
    kept = {p: p.stat().st_mtime_ns for p in before if p.exists()}
    assert kept == {p: t for p, t in before.items() if "tmp" not in p.name}


def test_ray_restarts_an_actor_that_dies(
    evaluated: tuple[Path, list[Result]], tmp_path: Path
) -> None:
    root, (_, result) = evaluated
    recipe = tiny_recipe(_copy(root, tmp_path))
    run_url = str(tmp_path / "runs" / "tiny")
    key = Evaluation(open_run(recipe, "tiny"), 12).key
    url = evaluation_url(open_run(recipe, "tiny"), 12, key)
    fleet = EvaluationPool(recipe)
    (actor,) = fleet.actors.actors
    killed = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
    psutil.Process(killed).kill()
    missing = [Range(0, 4), Range(4, 8), Range(8, 12)]
    wanted = [Generation(recipe, EvaluationTarget(run_url, 12, url, key), missing, True)]
    assert sorted(part for _, part in fleet.generate(wanted)) == missing
    assert ray.get(actor.__ray_call__.remote(lambda self: os.getpid())) != killed
    fleet.close()
    (again,) = evaluate(recipe, "tiny", [12])
    assert again.metrics == result.metrics


@pytest.mark.usefixtures("here")
def test_more_samples_start_with_the_same_images(
    evaluated: tuple[Path, list[Result]], tmp_path: Path
) -> None:
    root, (_, result) = evaluated
    recipe = tiny_recipe(_copy(root, tmp_path), "evaluate.samples=15", "scaling.evaluate_batches=9")
    (more,) = evaluate_run(open_run(recipe, "tiny"), ["12"], npz=True)
    assert np.array_equal(_images(Result.model_validate(more))[:12], _images(result))
    with np.load(Path(more.grid).parent / "samples.npz") as file:
        assert np.array_equal(file["arr_0"], _images(Result.model_validate(more)))
        assert file["arr_1"].tolist() == [i % 3 for i in range(15)]


@pytest.mark.usefixtures("here")
def test_only_the_grids_images_stay_unless_all_are_wanted(
    evaluated: tuple[Path, list[Result]], tmp_path: Path
) -> None:
    root, (_, result) = evaluated
    all_kept = tiny_recipe(_copy(root, tmp_path), "evaluate.grid=[10,1]")
    recipe = tiny_recipe(tmp_path, "evaluate.grid=[10,1]", "evaluate.keep_images=grid")
    assert (
        Evaluation(open_run(recipe, "tiny"), 12).key
        == Evaluation(open_run(all_kept, "tiny"), 12).key
    )
    (made,) = evaluate_run(open_run(recipe, "tiny"), ["12"])
    folder = Path(made.grid).parent
    # Of the first image of each class; the other chunks have none.
    assert [path.name for path in folder.glob("*.npy")] == ["grid-0000000-0000004.npy"]
    assert np.array_equal(np.load(next(folder.glob("*.npy"))), _images(result)[:3])
    assert made.metrics == result.metrics
    with pytest.raises(UserError, match=r"delete that folder and rerun with --npz"):
        evaluate_run(open_run(recipe, "tiny"), ["12"], npz=True)

    # Interrupted, and continued with other wishes: what was not kept is generated again.
    (folder / "result.json").unlink()
    (folder / "chunk-0000000-0000004.json").unlink()
    wide = tiny_recipe(
        tmp_path,
        "evaluate.grid=[10,1]",
        "evaluate.keep_images=grid",
        "scaling.evaluate_batches=2",
    )
    (again,) = evaluate_run(open_run(wide, "tiny"), ["12"], npz=True)
    assert again.metrics == result.metrics
    with np.load(folder / "samples.npz") as file:
        assert np.array_equal(file["arr_0"], _images(result))
    assert not list(folder.glob("images-*"))
    evaluate_run(open_run(wide, "tiny"), ["12"], npz=True)


def test_the_actors_time_without_work_is_recorded(
    evaluated: tuple[Path, list[Result]], tmp_path: Path
) -> None:
    root, results = evaluated
    shares = [result.idle_fraction for result in results]
    assert all(share is not None and 0 <= share < 1 for share in shares)
    assert shares[0]  # its actors had to be started
    # Images that are there need no actor: more than this machine could start are asked for.
    recipe = tiny_recipe(_copy(root, tmp_path), "scaling.evaluate_actors=99")
    for name in ("evaluations", "references"):
        shutil.copytree(root / name, tmp_path / name)
    folder = Path(evaluation_url(open_run(recipe, "tiny"), 12, results[1].key))
    (folder / "result.json").unlink()
    (again,) = evaluate(recipe, "tiny", [12])
    assert again.idle_fraction is None
    assert again.metrics == results[1].metrics


def test_encoded_images_are_listed_once_for_a_reference(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from diffit_train.evaluation import pool
    from diffit_train.evaluation.references import Reference, ReferenceSource, Statistics

    for name in ("images", "features", "latents"):
        shutil.copytree(trained / name, tmp_path / name)
    recipe = tiny_recipe(tmp_path)
    source = ReferenceSource.of(recipe)
    stored = source.stored()
    assert stored is not None
    assert source.stored(list_images(recipe)) == stored
    stored.write(Reference(Statistics(np.ones(5), np.eye(5)), None, None, 24))
    with monkeypatch.context() as patch:
        patch.setattr(pool, "list_images", Mock(side_effect=AssertionError("listed")))
        found = EvaluationPool(recipe).reference()
    assert found == stored
    assert np.array_equal(found.read().pool.mean, np.ones(5))
    # Another recipe's latents say nothing about its images.
    assert ReferenceSource.of(tiny_recipe(tmp_path, "data.flip=true")).stored() is None
    next((tmp_path / "images" / "digits").rglob("*.png")).unlink()
    assert "changed since" not in capsys.readouterr().err
    assert source.stored(list_images(recipe)) != stored
    assert "have changed since they were encoded" in capsys.readouterr().err


def test_the_best_checkpoint_is_tagged_and_registered(
    evaluated: tuple[Path, list[Result]], tmp_path: Path
) -> None:
    from diffit_train.models.published import read_weights_file

    root, results = evaluated
    recipe = tiny_recipe(_copy(root, tmp_path))
    shutil.copytree(root / "evaluations", tmp_path / "evaluations")
    best = min(results, key=lambda r: r.metrics["fd_digits"])
    found = register_best(open_run(recipe, "tiny"), results)
    assert found is not None
    assert found["step"] == best.step
    tracker = Tracker.of(recipe)
    parent = Checkpoint(str(tmp_path / "runs" / "tiny"), best.step).state.mlflow_run_id
    tags = tracker.client.get_run(parent).data.tags
    assert tags["diffit.best_step"] == str(best.step)
    assert tags["diffit.best_metric"] == "fd_digits"
    version = tracker.client.get_model_version_by_alias("demo-tiny", "best")
    file = Path(found["file"])
    assert (version.source, version.tags["file"]) == (file.parent.as_uri(), file.name)
    assert version.run_id == best.mlflow_run_id
    assert "blocks.0.attn.qkv.weight" in read_weights_file(found["file"], False)
    # Nothing has improved since.
    again = register_best(open_run(recipe, "tiny"), results)
    assert again is not None
    assert again["file"] is None
    versions = tracker.client.search_model_versions("name='demo-tiny'")
    assert len(versions) == 1


def test_best_never_moves_between_protocols(
    evaluated: tuple[Path, list[Result]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, results = evaluated
    recipe = tiny_recipe(_copy(root, tmp_path))
    shutil.copytree(root / "evaluations", tmp_path / "evaluations")
    tracker, numbers = Tracker.of(recipe), itertools.count()
    parent = Checkpoint(str(tmp_path / "runs" / "tiny"), 0).state.mlflow_run_id

    def stored(recipe: Recipe, step: int, value: float, **changes: object) -> Result:
        """An evaluation of a step, as if it had been measured."""
        made = next(r for r in results if r.step == 0)
        changes |= {"evaluate": evaluated_identity(recipe), "samples": recipe.evaluate.samples}
        key = f"made-{next(numbers)}"
        child = tracker.evaluation_run("demo", parent, key, key, {}, {})
        changes |= {"step": step, "metrics": {"fd_digits": value}, "key": key}
        changes["mlflow_run_id"] = child
        made = made.model_copy(update=changes)
        url = storage.join(evaluation_url(open_run(recipe, "tiny"), step, made.key), "result.json")
        storage.write_text(url, made.model_dump_json())
        return made

    def best(alias: str = "best") -> int | None:
        registered = tracker.registered("demo-tiny", alias)
        return registered and registered.step

    # Fewer samples, and a distance that would be the best of all.
    fewer = tiny_recipe(tmp_path, "evaluate.samples=6")
    assert register_best(open_run(fewer, "tiny"), [stored(fewer, 4, 1e-6)]) is None
    assert best() is None
    assert "evaluate.samples is 6, in the run's recipe 12" in capsys.readouterr().err
    # The first evaluation by the recipe's own protocol sets it.
    assert register_best(open_run(recipe, "tiny"), results) is not None
    first = min(results, key=lambda r: r.metrics["fd_digits"]).step
    assert best() == first
    version = tracker.client.get_model_version_by_alias("demo-tiny", "best")
    assert version.description.startswith(f"Step {first:,}, weights ema: fd_digits ")
    model = tracker.client.get_registered_model("demo-tiny")
    assert "diffit on 4x4x4 latents of 16x16 images of digits (3 classes)" in model.description
    folder = Path(unquote(urlsplit(version.source).path))
    assert (folder / version.tags["file"]).is_file()
    signature = Model.load(folder).signature  # as MLflow's page reads it
    assert [(s.name, s.shape) for s in signature.inputs.inputs] == [
        ("x", (-1, 4, 4, 4)),
        ("t", (-1,)),
        ("y", (-1,)),
    ]
    assert signature.outputs.inputs[0].shape == (-1, 8, 4, 4)
    for change in ("sampler.steps=2", "guidance.scale=1", "precision=bf16_autocast", "seed=3"):
        other = tiny_recipe(tmp_path, f"evaluate.{change}")
        assert register_best(open_run(other, "tiny"), [stored(other, 4, 1e-6)]) is None
        assert change.split("=")[0] in capsys.readouterr().err
    assert best() == first
    # Validation during training has an alias of its own.
    register_best(open_run(fewer, "tiny"), [stored(fewer, 8, 2e-6)], validated=True)
    assert (best(), best("best-validated")) == (first, 4)
    # The same settings on another reference or other features.
    for name in ("reference_digest", "features_digest"):
        made = stored(recipe, 4, 1e-7, **{name: "0" * 64})
        assert register_best(open_run(recipe, "tiny"), [made]) is None
        assert "by another protocol" in capsys.readouterr().err
    assert best() == first
    tags = tracker.client.get_run(parent).data.tags
    assert tags["diffit.best_step"] == str(first)


@pytest.mark.usefixtures("here")
def test_a_sweep_runs_locally_and_resumes(
    evaluated: tuple[Path, list[Result]], tmp_path: Path
) -> None:
    root, _ = evaluated
    recipe = tiny_recipe(_copy(root, tmp_path), "evaluate.samples=8")
    texts = ["guidance.scale=1:2:1", "sampler.steps=2,3"]
    found = run_sweep(open_run(recipe, "tiny"), ["12"], texts, "first")
    rows = found["rows"]
    pairs = [(row["guidance.scale"], row["sampler.steps"]) for row in rows]
    assert pairs == [(1, 2), (1, 3), (2, 2), (2, 3)]
    # At scale 1 the unconditional pass is skipped.
    assert [row["nfe"] for row in rows] == [2, 3, 4, 6]
    with Path(found["csv"]).open(newline="") as file:
        table = list(csv.DictReader(file))
    scales = [
        (float(r["evaluate.guidance.scale"]), int(r["evaluate.sampler.steps"])) for r in table
    ]
    assert sorted(scales) == pairs
    assert {float(r["fd_digits"]) for r in table} == {row["fd_digits"] for row in rows}
    assert Image.open(found["plot"]).size[0] > 900
    children = [r for r in Tracker.of(recipe).runs() if r.tags.get("diffit.sweep") == "first"]
    assert len(children) == 4
    # A sweep is not part of the run's own curve.
    parent = Checkpoint(str(tmp_path / "runs" / "tiny"), 12).state.mlflow_run_id
    curve = Tracker.of(recipe).history(parent, "eval/fd_digits")
    assert [step for step, _ in curve] == [0, 12]

    lost = next((tmp_path / "evaluations" / "tiny").glob("step-*/ddim2-constant2-*"))
    kept = {p: p.stat().st_mtime_ns for p in lost.parent.rglob("result.json")}
    shutil.rmtree(lost)
    again = run_sweep(open_run(recipe, "tiny"), ["12"], texts, "first")
    assert again["rows"] == rows
    after = {p: p.stat().st_mtime_ns for p in lost.parent.rglob("result.json")}
    assert {p for p in kept if kept[p] != after[p]} == {lost / "result.json"}
    with pytest.raises(UserError, match="'first'"):
        run_sweep(open_run(recipe, "tiny"), ["0"], texts, "first")


def test_a_reference_is_computed_in_parts_and_resumes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffit_train.evaluation import references

    monkeypatch.setattr(references, "SMALLEST_PART", 7)
    recipe = tiny_recipe(_copy(trained, tmp_path), "evaluate.reference_images=10")
    place, whole = make_reference(recipe)
    assert whole.count == 24
    assert whole.features is not None
    assert whole.features.shape == (10, 5)
    Path(place).unlink()
    Path(f"{place}.json").unlink()
    # As if killed with one of four parts done.
    fleet = EvaluationPool(recipe)
    listing = list_images(recipe)
    tasks = references.part_tasks(recipe, listing)
    assert [len(task.items) for task in tasks] == [7, 7, 7, 3]
    assert sum(len(task.kept) for task in tasks) == 10
    parts = Path(f"{place}.parts")
    target = parts / tasks[1].name
    call = fleet.actors.run(
        [tasks[1]], lambda a, t: a.reference_part.remote(t, str(target)), lambda t: t.name
    )
    assert [count for _, (count, _) in call] == [7]
    before = target.stat().st_mtime_ns
    seen, real = [], references.read_reference_parts

    def read(url: str, wanted: list[references.PartTask]) -> list[references.ReferenceSums]:
        seen.append(target.stat().st_mtime_ns)
        if len(seen) == 1:
            # As if a concurrent evaluation had finished and were deleting the parts.
            (parts / tasks[3].name).unlink()
        return list(real(url, wanted))

    monkeypatch.setattr(references, "read_reference_parts", read)
    again = fleet.reference().read()
    fleet.close()
    assert seen == [before, before]
    assert not parts.exists()
    assert np.array_equal(again.pool.covariance, whole.pool.covariance)
    assert np.array_equal(again.features, whole.features)


def test_other_settings_are_another_evaluation(evaluated: tuple[Path, list[Result]]) -> None:
    root, _ = evaluated
    plain = Evaluation(open_run(tiny_recipe(root), "tiny"), 12).key
    own = ["evaluate.seed=1", "evaluate.guidance.scale=2", "evaluate.weights=raw"]
    for change in [*own, "evaluate.labels=random", "evaluate.pixels=truncate"]:
        assert Evaluation(open_run(tiny_recipe(root, change), "tiny"), 12).key != plain
    assert Evaluation(open_run(tiny_recipe(root), "tiny"), 0).key != plain
    assert (
        Evaluation(open_run(tiny_recipe(root, "scaling.evaluate_actors=2"), "tiny"), 12).key
        == plain
    )


def test_the_key_depends_on_the_content_of_the_reference_not_its_path(
    evaluated: tuple[Path, list[Result]], tmp_path: Path
) -> None:
    root, _ = evaluated
    paths = [tmp_path / "a.npz", tmp_path / "b.npz", tmp_path / "c.npz"]
    for path, content in zip(paths, (b"one", b"one", b"two"), strict=True):
        path.write_bytes(content)

    def key(reference: Path | str) -> str:
        return Evaluation(
            open_run(tiny_recipe(root, f"evaluate.reference={reference}"), "tiny"), 12
        ).key

    first, second, third = (key(path) for path in paths)
    assert first == second != third
    assert key("dataset") == Evaluation(open_run(tiny_recipe(root), "tiny"), 12).key != first
    paths[0].write_bytes(b"two")
    assert key(paths[0]) == third
    with pytest.raises(UserError, match="does not exist"):
        key(tmp_path / "none.npz")


@pytest.mark.usefixtures("here")
def test_a_chunk_of_another_evaluation_is_rejected(
    evaluated: tuple[Path, list[Result]], tmp_path: Path
) -> None:
    root, (first, last) = evaluated
    recipe = tiny_recipe(_copy(root, tmp_path))
    folder = Path(evaluation_url(open_run(recipe, "tiny"), 12, last.key))
    folder.mkdir(parents=True)
    part = "0000004-0000008"
    for name in (f"chunk-{part}.json", f"chunk-{part}.safetensors", f"images-{part}.npy"):
        shutil.copy(Path(first.grid).parent / name, folder)
    with pytest.raises(DiffitError, match=r"chunk-0000004-0000008"):
        evaluate(recipe, "tiny", [12])


@pytest.mark.parametrize(
    ("run", "steps", "overrides", "words"),
    [
        ("none", [], [], "run 'none' does not exist"),
        ("tiny", ["5"], [], "no committed checkpoint at step 5; it has: 0, 4, 8, 12"),
        ("tiny", ["last"], [], "--step is 'last'"),
        ("tiny", [], ["evaluate.features.source=root:features/none"], "diffit fit features"),
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
        evaluate_run(open_run(recipe, run), steps)
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
    comparison = compare_store(str(root), None, "demo", str(tmp_path / "curves.png"))
    value = next(r for r in comparison.as_json()["runs"] if r["name"] == "tiny")
    assert [e["step"] for e in value["evaluations"]] == [0, 12]
    assert [e["samples"] for e in value["evaluations"]] == [12, 12]
    expected = results[1].metrics["fd_digits"]
    assert value["evaluations"][1]["fd_digits"] == pytest.approx(expected)
    assert Image.open(str(tmp_path / "curves.png")).size[0] > 600
    comparison.print_table()
    printed = capsys.readouterr().out
    assert results[1].key in printed
    assert "samples" in printed
    assert "0.003" in printed


def test_nothing_to_compare_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*mlflow\.db; train first"):
        compare_store(str(tmp_path), None, None, None)
    with pytest.raises(UserError, match=r"--tracking-uri, for example http.* or sqlite:////"):
        compare_store("s3://bucket/project", None, None, None)
    with pytest.raises(UserError, match=r"--root is 's3:/bucket/project': .* s3://…"):
        compare_store("s3:/bucket/project", None, None, None)
    Tracker(f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(UserError, match="no training run"):
        compare_store(str(tmp_path), None, None, None)
