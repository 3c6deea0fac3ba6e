"""The plots of `diffit compare`: curves over steps or settings, and scatter plots of trade-offs.

A line never joins metrics of different protocols.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from diffit_train.reports.collect import Protocol, plain
from diffit_train.reports.ranking import (
    Compared,
    Replicates,
    RunGroup,
    Spread,
    differing_settings,
    fronts,
    metric_names,
    pareto_axes,
    protocol_names,
)
from diffit_train.tracking import lower_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LEGEND, MAX_LABEL, MAX_MARKERS = 10, 56, 30
# Settings shown in other ways: seeds as error bars, steps in the cost panel, the rest in labels.
_NO_AXES = ("seed", "sampler.steps", "samples", "features.name", "features.source", "reference")
NFE_LABEL = "NFE per image"
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#777777")
_STYLES, _MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")


@dataclass(frozen=True)
class Line:
    """A line of a panel; `color` and `style` are indices into the palettes.

    Errors are one standard deviation. Dots are not joined; a front has rings as markers.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    style: int = 0
    kind: Literal["curve", "dots", "front"] = "curve"
    y_error: list[float] = field(default_factory=list)
    x_error: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """One panel of a plot; `spans` allows a log axis, for losses and distances."""

    title: str
    x_label: str
    lines: list[Line]
    y_label: str = ""
    spans: bool = False


class Series(NamedTuple):
    """What the replicates on a line have in common; `step` is None if the x axis is the step."""

    group: int
    step: int | None
    protocol: Protocol
    settings: tuple[tuple[str, str], ...]


class Point(NamedTuple):
    """Replicates in a panel."""

    x: Spread
    y: Spread
    of: Replicates


Lines = dict[Series, list[Point]]


def panels(compared: Compared) -> list[Panel]:
    """The panels that are not empty: curves over steps, then effects of settings."""
    replicates, metric = compared.replicates, compared.metric
    # A comparison of sweeps only is not about training.
    sweeps_only = bool(replicates) and all(e.sweep for e in compared.evaluations)
    all_panels = [] if sweeps_only else [_loss_panel(compared.groups)]
    for name in metric_names(compared.evaluations):
        series = _along(replicates, name, lambda r: r.step, "step")
        kept: Lines = {}
        for group in {s.group for s in series}:
            mine = {s: points for s, points in series.items() if s.group == group}
            # Settings varied at a single step have their own panels.
            kept |= _varying(mine) or (mine if len(mine) == 1 else {})
        all_panels.append(_panel(name, "step", name, kept))
    if metric is not None:
        for key in differing_settings(replicates):
            # Over the guidance scale this is figure 7a of the paper.
            for name in (metric, "precision", "recall") if key not in _NO_AXES else ():
                series = _along(replicates, name, partial(_number, key), key)
                all_panels.append(_panel(f"{name} vs. {key}", key, name, _varying(series)))
        all_panels.append(_cost_panel(replicates, metric))
    if (axes := pareto_axes(replicates, metric)) is not None:
        all_panels.append(_pareto_panel(replicates, axes))
    return [panel for panel in all_panels if panel.lines]


def _panel(title: str, x_label: str, metric: str, series: Lines) -> Panel:
    return Panel(title, x_label, _curves(series), spans=bool(lower_is_better(metric)))


def _loss_panel(groups: list[RunGroup]) -> Panel:
    lines = []
    for color, group in enumerate(groups):
        if len(group.runs) > 1 and (mean := group.mean_loss()):
            steps, losses = zip(*mean, strict=True)
            errors = [loss.deviation for loss in losses]
            values = [loss.mean for loss in losses]
            lines.append(Line(group.label, steps, values, color, y_error=errors))
            continue
        for style, run in enumerate(run for run in group.runs if run.loss):
            x, y = (list(values) for values in zip(*run.loss, strict=True))
            lines.append(Line(run.label, x, y, color, style))
    return Panel("training loss", "step", lines, spans=True)


def _number(key: str, r: Replicates) -> float | None:
    """A setting as a number; None if it is not a number, or has no effect."""
    try:
        return float(plain(r.settings.get(key)))
    except ValueError:
        return None


def _cost_panel(replicates: list[Replicates], metric: str) -> Panel:
    """The metric against NFE: lines along a sampler's steps, and the best of the others."""
    series = _along(replicates, metric, Replicates.cost, "sampler.steps")
    joined, lower = _varying(series), bool(lower_is_better(metric))
    best: dict[tuple[int, Protocol, Spread], Point] = {}
    for s, points in series.items():
        for point in points if s not in joined else ():
            key = (s.group, s.protocol, point.x)
            pair = (best.get(key, point), point)
            best[key] = (min if lower else max)(pair, key=lambda p: p.y.mean)
    lines = []
    if len({point.x for points in series.values() for point in points}) > 1:
        lines = [*_curves(joined), *_dots(list(best.values()), "best of the others")]
    return Panel(f"{metric} vs. NFE", NFE_LABEL, lines, spans=lower)


