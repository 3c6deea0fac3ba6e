"""Sweeps: their evaluations, and one sweep per name."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffit_train.cli import sweep as command
from diffit_train.errors import UserError
from diffit_train.evaluation.sweep import (
    open_sweep,
    parse_values,
    plan_sweep,
    read_sweep,
)
from diffit_train.jobs.job import Job
from diffit_train.runs.run import open_run
from tests.conftest import tiny_recipe


def test_lists_of_values_and_ranges_with_both_ends() -> None:
    key, values = parse_values("guidance.scale=1.0:5.0:0.4")
    assert key == "evaluate.guidance.scale"
    assert values == [1.0, 1.4, 1.8, 2.2, 2.6, 3.0, 3.4, 3.8, 4.2, 4.6, 5.0]
    assert parse_values("sampler.steps=50,250") == ("evaluate.sampler.steps", [50, 250])
    assert parse_values("evaluate.seed=0:3:1, 9") == ("evaluate.seed", [0, 1, 2, 3, 9])
    assert parse_values("weights=ema,raw") == ("evaluate.weights", ["ema", "raw"])


@given(first=st.integers(-500, 500), count=st.integers(1, 60), step=st.integers(1, 300))
def test_ranges_have_exact_decimal_steps(first: int, count: int, step: int) -> None:
    start, pace = Decimal(first) / 100, Decimal(step) / 100
    last = start + pace * (count - 1)
    _, values = parse_values(f"guidance.scale={start}:{last}:{pace}")
    assert [Decimal(str(value)) for value in values] == [start + pace * i for i in range(count)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("guidance.scale", "must be KEY=VALUES"),
        ("=1,2", "must be KEY=VALUES"),
        ("guidance.scale=5:1:0.5", "must ascend"),
        ("guidance.scale=1:5:0", "must ascend"),
        ("guidance.scale=1:x:2", "must be numbers FIRST:LAST:STEP"),
        ("guidance.scale=1:nan:2", "must ascend"),
        ("guidance.scale=0:1e9:1", "1,000,000,001 values"),
        ("seed=1,2,1", "duplicate values"),
        ("features.name=a,b", "cannot vary evaluate.features.name"),
        ("keep_images=grid,all", "evaluate.keep_images changes no metric"),
    ],
)
def test_bad_values_are_named(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_values(text)


def test_a_sweep_is_every_combination(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    texts = ["guidance.scale=1:2:0.5", "sampler.steps=2,3"]
    sweep = plan_sweep(open_run(recipe, "tiny"), [4, 8], texts, None)
    assert sweep.name == "guidance.scale-by-sampler.steps"
    assert len(sweep.members) == 2 * 3 * 2
    member = sweep.members[-1]
    assert (member.step, list(member.changes.values())) == (8, [2.0, 3])
    changed = member.recipe(recipe)
    assert changed.evaluate.guidance.scale == 2.0
    assert changed.evaluate.sampler.steps == 3
    assert changed.train_hash() == recipe.train_hash()
    assert sweep.loaded(str(tmp_path)) == recipe


def test_an_invalid_sweep_is_rejected_before_anything_is_written(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    for texts, name, words in (
        (["guidance.scale=1,-2"], None, r"evaluate\.guidance\.scale"),
        (["guidance.scal=1,2"], None, r"guidance\.scal"),
        (["sampler.name=ddim,euler"], None, "must be one of"),
        (["seed=1,2", "evaluate.seed=3"], None, "has evaluate.seed twice"),
        (["seed=1,2"], "a/b", "--name is 'a/b'"),
        (["seed=0:9999:1", "sampler.steps=1,2"], None, "20,000 evaluations"),
    ):
        with pytest.raises(UserError, match=words):
            plan_sweep(open_run(recipe, "tiny"), [4], texts, name)
    assert not list(tmp_path.iterdir())


def test_one_name_is_one_sweep(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    sweep = plan_sweep(open_run(recipe, "tiny"), [4], ["seed=1,2"], "first")
    root = str(tmp_path)
    open_sweep(sweep, root)
    open_sweep(plan_sweep(open_run(recipe, "tiny"), [4], ["seed=1,2"], "first"), root)
    assert read_sweep(sweep.url(root)) == sweep
    for changed in (
        plan_sweep(open_run(recipe, "tiny"), [4], ["seed=1,3"], "first"),
        plan_sweep(
            open_run(tiny_recipe(tmp_path, "evaluate.samples=9"), "tiny"),
            [4],
            ["seed=1,2"],
            "first",
        ),
    ):
        with pytest.raises(UserError, match=r"'first' .*--name"):
            open_sweep(changed, root)
    assert read_sweep(sweep.url(root)) == sweep
    with pytest.raises(UserError, match="there is no sweep in"):
        read_sweep(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("ready", [True, False])
def test_a_sweep_as_one_job_is_sent_to_a_checked_cluster_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: bool
) -> None:
    recipe, texts, sent = tiny_recipe(tmp_path), ["guidance.scale=1,2"], []

    def check(job: Job, address: str, python: str | None, runtime_env: str, *, check: bool) -> Job:
        assert (address, runtime_env, check) == ("http://head:8265", "auto", True)
        if not ready:
            raise UserError("a node lacks ray")
        return replace(job, runtime_env="pip")

    monkeypatch.setattr(command, "checked", check)
    monkeypatch.setattr(command, "submit", lambda job, *_, **__: sent.append(job))
    monkeypatch.setattr(command.stage, "results", lambda plan, root: [None, None])
    plan = plan_sweep(open_run(recipe, "tiny"), [4], texts, "swept")
    options = command.FleetOptions("http://head:8265", pool=True)
    if ready:
        command._sweep_by_one_job(plan, open_run(recipe, "tiny"), texts, options)
        assert [(job.sweep, job.runtime_env) for job in sent] == [("swept", "pip")]
    else:
        with pytest.raises(UserError, match="lacks ray"):
            command._sweep_by_one_job(plan, open_run(recipe, "tiny"), texts, options)
        assert not sent
