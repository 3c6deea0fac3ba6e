"""What an actor loads, and when."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffit_train.evaluation import node_weights
from diffit_train.evaluation.actors import (
    ChunkTask,
    EvaluationActor,
    EvaluationTarget,
    _OneAtATime,
)
from diffit_train.evaluation.chunks import Range, committed_chunks, read_chunk_images
from tests.conftest import tiny_recipe


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Checkpoints whose weights were fetched."""
    found: list[tuple[str, int]] = []
    real = node_weights.node_weights

    def fetch(recipe: Any, source: str, step: int) -> Any:
        found.append((recipe.evaluate.weights, step))
        return real(recipe, source, step)

    monkeypatch.setattr(node_weights, "node_weights", fetch)
    monkeypatch.setattr(node_weights, "node_folder", lambda: tmp_path / "copies")
    return found


def _task(root: Path, folder: Path, step: int = 12) -> ChunkTask:
    target = EvaluationTarget(str(root / "runs" / "tiny"), step, str(folder), "key")
    return ChunkTask(target, Range(0, 4))


def test_settings_of_one_checkpoint_share_its_weights(
    trained: Path, tmp_path: Path, fetched: list[tuple[str, int]]
) -> None:
    def chunk(actor: EvaluationActor, name: str, *overrides: str, step: int = 12) -> np.ndarray:
        recipe = tiny_recipe(trained, *overrides).model_dump(mode="json")
        seconds = actor.chunk(recipe, _task(trained, tmp_path / name, step))
        assert seconds > 0
        (part,) = committed_chunks(str(tmp_path / name))
        return read_chunk_images(str(tmp_path / name), part)

    changes = ("evaluate.guidance.scale=4", "evaluate.sampler.steps=5", "evaluate.seed=3")
    actor = EvaluationActor(tiny_recipe(trained).model_dump(mode="json"))
    actor.ready()
    plain = chunk(actor, "plain")
    model = actor.generator.model
    made = [chunk(actor, change, change) for change in changes]
    assert actor.generator.model is model
    assert fetched == [("ema", 12)]
    # Each is what an actor of its own makes.
    for change, pixels in zip(changes, made, strict=True):
        alone = EvaluationActor(tiny_recipe(trained).model_dump(mode="json"))
        alone.ready()
        assert np.array_equal(chunk(alone, f"{change} alone", change), pixels)
        assert not np.array_equal(pixels, plain)
    fetched.clear()
    chunk(actor, "raw", "evaluate.weights=raw")
    assert not np.array_equal(chunk(actor, "earlier", step=4), plain)
    assert np.array_equal(chunk(actor, "again"), plain)
    assert fetched == [("raw", 12), ("ema", 4), ("ema", 12)]


def test_a_chunk_is_committed_while_the_next_is_generated(
    trained: Path, tmp_path: Path, fetched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffit_train.evaluation import chunks

    actor = EvaluationActor(tiny_recipe(trained).model_dump(mode="json"))
    actor.ready()
    committing, released = threading.Event(), threading.Event()
    real = chunks.write_chunk

    def slow(*args: Any) -> None:
        # The first commit ends only once the other call has generated its images.
        if not committing.is_set():
            committing.set()
            assert released.wait(30)
        else:
            released.set()
        real(*args)

    monkeypatch.setattr(chunks, "write_chunk", slow)
    recipe = tiny_recipe(trained).model_dump(mode="json")
    tasks = [_task(trained, tmp_path / name) for name in ("first", "second")]
    threads = [threading.Thread(target=actor.chunk, args=(recipe, task)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [len(committed_chunks(str(tmp_path / name))) for name in ("first", "second")] == [1, 1]
    # Both may ask for the weights before the first call has loaded them.
    assert 1 <= len(fetched) <= 2


def test_features_are_measured_by_one_thread_at_a_time() -> None:
    """TF32 is a setting of the process: threads that overlap would restore each other's."""
    inside, most = 0, 0

    class Network:
        def extract(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1
            return {"features": pixels}

    network = _OneAtATime(Network(), threading.RLock())
    threads = [threading.Thread(target=network.extract, args=(np.zeros(1),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert most == 1
