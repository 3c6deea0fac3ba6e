"""Weights are read from a checkpoint once per node."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from diffit_train.evaluation import node_weights
from diffit_train.runs.checkpoints import Checkpoint
from tests.conftest import tiny_recipe


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read from checkpoints, whose digest is their step."""
    found: list[str] = []

    def read(recipe: object, source: str, step: int) -> dict[str, torch.Tensor]:
        found.append(f"{source} {step}")
        return {"weight": torch.full((3, 2), float(step)).T}

    monkeypatch.setattr(node_weights, "node_folder", lambda: tmp_path / "copies")
    monkeypatch.setattr(node_weights, "run_weights", read)
    monkeypatch.setattr(Checkpoint, "digest", property(lambda checkpoint: f"{checkpoint.step}"))
    return found


def _weight(root: Path, step: int, *overrides: str) -> float:
    weights = node_weights.node_weights(tiny_recipe(root, *overrides), "run", step)
    assert weights["weight"].shape == (2, 3)
    return float(weights["weight"][0, 0])


def test_a_checkpoint_is_read_once(tmp_path: Path, reads: list[str]) -> None:
    assert [_weight(tmp_path, 4) for _ in range(3)] == [4.0] * 3
    # Other settings of the same weights use the same copy; other weights do not.
    assert _weight(tmp_path, 4, "evaluate.guidance.scale=3") == 4.0
    assert len(reads) == 1
    _weight(tmp_path, 4, "evaluate.weights=raw")
    assert len(reads) == 2


def test_the_number_of_copies_is_bounded(tmp_path: Path, reads: list[str]) -> None:
    for step in (1, 2):
        _weight(tmp_path, step)
        time.sleep(0.01)
    held = node_weights.node_weights(tiny_recipe(tmp_path), "run", 2)
    _weight(tmp_path, 1)  # used last, so step 2 makes room
    half = tmp_path / "copies" / "x.safetensors.tmp-killed"
    half.write_bytes(b"half")
    _weight(tmp_path, 3)
    assert len(list((tmp_path / "copies").glob("*.safetensors"))) == node_weights.MOST_COPIES
    assert not half.exists()
    assert float(held["weight"][0, 0]) == 2.0
    reads.clear()
    assert [_weight(tmp_path, step) for step in (1, 3)] == [1.0, 3.0]
    assert reads == []


def test_without_room_the_checkpoint_is_used(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node_weights, "save_file", full)
    assert _weight(tmp_path, 4) == 4.0
    assert sorted(path.name for path in (tmp_path / "copies").iterdir()) == ["lock"]


def _slow_reader(root: Path, folder: Path) -> None:
    def read(recipe: object, source: str, step: int) -> dict[str, torch.Tensor]:
        (folder / f"read-{os.getpid()}").touch()
        time.sleep(0.3)
        return {"weight": torch.full((3, 2), 7.0)}

    node_weights.node_folder = lambda: folder / "copies"
    node_weights.run_weights = read
    Checkpoint.digest = property(lambda checkpoint: "digest")  # type: ignore[method-assign, assignment]
    found = node_weights.node_weights(tiny_recipe(root), "run", 7)
    assert float(found["weight"].sum()) == 42.0


def test_processes_of_a_node_share_one_read(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_slow_reader, args=(tmp_path, tmp_path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.glob("read-*"))) == 1
