"""The Trainer without Ray: any world size, stops, bad steps, rollbacks."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from diffit_train.api import encode as encode_latents
from diffit_train.api import train
from diffit_train.config import Recipe
from diffit_train.data.loader import Batch
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.evaluate import evaluate_run
from diffit_train.models.build import build_model
from diffit_train.progress import show_log
from diffit_train.runs.checkpoints import Checkpoint, Checkpoints
from diffit_train.runs.import_export import export_weights, import_file, recipe_of_weights
from diffit_train.runs.lease import Lease, LostLeaseError
from diffit_train.runs.phema import reconstruct_ema
from diffit_train.runs.run import Run, open_run
from diffit_train.tracking import Tracker
from diffit_train.training import control
from diffit_train.training.batch import BatchBuilder, TrainingBatch
from diffit_train.training.checkpointer import UnrecoverableError
from diffit_train.training.log import SkippedSteps
from diffit_train.training.telemetry import PHASES
from diffit_train.training.trainer import Trainer
from tests.conftest import tiny_recipe
from tests.training.ranks import on_ranks

CPU = torch.device("cpu")
STEPS = ("train.steps=24", "train.checkpoint_every=8", "train.log_every=2")


def _train(
    rank: int,
    world: int,
    recipe: Recipe,
    run: str,
    run_id: str,
    expected: int,
    stop_after: int | None = None,
    preempt: bool = False,
    bad_steps: tuple[int, ...] = (),
    lease: Lease | None = None,
) -> None:
    """Train, and stop after some steps, or save once for a preemption."""
    control.PREEMPTION_POLL_S = 0.0
    build: Callable[..., Any] = BatchBuilder.__call__

    def spoilt(self: BatchBuilder, batch: Batch) -> TrainingBatch:
        made: TrainingBatch = build(self, batch)
        if batch.step in bad_steps and rank == 0:
            made.x0[0] = math.nan
        return made

    BatchBuilder.__call__ = spoilt  # type: ignore[method-assign]
    started = Run(recipe.storage.root, run, recipe)
    lease = lease or Lease(started.url, 1, "")
    try:
        with Trainer(started, lease, run_id, CPU) as trainer:
            first, saved = trainer.step, False
            trainer.requests.watch_preemption = preempt
            trainer.requests.stop = rank == 0 and stop_after == 1
            for number, step in enumerate(trainer, first + 1):
                if isinstance(lease, FaultyLease):
                    lease.step[0] = step.step
                assert number == step.step or SkippedSteps.read(lease.url).ranges
                assert not step.phases or step.phases.keys() == set(PHASES)
                assert bool(step.record) == (rank == 0 and bool(step.phases))
                if step.check_preemption and not saved:
                    trainer.save()
                    saved = trainer.wait()
                # Only rank 0 is asked.
                trainer.requests.stop = rank == 0 and step.step + 1 == stop_after
                if step.stop:
                    trainer.save()
                    break
            trainer.finish()
            assert trainer.step == expected
    finally:
        BatchBuilder.__call__ = build  # type: ignore[method-assign]
    dist.barrier()


@dataclass(frozen=True)
class FaultyLease(Lease):
    """A lease that another command takes over, or whose storage is away for a checkpoint.

    Attributes:
        lost_after: the step.
        step: that training has reached.
        failed: how often it could not be read.
    """

    lost_after: float = math.inf
    outage: bool = False
    step: list[int] = field(default_factory=lambda: [0])
    failed: list[int] = field(default_factory=list)

    def require(self) -> None:
        (step,) = self.step
        in_checkpoint = threading.current_thread().name == "checkpoint"
        if self.outage and in_checkpoint and 7 <= step < 15 and not self.failed:  # that of step 8
            self.failed.append(step)
            raise OSError("storage is unreachable")
        if step > self.lost_after:
            raise LostLeaseError("another command has taken over")


def _run(root: Path, run: str, world: int, expected: int, *changes: str, **rest: Any) -> Path:
    """Train on some ranks; returns the run's folder."""
    recipe = tiny_recipe(root, *STEPS, *changes)
    url = root / "runs" / run
    identity = open_run(recipe, run).create()
    tracker = Tracker.of(recipe)
    run_id = tracker.training_run("demo", identity.uuid, run, {}, {})
    on_ranks(world, functools.partial(_train, **rest), recipe, run, run_id, expected)
    return url


def _log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").open()]


def _curve(run: Path) -> list[tuple[float, ...]]:
    names = ("step", "loss", "grad_norm", "lr")
    return [tuple(record[name] for name in names) for record in _log(run)]


