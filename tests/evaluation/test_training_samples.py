"""Grids that show a run while it trains: which, when, what they cost the training, and MLflow."""

from __future__ import annotations

import io
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffit_train import storage
from diffit_train.api import train
from diffit_train.config import load_recipe
from diffit_train.errors import DiffitError
from diffit_train.evaluation.training_samples import KEY, TrainingSamples, quick_recipe
from diffit_train.runs.checkpoints import Checkpoint, Checkpoints
from diffit_train.runs.run import Run, open_run
from diffit_train.tracking import Tracker
from diffit_train.training.checkpoint_thread import CheckpointThread
from diffit_train.training.driver import draw_and_log
from diffit_train.training.log import TrainingLog
from tests.conftest import tiny_recipe


@pytest.mark.parametrize(
    ("every", "drawn", "steps", "due"),
    [
        (10, [], [0, 5, 10, 15, 20], [10, 20]),
        (10, [10], [0, 5, 10, 15, 20, 30], [20, 30]),
        (10, [], [0, 7, 14, 21, 28], [14, 21]),  # the first one at or after 10, and after 20
        (10, [14], [7, 15, 16], []),
        (10, [], [0, 40], [40]),  # checkpoints are rarer
        (10, [], [0, 9], []),
    ],
)
def test_the_first_checkpoint_due_is_drawn(
    every: int, drawn: list[int], steps: list[int], due: list[int], tmp_path: Path
) -> None:
    samples = TrainingSamples(open_run(tiny_recipe(tmp_path, f"train.sample_every={every}"), "a"))
    for step in drawn:
        storage.write_bytes(f"{tmp_path}/runs/a/samples/step-{step:010d}.png", b"")
    assert samples.due(steps) == due


@pytest.mark.parametrize("name", ["demo", "imagenet256", "cifar10"])
def test_grids_take_few_steps_of_an_ema(name: str) -> None:
    recipe = load_recipe(name)
    quick = quick_recipe(recipe).evaluate
    assert quick.sampler.steps <= 20
    assert quick.sampler.name not in ("ddpm", "sde")
    assert quick.weights in recipe.train.ema
    quick_recipe(recipe.model_copy(update={"train": recipe.train.model_copy(update={"ema": {}})}))
    assert (recipe.train.sample_every is not None) == (name == "demo")


def _wait(what: Callable[[], bool]) -> None:
    for _ in range(200):
        if what():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it did not happen")


def _thread(handle: Callable[[int], None], stop: threading.Event, root: Path) -> CheckpointThread:
    run = Run(str(root), "run")
    return CheckpointThread(run, lambda _: [10, 20], handle, "draw", stop, on_cpu=True)


def test_what_is_due_is_handled_at_the_end_unless_training_stops(tmp_path: Path) -> None:
    handled, stop = list[int](), threading.Event()
    with _thread(handled.append, stop, tmp_path):
        pass
    assert handled == [10, 20]
    stop.set()
    with _thread(handled.append, stop, tmp_path):
        pass
    with pytest.raises(KeyboardInterrupt), _thread(handled.append, threading.Event(), tmp_path):
        raise KeyboardInterrupt
    assert handled == [10, 20]


def test_a_checkpoint_that_cannot_be_handled_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed: list[int] = []

    def fail(step: int) -> None:
        failed.append(step)
        raise DiffitError("no decoder\nat all")

    with _thread(fail, threading.Event(), tmp_path):
        _wait(lambda: failed == [10, 20])
    lines = [f"Could not draw step {step}: no decoder" for step in (10, 20)]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.fixture
def copy(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trained project, copied."""
    from mlflow.tracking._tracking_service import utils

    # By run, and so of the original.
    monkeypatch.setattr(utils, "_artifact_repos_cache", OrderedDict())
    shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def test_grids_of_a_run_are_drawn_once_and_logged(copy: Path) -> None:
    recipe = tiny_recipe(copy, "train.sample_every=4")
    samples, url = TrainingSamples(open_run(recipe, "tiny")), Run(recipe.storage.root, "tiny").url
    steps = Checkpoints(url).steps
    due = samples.due(steps)
    assert due
    for step in due:
        samples.draw(step)
    assert samples.due(steps) == []
    file = copy / "runs" / "tiny" / "samples" / f"step-{due[-1]:010d}.png"
    first = file.read_bytes()
    pixels = np.asarray(Image.open(io.BytesIO(first)).convert("RGB"))
    assert pixels.std() > 10  # images, not an empty page
    samples.draw(due[-1])
    assert np.array_equal(np.asarray(Image.open(file).convert("RGB")), pixels)

    tracker = Tracker.of(recipe)
    run_id = Checkpoint(url, steps[-1]).state.mlflow_run_id
    for _ in range(2):
        samples.send(run_id)
        assert tracker.image_steps(run_id, KEY) == set(due)
    logged = [f.path for f in tracker.client.list_artifacts(run_id, "images")]
    assert sum(path.endswith(".png") for path in logged) == len(due)


def test_grids_wait_for_mlflow(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    recipe = tiny_recipe(copy, "train.sample_every=12")
    url = Run(recipe.storage.root, "tiny").url
    away = tiny_recipe(copy, "train.sample_every=12", "tracking.uri=http://127.0.0.1:9")
    run_id = Checkpoint(url, Checkpoints(url).steps[-1]).state.mlflow_run_id
    draw_and_log(TrainingSamples(open_run(away, "tiny")), run_id, 12)
    assert "Could not log samples to MLflow" in capsys.readouterr().err
    tracker = Tracker.of(recipe)
    assert not tracker.image_steps(run_id, KEY)
    train(recipe, "tiny")  # already trained
    assert (
        tracker.image_steps(run_id, KEY)
        == TrainingSamples(open_run(recipe, "tiny")).drawn()
        != set()
    )


def test_the_recipe_is_stored_with_the_run(trained: Path) -> None:
    recipe = tiny_recipe(trained)
    url = Run(recipe.storage.root, "tiny").url
    run_id = Checkpoint(url, Checkpoints(url).steps[-1]).state.mlflow_run_id
    stored = Tracker.of(recipe).artifact(run_id, "recipe.yaml")
    assert stored == storage.read_bytes(storage.join(url, "recipe.yaml"))


@pytest.mark.slow
def test_the_curve_is_the_same_with_grids(copy: Path) -> None:
    recipe = tiny_recipe(copy, "train.sample_every=4")
    train(recipe, "watched")
    assert TrainingSamples(open_run(recipe, "watched")).drawn()
    names = ("loss", "grad_norm")
    curves = []
    for run in ("tiny", "watched"):
        url = Run(recipe.storage.root, run).url
        records = TrainingLog(url, Checkpoints(url).steps[-1]).records
        curves.append([[record[name] for name in names] for record in records])
    assert curves[0] == curves[1]
    weights = [
        (copy / "runs" / run / "checkpoints").rglob("master/*.safetensors")
        for run in ("tiny", "watched")
    ]
    first, second = ([path.read_bytes() for path in sorted(found)][-1] for found in weights)
    assert first == second
