"""The tables of `diffit compare`: for the terminal, Markdown, CSV and the HTML page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from diffit_train.compare.collect import RunRow, plain
from diffit_train.compare.ranking import (
    Compared,
    Replicates,
    RunGroup,
    Spread,
    best_by_protocol,
    best_indices,
    differing_settings,
    metric_names,
    protocol_names,
    protocols_of,
)


@dataclass(frozen=True)
class Cell:
    """A cell of a table; numbers are right-aligned, and the best of them is marked."""

    text: str
    is_number: bool = False
    best: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it holds only numbers and dashes."""
        columns = zip(*self.rows, strict=True)
        return [all(cell.is_number or cell.text == "-" for cell in column) for column in columns]


def sheets(compared: Compared) -> list[Sheet]:
    """The tables, without empty ones."""
    found = [
        _runs_sheet(compared),
        _differences_sheet(compared.runs),
        _evaluations_sheet(compared),
        _loss_sheet(compared.groups),
        _seeds_sheet(compared.replicates),
    ]
    return [sheet for sheet in found if sheet.rows]


def _metric_cell(value: float | None, best: bool = False) -> Cell:
    return Cell("-") if value is None else Cell(f"{value:.4g}", True, best)


def _count(value: int | None) -> Cell:
    return Cell("-") if value is None else Cell(f"{value:,}", True)


