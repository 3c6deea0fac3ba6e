"""The per-step agreement of ranks, and the handling of bad steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from diffit_train.config.train import Train
from diffit_train.data.loader import Batch
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.progress import show_log
from diffit_train.runs.lease import Lease
from diffit_train.training import control
from diffit_train.training.checkpointer import UnrecoverableError
from diffit_train.training.control import ControlPlane, Decision, Requests
from diffit_train.training.engine import Engine
from diffit_train.training.guard import BadStepGuard, RollbackRequested
from diffit_train.training.log import SkippedSteps
from diffit_train.training.telemetry import LossMeter
from tests.training.device_reads import DeviceReads
from tests.training.ranks import on_ranks


def _decide(plane: ControlPlane, loss_sum: float, grad_norm: float) -> Decision:
    return plane.decide(torch.tensor(loss_sum, dtype=torch.float64), torch.tensor(grad_norm))


def _decides(rank: int, world: int) -> None:
    control.PREEMPTION_POLL_S = 0.0
    requests = Requests()
    train = Train(steps=10, batch_size=4, loss_limit=5.0, grad_norm_limit=2.0)
    plane = ControlPlane(train, requests)

    # The loss is the mean over the global batch: (2 + 6) / 4.
    first = _decide(plane, 2.0 if rank == 0 else 6.0, 1.0)
    assert first == Decision(True, 2.0, 1.0, stop=False, check_preemption=False, save=False)

    # A bad loss on any rank, or a bad norm, rejects the step on all ranks.
    for mine, norm in ((math.nan if rank else 1.0, 1.0), (12.0, 1.0), (1.0, 2.5), (1.0, math.inf)):
        assert not _decide(plane, mine, norm).accept

    # DeepSpeed's -1 is a norm that is not finite.
    assert _decide(plane, 1.0, -1.0).grad_norm == math.inf

    # Only rank 0 is asked, and all ranks stop; or look for a preemption, but not all the time.
    requests.stop = rank == 0
    assert _decide(plane, 1.0, 1.0).stop
    requests.stop, requests.watch_preemption = rank == 1, rank == 0
    decision = _decide(plane, 1.0, 1.0)
    assert (decision.stop, decision.check_preemption) == (False, True)
    control.PREEMPTION_POLL_S = 3600.0
    assert not _decide(plane, 1.0, 1.0).check_preemption
    dist.barrier()


def test_all_ranks_make_the_same_decision() -> None:
    on_ranks(2, _decides)


def _batch(step: int, rank: int) -> Batch:
    fields: dict[str, Any] = dict.fromkeys(Batch.__dataclass_fields__)
    fields |= {"step": step, "shards": [f"shard-{rank}.tar"], "keys": np.array([10 * rank + step])}
    return Batch(**fields)


def _guards(rank: int, world: int, folder: Path) -> None:
    lease, waited, lines = Lease(str(folder), 1, ""), [], list[str]()
    changes: dict[str, Any] = {"max_consecutive_bad_steps": 2, "max_rollbacks": 1}
    plane = ControlPlane(Train(steps=99, batch_size=4, **changes), Requests())
    guard = BadStepGuard(lease, plane, lambda: waited.append(True))
    guard.record_skip(_batch(5, rank), math.nan, 1.0)
    guard.record_ok()
    guard.record_skip(_batch(7, rank), math.nan, 1.0)
    with pytest.raises(RollbackRequested), show_log(lines.append):
        guard.record_skip(_batch(8, rank), 1.0, math.inf)
    assert waited == [True]
    assert guard.pop_count() == 3
    assert guard.pop_count() == 0

    again = BadStepGuard(lease, plane, lambda: None)
    assert again.skipped == SkippedSteps(((7, 8),))
    again.record_skip(_batch(9, rank), math.nan, 1.0)
    with pytest.raises(UnrecoverableError, match=r"2 consecutive steps from 9 .*\(1 rollbacks\)"):
        again.record_skip(_batch(10, rank), math.nan, 1.0)
    if rank == 0:
        (line,) = lines
        assert line.startswith(
            "Skipped step 8: loss 1, gradient norm inf; shards shard-0.tar, shard-1.tar; keys"
        )
        records = [json.loads(line) for line in (folder / "bad-steps.jsonl").open()]
        assert [r["step"] for r in records] == [5, 7, 8, 9, 10]
        assert records[0]["keys"] == [5, 15]
    else:
        assert not lines
    dist.barrier()


def test_bad_steps_are_reported_and_rolled_back_until_the_limit(tmp_path: Path) -> None:
    on_ranks(2, _guards, tmp_path)


def _counts_reads(rank: int, world: int, stage: int, clip: float | None, precision: str) -> None:
    """A step as the loop takes it."""
    torch.manual_seed(0)
    shape = Shape(latent_size=4, latent_channels=2, out_channels=4, num_classes=3,
                  hidden_size=8, depth=2, num_heads=2)  # fmt: skip
    train = Train(steps=9, batch_size=4, zero_stage=stage, grad_clip=clip, precision=precision)
    engine = Engine(LatentDiffiT(shape), train, rank, world, torch.device("cpu"), 2)
    plane, meter = ControlPlane(train, Requests()), LossMeter(torch.device("cpu"))
    x, t, y = torch.randn(1, 2, 4, 4), torch.tensor([7]), torch.tensor([1])

    def step(number: int) -> bool:
        losses = []
        for last in (False, True):
            loss = (engine.forward(x, t, y) ** 2).mean(dim=(1, 2, 3))
            engine.backward(loss.sum() / 4, last)
            losses.append(loss.detach())

        def accept(norm: torch.Tensor) -> tuple[bool, float]:
            decision = plane.decide(torch.cat(losses).double().sum(), norm)
            return decision.accept, decision.grad_norm

        taken = engine.step(number, accept)
        engine.update_ema(number)
        meter.add(torch.cat(losses), t.repeat(2) / 1000)
        return taken

    assert step(0)
    with DeviceReads() as reads:
        assert step(1)
    assert len(reads.where) == 1, "\n\n".join(reads.where)
    engine.destroy()
    dist.barrier()


@pytest.mark.parametrize(
    ("stage", "clip", "precision"),
    [(0, None, "fp32"), (1, None, "bf16_autocast"), (2, 0.5, "bf16"), (3, 0.5, "bf16")],
)  # fmt: skip
def test_a_step_reads_the_device_once(stage: int, clip: float | None, precision: str) -> None:
    on_ranks(2, _counts_reads, stage, clip, precision)
