"""Training under Ray Train: the same curve for any world size, kills and restarts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from diffit_train.config import dump_recipe
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.sample import WeightSource, sample_images
from diffit_train.runs.checkpoints import Checkpoint, Checkpoints
from diffit_train.runs.run import open_run
from diffit_train.tracking import Tracker
from diffit_train.training import driver
from tests.conftest import tiny_recipe, train

pytestmark = pytest.mark.usefixtures("ray_session")

# Long enough that a signal reaches the workers of a busy machine before the last step.
LONGER = ("train.steps=1500", "train.checkpoint_every=40", "train.log_every=20")
LONGER += ("train.keep_checkpoints=3",)


def _log(root: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "runs" / run / "log.jsonl").open()]


def _losses(root: Path, run: str) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in _log(root, run)]


def _copy(encoded: Path, root: Path) -> Path:
    for name in ("images", "autoencoders", "features", "latents"):
        shutil.copytree(encoded / name, root / name)
    return root


def test_a_run_leaves_log_checkpoints_and_metrics(trained: Path) -> None:
    recipe, run = tiny_recipe(trained), trained / "runs" / "tiny"
    assert Checkpoints(str(run)).steps == [0, 4, 8, 12]
    assert [step for step, _ in _losses(trained, "tiny")] == [2, 4, 6, 8, 10, 12]
    state = Checkpoint(str(run), 12).state
    assert (state.images_seen, state.optimizer_steps) == (96, 12)
    assert state.recipe_hash == recipe.train_hash()
    record = next(r for r in Tracker.of(recipe).runs() if r.run_id == state.mlflow_run_id)
    assert (record.name, record.status) == ("tiny", "FINISHED")
    assert record.params["train.lr"] == "0.003"
    names = {"train/loss", "train/grad_norm", "train/lr", "perf/images_per_s", "perf/step_s"}
    assert names | {"perf/data_wait_fraction", "perf/mfu"} <= record.metrics.keys()
    assert any(f"train/loss_q{quarter}" in record.metrics for quarter in range(4))
    assert record.tags["diffit.recipe_hash"] == recipe.train_hash()
    history = Tracker.of(recipe).history(state.mlflow_run_id, "train/loss")
    assert history == _losses(trained, "tiny")
    assert not (run / "ray").exists()


def test_training_moves_the_weights_and_the_ema_trails(trained: Path) -> None:
    run = str(trained / "runs" / "tiny")
    start, raw, ema = Checkpoint(run, 0).load("raw"), Checkpoint(run, 12).load("raw"), None
    ema = Checkpoint(run, 12).load("ema")
    assert start.keys() == raw.keys() == ema.keys()
    moved = sum(float((raw[n] - start[n]).norm()) for n in raw)
    trailed = sum(float((ema[n] - start[n]).norm()) for n in raw)
    assert 0 < trailed < moved
    initial_ema = Checkpoint(run, 0).load("ema")
    assert all(torch.equal(initial_ema[n], start[n]) for n in start)


def test_a_finished_run_is_left_unchanged(trained: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (trained / "runs").rglob("*")}
    assert open_run(tiny_recipe(trained), "tiny").finished_step == 12
    assert train(tiny_recipe(trained), "tiny") == 12
    assert {p: p.stat().st_mtime_ns for p in (trained / "runs").rglob("*")} == before


def test_bad_input_writes_nothing(trained: Path, tmp_path: Path) -> None:
    before = sorted(trained.rglob("*"))
    with pytest.raises(UserError, match=r"'tiny'.*another recipe.*train\.lr is 0\.5, there 0\.003"):
        train(tiny_recipe(trained, "train.lr=0.5"), "tiny")
    with pytest.raises(UserError, match=r"4 CPUs, .* 2"):
        train(tiny_recipe(trained, "scaling.workers=4"), "other")
    with pytest.raises(UserError, match="latents .*data.name"):
        train(tiny_recipe(trained, "autoencoder.scale=3"), "other")
    assert sorted(trained.rglob("*")) == before
    with pytest.raises(UserError, match="diffit encode"):
        train(tiny_recipe(tmp_path), "tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_that_mlflow_refuses_leaves_no_folder(encoded: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "mlflow.db"
    damaged.write_text("this is not a database, but long enough to be checked")
    for uri, kind in (
        ("http://127.0.0.1:1", DiffitError),
        (f"sqlite:///{damaged}", UserError),
    ):
        with pytest.raises(kind, match="MLflow"):
            train(tiny_recipe(encoded, f"tracking.uri={uri}"), "refused")
        assert not (encoded / "runs" / "refused").exists()


@pytest.mark.slow
def test_two_workers_give_the_same_curve(trained: Path) -> None:
    train(tiny_recipe(trained, "scaling.workers=2"), "two-workers")
    for mine, theirs in zip(_log(trained, "two-workers"), _log(trained, "tiny"), strict=True):
        for name in ("loss", "grad_norm", "lr"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4)


@pytest.fixture(scope="module")
def undisturbed(encoded: Path, ray_session: None) -> list[tuple[int, float]]:
    """The curve of a longer run."""
    train(tiny_recipe(encoded, *LONGER), "longer")
    return _losses(encoded, "longer")


def _start(root: Path, *changes: str) -> subprocess.Popen[bytes]:
    """`diffit train` with its own cluster."""
    (root / "recipe.yaml").write_text(dump_recipe(tiny_recipe(root, *LONGER, *changes)))
    command = [sys.executable, "-c", "from diffit_train.cli.main import main; main()", "train"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    # A root relative to this directory, which is not the workers' directory.
    command += ["recipe.yaml", "--root", ".", "--run", "killed"]
    with (root / "stderr").open("wb") as said:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=root,
            stderr=said,
            # A background job of a shell, which the tests may be, ignores Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def _wait_for_step(root: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while max(Checkpoints(str(root / "runs" / "killed")).steps, default=0) < step:
        assert process.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline, "training did not reach the step"
        time.sleep(0.02)


def _no_doubled_points(root: Path, expected: list[tuple[int, float]], run: str = "killed") -> None:
    tracker = Tracker.of(tiny_recipe(root))
    (record,) = [r for r in tracker.runs() if r.name == run]
    points = tracker.history(record.run_id, "train/loss")
    assert [step for step, _ in points] == [step for step, _ in expected]


def _kill_workers(process: subprocess.Popen[bytes]) -> int:
    """How many there were."""
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if child.name().startswith("ray::RayTrainW")]
    for worker in workers:
        worker.kill()
    return len(workers)


@pytest.mark.slow
def test_the_curve_is_unchanged_by_a_killed_worker_and_a_killed_command(
    encoded: Path, undisturbed: list[tuple[int, float]], tmp_path: Path
) -> None:
    process = _start(_copy(encoded, tmp_path))
    try:
        _wait_for_step(tmp_path, 80, process)
        assert _kill_workers(process)
        _wait_for_step(tmp_path, 200, process)
    finally:
        process.kill()
        process.wait()
    time.sleep(5)  # workers exit on their own once the command is gone
    assert max(Checkpoints(str(tmp_path / "runs" / "killed")).steps) < 1500
    assert train(tiny_recipe(tmp_path, *LONGER), "killed") == 1500
    assert _losses(tmp_path, "killed") == undisturbed
    _no_doubled_points(tmp_path, undisturbed)
    assert Checkpoints(str(tmp_path / "runs" / "killed")).steps == [0, 1440, 1480, 1500]


@pytest.mark.slow
def test_ctrl_c_has_its_own_status_and_the_run_can_be_resumed(
    encoded: Path, undisturbed: list[tuple[int, float]], tmp_path: Path
) -> None:
    process = _start(_copy(encoded, tmp_path))
    _wait_for_step(tmp_path, 80, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    said = (tmp_path / "stderr").read_text()
    assert "Stop requested; saving a checkpoint; Ctrl-C again quits at once" in said
    (record,) = [r for r in Tracker.of(tiny_recipe(tmp_path)).runs() if r.name == "killed"]
    assert record.status == "KILLED"
    saved = max(Checkpoints(str(tmp_path / "runs" / "killed")).steps)
    assert f"Stopped at step {saved}; rerun the same command to resume" in said
    assert saved % 40  # not a step where one is due anyway
    assert "Traceback" not in said
    assert train(tiny_recipe(tmp_path, *LONGER), "killed") == 1500
    assert _losses(tmp_path, "killed") == undisturbed


@pytest.mark.slow
def test_a_second_ctrl_c_quits_at_once(encoded: Path, tmp_path: Path) -> None:
    process = _start(_copy(encoded, tmp_path))
    try:
        _wait_for_step(tmp_path, 40, process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
    finally:
        process.kill()
    assert "Traceback" not in (tmp_path / "stderr").read_text()


@pytest.mark.slow
def test_a_damaged_shard_is_named_and_not_retried(
    encoded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = _copy(encoded, tmp_path)
    shard = root / "latents" / "digits" / "shard-000002.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    words = r"'damaged' failed: shard .*shard-000002\.tar .*`diffit verify FOLDER --remove`"
    with pytest.raises(DiffitError, match=words):
        train(tiny_recipe(root), "damaged")
    said = capfd.readouterr().err
    assert said.count("from step 0 on 1 worker\n") == 1
    assert "Restarting" not in said


@pytest.mark.slow  # objectives, models and options are also tested individually
def test_another_objective_and_model_with_many_options(encoded: Path, tmp_path: Path) -> None:
    """Flow matching, a model without labels, autocast, selective checkpointing; then images."""
    changes = ["diffusion.objective=flow", "model.architecture=dit_tmsa", "model.conditional=false"]
    changes += ["train.precision=bf16_autocast", "train.activation_checkpointing=selective"]
    changes += ["evaluate.sampler.name=sde", "evaluate.guidance.kind=none", "train.steps=6"]
    changes += ["train.checkpoint_every=6"]
    recipe = tiny_recipe(encoded, *changes)
    assert train(recipe, "flow") == 6
    losses = [loss for _, loss in _losses(encoded, "flow")]
    # The untrained velocity is zero, so the loss starts near E (noise - x_0)^2, at least 2.
    assert losses[0] > 1.0
    weights = Checkpoint(str(encoded / "runs" / "flow"), 6).load("raw")
    assert not any("y_embedder" in name for name in weights)
    assert weights["final_layer.linear.weight"].shape == (16, 16)
    source = WeightSource(open_run(recipe, "flow"))
    result = sample_images(source, [], "0-1", str(tmp_path), 2)
    assert len(result["images"]) == 2


def test_an_unsupported_kernel_is_refused_immediately(encoded: Path) -> None:
    with pytest.raises(UserError, match=r"model\.attention is 'flex', which needs a CUDA device"):
        train(tiny_recipe(encoded, "model.attention=flex"), "flex")
    assert not (encoded / "runs" / "flex").exists()


@pytest.mark.slow  # also tested without Ray
def test_a_hopeless_run_reports_why_and_is_not_restarted(
    encoded: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = [
        "train.grad_norm_limit=1e-9",
        "train.max_consecutive_bad_steps=2",
        "train.max_rollbacks=1",
    ]
    words = r"'hopeless-run' failed: 2 consecutive steps from 2 .*\(1 rollbacks\)"
    with pytest.raises(DiffitError, match=words):
        train(tiny_recipe(encoded, *changes), "hopeless-run")
    said = capfd.readouterr().err
    assert said.count("from step 0 on 1 worker\n") == 1
    assert "Skipped step 0: loss" in said
    assert "Rolling back to the last checkpoint" in said
    assert "trained" not in said
    (record,) = [r for r in Tracker.of(tiny_recipe(encoded)).runs() if r.name == "hopeless-run"]
    assert record.status == "FAILED"


@pytest.mark.slow
def test_a_worker_that_dies_while_it_starts_is_replaced(encoded: Path, tmp_path: Path) -> None:
    process = _start(_copy(encoded, tmp_path), "train.steps=40", "scaling.workers=1")
    try:
        deadline = time.monotonic() + 120
        while not _kill_workers(process):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.wait(timeout=180) == 0
    finally:
        process.kill()
    assert "failure 1 of 3 allowed" in (tmp_path / "stderr").read_text()


def test_without_ray_the_curve_is_the_same(
    trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = open_run(tiny_recipe(trained), "local")
    assert driver.train(run, local=True) == 12
    assert _losses(trained, "local") == _losses(trained, "tiny")
    assert "in this process" in capfd.readouterr().err


@pytest.mark.parametrize("file", ["index.json", "state.json", "commit.json"])
def test_a_run_whose_newest_checkpoint_is_damaged_resumes_before_it(
    trained: Path, tmp_path: Path, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    run = open_run(tiny_recipe(tmp_path), "tiny")
    run.checkpoints[12].remove()
    (Path(run.checkpoints[8].url) / file).write_text("{}")
    assert driver.train(run.refresh(), local=True) == 12
    assert "Resuming from step 4: checkpoint" in capfd.readouterr().err
    assert _losses(tmp_path, "tiny") == _losses(trained, "tiny")
