"""The installed DeepSpeed has every private name of the table in `training/zero.py`."""

from __future__ import annotations

import re
from pathlib import Path

import deepspeed
import pytest
import torch

from diffit_train.training import zero
from diffit_train.training.engine import Engine
from tests.training.ranks import on_ranks
from tests.training.test_engine import _model, _train

assert zero.__doc__
ROWS = re.findall(r"^\| (.*`.*) \| (1, 2|3|1 to 3|all) \|", zero.__doc__, re.MULTILINE)
STAGES = {"1, 2": [1, 2], "3": [3], "1 to 3": [1, 2, 3]}


def _look_up(rank: int, world: int, names: list[str], stages: list[int]) -> None:
    for stage in stages:
        engine = Engine(_model(), _train(zero_stage=stage), rank, world, torch.device("cpu"))
        engine.backward(engine.forward(*_inputs()).mean())
        engine.step(0)
        owners = [engine.zero.optimizer, next(iter(engine.names))]
        missing = [n for n in names if not any(hasattr(owner, n) for owner in owners)]
        engine.destroy()
        assert not missing, f"DeepSpeed {deepspeed.__version__}, stage {stage}: {missing}"


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 2, 4, 4), torch.zeros(2), torch.zeros(2, dtype=torch.long)


def test_the_table_is_complete() -> None:
    assert zero.__file__
    used = set(re.findall(r"optimizer\.(\w+)|parameter\.(\w+)", Path(zero.__file__).read_text()))
    in_table = set(re.findall(r"`(\w+)`", " ".join(named for named, _ in ROWS)))
    assert {first or second for first, second in used} == in_table


@pytest.mark.parametrize(("named", "stages"), ROWS)
def test_a_private_name_exists(named: str, stages: str) -> None:
    names = re.findall(r"`(\w+)`", named)
    if stages == "all":
        assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] in (True, False)
    else:
        on_ranks(1, _look_up, names, STAGES[stages])
