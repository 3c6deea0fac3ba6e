"""`diffit compare`: runs, checkpoints and sweeps side by side, as MLflow holds them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from diffit_train import storage
from diffit_train.compare.collect import RunRow, collect
from diffit_train.compare.html import write_html
from diffit_train.compare.plots import draw_panels, panels
from diffit_train.compare.ranking import (
    Compared,
    best_by_protocol,
    fronts,
    main_metric,
    pareto_axes,
)
from diffit_train.compare.tables import csv_text, markdown_table, markdown_text, rich_table, sheets
from diffit_train.errors import UserError
from diffit_train.tracking import Tracker, redact

__all__ = ["Comparison", "collect", "compare_store"]

# A pipe has no width that a table would have to fit in.
TABLE_WIDTH = 1000


@dataclass(frozen=True)
class Comparison(Compared):
    """What was compared, and the files that show it."""

    plot: str
    html: str | None
    csv: str | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "runs": [{**run.as_json(), "best": self._best(run)} for run in self.runs],
            "plot": self.plot,
            "metric": self.metric,
            "seeds": [r.as_json() for r in self.replicates if len(r.by_seeds) > 1],
            "front": self._front(),
            "notes": self.notes(),
            "html": self.html,
            "csv": self.csv,
        }

    def _best(self, run: RunRow) -> list[dict[str, Any]]:
        """The best evaluation by each protocol."""
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

    def _front(self) -> dict[str, Any] | None:
        """The points of the Pareto fronts; metrics are means over seeds."""
        axes = pareto_axes(self.replicates, self.metric)
        if axes is None:
            return None
        members = [r for front in fronts(self.replicates, axes).values() for r in front]
        return {"axes": axes, "points": [r.as_json() for r in members]}

    def _lines(self) -> list[str]:
        places = {"curves": self.plot, "report": self.html, "table": self.csv}
        return [
            *self.notes(),
            *(f"{what}: {storage.display_path(p)}" for what, p in places.items() if p),
        ]

    def print_table(self) -> None:
        """The tables on standard output."""
        console = Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)
        for sheet in sheets(self):
            # A table folds its own title into its width.
            console.print(Text(sheet.title, "italic"))
            console.print(rich_table(sheet))
        for line in self._lines():
            console.print(line, soft_wrap=True, highlight=False, markup=False)

    def markdown(self) -> str:
        """The tables as GitHub's Markdown, then a list of notes."""
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
    """Compare runs of one experiment, or of all in a store, and draw their curves.

    Args:
        root: of the project; its MLflow store is read where `uri` is None.
        plot: where the curves go; by default ROOT/compare.png.
        selection: RUN, RUN@STEP (or RUN@newest) and RUN/SWEEP; by default every run.
        metric: what runs are ranked by; by default the FID, else another Frechet distance.
        html: where a report with the curves and grids goes, if anywhere.
        csv: where a table with a row an evaluation goes, if anywhere.

    Raises:
        UserError: there is no store, no such experiment, run, sweep, step or metric, or no training
            run; nothing was written.
    """
    tracker = Tracker(uri if uri is not None else _store_of(root))
    runs = collect(tracker, experiment, selection)
    ranked = main_metric([e for run in runs for e in run.evaluations], metric)
    target = plot if plot is not None else storage.join(root, "compare.png")
    comparison = Comparison(runs, ranked, target, html, csv)
    found = panels(comparison)
    with storage.atomic_file(target) as path, path.open("wb") as file:
        draw_panels(found, file)
    if csv is not None:
        storage.write_text(csv, csv_text(runs))
    if html is not None:
        write_html(comparison, found, tracker, html)
    return comparison


def _store_of(root: str) -> str:
    if fault := storage.missing_slash(root):
        raise UserError(f"--root is {root!r}: {fault}")
    if not storage.is_local(root):
        raise UserError(
            f"--root is {redact(root)}, where no MLflow file lies; give the MLflow of its runs "
            "by --tracking-uri, as http://mlflow:5000 or sqlite:////absolute/path/mlflow.db"
        )
    database = storage.local_path(root).absolute() / "mlflow.db"
    if not database.exists():
        raise UserError(f"there is no {database}; train first, or mend --root")
    return f"sqlite:///{database}"