def _pareto_panel(replicates: list[Replicates], axes: tuple[str, str]) -> Panel:
    """Every evaluation, and the Pareto front of each protocol."""
    spreads = [(r.spread(axes[0]), r.spread(axes[1]), r) for r in replicates]
    lines = _dots([Point(x, y, r) for x, y, r in spreads if x is not None and y is not None])
    by_protocol = fronts(replicates, axes)
    names = protocol_names(by_protocol)
    for style, (protocol, members) in enumerate(by_protocol.items()):
        x, y = ([s.mean for r in members if (s := r.spread(n))] for n in axes)
        lines.append(Line(_joined("front", names[protocol]), x, y, 7, style, "front"))
    title, spans = f"{axes[1]} vs. {axes[0]}", bool(lower_is_better(axes[1]))
    return Panel(title, axes[0], lines, axes[1], spans)


# ---- Lines ----


def _along(
    replicates: Iterable[Replicates],
    metric: str,
    x_of: Callable[[Replicates], float | None],
    free: str,
) -> Lines:
    """Replicates that have the metric and an x, grouped by everything except `free` and seeds.

    Args:
        free: `step`, or the setting that varies along the x axis.
    """
    series_points: Lines = {}
    for r in replicates:
        x, y = x_of(r), r.spread(metric)
        if x is not None and y is not None:
            settings = tuple((key, value) for key, value in r.settings.items() if key != free)
            series = Series(r.group, None if free == "step" else r.step, r.protocol, settings)
            series_points.setdefault(series, []).append(Point(Spread(x, 0.0, 1), y, r))
    return {s: sorted(points, key=lambda p: p.x) for s, points in series_points.items()}


def _varying(series: Lines) -> Lines:
    return {s: points for s, points in series.items() if len({p.x for p in points}) > 1}


def _curves(series: Lines) -> list[Line]:
    """One line per series, named by how it differs from the others; one color per group."""
    groups = [s.group for s in series]
    lines = []
    for i, (points, label) in enumerate(zip(series.values(), _names(series), strict=True)):
        several = len(set(groups)) > 1
        color, style = (groups[i], groups[:i].count(groups[i])) if several else (i, 0)
        lines.append(_line(label, points, color, style, "curve"))
    return lines


def _line(
    label: str, points: Sequence[Point], color: int, style: int, kind: Literal["curve", "dots"]
) -> Line:
    x, y = [p.x.mean for p in points], [p.y.mean for p in points]
    dx, dy = [p.x.deviation for p in points], [p.y.deviation for p in points]
    return Line(label, x, y, color, style, kind, dy if any(dy) else [], dx if any(dx) else [])


def _dots(points: Sequence[Point], what: str = "") -> list[Line]:
    """Points that are not joined; one color per group, one marker per protocol."""
    names = protocol_names(p.of.protocol for p in points)
    origins: dict[tuple[int, Protocol], list[Point]] = {}
    for point in points:
        origins.setdefault((point.of.group, point.of.protocol), []).append(point)
    return [
        _line(
            _joined(_label(mine), what, names[protocol]),
            mine,
            group,
            list(names).index(protocol),
            "dots",
        )
        for (group, protocol), mine in origins.items()
    ]


def _label(points: Sequence[Point]) -> str:
    """Name of the points' run, or of their group if there are several runs."""
    names = {p.of.label for p in points}
    return names.pop() if len(names) == 1 else points[0].of.group_label


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _names(series: Lines) -> list[str]:
    settings = [dict(s.settings) for s in series]
    keys = dict.fromkeys(key for own in settings for key in own if key not in _NO_AXES[2:])
    keys = {k: None for k in keys if len({plain(own.get(k)) for own in settings}) > 1}
    ways = protocol_names(s.protocol for s in series)
    names = []
    for (s, points), own in zip(series.items(), settings, strict=True):
        parts = [f"{_short(key, keys)} {plain(own.get(key)) or '-'}" for key in keys]
        if s.step is not None and len({other.step for other in series}) > 1:
            parts.insert(0, f"step {s.step:,}")
        parts.append(ways[s.protocol])
        if not any(parts) or len({other.group for other in series}) > 1:
            parts.insert(0, _label(points))
        names.append(_joined(*parts))
    return names


def _short(key: str, keys: Iterable[str]) -> str:
    last = key.rsplit(".", 1)[-1]
    same = [other for other in keys if other.rsplit(".", 1)[-1] == last]
    return last if len(same) == 1 and last != "name" else key.removesuffix(".name")


# ---- Drawing ----


def draw_panels(panels: Sequence[Panel], file: IO[bytes], width_inches: float = 4.4) -> None:
    """Write a PNG with up to three panels per row, each with its legend below."""
    columns = max(1, min(3, len(panels)))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [2.9 + 0.16 * max(len(_legend(panel)) for panel in row) for row in rows]
    figure = _figure(width_inches * columns, sum(heights) or 1.0)
    if not panels:
        figure.text(0.5, 0.5, "nothing logged yet", ha="center", va="center")
    parts = figure.subfigures(len(rows) or 1, 1, squeeze=False, height_ratios=heights or None)
    for row, part in zip(rows, parts[:, 0], strict=False):
        cells = part.subplots(1, columns, squeeze=False)[0]
        for panel, cell in zip(row, cells, strict=False):
            _draw_panel(cell, panel)
        for cell in cells[len(row) :]:
            cell.set_axis_off()
    figure.savefig(file, format="png")


