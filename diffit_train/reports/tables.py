"""The tables of `diffit compare`: for the terminal, Markdown, CSV and the HTML page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.table import Table
from rich.text import Text

from diffit_train.reports.collect import RunRow, plain
from diffit_train.reports.ranking import (
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

_NUMBERS = re.compile(r"[-+±\d.,e ]+")


@dataclass(frozen=True)
class Sheet:
    """A table as text, and the (row, column) of its best values."""

    title: str
    frame: pd.DataFrame
    best: frozenset[tuple[int, str]] = frozenset()

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [str(name) for name in self.frame]

    @property
    def rows(self) -> list[list[tuple[str, bool]]]:
        """The cells: their text, and whether it is the best value."""
        return [
            [(text, (i, name) in self.best) for name, text in row.items()]
            for i, row in enumerate(self.frame.to_dict("records"))
        ]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it holds only numbers and dashes."""
        return [all(_NUMBERS.fullmatch(text) for text in self.frame[n]) for n in self.frame]


def _sheet(
    title: str, rows: Sequence[Mapping[str, Any]], best: Mapping[str, set[int]] | None = None
) -> Sheet:
    """A table of values, without columns that are empty."""
    frame = pd.DataFrame(rows, dtype=object).dropna(axis=1, how="all").map(_text)
    marked = {(i, name) for name, places in (best or {}).items() for i in places}
    return Sheet(title, frame, frozenset(marked))


def _text(value: Any) -> str:
    if isinstance(value, Spread):
        error = f" ± {value.deviation:.2g}" if value.n > 1 else ""
        return f"{value.mean:.4g}{error}"
    if isinstance(value, str):
        return value or "-"
    if value is None or value != value:  # pandas fills missing cells with NaN
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def sheets(compared: Compared) -> list[Sheet]:
    """The tables, without empty ones."""
    tables = [
        _runs_sheet(compared),
        _differences_sheet(compared.runs),
        _evaluations_sheet(compared),
        _loss_sheet(compared.groups),
        _seeds_sheet(compared.replicates),
    ]
    return [sheet for sheet in tables if len(sheet.frame)]


def _runs_sheet(compared: Compared) -> Sheet:
    rows: list[dict[str, Any]] = [
        {
            "run": run.label,
            "status": run.record.status.lower(),
            "step": run.last_step,
            "loss": run.record.metrics.get("train/loss"),
            "images/s": run.record.metrics.get("perf/images_per_s"),
        }
        for run in compared.runs
    ]
    best = {}
    if (metric := compared.metric) is not None:
        names = protocol_names(protocols_of(e for e in compared.evaluations if metric in e.metrics))
        for number, (protocol, name) in enumerate(names.items()):
            way = f" ({name})" if name else ""
            at_step = f"at step{' ' * number}"  # each column has a name of its own
            tops = [best_by_protocol(run, metric).get(protocol) for run in compared.runs]
            values = [None if top is None else top.metrics[metric] for top in tops]
            best[f"best {metric}{way}"] = best_indices(values, [protocol] * len(values), metric)
            for row, value, top in zip(rows, values, tops, strict=True):
                row |= {f"best {metric}{way}": value, at_step: top and top.step}
    return _sheet("runs", rows, best)


def _differences_sheet(runs: list[RunRow]) -> Sheet:
    keys = list(runs[0].differences)
    by_run = [
        {"run": run.label, **{k: plain(v) for k, v in run.differences.items()}} for run in runs
    ]
    # One row per run if there are many runs, else one column per run.
    if len(runs) > max(6, len(keys)):
        return _sheet("recipe differences", by_run if keys else [])
    by_key = [{"key": key, **{row["run"]: row[key] for row in by_run}} for key in keys]
    return _sheet("recipe differences", by_key)


def _evaluations_sheet(compared: Compared) -> Sheet:
    every = compared.evaluations
    names, keys = metric_names(every), differing_settings(every)
    protocols = [e.protocol for e in every]
    best = {n: best_indices([e.metrics.get(n) for e in every], protocols, n) for n in names}
    rows = [
        {
            "run": run.label,
            "evaluation": e.key,
            "step": e.step,
            "sweep": e.sweep,
            **_settings(e.settings, keys),
            "NFE": e.cost,
            **{name: e.metrics.get(name) for name in names},
        }
        for run in compared.runs
        for e in run.evaluations
    ]
    return _sheet("evaluations", rows, best)


def _settings(settings: Mapping[str, str], keys: Sequence[str]) -> dict[str, Any]:
    shown: dict[str, Any] = {key: plain(settings.get(key)) for key in keys}
    if shown.get("samples", "").isdecimal():
        shown["samples"] = int(shown["samples"])
    return shown


def _loss_sheet(groups: list[RunGroup]) -> Sheet:
    """The loss of runs that differ only in their seed, at the last step that all have logged."""
    rows = [
        {"runs": group.label, "n": spread.n, "step": step, "loss": spread}
        for group in groups
        if len(group.runs) > 1
        for step, spread in group.mean_loss()[-1:]
    ]
    return _sheet("loss over training seeds: mean ± standard deviation", rows)


def _seeds_sheet(replicates: list[Replicates]) -> Sheet:
    several = [r for r in replicates if len(r.by_seeds) > 1]
    names = metric_names(e for r in several for e in r.by_seeds.values())
    spreads = {name: [r.spread(name) for r in several] for name in names}
    keys = differing_settings(several)
    rows = [
        {
            "runs": r.label,
            "step": r.step,
            **_settings(r.settings, keys),
            "training seeds": len(r.seeds()[0]),
            "evaluation seeds": len(r.seeds()[1]),
            "n": len(r.by_seeds),
            **{name: spreads[name][i] for name in names},
        }
        for i, r in enumerate(several)
    ]
    protocols = [r.protocol for r in several]
    best = {n: best_indices([s and s.mean for s in spreads[n]], protocols, n) for n in names}
    return _sheet("over seeds: mean ± standard deviation", rows, best)


# ---- As text ----


def rich_table(sheet: Sheet) -> Table:
    """A table for the terminal, without its title; the best values are bold and starred."""
    table = Table()
    for name, numeric in zip(sheet.columns, sheet.numeric, strict=True):
        table.add_column(Text(name), justify="right" if numeric else "left")
    for row in sheet.rows:
        # Names may contain brackets, which rich would read as markup in a plain string.
        table.add_row(*(Text(f"{text}*", "bold") if best else Text(text) for text, best in row))
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
        *(
            [f"**{markdown_text(text)}**" if best else markdown_text(text) for text, best in row]
            for row in sheet.rows
        ),
    ]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"### {markdown_text(sheet.title)}\n\n{table}"


def csv_text(runs: Sequence[RunRow]) -> str:
    """One row per evaluation: run, step, key, sweep, samples, settings that differ, metrics."""
    every = [e for run in runs for e in run.evaluations]
    keys = [key for key in differing_settings(every) if key != "samples"]
    rows = [
        {
            "run": run.label,
            "step": e.step,
            "key": e.key,
            "sweep": e.sweep,
            "samples": e.protocol.samples,
            **{f"evaluate.{key}": e.settings.get(key) for key in keys},
            "nfe": e.cost,
            **{name: e.metrics.get(name) for name in metric_names(every)},
            "mlflow_run_id": e.run_id,
        }
        for run in runs
        for e in run.evaluations
    ]
    return pd.DataFrame(rows, dtype=object).map(_without_formula).to_csv(index=False)


def _without_formula(cell: object) -> object:
    """A cell that a spreadsheet shows instead of running it; numbers stay."""
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
