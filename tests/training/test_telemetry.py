"""Meters against hand-computed sums, and counted FLOPs against the formula."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from diffit_train import storage
from diffit_train.models.cost import training_flops_per_image
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.training.log import TrainingLog
from diffit_train.training.telemetry import (
    LossMeter,
    SpeedMeter,
    Stopwatch,
    matmul_flops_per_s,
    peak_memory_bytes,
    slowest_rank,
)
from tests.training.ranks import on_ranks

CPU = torch.device("cpu")


def _meter_on_two_ranks(rank: int, world: int) -> None:
    meter = LossMeter(CPU)
    losses, t = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.249, 0.25, 1.0])
    mine = slice(rank * 2, rank * 2 + 2)
    meter.add(losses[mine], t[mine])
    values = meter.reduce()
    assert values == {"loss": 2.5, "loss_q0": 1.5, "loss_q1": 3.0, "loss_q3": 4.0}
    meter.add(torch.tensor([7.0]), torch.tensor([0.5]))
    assert meter.reduce() == {"loss": 7.0, "loss_q2": 7.0}
    assert meter.reduce() == {}
    # An interval split by a restart gives the same result as an uninterrupted one.
    meter.add(losses[mine], t[mine])
    total = meter.total().tolist()
    again = LossMeter(CPU)
    if rank == 0:
        again.restore(total)
    again.add(torch.tensor([9.0]), torch.tensor([0.999]))
    assert again.reduce() == {"loss": 28 / 6, "loss_q0": 1.5, "loss_q1": 3.0, "loss_q3": 22 / 3}


def _slow_on_one_rank(rank: int, world: int) -> None:
    # Rank 1 computes longer, and rank 0 waits for it in its backward pass.
    mine = {"data": 0.1, "forward": 0.2 + rank, "backward": 2.0 - rank, "optimizer": 0.0}
    slowest, seconds = slowest_rank(mine, CPU)
    assert slowest == 1
    assert seconds == {"data": 0.1, "forward": 1.2, "backward": 1.0, "optimizer": 0.0}
    mine = {"data": 5.0 - rank, "forward": 0.2, "backward": rank + 1.0, "optimizer": 0.5}
    assert slowest_rank(mine, CPU) == (
        0,
        mine if rank == 0 else mine | {"data": 5.0, "backward": 1.0},
    )
    dist.barrier()


def test_the_slowest_rank_is_the_one_that_others_wait_for() -> None:
    on_ranks(2, _slow_on_one_rank)


def test_phases_are_timed_separately() -> None:
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch.phase("a"):
            time.sleep(0.02)
        with watch.phase("b"):
            pass
    seconds = watch.take()
    assert 0.04 <= seconds["a"] < 2.0
    assert seconds["b"] < 0.02
    assert watch.take() == {}


def test_peak_memory_of_this_process() -> None:
    now = psutil.Process().memory_info().rss
    assert now * 0.99 <= peak_memory_bytes(CPU) < now * 10


def test_losses_are_averaged_over_ranks_and_by_quarter() -> None:
    on_ranks(2, _meter_on_two_ranks)


def test_flops_of_the_published_model() -> None:
    with torch.device("meta"):
        model = LatentDiffiT(Shape())
    # 118.5 G multiply-adds forward; two FLOPs each; backward is twice forward.
    assert training_flops_per_image(model) / 6 == pytest.approx(118.5e9, rel=5e-3)


def test_speed_is_derived_from_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 30.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    meter = SpeedMeter(batch_size=8, flops_per_image=100.0, peak_flops_per_s=1000.0)
    meter.restart(waited_s=1.0)
    values = meter.measure(steps=5, waited_s=3.0)
    expected = {"images_per_s": 2.0, "step_s": 4.0, "data_wait_fraction": 0.1, "mfu": 0.2}
    assert values == pytest.approx(expected)


def test_the_measured_matmul_rate_is_plausible() -> None:
    assert 1e8 < matmul_flops_per_s(CPU, torch.float32, 256) < 1e15


def test_a_resumed_log_drops_records_after_the_checkpoint(tmp_path: Path) -> None:
    log = TrainingLog(str(tmp_path), 0)
    for step in (2, 4, 6):
        log.append({"step": step, "loss": 1.0 / step})
    storage.write_text(log.url, log.text())
    resumed = TrainingLog(str(tmp_path), 4)
    assert [record["step"] for record in resumed.records] == [2, 4]
    resumed.append({"step": 6, "loss": 0.5})
    storage.write_text(resumed.url, resumed.text())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["loss"] == 0.5