def _figure(width_inches: float, height_inches: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    figure = Figure(figsize=(width_inches, height_inches), layout=layout, dpi=120)
    FigureCanvasAgg(figure)
    return figure


def _draw_panel(cell: Axes, panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter

    handles = [_draw_line(cell, line) for line in panel.lines]
    cell.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    cell.grid(alpha=0.3)
    x = {x for line in panel.lines for x in line.x}
    y = {y for line in panel.lines for y in line.y if math.isfinite(y)}
    # A log axis within one decade has hardly any tick labels.
    if panel.spans and y and 0 < 10 * min(y) < max(y):
        cell.set_yscale("log")
    if panel.x_label == NFE_LABEL and len(x) > 1:
        cell.set_xscale("log", base=2)
    if panel.x_label in ("step", NFE_LABEL):
        cell.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(x) == 1:  # the ticks around it would be of no use
        cell.set_xticks([*x], [f"{value:,.6g}" for value in x])
    if len(y) == 1:
        cell.set_yticks([*y], [f"{value:.4g}" for value in y])
    labels = _legend(panel)
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
    cell.legend(handles[: len(labels)], labels, fontsize=8, frameon=False, **place)


def _legend(panel: Panel) -> list[str]:
    """Labels of the lines; long ones lose their middle, as the end often tells them apart."""
    half = MAX_LABEL // 2
    labels = [line.label for line in panel.lines]
    labels = [t if len(t) <= MAX_LABEL else f"{t[:half]}…{t[-half:]}" for t in labels]
    if len(labels) > MAX_LEGEND:
        labels[MAX_LEGEND:] = [f"and {len(labels) - MAX_LEGEND} more"]
    # matplotlib hides labels that start with _ and typesets $ as math.
    return [f" {label}".replace("$", r"\$") for label in labels]


def _draw_line(cell: Axes, line: Line) -> Any:
    # With more lines than colors, styles tell them apart.
    index = line.style + line.color // len(_COLORS)
    look: dict[str, Any] = {
        "color": _COLORS[line.color % len(_COLORS)],
        "linestyle": "none" if line.kind == "dots" else _STYLES[index % len(_STYLES)],
        "linewidth": 1.3,
    }
    if line.kind == "front":  # rings, so that even a front of one point shows
        return cell.plot(line.x, line.y, marker="o", markersize=9, fillstyle="none", **look)[0]
    if len(line.x) > MAX_MARKERS and line.kind == "curve":
        if line.y_error:
            mean, error = np.array(line.y), np.array(line.y_error)
            band = {"color": look["color"], "alpha": 0.2, "linewidth": 0}
            cell.fill_between(line.x, mean - error, mean + error, **band)
        return cell.plot(line.x, line.y, **look)[0]
    look |= {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 4, "capsize": 3}
    return cell.errorbar(line.x, line.y, line.y_error or None, line.x_error or None, **look)


def draw_ablation(result: dict[str, Any], file: IO[bytes]) -> None:
    """Draw an ablation as a PNG image: a dot for each seed, a line for the mean, the paper's FID.

    The two panels have axes of their own, since only the order can be compared.

    Args:
        result: of `diffit ablate`.
    """
    rows = result["rows"]
    figure = _figure(8.0, 1.6 + 0.45 * len(rows))
    known = [(place, row["paper"]) for place, row in enumerate(rows) if row["paper"] is not None]
    ours, *theirs = figure.subplots(1, 2 if known else 1, sharey=True, squeeze=False)[0]
    # Dots and lines, not bars: rows often differ by less than a tenth, so the axis begins at the
    # lowest.
    for place, row in enumerate(rows):
        ours.plot(row["values"], [place] * len(row["values"]), "o", color="C0", markersize=5)
        ours.plot([row["mean"]] * 2, [place - 0.3, place + 0.3], color="C0", linewidth=2)
    names = [(row["name"], str(row["title"])) for row in rows]
    labels = [title if name in title.split() else f"{name}: {title}" for name, title in names]
    ours.margins(x=0.08, y=0.1)
    ours.grid(axis="x", color="0.9")
    ours.set_yticks(range(len(rows)), labels)
    ours.invert_yaxis()
    ours.set_xlabel(f"{result['metric']}, scale {result['scale']}")
    for cell in theirs:
        bars = cell.barh(*zip(*known, strict=True), height=0.6, color="0.75")
        cell.bar_label(bars, fmt="%.2f", padding=3)
        cell.set_xlim(0.0, 1.15 * max(fid for _, fid in known))
        cell.set_xlabel("FID in the paper")
    seeds = "1 seed" if result["seeds"] == 1 else f"{result['seeds']} seeds"
    figure.suptitle(f"{result['ablation']}: {result['title']}; {seeds}")
    figure.savefig(file, format="png")
