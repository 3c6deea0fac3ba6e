"""`diffit doctor` on this machine: what is fine, and what needs fixing."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffit_train.cli import app, exit_status
from diffit_train.commands.doctor import check_machine
from tests.conftest import tiny_recipe
from tests.head import free_port


def test_a_sound_machine_passes_and_nothing_is_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", "demo", "--root", str(tmp_path)]
    assert exit_status(lambda: app(words, standalone_mode=False)) == 0
    assert "all checks passed" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_named_with_its_fix(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    changes = (f"tracking.uri={uri}", "scaling.gpus_per_worker=1")
    checks = {c.check: c for c in check_machine(tiny_recipe(tmp_path / "file", *changes), "here")}
    assert "make it writable" in checks["root"].fix
    assert "fix tracking.uri" in checks["mlflow"].fix
    assert "secret" not in str(checks)
    assert "wants 1 GPU" in checks["gpus"].fix
    monkeypatch.setattr("diffit_train.commands.doctor.requires", lambda name: ["numpy>99", "nope"])
    checks = {c.check: c for c in check_machine(tiny_recipe(tmp_path), "here")}
    assert checks["numpy"].fix == "pip install 'numpy>99'"
    assert checks["nope"].found == "missing"
    words = ["doctor", "demo", "--root", str(tmp_path / "file")]
    assert exit_status(lambda: app(words, standalone_mode=False)) == 1
    assert "failed: " in capfd.readouterr().err
