"""The report of `diffit compare --html`: one self-contained file."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import pandas as pd
from PIL import Image

from diffit_train import __version__, storage
from diffit_train.errors import first_line, redact
from diffit_train.progress import counted
from diffit_train.reports.collect import Evaluation, RunRow
from diffit_train.reports.plots import Panel, draw_panels
from diffit_train.reports.ranking import Compared, best_by_protocol, protocols_of
from diffit_train.reports.tables import Sheet, sheets
from diffit_train.tracking import Tracker

MAX_GRIDS = 24
# Larger grids are embedded at reduced size, so that a page with many still opens on a phone.
MAX_GRID_BYTES = 800_000
SMALL_SIDE_PX = 1400
GRID_NAME = "grid.png"
HASH_CHARACTERS = 12


class EmbeddedImage(NamedTuple):
    """An image as a data URI."""

    caption: str
    uri: str


def write_html(compared: Compared, panels: Sequence[Panel], tracker: Tracker, url: str) -> None:
    """Write tables, panels and the grids of samples that MLflow holds as one HTML file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("diffit_train.reports", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    labels = [run.label for run in compared.runs]
    experiments = dict.fromkeys(run.record.experiment for run in compared.runs)
    facts = {
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by diffit {__version__}",
        "MLflow": redact(tracker.uri),
        "experiment": ", ".join(experiments),
        "ranked by": compared.metric or "-",
    }
    tables = sheets(compared)
    # Long tables go below the plots.
    summary = [sheet for sheet in tables if sheet.title in ("runs", "recipe differences")]
    details = [sheet for sheet in tables if sheet not in summary]
    chosen, left_out = chosen_grids(compared)
    grids, grid_notes = _grids(chosen, tracker)
    if left_out:
        grid_notes.insert(
            0,
            f"omitted: grids of {counted(left_out, 'more evaluation')}; shown are each run's best "
            f"by {compared.metric} and its newest, at most {MAX_GRIDS} grids",
        )
    page = environment.get_template("report.html.j2").render(
        title=f"Comparison of {', '.join(labels) if len(labels) <= 3 else f'{len(labels)} runs'}",
        facts=facts,
        notes=compared.notes(),
        summary=summary,
        details=[*details, _origins_sheet(compared.runs)],
        plots=[_drawn(panel) for panel in panels],
        grids=grids,
        grid_notes=grid_notes,
    )
    storage.write_text(url, page)


def chosen_grids(compared: Compared) -> tuple[list[tuple[str, Evaluation]], int]:
    """(caption, evaluation) of each run's best and newest, and the number of other evaluations.

    The best is by the most common protocol of all runs, or by the run's own most common one if it
    lacks that.
    """
    every = [e for e in compared.evaluations if e.metrics]
    chosen = []
    for run in compared.runs:
        mine = [e for e in run.evaluations if e.metrics]
        if not mine:
            continue
        newest = max(mine, key=lambda e: e.step)
        tops = best_by_protocol(run, compared.metric) if compared.metric else {}
        best = tops.get(protocols_of(every)[0], next(iter(tops.values()), None))
        same = best is not None and best.step == newest.step
        if best is not None:
            chosen.append((_caption(run, best, "best and newest" if same else "best"), best))
        if not same:
            chosen.append((_caption(run, newest, "newest"), newest))
    return chosen[:MAX_GRIDS], len(every) - len(chosen[:MAX_GRIDS])


def _caption(run: RunRow, evaluation: Evaluation, why: str) -> str:
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items())
    return f"{run.label}, step {evaluation.step:,} ({why}): {evaluation.key}; {metrics}"


def _grids(
    chosen: Sequence[tuple[str, Evaluation]], tracker: Tracker
) -> tuple[list[EmbeddedImage], list[str]]:
    """The grids, and notes about those that MLflow cannot provide."""
    images, notes = [], []
    for caption, evaluation in chosen:
        try:
            data = tracker.artifact(evaluation.run_id, GRID_NAME)
            if data is None:
                notes.append(f"MLflow has no grid of {evaluation.key}")
            else:
                images.append(EmbeddedImage(caption, _grid_uri(data)))
        # Artifact stores raise errors of many types; write the report without the grid.
        except Exception as error:
            notes.append(f"could not read the grid of {evaluation.key}: {first_line(error)}")
    return images, notes


def _grid_uri(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as grid:
        if len(data) <= MAX_GRID_BYTES:
            grid.verify()
            return _data_uri(data, "png")
        small = grid.convert("RGB")
    small.thumbnail((SMALL_SIDE_PX, SMALL_SIDE_PX))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=88)
    return _data_uri(file.getvalue(), "jpeg")


def _drawn(panel: Panel) -> EmbeddedImage:
    file = io.BytesIO()
    draw_panels([panel], file, width_inches=5.0)
    return EmbeddedImage(panel.title, _data_uri(file.getvalue(), "png"))


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _origins_sheet(runs: Sequence[RunRow]) -> Sheet:
    """Where each run comes from, with shortened hashes."""
    rows = []
    for run in runs:
        started = datetime.fromtimestamp(run.record.start_time_ms / 1000, UTC)
        origin = {"MLflow run": run.record.run_id, **run.origin()}
        short = {
            key.replace("_", " "): t[:HASH_CHARACTERS] if re.fullmatch("[0-9a-f]+", t) else t
            for key, t in origin.items()
        }
        rows.append({"run": run.label, "started (UTC)": f"{started:%Y-%m-%d %H:%M}", **short})
    return Sheet("origin of the runs", pd.DataFrame(rows).fillna("-"))
