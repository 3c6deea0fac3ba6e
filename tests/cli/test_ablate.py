"""Ablations: recipes of every row, and what is concluded from the distances."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffit_train.cli import ablate, sweep
from diffit_train.cli.ablate import NOT_SEEN, SEEN, WITHIN, paper_order, run_ablation
from diffit_train.cli.sweep import FleetOptions
from diffit_train.config.ablations import SCALES, ablation_names, find_ablation
from diffit_train.errors import DiffitError, UserError
from diffit_train.jobs.fleet import Fleet
from diffit_train.models.build import build_model
from diffit_train.runs.run import Run


@pytest.mark.parametrize("name", ablation_names())
def test_every_row_is_a_recipe_of_its_own(name: str) -> None:
    ablation = find_ablation(name)
    for scale in SCALES:
        recipes = [ablation.recipe_of(row, scale, 1) for row in ablation.rows]
        hashes = {r.train_hash() for r in recipes}
        assert len(hashes) == (len(recipes) if ablation.trains else 1)
        keys = {json.dumps(r.evaluate_identity(), sort_keys=True) for r in recipes}
        assert len(keys) == (1 if ablation.trains else len(recipes))
        assert {r.train.seed for r in recipes} == {1}
        assert len({r.encode_hash() for r in recipes}) == 1
        if scale == "tiny":
            with torch.device("meta"):
                for recipe in recipes:
                    build_model(recipe)


def test_the_papers_best_row_is_the_recipe_itself() -> None:
    for name in ("table3", "table4", "table6", "table7", "table8"):
        ablation = find_ablation(name)
        best = ablation.rows[ablation.order()[0]]
        assert best.fid == 1.95
        assert not best.set
    assert find_ablation("table4").order() == ["E", "D", "C", "B", "A"]
    assert find_ablation("figure8").order() == ["8", "4", "2"]
    assert find_ablation("figure7b").order() == ["tmsa", "modulation"]


def test_tables_share_the_runs_of_the_recipe_itself() -> None:
    tables = [find_ablation(name) for name in ablation_names()]
    shared = {"table3", "table4", "table6", "table7", "table8", "figure8"}
    names = [t.run_of(row, "tiny", 2) for t in tables if t.trains for row in t.rows]
    assert names.count("cifar10-tiny-seed2") == len(shared)
    assert len({*names}) == len(names) - len(shared) + 1
    for table in tables:
        for row in table.rows:
            if table.run_of(row, "tiny", 2) == "cifar10-tiny-seed2":
                assert table.name in shared
                assert table.recipe_of(row, "tiny", 2) == tables[0].recipe_of(
                    "time512-dim256", "tiny", 2
                )


def test_dimensions_of_table_3() -> None:
    table = find_ablation("table3")
    sizes = [table.recipe_of(row, "full", 0).model for row in table.rows]
    assert [(s.time_size, s.channels) for s in sizes] == [
        (512, (128, 512, 512)),
        (256, (128, 256, 256)),
        (512, (128, 256, 256)),
    ]


@pytest.mark.parametrize(
    ("f", "g", "h", "verdict"),
    [
        ([4.0, 4.1], [3.0, 3.1], [2.0, 2.1], SEEN),
        ([3.0, 3.1], [4.0, 4.1], [2.0, 2.1], NOT_SEEN),
        ([4.0, 4.1], [3.0, 3.9], [3.3, 3.4], WITHIN),
        # Neighbors are within the spread, the ends are the other way round.
        ([3.0, 3.1], [3.4, 3.9], [3.9, 4.0], NOT_SEEN),
        ([4.0], [3.0], [2.0], "not decided: one seed has no spread"),
    ],
)
def test_the_order_is_judged_against_the_spread(
    f: list[float], g: list[float], h: list[float], verdict: str
) -> None:
    assert paper_order(find_ablation("table6"), {"F": f, "G": g, "H": h}) == verdict


def test_an_interrupted_ablation_goes_on(tmp_path: Path) -> None:
    """Every run is asked for again; finished ones answer at once."""
    asked: list[str] = []

    def run_one(run: Run, address: str | None) -> float:
        asked.append(run.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"bias": 4.0, "mlp": 3.0, "tmsa": 2.0}[run.recipe.model.time] + run.recipe.train.seed

    table, root = find_ablation("table6"), str(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_ablation(table, "tiny", 2, root=root, run_one=run_one)
    assert not (tmp_path / "ablations").exists()
    asked.append("killed")
    result = run_ablation(table, "tiny", 2, root=root, run_one=run_one)
    rows = ("table6-tiny-F", "table6-tiny-G", "cifar10-tiny")
    assert asked[-6:] == [f"{row}-seed{seed}" for seed in (0, 1) for row in rows]
    assert [row["mean"] for row in result["rows"]] == [4.5, 3.5, 2.5]
    assert (result["metric"], result["order"]) == ("fd_cifar10", WITHIN)
    stored = json.loads((tmp_path / "ablations" / "table6-tiny.json").read_text())
    assert stored == result
    with Image.open(tmp_path / "ablations" / "table6-tiny.png") as picture:
        assert picture.size[0] == 960


def test_a_fleet_runs_the_first_job_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its latents and reference are everyone's; failures are named, and the rest is kept."""
    sent: list[tuple[list[str], int]] = []

    def run(fleet: Fleet) -> None:
        jobs = [state.job for state in fleet.states if state.job]
        sent.append(([job.run.name for job in jobs], fleet.max_concurrent))
        assert {job.stage for job in jobs} == {"pipeline"}
        for state in fleet.states:
            killed = "G-seed1" in state.name
            state.state, state.reason = ("failed", "was killed") if killed else ("done", "")

    monkeypatch.setattr(Fleet, "run", run)
    monkeypatch.setattr(sweep, "checked", lambda job, *_, **__: job)
    monkeypatch.setattr(ablate, "_fit_classifier", lambda recipe: None)
    fleet = FleetOptions("http://head:8265", max_concurrent=3)
    with pytest.raises(DiffitError, match="1 of 6 .*G-seed1.*killed"):
        run_ablation(find_ablation("table6"), "tiny", 2, root=str(tmp_path), fleet=fleet)
    assert sent[0] == (["table6-tiny-F-seed0"], 3)
    assert len(sent[1][0]) == 5
    # The rows of a figure that trains only once share a run, so they follow each other.
    sent.clear()
    figure, root = find_ablation("figure7a"), str(tmp_path)
    run_ablation(figure, "tiny", 1, root=root, fleet=fleet, run_one=lambda *_: 1.0)
    assert [runs for runs, _ in sent] == [["figure7a-tiny-run-seed0"]] * 4


def test_bad_input_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'table1'.*table3"):
        find_ablation("table1")
    with pytest.raises(UserError, match=r"model\.window is 3"):
        run_ablation(find_ablation("table6"), "tiny", 1, ["model.window=3"], str(tmp_path))
