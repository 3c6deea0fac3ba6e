"""Damaged files of a run: one message that names the file, and what removing it costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffit_train import storage
from diffit_train.cli.integrity import verify
from diffit_train.cli.verify import check
from diffit_train.errors import DiffitError, UserError
from diffit_train.runs.checkpoints import Checkpoint, Checkpoints, save_whole
from diffit_train.runs.import_export import export_weights
from diffit_train.runs.run import Run, open_run
from diffit_train.tracking import Tracker
from diffit_train.training.log import (
    SkippedSteps,
    TrainingLog,
    append_bad_step,
    as_metrics,
    check_run_files,
)
from tests.conftest import tiny_recipe
from tests.made import make_state


def _record(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "step_s": 0.5, "lr": 1e-3}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a log of three records, known to MLflow, and a checkpoint at step 6."""
    from diffit_train.models.build import build_model

    recipe = tiny_recipe(tmp_path)
    identity = open_run(recipe, "one").create()
    folder = tmp_path / "runs" / "one"
    tracker = Tracker.of(recipe)
    tags = {"diffit.recipe_hash": identity.recipe_hash}
    mlflow_run_id = tracker.training_run("demo", identity.uuid, "one", recipe.flat(), tags)
    log = TrainingLog(str(folder), 6)
    for step in (2, 4, 6):
        log.append(_record(step))
        tracker.log_metrics(mlflow_run_id, as_metrics(_record(step)), step)
    storage.write_text(log.url, log.text())
    weights = {n: p.detach() for n, p in build_model(recipe).named_parameters() if p.requires_grad}
    state = make_state(
        6, recipe_hash=identity.recipe_hash, mlflow_run_id=mlflow_run_id, log=log.mark()
    )
    shapes = {name: value.shape for name, value in weights.items()}
    save_whole({"master": weights, "ema": weights}, shapes, str(folder), state)
    for step in (3, 4, 7, 8):
        append_bad_step(str(folder), {"step": step})
    SkippedSteps().adding(3, 4).adding(7, 8).write(str(folder))
    export_weights(open_run(recipe, "one"), 6, "ema")
    return folder


def _names(run: Path) -> list[str]:
    return [one.check.name for one in verify(str(run))]


def test_an_undamaged_run_is_good(run: Path) -> None:
    check_run_files(Run(str(run.parent.parent), run.name))
    assert _names(run) == []


DAMAGE = {
    "emptied": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "a record less": lambda text: "\n".join(text.splitlines()[:-1]),
    "another number": lambda text: text.replace("0.25", "0.35"),
    "binary": lambda text: "\0" * len(text),
    "not text": lambda text: "\udcff" + text,
    "a list": lambda text: "[1, 2]\n",
    "nested": lambda text: "[" * 100_000,
    "steps descend": lambda text: "\n".join(reversed(text.splitlines())),
    "a step that is no number": lambda text: text.replace('"step": 4', '"step": "four"'),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_log_is_named_and_begins_again(how: str, run: Path) -> None:
    file, mark = run / "log.jsonl", Checkpoint(str(run), 6).state.log
    text = DAMAGE[how](file.read_text())
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"{file} .*remove"):
        check_run_files(Run(str(run.parent.parent), run.name))
    with pytest.raises(DiffitError, match=r"(?s)1 damaged part in .*log\.jsonl: .*--remove"):
        check(str(run), remove=False)
    check(str(run), remove=True)
    assert not file.exists()
    assert _names(run) == []
    check_run_files(Run(str(run.parent.parent), run.name))
    log = TrainingLog(str(run), 6, mark)
    log.append(_record(8))
    storage.write_text(log.url, log.text())
    # Resumed again from the same checkpoint, or from one that knows the new log.
    assert TrainingLog(str(run), 6, mark).records == []
    assert TrainingLog(str(run), 8, log.mark()).records == [_record(8)]


def test_without_a_mark_any_log_is_read(run: Path) -> None:
    (run / "log.jsonl").write_text("".join(json.dumps(_record(s)) + "\n" for s in (2, 4)))
    assert len(TrainingLog(str(run), 6, None).records) == 2


