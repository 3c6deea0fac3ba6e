"""Damaged files of a run: one message that names the file and the way back, and the way back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffit_train import storage
from diffit_train.commands.verify import check_root, check_run
from diffit_train.errors import DiffitError, UserError
from diffit_train.runs.checkpoints import LogMark, committed_steps, save_whole
from diffit_train.runs.identity import create_identity, read_identity, stored_recipe
from diffit_train.runs.import_export import export_weights
from diffit_train.tracking import Tracker
from diffit_train.training.log import (
    DamagedRunFile,
    SkippedSteps,
    TrainingLog,
    append_bad_step,
    as_metrics,
    check_run_files,
)
from diffit_train.training.verify import verify_run
from tests.conftest import tiny_recipe
from tests.made import make_state


def _record(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "step_s": 0.5, "lr": 1e-3}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a log of three records, known to MLflow, and a checkpoint at step 6."""
    from diffit_train.models.build import build_model

    recipe = tiny_recipe(tmp_path)
    identity = create_identity(recipe, "one")
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
    export_weights(recipe, "one", 6, "ema")
    return folder


def test_an_undamaged_run_is_good(run: Path) -> None:
    check_run_files(str(run))
    assert verify_run(str(run)) == {}
    assert check_run(str(run), repair=False)["bad"] == {}


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
def test_a_damaged_log_is_named_and_comes_back(how: str, run: Path) -> None:
    file = run / "log.jsonl"
    text = DAMAGE[how](file.read_text())
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"{file} is damaged: .*`diffit verify run {run} --rep"):
        check_run_files(str(run))
    with pytest.raises(DiffitError, match=r"1 damaged part in (.|\n)*log\.jsonl: (.|\n)*--repair"):
        check_run(str(run), repair=False)
    if how in ("emptied", "binary"):  # the way back does not depend on the damage
        assert check_run(str(run), repair=True)["bad"] == {}
        check_run_files(str(run))
        mark = LogMark.model_validate_json((run / "log-rebuilt.json").read_bytes())
        assert TrainingLog(str(run), 6, mark).records == [_record(step) for step in (2, 4, 6)]


def test_without_a_mark_any_log_is_read(run: Path) -> None:
    (run / "log.jsonl").write_text("".join(json.dumps(_record(s)) + "\n" for s in (2, 4)))
    assert len(TrainingLog(str(run), 6, None).records) == 2


@pytest.mark.parametrize("text", ["", "[[3,", "[[3]]", '{"ranges": [[3, 9]], "checksum": "0"}'])
def test_damaged_ranges_are_named_and_come_back(text: str, run: Path) -> None:
    file = run / "passed-over.json"
    file.write_text(text)
    with pytest.raises(DamagedRunFile, match=f"{file} is damaged: .* from bad-steps.jsonl"):
        SkippedSteps.read(str(run))
    # The recipe rolls back after so many consecutive bad steps.
    recipe = run / "recipe.yaml"
    most = stored_recipe(str(run)).train.max_consecutive_bad_steps
    recipe.write_text(
        recipe.read_text().replace(
            f"max_consecutive_bad_steps: {most}", "max_consecutive_bad_steps: 2"
        )
    )
    check_run(str(run), repair=True)
    assert SkippedSteps.read(str(run)).ranges == ((3, 4), (7, 8))


def test_a_worker_can_send_the_error_to_the_driver(tmp_path: Path) -> None:
    from ray import cloudpickle

    error = DamagedRunFile.of(f"{tmp_path}/log.jsonl", "it is empty", "MLflow")
    again = cloudpickle.loads(cloudpickle.dumps(error))
    assert (str(again), again.reason) == (str(error), "it is empty")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("batch_size: 8", "batch_size: 6"),
        lambda text: "\udcff" + text,
    ],
)
def test_a_damaged_recipe_is_named_and_comes_back(change: Any, run: Path) -> None:
    before, file = stored_recipe(str(run)), run / "recipe.yaml"
    file.write_bytes(change(file.read_text()).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"{file} is damaged: (.|\n)*verify run {run} --repair"):
        stored_recipe(str(run))
    check_run(str(run), repair=True)
    assert stored_recipe(str(run)) == before


def test_a_damaged_identity_is_named_and_comes_back(run: Path) -> None:
    before, file = read_identity(str(run)), run / "run.json"
    assert before is not None
    file.write_text(file.read_text().replace(before.uuid, before.uuid[::-1]))
    with pytest.raises(DiffitError, match=f"{file} is damaged: .*verify run {run} --repair"):
        read_identity(str(run))
    check_run(str(run), repair=True)
    assert read_identity(str(run)) == before


def test_a_damaged_export_is_written_again_and_a_checkpoint_is_not(run: Path) -> None:
    export = next((run / "export").iterdir())
    before = export.read_bytes()
    export.write_bytes(before[:-3] + b"xyz")
    assert list(verify_run(str(run))) == [f"export/{export.name}"]
    check_run(str(run), repair=True)
    assert len(export.read_bytes()) == len(before)
    weights = next((run / "checkpoints").rglob("ema/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DiffitError, match="step-0000000006: .*differs from its recorded sha256"):
        check_run(str(run), repair=True)
    assert committed_steps(str(run)) == [6]


def test_a_root_is_checked_as_a_whole(run: Path, tmp_path: Path) -> None:
    assert check_root(str(tmp_path), repair=False)["bad"] == {}
    (run / "log.jsonl").write_text("")
    with pytest.raises(DiffitError, match=r"runs/one: 1 damaged part"):
        check_root(str(tmp_path), repair=False)
    check_root(str(tmp_path), repair=True)
    database = tmp_path / "mlflow.db"
    whole = bytearray(database.read_bytes())
    whole[4096:20000] = b"\xff" * (20000 - 4096)
    database.write_bytes(whole)
    with pytest.raises(DiffitError, match=r"mlflow\.db: .*restore .*mlflow\.db from a backup"):
        check_root(str(tmp_path), repair=False)
    with pytest.raises(UserError, match="is not a root"):
        check_root(str(tmp_path / "runs"), repair=False)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the folder of a run"):
        verify_run(str(tmp_path / "none"))


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
