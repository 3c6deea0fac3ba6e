"""`diffit compare`: selection, ranking, averages over seeds, plots and files."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from diffit_train.cli.main import app, exit_status
from diffit_train.errors import UserError
from diffit_train.reports import html
from diffit_train.reports.collect import Evaluation, Protocol, RunRow, collect
from diffit_train.reports.compare import Comparison, compare_store
from diffit_train.reports.plots import (
    NFE_LABEL,
    Line,
    Panel,
    _draw_panel,
    draw_panels,
    panels,
)
from diffit_train.reports.ranking import (
    best_by_protocol,
    best_indices,
    best_of,
    fronts,
    group_runs,
    main_metric,
    metric_names,
    pareto_front,
    protocol_names,
)
from diffit_train.reports.tables import csv_text, sheets
from diffit_train.tracking import Tracker

RECIPE = {
    "name": "x",
    "data.source": "root:images",
    "data.resolution": 32,
    "model.depth": 2,
    "train.lr": 1e-4,
    "train.seed": 0,
    "train.checkpoint_every": 10,
    "train.start": None,
    "storage.root": "/somewhere",
    "scaling.workers": 1,
}
EVALUATE = {
    "evaluate.samples": 5000,
    "evaluate.batch_size": 8,
    "evaluate.weights": "ema",
    "evaluate.seed": 0,
    "evaluate.sampler.name": "ddim",
    "evaluate.sampler.steps": 50,
    "evaluate.guidance.kind": "constant",
    "evaluate.guidance.scale": 1.5,
    "evaluate.features.name": "inception",
    "evaluate.features.source": "published",
    "evaluate.reference": "",
    "evaluate.reference_images": 10000,
}
COLORS = {"base-s0": (200, 10, 10), "base-s1": (10, 200, 10), "<b>": (10, 10, 200)}


class Store:
    """An MLflow store, filled as training and evaluation fill it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        uri = f"sqlite:///{folder}/mlflow.db"
        self.tracker = Tracker(uri)

    def run(self, name: str, changes: Mapping[str, object], experiment: str = "main") -> str:
        """A training run with a loss at steps 10 to 30."""
        params = {**RECIPE, **changes}
        tags = {"diffit.recipe_hash": f"hash-of-{name}", "mlflow.source.git.commit": "c0ffee" * 6}
        tags["diffit.dataset_digest"] = "d1" * 32
        uuid = f"{experiment}-{name}-{len(self.tracker.runs())}"
        run = self.tracker.training_run(experiment, uuid, name, params, tags)
        for step in (10, 20, 30):
            loss = 1.0 / step + float(str(params["train.seed"])) / 100
            self.tracker.log_metrics(run, {"train/loss": loss, "perf/images_per_s": 5.0}, step)
        self.tracker.finish(run)
        return run

    def evaluation(
        self,
        run: str,
        step: int,
        metrics: Mapping[str, float],
        changes: Mapping[str, object],
        sweep: str | None = None,
        color: tuple[int, int, int] | None = None,
        cost: float | None = None,
        digest: str | None = None,
    ) -> None:
        """A child run, with a single-color grid if `color` is given."""
        params = {**EVALUATE, **{f"evaluate.{key}": value for key, value in changes.items()}}
        words = sorted((key, str(value)) for key, value in params.items())
        key = f"ddim{params['evaluate.sampler.steps']}-{abs(hash((run, *words))) % 16**8:08x}"
        tags = {"diffit.evaluation_key": key} | ({"diffit.sweep": sweep} if sweep else {})
        if digest is not None:
            tags["diffit.reference_digest"] = digest
        named = {f"eval/{name}": value for name, value in metrics.items()}
        if cost is not None:
            named["cost/nfe"] = cost
        child = self.tracker.evaluation_run(
            "main", run, f"{step}/{key}", f"{step}-{key}", {**params, "step": step}, tags
        )
        self.tracker.log_metrics(child, named, step)
        if color is not None:
            grid = self.folder / "grid.png"
            Image.new("RGB", (40, 30), color).save(grid)
            self.tracker.log_artifact(child, grid)
        self.tracker.finish(child)