@pytest.mark.parametrize("text", ["", "[[3,", "[[3]]", "null", '{"ranges": [[3, 9, 1]]}'])
def test_damaged_ranges_are_named_and_stay(text: str, run: Path) -> None:
    """Training without them would be another one."""
    file = run / "skipped-steps.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"{file} .*bad-steps.jsonl"):
        SkippedSteps.read(str(run))
    with pytest.raises(DiffitError, match=r"skipped-steps\.json: .*bad-steps.jsonl"):
        check(str(run), remove=True)
    assert file.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("batch_size: 8", "batch_size: 6"),
        lambda text: "\udcff" + text,
    ],
)
def test_a_damaged_recipe_is_named_and_comes_back(change: Any, run: Path, tmp_path: Path) -> None:
    it = open_run(tiny_recipe(tmp_path), "one")
    before, file = it.stored_recipe, run / "recipe.yaml"
    file.write_bytes(change(file.read_text()).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"(?s){file} .*`diffit train`"):
        _ = it.refresh().stored_recipe
    check(str(run), remove=True)
    it.record_steps()  # as training does
    assert it.refresh().stored_recipe == before


def test_a_damaged_identity_is_named_and_removed(run: Path, tmp_path: Path) -> None:
    file = run / "run.json"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(DiffitError, match=f"{file} "):
        open_run(tiny_recipe(tmp_path), "one")
    assert list(check(str(run), remove=True)["removed"]) == ["run.json"]
    assert open_run(tiny_recipe(tmp_path), "one").check() is None
    assert Checkpoints(str(run)).steps == [6]


def test_damaged_exports_and_checkpoints_are_removed(run: Path) -> None:
    export = next((run / "export").iterdir())
    export.write_bytes(export.read_bytes()[:-3] + b"xyz")
    assert [one.check.name for one in verify(str(export))] == [export.name]
    weights = next((run / "checkpoints").rglob("ema/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DiffitError, match="step-0000000006: .*sha256"):
        check(str(run), remove=False)
    removed = check(str(run), remove=True)["removed"]
    assert list(removed) == ["step-0000000006", f"export/{export.name}"]
    assert Checkpoints(str(run)).steps == []
    assert not list((run / "export").iterdir())


def test_unfinished_checkpoints_are_removed(run: Path, tmp_path: Path) -> None:
    kept = {path for path in run.rglob("*") if path.is_file()}
    for folder in ("", "ema-snapshots/"):
        half = run / f"{folder}checkpoints" / "step-0000000008" / "ema" / "rank.safetensors"
        half.parent.mkdir(parents=True)
        half.write_bytes(b"half")
    (run / "log.jsonl.tmp-killed").write_bytes(b"half")
    open_run(tiny_recipe(tmp_path), "one").remove_unfinished()
    assert {path for path in run.rglob("*") if path.is_file()} == kept


def test_a_root_is_checked_as_a_whole(run: Path, tmp_path: Path) -> None:
    assert verify(str(tmp_path)) == []
    (run / "log.jsonl").write_text("")
    with pytest.raises(DiffitError, match=r"runs/one/log.jsonl: "):
        check(str(tmp_path), remove=False)
    check(str(tmp_path), remove=True)
    database = tmp_path / "mlflow.db"
    whole = bytearray(database.read_bytes())
    whole[4096:20000] = b"\xff" * (20000 - 4096)
    database.write_bytes(whole)
    with pytest.raises(DiffitError, match=r"mlflow\.db: .*rebuilt by a backup"):
        check(str(tmp_path), remove=True)
    for other in ("runs", "none"):
        with pytest.raises(UserError, match=str(tmp_path)):
            verify(str(tmp_path / other))


def test_a_damaged_database_is_named(run: Path, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "kept.db")
    database = tmp_path / "mlflow.db"
    message = rf"(cannot open MLflow at .*|){database}(: | is damaged)"
    for damage in (b"", b"not a database" * 999, (tmp_path / "kept.db").read_bytes()[:9000]):
        database.write_bytes(damage)
        if not damage:
            continue  # SQLite takes an empty file for a new one
        with pytest.raises(UserError, match=message):
            Tracker.of(tiny_recipe(tmp_path)).runs()
