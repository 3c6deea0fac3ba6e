"""`diffit clean` lists what nobody needs, and deletes nothing else."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from diffit_train import storage
from diffit_train.cli import exit_status, main
from diffit_train.commands import clean
from diffit_train.commands.clean import clean_command
from diffit_train.leftovers import find_leftovers

DAY_S = 86_400.0
EVALUATION = "evaluations/demo/step-0000000004"

# What a project holds that must stay, whatever its age.
WANTED = {
    "images/digits/a/photo.png.tmp-mine": "the user's own",
    "latents/digits/manifest.json": "{}",
    "latents/digits/parts/plan.json": "an append that a rerun continues",
    "references/digits.safetensors": "reference",
    "references/other.safetensors.parts/part-00000.safetensors": "a reference in the making",
    "features/own/features.json": "{}",
    "features/fitting/fit-state.safetensors": "a fit that a rerun continues",
    "runs/demo/run.json": "{}",
    "runs/demo/log.jsonl": "{}",
    "runs/demo/checkpoints/step-0000000004/commit.json": "{}",
    "runs/demo/checkpoints/step-0000000004/rank-00000-of-00001.safetensors": "weights",
    "runs/demo/ema-snapshots/checkpoints/step-0000000004/commit.json": "{}",
    f"{EVALUATION}/kept/result.json": json.dumps({"keep_images": "all"}),
    f"{EVALUATION}/kept/images-0000000-0000004.npy": "wanted",
    f"{EVALUATION}/grid/result.json": json.dumps({"keep_images": "grid"}),
    f"{EVALUATION}/grid/grid-0000000-0000004.npy": "of the grid",
    f"{EVALUATION}/grid/chunk-0000000-0000004.safetensors": "measurements",
    f"{EVALUATION}/grid/samples.npz": "samples",
    f"{EVALUATION}/running/chunk-0000000-0000004.safetensors": "can be finished",
    f"{EVALUATION}/running/images-0000000-0000004.npy": "can be finished",
    "evaluations/demo/sweeps/first/sweep.json": "{}",
}
# What is left behind, by kind.
LEFT = {
    "runs/demo/export/ema.safetensors.tmp-killed": "half-written file",
    "runs/demo/checkpoints/step-0000000008/rank-00000-of-00001.safetensors": (
        "checkpoint that was never finished"
    ),
    "runs/demo/ema-snapshots/checkpoints/step-0000000008/rank-00000-of-00001.safetensors": (
        "checkpoint that was never finished"
    ),
    "runs/demo/ray/run/state.json": "state of a killed training",
    f"{EVALUATION}/grid/images-0000000-0000004.npy": "images of a finished evaluation",
    "evaluations/demo/step-0000000099/lost/chunk-0000000-0000004.safetensors": (
        "unfinished evaluation of a removed checkpoint"
    ),
    "references/digits.safetensors.parts/part-00000.safetensors": "parts of a finished reference",
    "features/own/fit-state.safetensors": "state of a finished fit",
}


def _write(root: Path, path: str, text: str, age_s: float = 2 * DAY_S) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    os.utime(file, (time.time() - age_s,) * 2)


def _files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with all that can be left behind, two days old, and an empty temporary folder."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    project = tmp_path / "project"
    for path, text in WANTED.items():
        _write(project, path, text)
    for path in LEFT:
        _write(project, path, "x" * 100)
    return project


def _clean(root: Path | str, *options: str) -> int:
    return exit_status(lambda: main(["clean", "--root", str(root), *options]))


def test_only_what_nobody_needs_is_listed_and_deleted(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {file for one in find_leftovers(str(root)) for file in one.files} == {
        str(root / path) for path in LEFT
    }
    assert _clean(root, "--yes", "--json") == 0
    out = capsys.readouterr()
    rows = json.loads(out.out)
    assert sorted(row["kind"] for row in rows) == sorted(LEFT.values())
    assert all(row["bytes"] == 100 and row["deleted"] for row in rows)
    assert _files(root) == set(WANTED)
    assert not (root / "runs/demo/checkpoints/step-0000000008").exists()
    assert not (root / "runs/demo/ray").exists()
    assert _clean(root, "--yes") == 0
    assert "nothing to delete" in capsys.readouterr().err


def test_without_an_answer_nothing_is_deleted(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _files(root)
    assert _clean(root) == 0
    err = capsys.readouterr().err
    assert "rerun with --yes to delete it" in err
    assert "images of a finished evaluation" in err
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(typer, "confirm", lambda *_, **__: False)
    clean_command(str(root))
    assert _files(root) == before
    monkeypatch.setattr(typer, "confirm", lambda *_, **__: True)
    clean_command(str(root))
    assert _files(root) == set(WANTED)


def test_what_may_be_in_use_is_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A run that still writes its log, and an evaluation that has just ended.
    _write(root, "runs/demo/log.jsonl", "{}", age_s=60.0)
    _write(root, f"{EVALUATION}/grid/result.json", json.dumps({"keep_images": "grid"}), 60.0)
    assert _clean(root, "--yes") == 0
    assert "4 more may be in use: written to in the last 24 hours" in capsys.readouterr().err
    kept = {path for path in LEFT if path.startswith(("runs/demo/", f"{EVALUATION}/grid/"))} - {
        "runs/demo/export/ema.safetensors.tmp-killed"
    }
    assert _files(root) == set(WANTED) | kept
    assert _clean(root, "--yes", "--older-than", "0") == 0
    assert _files(root) == set(WANTED)


def test_what_changes_while_the_user_is_asked_is_kept(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = "runs/demo/checkpoints/step-0000000008"

    def agreed(_: object) -> bool:
        # A slow save ends after all.
        _write(root, f"{folder}/commit.json", "{}")
        return True

    monkeypatch.setattr(clean, "_agreed", agreed)
    assert _clean(root) == 0
    assert "has changed meanwhile; it is kept" in capsys.readouterr().err
    assert len(list((root / folder).iterdir())) == 2


def test_temporary_folders_of_killed_commands_are_deleted(root: Path) -> None:
    temporary = Path(tempfile.gettempdir())
    _write(temporary, "diffit-download-abc/shard.tar", "x")
    _write(temporary, "diffit-upload-new/shard.tar", "x", age_s=5.0)
    _write(temporary, "diffit-shards-user/cache.tar", "x")
    _write(temporary, "somebody-else/file", "x")
    for name in ("diffit-download-abc", "diffit-shards-user"):
        os.utime(temporary / name, (time.time() - 2 * DAY_S,) * 2)
    assert _clean(root, "--yes") == 0
    assert sorted(path.name for path in temporary.iterdir()) == [
        "diffit-shards-user",
        "diffit-upload-new",
        "somebody-else",
    ]


@pytest.fixture
def remote() -> Iterator[str]:
    """The same root on an object store in memory."""
    url = "memory://clean/project"
    for path, text in WANTED.items():
        storage.write_text(storage.join(url, path), text)
    for path in LEFT:
        storage.write_text(storage.join(url, path), "x" * 100)
    yield url
    storage.remove("memory://clean")


def test_a_remote_root_is_cleaned(remote: str, root: Path) -> None:
    assert _clean(remote, "--yes") == 0
    assert len(storage.walk(remote)) == len(WANTED) + len(LEFT), "written just now"
    assert _clean(remote, "--yes", "--older-than", "0") == 0
    assert set(storage.walk(remote)) == set(WANTED)


def test_a_root_that_does_not_exist_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _clean(tmp_path / "nowhere", "--yes") == 2
    assert "does not exist; give the folder of a project" in capsys.readouterr().err