# FID by training seed and step, and by guidance scale and evaluation seed.
CURVE = {0: {10: 30.0, 30: 10.0}, 1: {10: 33.0, 30: 11.5}}
SCALES = {1.0: (14.0, 14.5, 13.6), 2.0: (8.0, 8.4, 8.1), 3.0: (11.0, 11.1, 11.6)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two seeds of a run, one with sweeps, and another run, also evaluated on more samples."""
    made = Store(tmp_path_factory.mktemp("store"))
    for seed, curve in CURVE.items():
        name = f"base-s{seed}"
        run = made.run(name, {"train.seed": seed, "scaling.workers": 1 + seed})
        for step, fid in curve.items():
            metrics = {"fid": fid, "inception_score": 90.0 - fid, "precision": 0.5, "recall": 0.6}
            color = COLORS[name] if step == 30 else None
            made.evaluation(run, step, metrics, {}, color=color, cost=100)
        if seed == 0:
            for scale, fids in SCALES.items():
                for own, fid in enumerate(fids):
                    metrics = {"fid": fid, "inception_score": 50 * scale + own}
                    change = {"guidance.scale": scale, "seed": own}
                    made.evaluation(run, 30, metrics, change, sweep="scales", cost=100)
            for steps, fid in ((10, 20.0), (25, 13.0)):
                change = {"sampler.steps": steps}
                made.evaluation(run, 30, {"fid": fid}, change, sweep="steps", cost=2.0 * steps)
    other = made.run("<b>", {"train.lr": 3e-4, "train.checkpoint_every": 30})
    made.evaluation(other, 20, {"fid": 9.5}, {"samples": 5000, "batch_size": 16}, cost=100)
    made.evaluation(
        other, 30, {"fid": 3.0, "precision": 0.4}, {"samples": 50_000}, color=COLORS["<b>"]
    )
    made.run("lonely", {}, experiment="aside")
    return made


@pytest.fixture(scope="module")
def comparison(store: Store) -> Comparison:
    return _compared(collect(store.tracker, "main"))


def _compared(rows: list[RunRow]) -> Comparison:
    metric = main_metric([e for row in rows for e in row.evaluations], None)
    return Comparison(rows, metric, "compare.png", None, None)


def _measured(metrics: dict[str, float], protocol: Protocol, step: int = 1) -> Evaluation:
    return Evaluation(step, "key", metrics, protocol, {}, None, None, "id")


def _fids(store: Store, *selection: str) -> dict[str, list[float]]:
    rows = collect(store.tracker, None, selection)
    return {row.record.name: sorted(e.metrics["fid"] for e in row.evaluations) for row in rows}


# ---- Selection ----


def test_everything_is_compared_unless_selected(store: Store) -> None:
    found = _fids(store)
    assert list(found) == ["base-s0", "base-s1", "<b>", "lonely"]
    assert len(found["base-s0"]) == 13
    assert list(_fids(store, "lonely", "base-s1")) == ["lonely", "base-s1"]


def test_checkpoints_and_sweeps_are_selected(store: Store) -> None:
    assert _fids(store, "base-s0@10", "base-s1@30") == {"base-s0": [30.0], "base-s1": [11.5]}
    swept = sorted(fid for fids in SCALES.values() for fid in fids)
    assert _fids(store, "base-s0/scales") == {"base-s0": swept}
    assert _fids(store, "base-s0@10", "base-s0/steps") == {"base-s0": [13.0, 20.0, 30.0]}
    assert _fids(store, "<b>@newest") == {"<b>": [3.0]}
    assert _fids(store, "base-s0@30/steps") == {"base-s0": [13.0, 20.0]}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bse-s1", r"no run 'bse-s1'; .*closest first: base-s1, base-s0, .*lonely"),
        ("base-s0/scale", r"no sweep 'scale' of run 'base-s0'; .*closest first: scales, steps"),
        ("base-s1/scales", r"no sweep 'scales' of run 'base-s1'; .*: none"),
        ("base-s1@20", r"no evaluation of run 'base-s1' at step '20'; .*: 10, 30"),
        ("lonely@10", r"run 'lonely' has no evaluation yet; run `diffit evaluate`"),
    ],
)
def test_unknown_names_are_reported_with_the_closest(store: Store, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        collect(store.tracker, None, [word])


def test_runs_with_the_same_name_get_distinct_labels(tmp_path: Path, store: Store) -> None:
    shutil.copy(store.folder / "mlflow.db", tmp_path)
    copy = Store(tmp_path)
    copy.run("lonely", {}, experiment="main")
    labels = [row.label for row in collect(copy.tracker, None, ["lonely"])]
    assert labels == ["lonely (aside)", "lonely (main)"]
    (row,) = collect(copy.tracker, None, ["lonely (main)"])
    assert row.record.experiment == "main"
    again = copy.run("lonely", {}, experiment="main")
    assert f"lonely ({again[:8]})" in [row.label for row in collect(copy.tracker, "main")]


def test_names_may_contain_the_separators_of_a_selection(tmp_path: Path, store: Store) -> None:
    shutil.copy(store.folder / "mlflow.db", tmp_path)
    copy = Store(tmp_path)
    for name, fid in (("wide", 5.0), ("wide@2", 6.0), ("wide@2/b", 7.0)):
        copy.evaluation(copy.run(name, {}), 10, {"fid": fid}, {}, sweep="b")
    assert _fids(copy, "wide@2/b") == {"wide@2/b": [7.0]}
    assert _fids(copy, "wide@2@10", "wide/b") == {"wide@2": [6.0], "wide": [5.0]}
    with pytest.raises(UserError, match=r"run 'wide@2' at step '3'; .*closest first: 10"):
        collect(copy.tracker, None, ["wide@2@3"])


def test_the_ranking_metric_must_have_a_direction(comparison: Comparison) -> None:
    evaluations = comparison.evaluations
    assert metric_names(evaluations) == ["fid", "inception_score", "precision", "recall"]
    assert main_metric(evaluations, None) == "fid"
    assert main_metric(evaluations, "recall") == "recall"
    assert main_metric([], None) is None
    with pytest.raises(UserError, match=r"'inception' .*closest first: inception_score"):
        main_metric(evaluations, "inception")
    odd = _measured({"speed": 1.0, "sfd_digits": 3.0, "fd_digits": 2.0}, Protocol())
    assert main_metric([odd], None) == "fd_digits"


# ---- Differences ----


def test_only_recipe_differences_are_shown(comparison: Comparison) -> None:
    (sheet,) = [s for s in sheets(comparison) if s.title == "recipe differences"]
    cells = {key: others for key, *others in sheet.frame.to_numpy().tolist()}
    assert cells == {
        "train.checkpoint_every": ["10", "10", "30"],
        "train.lr": ["0.0001", "0.0001", "0.0003"],
        "train.seed": ["0", "1", "0"],
    }


def test_differing_settings_are_columns_and_the_others_a_note(
    comparison: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    (sheet,) = [s for s in sheets(comparison) if s.title == "evaluations"]
    settings = ["samples", "seed", "sampler.steps", "guidance.scale"]
    assert [c for c in sheet.columns if c in settings] == settings
    assert not {"weights", "batch_size", "sampler.name"} & set(sheet.columns)
    comparison.print_table()
    printed = capsys.readouterr().out
    assert "the same in all evaluations: weights ema, sampler.name ddim, " in printed
    assert "batch_size" not in printed
    assert re.search(r"base-s0 .* 8\* ", printed), "the best is starred"


# ---- Ranking ----


def test_metrics_of_different_sample_counts_are_not_ranked_together(comparison: Comparison) -> None:
    few, many = Protocol(samples=5000), Protocol(samples=50_000)
    mixed = [_measured({"fid": 9.0}, few), _measured({"fid": 3.0}, many)]
    with pytest.raises(ValueError, match="fid of different protocols"):
        best_of(mixed, "fid")
    assert best_of(mixed[:1], "fid") == mixed[0]
    assert best_indices([9.0, 3.0, 8.0], [few, many, few], "fid") == {2}

    (runs,) = [s for s in sheets(comparison) if s.title == "runs"]
    columns = ["best fid (5,000 samples)", "best fid (50,000 samples)"]
    assert [c for c in runs.columns if c.startswith("best")] == columns
    best = {row["run"]: [row[c] for c in columns] for row in runs.frame.to_dict("records")}
    assert best == {"base-s0": ["8", "-"], "base-s1": ["11.5", "-"], "<b>": ["9.5", "3"]}
    marked = [(row[0][0], text) for row in runs.rows for text, best in row if best]
    assert marked == [("base-s0", "8")]
    (note,) = [n for n in comparison.notes() if n.startswith("note")]
    assert "measured in 2 ways: 5,000 samples; 50,000 samples." in note
    assert "no line joins them" in note


@pytest.mark.parametrize(
    ("name", "best"),
    [(name, 0) for name in ("fid", "sfid", "kid", "fd_digits", "sfd_digits", "kd_digits")]
    + [(name, 2) for name in ("inception_score", "precision", "recall", "classifier_accuracy")],
)
def test_the_better_direction_of_each_metric(name: str, best: int) -> None:
    same = [Protocol()] * 4
    assert best_indices([1.0, 2.0, 3.0, math.nan], same, name) == {best}
    evaluations = [_measured({name: float(i)}, Protocol(), i) for i in (1, 2, 3)]
    top = best_of(evaluations, name)
    assert top is not None
    assert top.step == best + 1


def test_nothing_is_marked_best_without_a_rival() -> None:
    assert best_indices([1.0, None], [Protocol()] * 2, "fid") == set()
    assert best_indices([1.0, 1.0], [Protocol()] * 2, "fid") == set()
    assert best_indices([1.0, 2.0], [Protocol()] * 2, "unheard_of") == set()


def test_different_features_or_references_are_different_protocols(
    tmp_path: Path, store: Store
) -> None:
    shutil.copy(store.folder / "mlflow.db", tmp_path)
    copy = Store(tmp_path)
    run = copy.run("measured", {})
    own = {"features.name": "digits", "features.source": "root:features/digits"}
    for step, change in enumerate([{}, own, {"reference": "root:adm.npz"}]):
        copy.evaluation(run, step, {"fid": 5.0}, change)
    larger = copy.run("larger", {"data.resolution": 64})
    copy.evaluation(larger, 1, {"fid": 5.0}, {})
    copy.evaluation(larger, 2, {"fid": 5.0}, {"features.source": "/elsewhere/inception.pth"})
    rows = collect(copy.tracker, None, ["measured", "larger"])
    protocols = [e.protocol for row in rows for e in row.evaluations]
    assert len(set(protocols)) == 4
    assert protocols[3] == protocols[4], "the published network is the same at any path"
    names = protocol_names(protocols)
    assert names[protocols[2]] == "features inception, reference root:adm.npz"
    assert len(set(names.values())) == 4
    (note,) = [n for n in _compared(rows).notes() if "measured in 4 ways" in n]
    assert "features digits of root:features/digits, reference root:images at 32" in note
    assert "features inception, reference root:images at 64" in note


def test_different_precisions_are_ranked_apart(tmp_path: Path, store: Store) -> None:
    shutil.copy(store.folder / "mlflow.db", tmp_path)
    copy = Store(tmp_path)
    run = copy.run("precise", {})
    copy.evaluation(run, 1, {"fid": 5.0}, {"precision": "fp32"})
    copy.evaluation(run, 2, {"fid": 4.0}, {"precision": "fp32"})
    copy.evaluation(run, 3, {"fid": 3.0}, {"precision": "bf16_autocast"})
    (row,) = rows = collect(copy.tracker, None, ["precise"])
    best = best_by_protocol(row, "fid")
    assert sorted((p.precision, e.step) for p, e in best.items()) == [
        ("bf16_autocast", 3),
        ("fp32", 2),
    ]
    (note,) = [n for n in _compared(rows).notes() if "measured in 2 ways" in n]
    assert "precision fp32; precision bf16_autocast. They are not comparable" in note


def test_references_are_identified_by_digest(tmp_path: Path) -> None:
    copy = Store(tmp_path)
    first, second = copy.run("first", {}), copy.run("second", {})
    paths = ["/here/adm.npz", "https://there/jul-2021/adm.npz", "/here/adm.npz", "dataset"]
    digests = ["a" * 64, "a" * 64, "b" * 64, "c" * 64]
    for step, (path, digest) in enumerate(zip(paths, digests, strict=True)):
        run = second if step == 1 else first
        copy.evaluation(run, step, {"fid": 9.0 - step}, {"reference": path}, digest=digest)
    rows = collect(copy.tracker, None, ["first", "second"])
    protocols = {e.step: e.protocol for row in rows for e in row.evaluations}
    assert protocols[0] == protocols[1], "the same file at two paths"
    assert len(set(protocols.values())) == 3, "a different file at the same path"
    assert protocols[0].reference == "adm.npz (aaaaaaaa)"
    assert protocols[2].reference == "adm.npz (bbbbbbbb)"
    assert protocols[3].reference == "root:images at 32 (cccccccc)"
    with pytest.raises(ValueError, match="different protocols"):
        best_of(rows[0].evaluations, "fid")
    assert best_of([rows[0].evaluations[0], *rows[1].evaluations], "fid").step == 1  # type: ignore[union-attr]
    # A different path does not separate seeds of the same run.
    assert rows[0].evaluations[0].settings == rows[1].evaluations[0].settings


# ---- Seeds ----


def test_seeds_give_mean_and_deviation(comparison: Comparison) -> None:
    groups = group_runs(comparison.runs)
    assert [(g.label, len(g.runs)) for g in groups] == [("base (2 seeds)", 2), ("<b>", 1)]
    value = json.loads(json.dumps(comparison.as_json()))
    found = {(s["step"], s["settings"]["guidance.scale"]): s for s in value["seeds"]}
    assert len(found) == len(value["seeds"]) == 2 + len(SCALES)
    for step in (10, 30):
        fids = [CURVE[seed][step] for seed in (0, 1)]
        group = found[step, "1.5"]
        assert (group["runs"], group["training_seeds"]) == ("base (2 seeds)", ["0", "1"])
        expected = {"mean": np.mean(fids), "standard_deviation": np.std(fids, ddof=1), "n": 2}
        assert group["metrics"]["fid"] == pytest.approx(expected)
    for scale, fids in SCALES.items():
        group = found[30, str(scale)]
        assert (group["runs"], group["evaluation_seeds"]) == ("base-s0", ["0", "1", "2"])
        expected = {"mean": np.mean(fids), "standard_deviation": np.std(fids, ddof=1), "n": 3}
        assert group["metrics"]["fid"] == pytest.approx(expected)
    (sheet,) = [s for s in sheets(comparison) if s.title.startswith("over seeds")]
    (place,) = sheet.frame.index[sheet.frame["guidance.scale"] == "2.0"]
    fids = SCALES[2.0]
    shown = f"{np.mean(fids):.4g} ± {np.std(fids, ddof=1):.2g}"
    assert sheet.frame["fid"][place] == shown
    assert (place, "fid") in sheet.best
    (losses,) = [s for s in sheets(comparison) if s.title.startswith("loss over")]
    ends = [1 / 30, 1 / 30 + 0.01]
    assert losses.frame["loss"][0] == f"{np.mean(ends):.4g} ± {np.std(ends, ddof=1):.2g}"


def test_a_repeated_seed_is_not_another_seed(tmp_path: Path, store: Store) -> None:
    shutil.copy(store.folder / "mlflow.db", tmp_path)
    copy = Store(tmp_path)
    for name, change in (
        ("a", {"train.seed": 4}),
        ("b", {"train.seed": 4}),
        ("c", {"train.seed": 5, "train.checkpoint_every": 30}),
        ("d", {"train.seed": 6, "model.depth": 3}),
    ):
        copy.run(name, change)
    rows = collect(copy.tracker, "main", ["a", "b", "c", "d"])
    members = [[run.record.name for run in group.runs] for group in group_runs(rows)]
    assert members == [["a", "c"], ["b"], ["d"]]


# ---- Plots ----


def _panel(found: list[Panel], title: str) -> Panel:
    return next(panel for panel in found if panel.title == title)


def test_curves_have_error_bars_and_never_mix_samples(comparison: Comparison) -> None:
    found = panels(comparison)
    fid = _panel(found, "fid")
    (line,) = fid.lines
    assert (line.label, line.x) == ("base (2 seeds)", [10, 30])
    pairs = [[CURVE[seed][step] for seed in (0, 1)] for step in (10, 30)]
    assert line.y == pytest.approx(np.mean(pairs, axis=1))
    assert line.y_error == pytest.approx(np.std(pairs, axis=1, ddof=1))
    loss = _panel(found, "training loss")
    assert [line.label for line in loss.lines] == ["base (2 seeds)", "<b>"]
    assert loss.lines[0].y_error == pytest.approx([0.01 / math.sqrt(2)] * 3)
    assert not any(line.x == [20, 30] and line.y == [9.5, 3.0] for p in found for line in p.lines)


def test_metric_vs_guidance_and_nfe(comparison: Comparison) -> None:
    found = panels(comparison)
    (line,) = _panel(found, "fid vs. guidance.scale").lines
    # The evaluation of the curve, at scale 1.5, differs from the sweep only in its scale.
    assert line.x == [1.0, 1.5, 2.0, 3.0]
    assert line.y[2] == pytest.approx(np.mean(SCALES[2.0]))
    assert line.y_error[2] == pytest.approx(np.std(SCALES[2.0], ddof=1))
    cost = _panel(found, "fid vs. NFE")
    curve = next(line for line in cost.lines if line.kind == "curve")
    assert curve.x == [20.0, 50.0, 100.0]
    assert curve.y[:2] == [20.0, 13.0]


def test_the_only_value_of_an_axis_is_its_only_tick() -> None:
    from matplotlib.figure import Figure

    for label in ("step", NFE_LABEL):
        axes = Figure().subplots()
        _draw_panel(axes, Panel("a title", label, [Line("one", [1200.0], [345.25])], "fd"))
        assert [text.get_text() for text in axes.get_xticklabels()] == ["1,200"]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["345.2"]


def test_empty_panels_are_omitted(store: Store, tmp_path: Path) -> None:
    rows = collect(store.tracker, None, ["base-s1"])
    titles = [p.title for p in panels(_compared(rows))]
    curves = ["training loss", "fid", "inception_score", "precision", "recall"]
    assert titles == [*curves, "fid vs. inception_score"]
    rows = collect(store.tracker, None, ["lonely"])
    assert [p.title for p in panels(_compared(rows))] == ["training loss"]
    with (tmp_path / "empty.png").open("wb") as file:
        draw_panels([], file)
    assert Image.open(tmp_path / "empty.png").size[0] > 100


points = st.lists(
    st.tuples(st.integers(-4, 4).map(float), st.integers(-4, 4).map(float)), max_size=12
)


@given(points, st.booleans(), st.booleans())
def test_the_front_is_what_nothing_dominates(
    found: list[tuple[float, float]], lower_x: bool, lower_y: bool
) -> None:
    sign = np.where([lower_x, lower_y], 1, -1)

    def dominated(mine: tuple[float, float]) -> bool:
        differences = [np.subtract(other, mine) * sign for other in found]
        return any((d <= 0).all() and (d < 0).any() for d in differences)

    front = pareto_front(found, (lower_x, lower_y))
    assert sorted(front) == [i for i, point in enumerate(found) if not dominated(point)]
    assert [found[i][0] for i in front] == sorted(found[i][0] for i in front)


def test_fronts_are_by_protocol(comparison: Comparison) -> None:
    ((protocol, members),) = fronts(comparison.replicates, ("inception_score", "fid")).items()
    assert protocol.samples == 5000
    means = [[r.spread(name).mean for name in ("inception_score", "fid")] for r in members]
    scores = [[50.0 * scale + 1, np.mean(SCALES[scale])] for scale in (2.0, 3.0)]
    assert np.allclose(means, scores)
    panel = _panel(panels(comparison), "fid vs. inception_score")
    (line,) = [x for x in panel.lines if x.kind == "front"]
    assert np.allclose(np.transpose([line.x, line.y]), scores)
    value = comparison.as_json()["front"]
    assert value["axes"] == ("inception_score", "fid")
    assert [p["settings"]["guidance.scale"] for p in value["points"]] == ["2.0", "3.0"]


# ---- Files ----


def test_markdown_parses_back(comparison: Comparison) -> None:
    text = comparison.markdown()
    parts = re.split(r"^### (.*)\n\n", text, flags=re.M)
    tables = dict(zip(parts[1::2], parts[2::2], strict=True))
    lines = [x for x in tables["runs"].splitlines() if x.startswith("|")]
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert cells[0][:2] == ["run", "status"]
    assert [row[0] for row in cells[2:]] == ["base-s0", "base-s1", "&lt;b&gt;"]
    column = cells[0].index("best fid (5,000 samples)")
    assert [row[column] for row in cells[2:]] == ["**8**", "11.5", "9.5"]
    assert {len(row) for row in cells} == {len(cells[0])}
    assert re.fullmatch(r":?-+:?", cells[1][0])
    assert "<b>" not in text
    assert "- note: metrics were measured in 2 ways" in text


@pytest.mark.parametrize("name", ['=HYPERLINK("http://x")', "+1+cmd", "-x", "@SUM(A1)", "\t=1"])
def test_a_name_is_no_formula_in_a_spreadsheet(comparison: Comparison, name: str) -> None:
    first = next(run for run in comparison.runs if run.evaluations)
    named = replace(first, label=name)
    rows = list(csv.DictReader(io.StringIO(csv_text([named]))))
    assert {row["run"] for row in rows} == {f"'{name}"}
    assert all(
        float(row["fid"]) == e.metrics["fid"]
        for row, e in zip(rows, first.evaluations, strict=True)
    )


def test_csv_parses_back(comparison: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(comparison.runs))))
    assert len(rows) == len(comparison.evaluations)
    assert list(rows[0])[:5] == ["run", "step", "key", "sweep", "samples"]
    assert "evaluate.weights" not in rows[0]
    pairs = [(run, e) for run in comparison.runs for e in run.evaluations]
    for row, (run, e) in zip(rows, pairs, strict=True):
        assert (row["run"], int(row["step"]), row["key"]) == (run.label, e.step, e.key)
        assert row["sweep"] == (e.sweep or "")
        assert row["evaluate.guidance.scale"] == e.settings["guidance.scale"]
        assert float(row["fid"]) == e.metrics["fid"]
        assert row["recall"] == ("" if "recall" not in e.metrics else str(e.metrics["recall"]))


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether every tag was closed."""

    EMPTY = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_complete_and_self_contained(store: Store, tmp_path: Path) -> None:
    page, table = tmp_path / "out" / "report.html", tmp_path / "table.csv"
    comparison = compare_store(
        str(store.folder),
        None,
        "main",
        str(tmp_path / "compare.png"),
        html=str(page),
        csv=str(table),
    )
    text = page.read_text()
    parsed = Page(text)
    assert not parsed.open
    plain = re.sub(r'http-equiv|base64,[^"]*|sqlite:/+', "", text)
    assert not re.search(r"http|ftp|//|@import|url\(|<script", plain)
    attributes = [value for _, found in parsed.tags for value in found.values() if value]
    sources = [found["src"] for tag, found in parsed.tags if tag == "img"]
    assert all(source and source.startswith("data:image/png;base64,") for source in sources)
    assert not {"link", "iframe", "object", "b"} & {tag for tag, _ in parsed.tags}
    words = " ".join(parsed.words)
    assert "<b>" in words
    assert any("<b>, step 30" in value for value in attributes)
    assert "c0ffeec0ffee" in words
    assert "hash-of-base" in words
    assert "d1d1d1d1d1d1" in words
    assert "omitted: grids of 13 more evaluations" in words

    colors = set()
    for source in sources:
        image = Image.open(io.BytesIO(_decoded(str(source))))
        if image.size == (40, 30):
            colors.add(image.getpixel((5, 5)))
    # The best evaluation of base-s0 is in the sweep, without a grid; its newest is at that step.
    assert colors == {COLORS["base-s1"], COLORS["<b>"]}
    assert "MLflow has no grid of ddim50" in words
    assert len(sources) == len(panels(comparison)) + 2
    assert len(list(csv.reader(table.open()))) == len(comparison.evaluations) + 1
    assert [p.name for p in sorted(tmp_path.rglob("*")) if ".tmp-" in p.name] == []


def _decoded(source: str) -> bytes:
    import base64

    return base64.b64decode(source.split(",", 1)[1])


def test_a_large_grid_is_embedded_at_reduced_size(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    assert html._grid_uri(file.getvalue()).startswith("data:image/png")
    monkeypatch.setattr(html, "MAX_GRID_BYTES", 1000)
    monkeypatch.setattr(html, "SMALL_SIDE_PX", 60)
    uri = html._grid_uri(file.getvalue())
    assert uri.startswith("data:image/jpeg")
    assert Image.open(io.BytesIO(_decoded(uri))).size == (60, 45)


def test_the_page_is_bounded_and_reveals_no_secret(
    store: Store, comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "MAX_GRIDS", 1)
    monkeypatch.setattr(store.tracker, "uri", "http://user:secret@mlflow:5000")
    html.write_html(comparison, [], store.tracker, str(tmp_path / "r.html"))
    text = (tmp_path / "r.html").read_text()
    assert "omitted: grids of 16 more evaluations" in text
    assert "http://mlflow:5000" in text
    assert "secret" not in text


def test_an_unreadable_grid_is_reported(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run_id: str, name: str) -> bytes:
        raise OSError("http://user:secret@store is away")

    monkeypatch.setattr(store.tracker, "artifact", refuse)
    chosen = [("caption", _measured({}, Protocol()))]
    images, notes = html._grids(chosen, store.tracker)
    assert images == []
    assert notes == ["could not read the grid of key: http://store is away"]


# ---- The command ----


def test_the_command_prints_one_format(store: Store, tmp_path: Path) -> None:
    words = ["compare", "base-s1", "<b>@30", "--root", str(store.folder)]
    words += ["--plot", str(str(tmp_path / "p.png"))]
    value = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [run["name"] for run in value["runs"]] == ["base-s1", "<b>"]
    first = value["runs"][0]
    assert first["origin"]["recipe_hash"] == "hash-of-base-s1"
    assert first["best"][0] == {
        "metric": "fid",
        "value": 11.5,
        "samples": 5000,
        "step": 30,
        "key": first["evaluations"][1]["key"],
    }
    assert [e["step"] for e in value["runs"][1]["evaluations"]] == [30]
    printed = CliRunner().invoke(app, [*words, "--markdown", "--metric", "precision"]).stdout
    assert "| best precision (5,000 samples) |" in printed
    assert Image.open(str(tmp_path / "p.png")).size[0] > 600


@pytest.mark.parametrize(
    "words", [["--json", "--markdown"], ["--metric", "fd"], ["nobody"], ["base-s0/none"]]
)
def test_bad_input_writes_nothing(store: Store, tmp_path: Path, words: list[str]) -> None:
    files = ["--plot", f"{tmp_path}/p.png", "--html", f"{tmp_path}/r.html"]
    arguments = ["compare", "--root", str(store.folder), *files, *words]
    assert exit_status(lambda: app(arguments, standalone_mode=False)) == 2
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_omitted(
    tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(store.folder / "mlflow.db", tmp_path)
    copy = Store(tmp_path)
    run = copy.run("broken[/]", {})
    copy.evaluation(run, 10, {"fid": math.nan}, {})
    copy.evaluation(run, 20, {"fid": 4.0}, {})
    copy.evaluation(run, 30, {"fid": 5.0}, {})
    comparison = compare_store(
        str(tmp_path), None, "main", str(tmp_path / "p.png"), selection=["broken[/]"]
    )
    value = json.loads(json.dumps(comparison.as_json(), allow_nan=False))
    assert [e["fid"] for e in value["runs"][0]["evaluations"]] == [None, 4.0, 5.0]
    assert value["runs"][0]["best"][0]["step"] == 20
    comparison.print_table()
    assert "broken[/]" in capsys.readouterr().out
