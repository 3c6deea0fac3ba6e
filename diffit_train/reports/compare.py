"""`diffit compare`: runs, checkpoints and sweeps side by side, read from MLflow."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from diffit_train import storage
from diffit_train.errors import UserError, redact
from diffit_train.reports.collect import RunRow, collect
from diffit_train.reports.html import write_html
from diffit_train.reports.plots import draw_panels, panels
from diffit_train.reports.ranking import (
    Compared,
    best_by_protocol,
    fronts,
    main_metric,
    pareto_axes,
)
from diffit_train.reports.tables import (
    csv_text,
    markdown_table,
    markdown_text,
    rich_table,
    sheets,
)
from diffit_train.tracking import Tracker

if TYPE_CHECKING:
    import pandas as pd

# Output to a pipe need not fit any width.
TABLE_WIDTH = 1000


@dataclass(frozen=True)
class Comparison(Compared):
    """The compared runs, and the files written about them."""

    plot: str
    html: str | None
    csv: str | None

    def as_json(self) -> dict[str, Any]:
        """Plain values; metrics of the Pareto fronts are means over seeds."""
        axes = pareto_axes(self.replicates, self.metric)
        members = fronts(self.replicates, axes).values() if axes else ()
        points = [r.as_json() for front in members for r in front]
        return {
            "runs": [{**run.as_json(), "best": self._best(run)} for run in self.runs],
            "plot": self.plot,
            "metric": self.metric,
            "seeds": [r.as_json() for r in self.replicates if len(r.by_seeds) > 1],
            "front": {"axes": axes, "points": points} if axes else None,
            "notes": self.notes(),
            "html": self.html,
            "csv": self.csv,
        }

    def _best(self, run: RunRow) -> list[dict[str, Any]]:
        """The best evaluation of each protocol."""
        if self.metric is None:
            return []
        return [
            {
                "metric": self.metric,
                "value": top.metrics[self.metric],
                "samples": protocol.samples,
                "step": top.step,
                "key": top.key,
            }
            for protocol, top in best_by_protocol(run, self.metric).items()
        ]

    def _lines(self) -> list[str]:
        files = {"curves": self.plot, "report": self.html, "table": self.csv}
        return [
            *self.notes(),
            *(f"{what}: {storage.display_path(file)}" for what, file in files.items() if file),
        ]

    def print_table(self) -> None:
        """Print the tables to standard output."""
        console = Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)
        for sheet in sheets(self):
            # rich would wrap a table's own title to the table's width.
            console.print(Text(sheet.title, "italic"))
            console.print(rich_table(sheet))
        for line in self._lines():
            console.print(line, soft_wrap=True, highlight=False, markup=False)

    def markdown(self) -> str:
        """The tables as GitHub Markdown, followed by a list of notes."""
        notes = "".join(f"- {markdown_text(line)}\n" for line in self._lines())
        return "\n".join([*(markdown_table(sheet) for sheet in sheets(self)), notes])


def compare_store(
    root: str,
    uri: str | None,
    experiment: str | None,
    plot: str | None,
    *,
    selection: Sequence[str] = (),
    metric: str | None = None,
    html: str | None = None,
    csv: str | None = None,
) -> Comparison:
    """Compare runs of one experiment, or of all in a store, and plot their curves.

    Args:
        root: root of the project; its MLflow store is read if `uri` is None.
        plot: PNG file for the curves; ROOT/compare.png by default.
        selection: RUN, RUN@STEP (or RUN@newest) or RUN/SWEEP; every run by default.
        metric: metric to rank by; the FID by default, or else another Frechet distance.
        html: file for a report with the curves and grids; None for no report.
        csv: file for a table with one row per evaluation; None for no table.

    Raises:
        UserError: there is no store or training run, or no such experiment, run, sweep, step or
            metric; nothing was written.
    """
    tracker = Tracker(uri if uri is not None else _store_of(root))
    runs = collect(tracker, experiment, selection)
    ranked = main_metric([e for run in runs for e in run.evaluations], metric)
    target = plot if plot is not None else storage.join(root, "compare.png")
    comparison = Comparison(runs, ranked, target, html, csv)
    drawn = panels(comparison)
    with storage.atomic_file(target) as path, path.open("wb") as file:
        draw_panels(drawn, file)
    if csv is not None:
        storage.write_text(csv, csv_text(runs))
    if html is not None:
        write_html(comparison, drawn, tracker, html)
    return comparison


def compare(
    root: str,
    selection: Sequence[str] = (),
    tracking_uri: str | None = None,
    experiment: str | None = None,
) -> pd.DataFrame:
    """The evaluations of a project: run, step, settings that differ, NFE, metrics; one per row.

    Args:
        root: project folder.
        selection: RUN, RUN@STEP or RUN/SWEEP; every run by default.
        tracking_uri: of MLflow; None for ROOT/mlflow.db.
        experiment: of MLflow; None for all.

    Raises:
        UserError: there is no store, training run or selected run.
    """
    import pandas as pd

    tracker = Tracker(tracking_uri if tracking_uri is not None else _store_of(root))
    return pd.read_csv(StringIO(csv_text(collect(tracker, experiment, selection))))


def _store_of(root: str) -> str:
    if fault := storage.missing_slash(root):
        raise UserError(f"--root is {root!r}: {fault}")
    if not storage.is_local(root):
        raise UserError(
            f"--root is {redact(root)}, which holds no MLflow database; give the tracking URI of "
            "its runs with --tracking-uri, for example http://mlflow:5000 or "
            "sqlite:////absolute/path/mlflow.db"
        )
    database = storage.local_path(root).absolute() / "mlflow.db"
    if not database.exists():
        raise UserError(f"there is no {database}; train first, or fix --root")
    return f"sqlite:///{database}"
