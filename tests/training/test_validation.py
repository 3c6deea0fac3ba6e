"""Checkpoints evaluated by Ray Train's own validation during training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diffit_train.api import train
from diffit_train.errors import UserError
from diffit_train.evaluation.evaluate import watch_run
from diffit_train.evaluation.result import Evaluation
from diffit_train.runs.checkpoints import Checkpoint
from diffit_train.runs.run import open_run
from diffit_train.tracking import Tracker
from tests.conftest import tiny_recipe


@pytest.mark.slow
def test_checkpoints_are_evaluated_during_training(
    encoded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("images", "autoencoders", "features", "latents"):
        shutil.copytree(encoded / name, tmp_path / name)
    validate = ("train.validate_every=8", "train.validate_samples=6")
    recipe = tiny_recipe(tmp_path, *validate, "train.steps=16")
    assert train(recipe, "watched").checkpoints.latest_step == 16
    assert "step 16 evaluated: fd_digits" in capfd.readouterr().err
    smaller = tiny_recipe(tmp_path, *validate, "train.steps=16", "evaluate.samples=6")
    results = [Evaluation(open_run(smaller, "watched"), step).read() for step in (8, 16)]
    assert [r.step for r in results if r] == [8, 16]
    # They are not part of the curve of full evaluations, which have more samples.
    run_id = Checkpoint(str(tmp_path / "runs" / "watched"), 16).state.mlflow_run_id
    tracker = Tracker.of(recipe)
    curve = tracker.history(run_id, "validation/fd_digits")
    assert curve == [(r.step, pytest.approx(r.metrics["fd_digits"])) for r in results if r]
    assert tracker.history(run_id, "eval/fd_digits") == []
    tags = tracker.client.get_run(run_id).data.tags
    assert tags["diffit.best_validated_step"] in ("8", "16")
    assert "diffit.best_step" not in tags

    with pytest.raises(UserError, match=r"evaluate\.features\.source"):
        missing = "evaluate.features.source=root:features/none"
        train(tiny_recipe(tmp_path, *validate, missing), "other")
    assert not (tmp_path / "runs" / "other").exists()


@pytest.mark.usefixtures("here")
def test_every_checkpoint_of_a_run_is_watched(trained: Path, tmp_path: Path) -> None:
    for name in ("images", "autoencoders", "features", "latents", "runs"):
        shutil.copytree(trained / name, tmp_path / name)
    shutil.copy(trained / "mlflow.db", tmp_path)
    last = tmp_path / "runs" / "tiny" / "checkpoints" / "step-0000000012"
    aside = last.rename(tmp_path / "aside")
    found: list[int] = []

    def pause(seconds: float) -> None:
        # Training commits its last checkpoint only now.
        found.append(len(list((tmp_path / "evaluations").rglob("result.json"))))
        aside.rename(last)

    rows = watch_run(open_run(tiny_recipe(tmp_path, "evaluate.samples=4"), "tiny"), pause=pause)
    assert found == [3]
    assert [row.step for row in rows] == [0, 4, 8, 12]