def _setting(value: str | None, key: str = "") -> Cell:
    text = plain(value) or "-"
    if key == "samples" and text.isdecimal():
        return _count(int(text))
    return Cell(text, re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", text) is not None)


def _spread_cell(spread: Spread | None, best: bool = False) -> Cell:
    if spread is None or spread.n == 1:
        return _metric_cell(spread and spread.mean, best)
    return Cell(f"{spread.mean:.4g} ± {spread.deviation:.2g}", True, best)


def _runs_sheet(compared: Compared) -> Sheet:
    runs, metric = compared.runs, compared.metric
    columns = ["run", "status", "step", "loss", "images/s"]
    rows = [
        [
            Cell(run.label),
            Cell(run.record.status.lower()),
            _count(run.last_step),
            _metric_cell(run.record.metrics.get("train/loss")),
            _metric_cell(run.record.metrics.get("perf/images_per_s")),
        ]
        for run in runs
    ]
    if metric is not None:
        tops = [best_by_protocol(run, metric) for run in runs]
        names = protocol_names(protocols_of(e for e in compared.evaluations if metric in e.metrics))
        for protocol, name in names.items():
            columns += [f"best {metric} ({name})" if name else f"best {metric}", "at step"]
            best = [top.get(protocol) for top in tops]
            values = [None if top is None else top.metrics[metric] for top in best]
            marked = best_indices(values, [protocol] * len(values), metric)
            for index, (row, top) in enumerate(zip(rows, best, strict=True)):
                row.append(_metric_cell(values[index], index in marked))
                row.append(_count(None if top is None else top.step))
    return Sheet("runs", columns, rows)


def _differences_sheet(runs: list[RunRow]) -> Sheet:
    keys = list(runs[0].differences)
    cells = [[_setting(run.differences[key]) for key in keys] for run in runs]
    # One row per run if there are many runs, else one column per run.
    if len(runs) > max(6, len(keys)):
        rows = [[Cell(run.label), *row] for run, row in zip(runs, cells, strict=True)]
        return Sheet("recipe differences", ["run", *keys], rows if keys else [])
    rows = [[Cell(key), *(row[index] for row in cells)] for index, key in enumerate(keys)]
    return Sheet("recipe differences", ["key", *(run.label for run in runs)], rows)


def _evaluations_sheet(compared: Compared) -> Sheet:
    every = compared.evaluations
    names, keys = metric_names(every), differing_settings(every)
    sweeps = any(e.sweep for e in every)
    costs = any(e.cost is not None for e in every)
    protocols = [e.protocol for e in every]
    marks = {n: best_indices([e.metrics.get(n) for e in every], protocols, n) for n in names}
    columns = ["run", "evaluation", "step", *(["sweep"] if sweeps else []), *keys]
    columns += [*(["NFE"] if costs else []), *names]
    labels = [run.label for run in compared.runs for _ in run.evaluations]
    rows = []
    for index, (label, e) in enumerate(zip(labels, every, strict=True)):
        row = [Cell(label), Cell(e.key), _count(e.step)]
        row += [Cell(e.sweep or "-")] if sweeps else []
        row += [_setting(e.settings.get(key), key) for key in keys]
        row += [_metric_cell(e.cost)] if costs else []
        row += [_metric_cell(e.metrics.get(name), index in marks[name]) for name in names]
        rows.append(row)
    return Sheet("evaluations", columns, rows)


def _loss_sheet(groups: list[RunGroup]) -> Sheet:
    """The loss of runs that differ only in their seed, at the last step that all have logged."""
    rows = []
    for group in (group for group in groups if len(group.runs) > 1):
        for step, spread in group.mean_loss()[-1:]:
            rows.append([Cell(group.label), _count(spread.n), _count(step), _spread_cell(spread)])
    title = "loss over training seeds: mean ± standard deviation"
    return Sheet(title, ["runs", "n", "step", "loss"], rows)


def _seeds_sheet(replicates: list[Replicates]) -> Sheet:
    several = [r for r in replicates if len(r.by_seeds) > 1]
    keys = differing_settings(several)
    names = metric_names(e for r in several for e in r.by_seeds.values())
    columns = ["runs", "step", *keys, "training seeds", "evaluation seeds", "n"]
    rows = [
        [
            *(Cell(r.label), _count(r.step), *(_setting(r.settings.get(key), key) for key in keys)),
            *(_count(len(seeds)) for seeds in (*r.seeds(), r.by_seeds)),
        ]
        for r in several
    ]
    protocols = [r.protocol for r in several]
    for name in names:
        spreads = [r.spread(name) for r in several]
        marked = best_indices([s and s.mean for s in spreads], protocols, name)
        for index, (row, spread) in enumerate(zip(rows, spreads, strict=True)):
            row.append(_spread_cell(spread, index in marked))
    return Sheet("over seeds: mean ± standard deviation", [*columns, *names], rows)


# ---- As text ----


def rich_table(sheet: Sheet) -> Table:
    """A table for the terminal, without its title; the best values are bold and starred."""
    table = Table()
    for name, numeric in zip(sheet.columns, sheet.numeric, strict=True):
        table.add_column(Text(name), justify="right" if numeric else "left")
    for row in sheet.rows:
        # Names may contain brackets, which rich would read as markup in a plain string.
        table.add_row(*(Text(c.text + "*", "bold") if c.best else Text(c.text) for c in row))
    return table


def markdown_text(text: str) -> str:
    """Text escaped so that GitHub shows it literally."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|~\[\]])", r"\\\1", " ".join(text.split()))


def markdown_table(sheet: Sheet) -> str:
    """A table as GitHub Markdown; the best values are bold."""
    lines = [
        [markdown_text(name) for name in sheet.columns],
        ["---:" if numeric else "---" for numeric in sheet.numeric],
    ]
    for row in sheet.rows:
        texts = [markdown_text(cell.text) for cell in row]
        lines.append([f"**{t}**" if c.best else t for t, c in zip(texts, row, strict=True)])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"### {markdown_text(sheet.title)}\n\n{table}"


def csv_text(runs: Sequence[RunRow]) -> str:
    """One row per evaluation: run, step, key, sweep, samples, settings that differ, metrics."""
    every = [e for run in runs for e in run.evaluations]
    names = metric_names(every)
    keys = [key for key in differing_settings(every) if key != "samples"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["run", "step", "key", "sweep", "samples", *(f"evaluate.{key}" for key in keys)]
    writer.writerow([*head, "nfe", *names, "mlflow_run_id"])
    for run in runs:
        for e in run.evaluations:
            own = [run.label, e.step, e.key, e.sweep, e.protocol.samples]
            settings = [e.settings.get(key) for key in keys]
            metrics = [e.metrics.get(name) for name in names]
            row = [*own, *settings, e.cost, *metrics, e.run_id]
            writer.writerow([_without_formula(cell) for cell in row])
    return text.getvalue()


def _without_formula(cell: object) -> object:
    """A cell that a spreadsheet shows instead of running it; numbers stay."""
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
