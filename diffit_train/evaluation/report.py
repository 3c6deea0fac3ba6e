"""`diffit compare`: the runs of an experiment side by side, as MLflow holds them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from diffit_train import storage
from diffit_train.errors import UserError
from diffit_train.tracking import RunRecord, Tracker, redact

# Recipe keys that say where and on how much a run ran, not what it is.
_UNINTERESTING = ("storage.", "tracking.", "scaling.", "name")
PLAIN_WIDTH = 200
History = list[tuple[int, float]]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of a run at a step; `metrics` without their prefix `eval/`.

    A Frechet distance falls with the number of `samples`, so it is compared at equal ones only.
    """

    step: int
    key: str
    samples: int | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class RunRow:
    """A training run."""

    record: RunRecord
    differences: dict[str, str]
    last_step: int
    loss: History
    evaluations: list[Evaluation] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        metrics = self.record.metrics
        return {
            "name": self.record.name,
            "run_id": self.record.run_id,
            "experiment": self.record.experiment,
            "status": self.record.status,
            "differences": self.differences,
            "last_step": self.last_step,
            "train_loss": metrics.get("train/loss"),
            "images_per_s": metrics.get("perf/images_per_s"),
            "evaluations": [
                {"step": e.step, "key": e.key, "samples": e.samples, **e.metrics}
                for e in self.evaluations
            ],
        }


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, and where the picture of their curves is."""

    runs: list[RunRow]
    picture: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"runs": [run.as_json() for run in self.runs], "picture": self.picture}

    def print_table(self) -> None:
        """Runs with their differences, then their evaluations, on standard output."""
        # A pipe has no width that a table would have to fit in.
        console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
        console.print(_runs_table(self.runs))
        if self.runs[0].differences:
            console.print(_differences_table(self.runs))
        console.print(_evaluations_table(self.runs))
        console.print(f"curves: {self.picture}", soft_wrap=True, highlight=False)


def compare_store(
    root: str, uri: str | None, experiment: str | None, picture: Path | None
) -> Comparison:
    """Compare the runs of one experiment, or of all in a store, and draw their curves.

    Args:
        root: of the project; its MLflow store is read where `uri` is None.
        picture: where the curves go; by default ROOT/compare.png.

    Raises:
        UserError: there is no store, no such experiment, or no training run in it.
    """
    if uri is None:
        database = storage.local_path(root).absolute() / "mlflow.db"
        if fault := storage.missing_slash(root):
            raise UserError(f"--root is {root!r}: {fault}")
        if not storage.is_local(root):
            raise UserError(
                f"--root is {redact(root)}, where no MLflow file lies; give the MLflow of its runs "
                "by --tracking-uri, as http://mlflow:5000 or sqlite:////absolute/path/mlflow.db"
            )
        if not database.exists():
            raise UserError(f"there is no {database}; train first, or mend --root")
        uri = f"sqlite:///{database}"
    target = str(picture) if picture is not None else storage.join(root, "compare.png")
    comparison = Comparison(collect(Tracker(uri), experiment), target)
    draw_curves(comparison.runs, target)
    return comparison


def collect(tracker: Tracker, experiment: str | None) -> list[RunRow]:
    """The training runs with their evaluations, oldest first.

    Raises:
        UserError: there is none.
    """
    records = tracker.runs(experiment)
    parents = [record for record in records if record.parent_id is None]
    if not parents:
        raise UserError("MLflow holds no training run; run `diffit train` first")
    differing = _differing_keys(parents)
    rows = []
    for record in parents:
        loss = tracker.history(record.run_id, "train/loss")
        children = [child for child in records if child.parent_id == record.run_id]
        rows.append(
            RunRow(
                record,
                {key: record.params.get(key, "-") for key in differing},
                max((step for step, _ in loss), default=0),
                loss,
                sorted((_evaluation(child) for child in children), key=lambda e: (e.step, e.key)),
            )
        )
    return rows


def _differing_keys(records: list[RunRecord]) -> list[str]:
    keys = sorted({key for record in records for key in record.params})
    return [
        key
        for key in keys
        if not key.startswith(_UNINTERESTING)
        and len({record.params.get(key) for record in records}) > 1
    ]


def _evaluation(child: RunRecord) -> Evaluation:
    metrics = {
        name.removeprefix("eval/"): value
        for name, value in sorted(child.metrics.items())
        if name.startswith("eval/")
    }
    key = child.tags.get("diffit.evaluation_key", child.name)
    samples = child.params.get("evaluate.samples")
    step = int(child.params.get("step", 0))
    return Evaluation(step, key, None if samples is None else int(samples), metrics)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _runs_table(runs: list[RunRow]) -> Table:
    table = Table(title="runs", title_justify="left")
    for name in ("run", "status"):
        table.add_column(name)
    for name in ("step", "loss", "pictures/s"):
        table.add_column(name, justify="right")
    for run in runs:
        metrics = run.record.metrics
        table.add_row(
            run.record.name,
            run.record.status.lower(),
            f"{run.last_step:,}",
            _number(metrics.get("train/loss")),
            _number(metrics.get("perf/images_per_s")),
        )
    return table


def _differences_table(runs: list[RunRow]) -> Table:
    table = Table(title="recipe differences", title_justify="left")
    table.add_column("key")
    for run in runs:
        table.add_column(run.record.name, justify="right")
    for key in runs[0].differences:
        table.add_row(key, *(run.differences[key] for run in runs))
    return table


def _evaluations_table(runs: list[RunRow]) -> Table:
    names = sorted({name for run in runs for e in run.evaluations for name in e.metrics})
    table = Table(title="evaluations", title_justify="left")
    for name in ("run", "evaluation"):
        table.add_column(name)
    for name in ("step", "samples", *names):
        table.add_column(name, justify="right")
    for run in runs:
        for evaluation in run.evaluations:
            figures = [_number(evaluation.metrics.get(name)) for name in names]
            samples = "-" if evaluation.samples is None else f"{evaluation.samples:,}"
            table.add_row(
                run.record.name, evaluation.key, f"{evaluation.step:,}", samples, *figures
            )
    return table


def draw_curves(runs: list[RunRow], url: str) -> None:
    """Write a PNG: loss over steps, and every evaluation metric over steps, a line a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({name for run in runs for e in run.evaluations for name in e.metrics})
    panels = ["train/loss", *names]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained", dpi=120)
    cells = figure.subplots(rows, columns, squeeze=False).flatten()
    for cell, name in zip(cells, panels, strict=False):
        for run in runs:
            for label, points in _lines(run, name):
                marker = "o" if name in names else None
                cell.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4)
        cell.set(title=name, xlabel="step")
        cell.grid(alpha=0.3)
        if name == "train/loss" or name.startswith("fd_"):
            cell.set_yscale("log")
    for cell in cells[len(panels) :]:
        cell.set_axis_off()
    cells[0].legend(fontsize=8)
    with storage.atomic_file(url) as path, path.open("wb") as file:
        FigureCanvasAgg(figure).print_figure(file, format="png")


def _lines(run: RunRow, name: str) -> list[tuple[str, History]]:
    """A run's lines of a panel: its loss, or a metric for each way of evaluating."""
    if name == "train/loss":
        return [(run.record.name, run.loss)] if run.loss else []
    points = [(e.step, e.metrics[name]) for e in run.evaluations if name in e.metrics]
    return [(run.record.name, points)] if points else []