def _meets_an_outage(rank: int, world: int, recipe: Recipe, run: str, run_id: str) -> None:
    lease = FaultyLease(f"{recipe.storage.root}/runs/{run}", 1, "", outage=True)
    lines: list[str] = []
    with show_log(lines.append):
        _train(rank, world, recipe, run, run_id, 24, lease=lease)
    if rank == 0:
        assert lease.failed
        assert any("step-0000000008 could not be written" in line for line in lines)


def _loses_its_lease(
    rank: int, world: int, recipe: Recipe, run: str, run_id: str, lost_after: int
) -> None:
    lease = FaultyLease(f"{recipe.storage.root}/runs/{run}", 1, "", lost_after=lost_after)
    with pytest.raises(UnrecoverableError, match="another command has taken over"):
        _train(rank, world, recipe, run, run_id, 24, lease=lease)
    dist.barrier()


def _same_weights(a: Path, b: Path, step: int) -> None:
    for kind in ("raw", "ema"):
        mine, theirs = Checkpoint(str(a), step).load(kind), Checkpoint(str(b), step).load(kind)
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.fixture(scope="module")
def whole(encoded: Path) -> Path:
    """An uninterrupted run of two ranks."""
    return _run(encoded, "whole", 2, 24)


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, ("train.micro_batch_size=3",)),
        pytest.param(1, ("train.zero_stage=0",), marks=pytest.mark.slow),
        (2, ("train.zero_stage=3", "train.micro_batch_size=2")),
        # Four streams of two images: one rank has twice as many as the others.
        pytest.param(3, ("train.micro_batch_size=1",), marks=pytest.mark.slow),
        pytest.param(4, (), marks=pytest.mark.slow),
    ],
)
def test_the_curve_does_not_depend_on_how_it_is_computed(
    encoded: Path, whole: Path, world: int, changes: tuple[str, ...]
) -> None:
    run = _run(encoded, f"other-{world}-{len(changes[0]) if changes else 0}", world, 24, *changes)
    for mine, theirs in zip(_curve(run), _curve(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_bf16_weights_follow_the_fp32_curve(encoded: Path, whole: Path) -> None:
    changes = ("train.precision=bf16", "train.zero_stage=3", "train.micro_batch_size=2")
    run = _run(encoded, "bf16", 2, 24, *changes)
    for mine, theirs in zip(_log(run), _log(whole), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.03)
    # Master weights are fp32: they hold values that bf16 cannot.
    masters = Checkpoint(str(run), 24).load("raw").values()
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters)


def test_a_stopped_run_resumes_as_if_uninterrupted(encoded: Path, whole: Path) -> None:
    # In the middle of a log interval, whose sums must not be lost.
    run = _run(encoded, "stopped", 2, 11, stop_after=11)
    assert Checkpoints(str(run)).steps == [0, 8, 11]
    assert Checkpoint(str(run), 11).state.interval is not None
    recipe = tiny_recipe(encoded, *STEPS)
    on_ranks(2, _train, recipe, "stopped", Checkpoint(str(run), 11).state.mlflow_run_id, 24)
    assert _curve(run) == _curve(whole)
    _same_weights(run, whole, 24)
    points = Tracker.of(recipe).history(Checkpoint(str(run), 24).state.mlflow_run_id, "train/loss")
    assert [step for step, _ in points] == list(range(2, 25, 2))


@pytest.mark.slow
def test_a_preemption_saves_one_checkpoint(encoded: Path, whole: Path) -> None:
    run = _run(encoded, "preempted", 2, 24, stop_after=None, preempt=True)
    assert Checkpoints(str(run)).steps == [0, 1, 8, 16, 24]
    assert _curve(run) == _curve(whole)


def test_a_checkpoint_is_due_by_time(encoded: Path) -> None:
    every = ("train.steps=5", "train.checkpoint_every=100")
    run = _run(encoded, "often", 2, 5, *every, "train.checkpoint_every_s=0.0001")
    assert Checkpoints(str(run)).steps == [0, 1, 2, 3, 4, 5]
    run = _run(encoded, "seldom", 2, 5, *every, "train.checkpoint_every_s=3600")
    assert Checkpoints(str(run)).steps == [0, 5]


QUICK = {("fp32", 0), ("bf16", 1), ("bf16", 2), ("bf16_autocast", 3)}


@pytest.mark.parametrize(
    ("precision", "stage"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(("fp32", "tf32", "bf16", "bf16_autocast"), range(4))
        if case != ("bf16", 0)
    ],
)
def test_stop_and_preemption_are_noticed_in_bad_steps(
    encoded: Path, precision: str, stage: int
) -> None:
    changes = (f"train.precision={precision}", f"train.zero_stage={stage}")
    rest: dict[str, Any] = {"stop_after": 2, "preempt": True, "bad_steps": (0, 1)}
    run = _run(encoded, f"bad-{precision}-{stage}", 2, 2, *changes, **rest)
    assert Checkpoints(str(run)).steps == [0, 1, 2]
    assert Checkpoint(str(run), 2).state.optimizer_steps == 0
    records = [json.loads(line) for line in (run / "bad-steps.jsonl").open()]
    assert [(record["step"], record["loss"]) for record in records] == [(0, "nan"), (1, "nan")]
    before, after = (Checkpoint(str(run), step).load("raw") for step in (0, 2))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_bad_batches_are_reported_and_skipped(encoded: Path) -> None:
    bad = (5, 9)
    run = _run(encoded, "bad", 2, 24, stop_after=None, preempt=False, bad_steps=bad)
    records = [json.loads(line) for line in (run / "bad-steps.jsonl").open()]
    assert [record["step"] for record in records] == [5, 9]
    assert all(len(record["keys"]) == 8 and record["shards"] for record in records)
    assert all(record["loss"] == "nan" for record in records)
    state = Checkpoint(str(run), 24).state
    assert (state.step, state.optimizer_steps) == (24, 22)
    skipped = {record["step"]: record.get("skipped_steps", 0) for record in _log(run)}
    assert {step: n for step, n in skipped.items() if n} == {6: 1, 10: 1}
    assert all(math.isfinite(record["loss"]) for record in _log(run))


def test_too_many_consecutive_bad_batches_cause_a_rollback(
    encoded: Path,
) -> None:
    bad, limit = (10, 11, 12), "train.max_consecutive_bad_steps=3"
    run = _run(encoded, "back", 2, 24, limit, stop_after=None, preempt=False, bad_steps=bad)
    assert SkippedSteps.read(str(run)).ranges == ((10, 12),)
    assert len((run / "bad-steps.jsonl").read_text().splitlines()) == 3
    # A run that skips them from the start ends with the same weights.
    knowing = encoded / "runs" / "knowing"
    SkippedSteps(((10, 12),)).write(str(knowing))
    assert _run(encoded, "knowing", 2, 24) == knowing
    _same_weights(run, knowing, 24)
    assert Checkpoint(str(run), 24).state.optimizer_steps == 21


def _gives_up(rank: int, world: int, recipe: Recipe, run: str, run_id: str) -> None:
    with pytest.raises(DiffitError, match=r"2 consecutive steps from 3 .* lower train\.lr"):
        _train(rank, world, recipe, run, run_id, 24, bad_steps=(3, 4))


def test_a_run_without_rollbacks_left_stops(encoded: Path) -> None:
    recipe = tiny_recipe(
        encoded, *STEPS, "train.max_consecutive_bad_steps=2", "train.max_rollbacks=0"
    )
    identity = open_run(recipe, "hopeless").create()
    run_id = Tracker.of(recipe).training_run("demo", identity.uuid, "hopeless", {}, {})
    on_ranks(2, _gives_up, recipe, "hopeless", run_id)
    assert Checkpoints(str(encoded / "runs" / "hopeless")).steps == [0]


def test_training_goes_on_while_its_lease_cannot_be_read(encoded: Path) -> None:
    recipe = tiny_recipe(encoded, *STEPS)
    identity = open_run(recipe, "outage").create()
    run_id = Tracker.of(recipe).training_run("demo", identity.uuid, "outage", {}, {})
    on_ranks(2, _meets_an_outage, recipe, "outage", run_id)
    run = encoded / "runs" / "outage"
    assert Checkpoints(str(run)).steps == [0, 16, 24]
    parts = list((run / "checkpoints" / "step-0000000008").rglob("*"))
    assert not [path for path in parts if path.is_file()]


def test_without_its_lease_a_run_writes_nothing(encoded: Path) -> None:
    recipe = tiny_recipe(encoded, *STEPS)
    identity = open_run(recipe, "lost").create()
    run_id = Tracker.of(recipe).training_run("demo", identity.uuid, "lost", {}, {})
    on_ranks(2, _loses_its_lease, recipe, "lost", run_id, 11)
    run = encoded / "runs" / "lost"
    assert Checkpoints(str(run)).steps == [0, 8]
    assert [record["step"] for record in _log(run)] == [2, 4, 6, 8]
    on_ranks(2, _loses_its_lease, recipe, "lost", run_id, -1)
    assert Checkpoints(str(run)).steps == [0, 8]


@pytest.mark.slow
def test_steps_beyond_a_limit_are_skipped(encoded: Path, whole: Path) -> None:
    norms = sorted(record["grad_norm"] for record in _log(whole))
    limit = norms[len(norms) // 2]
    run = _run(encoded, "limited", 2, 24, f"train.grad_norm_limit={limit}",
               "train.max_consecutive_bad_steps=24")  # fmt: skip
    records = [json.loads(line) for line in (run / "bad-steps.jsonl").open()]
    assert 0 < len(records) < 24
    assert all(float(record["grad_norm"]) > limit for record in records)
    assert Checkpoint(str(run), 24).state.optimizer_steps == 24 - len(records)


def test_trace_and_snapshots_are_written_on_request(encoded: Path) -> None:
    changes = ["train.profile_steps=[3,4]", "train.ema_snapshot_every=6"]
    changes += ["train.ema={ema: {decay: 0.9}, a: {sigma_rel: 0.05}, b: {sigma_rel: 0.15}}"]
    run = _run(encoded, "looked-at", 1, 24, *changes)
    trace = run / "profile" / "steps-3-4.json.gz"
    assert trace.stat().st_size > 1000
    assert Checkpoints(str(run / "ema-snapshots")).steps == [6, 12, 18, 24]
    snapshot, checkpoint = Checkpoint(str(run / "ema-snapshots"), 24).load("a"), str(run)
    assert all(
        torch.equal(value, snapshot[name])
        for name, value in Checkpoint(checkpoint, 24).load("a").items()
    )
    record = _log(run)[-1]
    names = ("data_s", "forward_s", "backward_s", "optimizer_s", "checkpoint_s", "memory_gib")
    assert all(record[name] >= 0.0 for name in names)
    parts = record["forward_s"] + record["backward_s"] + record["optimizer_s"] + record["data_s"]
    assert 0.3 * record["step_s"] < parts <= 1.05 * record["step_s"]


def test_an_ema_is_reconstructed_from_snapshots(encoded: Path, whole: Path, tmp_path: Path) -> None:
    changes = ["train.ema_snapshot_every=2"]
    changes += ["train.ema={ema: {decay: 0.9}, a: {sigma_rel: 0.05}, b: {sigma_rel: 0.2}}"]
    run = _run(encoded, "snapshots", 1, 24, *changes)
    recipe = tiny_recipe(encoded, *STEPS, *changes)
    same = reconstruct_ema(open_run(recipe, "snapshots"), 0.05)
    assert same.error < 1e-9
    assert same.file == f"{run}/export/ema-0.05-0000000024.safetensors"
    kept = Checkpoint(str(run), 24).load("a")
    made = load_file(same.file)
    for name, value in kept.items():
        torch.testing.assert_close(made[name], value, atol=1e-7, rtol=1e-6)
    # An evaluation reconstructs it once and then reuses it.
    changes += ["evaluate.weights=sigma_rel:0.07", "evaluate.samples=4"]
    (result,) = evaluate_run(open_run(tiny_recipe(encoded, *STEPS, *changes), "snapshots"), ["24"])
    assert (run / "export" / "ema-0.07-0000000024.safetensors").exists()
    assert result.evaluate["weights"] == "sigma_rel:0.07"
    # At a step without a snapshot, the weights are interpolated.
    out = str(tmp_path / "x.safetensors")
    between = reconstruct_ema(open_run(recipe, "snapshots"), 0.1, 21, out)
    assert 0.0 < between.error < 0.2
    assert recipe_of(out).train == recipe.train
    for wrong, words in (
        ((0.5, None), r"--sigma-rel is 0\.5.*below 0\.2887"),
        ((0.1, 99), r"--step is 99, but the snapshots of 'snapshots' end at step 24"),
    ):
        with pytest.raises(UserError, match=words):
            reconstruct_ema(open_run(recipe, "snapshots"), *wrong)
    with pytest.raises(UserError, match=r"train\.ema_snapshot_every"):
        reconstruct_ema(open_run(tiny_recipe(encoded, *STEPS), "whole"), 0.1)


def recipe_of(file: str) -> Recipe:
    """The recipe recorded in a weight file."""
    return recipe_of_weights(file, None, [], None)


def _deepspeed_alone(rank: int, world: int, recipe: Recipe, folder: str) -> None:
    import deepspeed

    torch.manual_seed(0)
    model = build_model(recipe)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(5):
        torch.manual_seed(step)
        x, t = torch.randn(4, 4, 4, 4), torch.zeros(4, dtype=torch.long)
        engine.backward((engine(x, t, t) - 1.0).square().mean())
        engine.step()
    engine.save_checkpoint(folder)


def test_a_run_resumes_from_deepspeeds_own_checkpoint(encoded: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(encoded, *STEPS)
    on_ranks(2, _deepspeed_alone, recipe, str(tmp_path))
    with pytest.raises(UserError, match=r"made of pickles.*--allow-pickle"):
        import_file(open_run(recipe, "taken-over"), str(tmp_path), 0, False)
    run = open_run(recipe, "taken-over")
    checkpoint = import_file(run, str(tmp_path), 0, True)
    assert checkpoint.step == 5
    state = checkpoint.state
    assert (state.optimizer_steps, state.images_seen) == (5, 40)
    on_ranks(2, _train, recipe, "taken-over", state.mlflow_run_id, 24)
    assert run.refresh().checkpoints[24].state.optimizer_steps == 24
    with pytest.raises(UserError, match=r"'taken-over'"):
        import_file(open_run(recipe, "taken-over"), str(tmp_path), 0, True)
    wider = tiny_recipe(encoded, *STEPS, "model.hidden_size=32")
    with pytest.raises(UserError, match=r"elements, expected"):
        import_file(open_run(wider, "wider"), str(tmp_path), 0, True)
    assert not (encoded / "runs" / "wider").exists()


@pytest.mark.slow
def test_a_run_starts_from_another_at_twice_the_resolution(encoded: Path, whole: Path) -> None:
    changes = ["data.name=large", "data.resolution=32", *STEPS]
    large = tiny_recipe(encoded, *changes)
    encode_latents(large)
    recipe = open_run(large, "larger", "whole@16", "ema").recipe
    start = recipe.train.start
    assert start is not None
    assert (start.run, start.step, recipe.model.position_side) == ("whole", 16, 2)
    identity = open_run(recipe, "larger").create()
    run_id = Tracker.of(recipe).training_run("demo", identity.uuid, "larger", {}, {})
    on_ranks(2, _train, recipe, "larger", run_id, 24)
    source, first = Checkpoint(str(whole), 16).load("ema"), encoded / "runs" / "larger"
    begun = Checkpoint(str(first), 0).load("raw")
    assert torch.equal(begun["blocks.0.mlp.fc1.weight"], source["blocks.0.mlp.fc1.weight"])
    table = "blocks.0.attn.relative_position_bias_table"
    assert (source[table].shape[0], begun[table].shape[0]) == (9, 49)
    # Rerunning resumes, although the source has newer checkpoints.
    again = open_run(large, "larger", "whole", "ema").recipe
    assert again.train_hash() == recipe.train_hash()
    assert train(large, "larger", init_from="whole").checkpoints.latest_step == 24
    # Other commands need no --init-from.
    assert train(large, "larger").checkpoints.latest_step == 24
    export_weights(open_run(large, "larger"), 24, "raw")
    # Once the run has its own checkpoints, the source is no longer needed.
    gone = whole.rename(whole.parent / "gone")
    more = tiny_recipe(encoded, *changes, "train.keep_every=24")
    assert open_run(more, "larger", "whole", "ema").recipe.train_hash() == recipe.train_hash()
    shutil.rmtree(Checkpoint(str(first), 24).url)
    assert train(more, "larger", init_from="whole").checkpoints.latest_step == 24
    gone.rename(whole)
    for wrong, words in (
        (("larger", "whole@17", "ema"), r"no committed checkpoint at step 17"),
        (("new", "nobody", "ema"), r"run 'nobody' does not exist"),
        (("new", "whole", "slow"), r"--init-weights is 'slow', but whole holds raw, ema"),
        (("new", "whole@x", "ema"), r"must be RUN or RUN@STEP"),
        (("whole", "whole", "ema"), r"--init-from is run 'whole' itself"),
    ):
        with pytest.raises(UserError, match=words):
            open_run(large, *wrong)
    wider = tiny_recipe(encoded, *changes, "model.hidden_size=32")
    wider = open_run(wider, "wider", "whole", "ema").recipe
    with pytest.raises(UserError, match=r"whole@24 "):
        train(wider, "wider")
