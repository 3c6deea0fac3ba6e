"""What runs there are, removing one, and following a training from elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner

from diffit_train import storage
from diffit_train.cli.main import app
from diffit_train.cli.runs import (
    follow_training,
    list_runs,
    newest_training,
    remove_run,
    show_run,
)
from diffit_train.config import stored_text
from diffit_train.errors import DiffitError, UserError
from diffit_train.runs import lease
from diffit_train.runs.checkpoints import Checkpoints, save_whole
from diffit_train.runs.lease import Holder
from diffit_train.runs.run import Run, open_run
from diffit_train.tracking import Tracker
from tests.conftest import tiny_recipe
from tests.head import free_port
from tests.made import make_state

RECORD = {"loss": 0.25, "images_per_s": 40.0}


def _run(root: Path, run: str, *steps: int) -> str:
    """A run with small checkpoints."""
    recipe = tiny_recipe(root)
    url = str(root / "runs" / run)
    open_run(recipe, run).create()
    values = {"w": torch.arange(1000.0)}
    for step in steps:
        state = make_state(step, recipe_hash=recipe.train_hash())
        save_whole({"ema": values}, {"w": torch.Size([1000])}, url, state)
    return url


def _hold(url: str, step: int, silent_s: float = 0.0, **changes: bool) -> None:
    """Write what a command that trains the run, or did, leaves of its lease."""
    written = {"written_s": time.time() - silent_s, "progress": {"step": step, **RECORD}}
    holder = Holder.me().model_copy(update=written | changes)
    storage.write_text(f"{url}/lease/00000001.json", holder.model_dump_json())


def test_states_of_runs(tmp_path: Path) -> None:
    _run(tmp_path, "done", 4, 12)
    _run(tmp_path, "begun", 4)
    _run(tmp_path, "new")
    _hold(_run(tmp_path, "going", 4), 7)
    _hold(_run(tmp_path, "silent", 4), 7, silent_s=100.0)
    left, broken = Run(str(tmp_path), "left"), Run(str(tmp_path), "broken")
    for run in (left, broken):
        _run(tmp_path, run.name, 4)
    with pytest.raises(SystemExit), left.acquire():
        raise SystemExit(143)
    with pytest.raises(ZeroDivisionError), broken.acquire():
        raise ZeroDivisionError
    (tmp_path / "runs" / "no-run").mkdir()
    rows = {row["run"]: row for row in list_runs(str(tmp_path))}
    assert {run: row["state"] for run, row in rows.items()} == {
        "done": "finished",
        "begun": "stopped",
        "new": "empty",
        "going": "training",
        "silent": "killed",
        "left": "stopped",
        "broken": "failed",
    }
    going = rows["going"]
    assert (going["step"], going["steps"], going["loss"]) == (7, 12, 0.25)
    assert rows["done"]["step"] == 12
    # A command that was killed may have trained further than its checkpoint.
    assert rows["silent"]["step"] == 4


def test_a_run_is_shown_with_the_sizes_of_its_checkpoints(tmp_path: Path) -> None:
    url = _run(tmp_path, "mine", 4, 8)
    storage.write_bytes(f"{url}/export/ema-0000000008.safetensors", bytes(5000))
    _hold(url, 9)
    found = show_run(str(tmp_path), "mine")
    assert [one["step"] for one in found["checkpoints"]] == [4, 8]
    assert all(4000 < one["bytes"] < 8000 for one in found["checkpoints"])
    assert found["checkpoints"][0]["holds"] == ["ema"]
    assert found["exports"] == [{"file": "export/ema-0000000008.safetensors", "bytes": 5000}]
    assert found["bytes"] == sum(p.stat().st_size for p in Path(url).rglob("*") if p.is_file())
    assert found["evaluations"] == []
    with pytest.raises(UserError, match="'other' .*: mine"):
        show_run(str(tmp_path), "other")
    words = ["runs", "show", "mine", "--root", str(tmp_path), "--json"]
    assert json.loads(CliRunner().invoke(app, words).stdout)["step"] == 9
    listed = CliRunner().invoke(app, ["runs", "list", "--root", str(tmp_path), "--json"])
    assert [row["run"] for row in json.loads(listed.stdout)] == ["mine"]


def test_a_run_is_removed_only_when_agreed_and_idle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr(lease, "POLL_S", 0.1)
    url = _run(tmp_path, "mine", 4)
    _run(tmp_path, "other", 4)
    storage.write_text(str(tmp_path / "evaluations" / "mine" / "step-0000000004" / "x"), "x")
    assert not remove_run(str(tmp_path), "mine", yes=False)["removed"]
    assert "rerun with --yes" in capsys.readouterr().err
    assert Path(url).exists()
    training = lease.acquire(url, False, lambda: None)
    with training, pytest.raises(UserError, match="--wait"):
        remove_run(str(tmp_path), "mine", yes=True)
    assert remove_run(str(tmp_path), "mine", yes=True)["removed"]
    assert not (tmp_path / "runs" / "mine").exists()
    assert not (tmp_path / "evaluations" / "mine").exists()
    assert (tmp_path / "runs" / "other" / "run.json").exists()


def test_a_run_is_removed_from_mlflow_if_asked(tmp_path: Path) -> None:
    tracker = Tracker.of(tiny_recipe(tmp_path))
    for run in ("mine", "kept", "other"):
        _run(tmp_path, run, 4)
        identity = open_run(tiny_recipe(tmp_path), run).metadata
        assert identity is not None
        parent = tracker.training_run("e", identity.uuid, run, {}, {})
        tracker.evaluation_run("e", parent, "key", f"evaluation of {run}", {}, {})
    remove = ["runs", "remove", "--root", str(tmp_path)]
    said = CliRunner().invoke(app, [*remove, "mine", "--mlflow"]).stderr
    assert "2 runs in MLflow at sqlite:///" in said
    assert len(tracker.runs()) == 6  # nobody has agreed
    CliRunner().invoke(app, [*remove, "mine", "--mlflow", "--yes"])
    said = CliRunner().invoke(app, [*remove, "kept", "--yes"]).stderr
    assert "MLflow keeps the run's curves" in said
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]
    left = {record.name for record in tracker.runs()}
    assert left == {"kept", "evaluation of kept", "other", "evaluation of other"}


def test_a_removal_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    url, remove = _run(tmp_path, "mine", 4), storage.remove

    def killed(place: str) -> None:
        if place == url:
            raise Killed
        remove(place)

    monkeypatch.setattr(storage, "remove", killed)
    with pytest.raises(Killed):
        remove_run(str(tmp_path), "mine", yes=True, in_mlflow=True)
    monkeypatch.undo()
    assert list_runs(str(tmp_path)) == []
    assert remove_run(str(tmp_path), "mine", yes=True, in_mlflow=True)["removed"]
    assert not Path(url).exists()


def test_nothing_is_removed_while_mlflow_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = _run(tmp_path, "mine", 4)
    away = f"tracking.uri=http://127.0.0.1:{free_port()}"
    storage.write_text(f"{url}/recipe.yaml", stored_text(tiny_recipe(tmp_path, away)))
    with pytest.raises(DiffitError, match="--mlflow"):
        remove_run(str(tmp_path), "mine", yes=True, in_mlflow=True)
    storage.write_text(f"{url}/recipe.yaml", stored_text(tiny_recipe(tmp_path)))

    def forbid(tracker: Tracker, run_ids: Sequence[str]) -> None:
        raise MlflowException("Permission denied")

    monkeypatch.setattr(Tracker, "delete", forbid)
    with pytest.raises(DiffitError, match="Permission denied.*--mlflow"):
        remove_run(str(tmp_path), "mine", yes=True, in_mlflow=True)
    assert Checkpoints(url).steps == [4]
    assert remove_run(str(tmp_path), "mine", yes=True)["removed"]


def test_the_newest_training_is_watched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        newest_training(str(tmp_path))
    first, second = _run(tmp_path, "first", 4), _run(tmp_path, "second", 4)
    _hold(first, 4, silent_s=1.0, released=True)
    _hold(second, 4, released=True)
    _run(tmp_path, "imported", 4)
    assert newest_training(str(tmp_path)) == "second"
    _hold(first, 7, silent_s=1.0)
    assert newest_training(str(tmp_path)) == "first"
    _hold(second, 7)
    with pytest.raises(UserError, match="first, second"):
        newest_training(str(tmp_path))


def test_a_training_is_followed_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = _run(tmp_path, "mine", 0)
    _hold(url, 0)

    def end() -> None:
        _run(tmp_path, "mine", 12)
        _hold(url, 12, released=True)

    pauses = iter([lambda: _hold(url, 6), end])
    found = follow_training(str(tmp_path), "mine", pause=lambda seconds: next(pauses)())
    assert (found["state"], found["step"]) == ("finished", 12)
    assert "run mine: finished at step 12 of 12" in capsys.readouterr().err


def test_a_failed_or_silent_training_is_a_failure(tmp_path: Path) -> None:
    url = _run(tmp_path, "mine", 0)
    with pytest.raises(UserError, match="diffit runs show mine"):
        follow_training(str(tmp_path), "mine")
    _hold(url, 4, released=True, failed=True)
    with pytest.raises(DiffitError, match="'mine' failed"):
        follow_training(str(tmp_path), "mine")
    _hold(url, 4, silent_s=100.0)
    with pytest.raises(DiffitError, match="'mine' was killed"):
        follow_training(str(tmp_path), "mine")
