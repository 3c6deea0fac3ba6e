"""`diffit doctor` on this machine: what is fine, and what needs fixing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

from diffit_train.cli.main import app, exit_status
from diffit_train.jobs.doctor import check_machine, check_nodes, check_size
from diffit_train.jobs.node import PACKAGE, Check, check_packages
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
    # A Ray session that an earlier test left in this process schedules no GPU.
    monkeypatch.setattr("diffit_train.jobs.doctor.scheduled_gpus", lambda: None)
    (tmp_path / "file").write_text("not a folder")
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    changes = (f"tracking.uri={uri}", "scaling.gpus_per_worker=1")
    checks = {c.check: c for c in check_machine(tiny_recipe(tmp_path / "file", *changes), "here")}
    assert "make it writable" in checks["root"].fix
    assert "fix tracking.uri" in checks["mlflow"].fix
    assert "secret" not in str(checks)
    assert "wants 1 GPU" in checks["gpus"].fix
    monkeypatch.setattr("diffit_train.jobs.node.requires", lambda name: ["numpy>99", "nope"])
    checks = {c.check: c for c in check_machine(tiny_recipe(tmp_path), "here")}
    assert checks["numpy"].fix == "pip install 'numpy>99'"
    assert checks["nope"].found == "missing"
    words = ["doctor", "demo", "--root", str(tmp_path / "file")]
    assert exit_status(lambda: app(words, standalone_mode=False)) == 1
    assert "failed: " in capfd.readouterr().err


def test_gpus_are_compared_with_what_ray_schedules_and_what_training_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SimpleNamespace(name="T4", total_memory=2**20)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i: small)
    monkeypatch.setattr("diffit_train.jobs.doctor.scheduled_gpus", lambda: None)

    def gpus(*changes: str) -> Check:
        checks = check_machine(tiny_recipe(tmp_path, *changes), "here")
        return next(check for check in checks if check.check == "gpus")

    assert "training needs about" in gpus("scaling.gpus_per_worker=1").fix
    # A head without GPUs is fine, a node whose GPUs torch does not see is not.
    monkeypatch.setattr("diffit_train.jobs.doctor.scheduled_gpus", lambda: 2.0)
    assert "Ray schedules 2 GPU" in gpus("scaling.gpus_per_worker=1").fix
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("diffit_train.jobs.doctor.scheduled_gpus", lambda: 0.0)
    assert not gpus("scaling.gpus_per_worker=1").fix


def test_nodes_that_lack_packages_are_asked_for_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = Check("b", "fsspec", "missing", "pip install fsspec", package=True)
    asked = []

    def on_every_node(call: Callable[..., Any], *args: Any) -> list[Check]:
        asked.append(call)
        return [Check("a", "ray", "2"), lacking]

    monkeypatch.setattr("diffit_train.ray_session.connected", nullcontext)
    monkeypatch.setattr("diffit_train.jobs.doctor._on_every_node", on_every_node)
    assert check_nodes(tiny_recipe(tmp_path), ["train"]) == [Check("a", "ray", "2"), lacking]
    assert asked == [check_packages]


def test_the_first_check_of_a_job_needs_only_what_ray_brings() -> None:
    code = (
        "import sys, diffit_train.jobs.node\n"
        "diffit_train.jobs.node.check_packages('here')\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {"diffit_train", "packaging"}
    third_party = set(out.stdout.split()) - sys.stdlib_module_names - ours
    assert not third_party & {name.replace("-", "_") for name in _requirement_names()}


def _requirement_names() -> list[str]:
    return [Requirement(text).name for text in requires(PACKAGE) or ()]


def test_a_cluster_that_may_grow_is_large_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "3 GPUs, but the Ray cluster has 0"
    monkeypatch.setattr("diffit_train.ray_session.missing_resources", lambda cpus, gpus: missing)
    fixed = check_size(tiny_recipe(tmp_path), "train")
    assert "scaling.node_wait_timeout_s" in fixed.fix
    growing = check_size(tiny_recipe(tmp_path, "scaling.node_wait_timeout_s=60"), "train")
    assert (growing.found, growing.fix) == (f"needs {missing}; waits up to 60 s for more", "")
