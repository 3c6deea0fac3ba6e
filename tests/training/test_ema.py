"""Sharded EMA against its formulas and the gathered weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from diffit_train.config.train import EmaProfile, Train
from diffit_train.runs.checkpoints import Slice
from diffit_train.training.ema import ema_decay
from diffit_train.training.engine import Engine
from tests.training.ranks import on_ranks
from tests.training.test_engine import BATCH, CPU, _model, _one_step

PROFILES = {
    "constant": EmaProfile(decay=0.9),
    "ramped": EmaProfile(half_life_images=20.0, ramp_ratio=0.05),
    "power": EmaProfile(sigma_rel=0.1),
}


def test_half_life_is_counted_in_images() -> None:
    steady = EmaProfile(half_life_images=80.0)
    # Ten steps of eight images.
    assert ema_decay(steady, 0, 8) ** 10 == pytest.approx(0.5)
    ramped = EmaProfile(half_life_images=80.0, ramp_ratio=0.05)
    assert ema_decay(ramped, 0, 8) == 0.0
    assert ema_decay(ramped, 100, 8) == pytest.approx(0.5 ** (8 / 40))
    assert ema_decay(ramped, 10_000, 8) == ema_decay(steady, 0, 8)


def _gathered(engine: Engine, kind: str) -> dict[str, torch.Tensor]:
    """A full state, assembled from what each rank owns."""
    mine = [(s.slice, s.values[kind].clone()) for s in engine.owned()]
    everyone: list[Any] = [None] * engine.world_size
    dist.all_gather_object(everyone, mine)
    whole = {name: torch.full((shape.numel(),), torch.nan) for name, shape in engine.shapes.items()}
    for part in everyone:
        for slice_, values in part:
            assert isinstance(slice_, Slice)
            whole[slice_.name][slice_.offset : slice_.offset + slice_.length] = values
    assert not any(values.isnan().any() for values in whole.values())
    return whole


def _compare_with_whole(rank: int, world: int, stage: int, precision: str) -> None:
    train = Train(
        steps=9, batch_size=BATCH, lr=1e-2, zero_stage=stage, precision=precision, ema=PROFILES
    )
    engine = Engine(_model(), train, rank, world, CPU)
    averages = {name: _gathered(engine, "master") for name in PROFILES}
    total = sum(s.slice.length for s in engine.owned())
    assert total < 0.6 * sum(shape.numel() for shape in engine.shapes.values())
    for step in range(5):
        _one_step(engine, step)
        masters = _gathered(engine, "master")
        for name, profile in PROFILES.items():
            for key, average in averages[name].items():
                average.lerp_(masters[key], 1.0 - ema_decay(profile, step, BATCH))
    for name in PROFILES:
        mine = _gathered(engine, name)
        assert all(torch.equal(mine[key], value) for key, value in averages[name].items()), name
        assert any(not torch.equal(mine[key], masters[key]) for key in mine)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_sharded_ema_equals_ema_of_gathered_weights(stage: int, precision: str) -> None:
    on_ranks(2, _compare_with_whole, stage, precision)
