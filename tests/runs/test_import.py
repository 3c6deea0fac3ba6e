"""What is not imported: weights that are not finite, steps without a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffit_train.errors import UserError
from diffit_train.models.build import build_model
from diffit_train.runs.checkpoints import Checkpoint, save_whole
from diffit_train.runs.import_export import import_file
from diffit_train.runs.run import open_run
from tests.conftest import tiny_recipe
from tests.made import make_state

STATE = make_state(3)


def _file(folder: Path, **metadata: str) -> str:
    path = folder / "w.safetensors"
    save_file(build_model(tiny_recipe(folder)).state_dict(), str(path), metadata=metadata)
    return str(path)


@pytest.mark.parametrize("step", ["many", "-1", "1e9", "²", "9" * 11, "9" * 5000])
def test_a_step_without_a_folder_is_refused(step: str, tmp_path: Path) -> None:
    file = _file(tmp_path, step=step)
    with pytest.raises(UserError, match=r"w\.safetensors .*step.*--step"):
        import_file(open_run(tiny_recipe(tmp_path), "new"), file, None, False)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("step", [-1, 10**10])
def test_a_given_step_has_a_folder(step: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="9,999,999,999"):
        import_file(open_run(tiny_recipe(tmp_path), "new"), _file(tmp_path), step, False)
    assert not (tmp_path / "runs").exists()


def test_the_largest_step_is_found_again(tmp_path: Path) -> None:
    run = open_run(tiny_recipe(tmp_path), "new")
    checkpoint = import_file(run, _file(tmp_path, step="9" * 10), None, False)
    assert run.checkpoints.steps == [checkpoint.step] == [9_999_999_999]


def test_weights_of_a_checkpoint_are_finite(tmp_path: Path) -> None:
    values = {"good": torch.ones(2, 3), "bad": torch.tensor([1.0, float("nan")])}
    shapes = {name: value.shape for name, value in values.items()}
    save_whole({"ema": values}, shapes, str(tmp_path), STATE)
    with pytest.raises(UserError, match=r"ema .*step-0000000003 .*NaN.* bad"):
        Checkpoint(str(tmp_path), 3).load("ema")
