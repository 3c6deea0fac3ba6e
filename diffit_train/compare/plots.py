"""The plots of `diffit compare`: curves over steps, effects of settings, and Pareto fronts.

A line never joins metrics of different protocols.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from diffit_train.compare.collect import Protocol, plain
from diffit_train.compare.ranking import (
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
from diffit_train.metric_names import lower_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LEGEND = 10
MAX_LABEL = 56
# Settings shown in other ways: seeds as error bars, steps in the cost panel.
_OTHER_AXES = ("seed", "sampler.steps")
# Settings that are part of the protocol, which names the line instead.
_OF_PROTOCOL = ("samples", "features.name", "features.source", "reference")
NFE_LABEL = "NFE per image"

LineKind = Literal["curve", "band", "dots", "front"]


@dataclass(frozen=True)
class Line:
    """A line of a panel; `color` and `style` are indices into the palettes.

    Errors are one standard deviation, 0 for single values. A band shades its errors; dots are not
    joined; a front has rings as markers.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    style: int = 0
    kind: LineKind = "curve"
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


Origin = tuple[int, Protocol]


def panels(compared: Compared) -> list[Panel]:
    """The panels that are not empty: curves over steps, then effects of settings."""
    replicates, metric = compared.replicates, compared.metric
    names = metric_names(compared.evaluations)
    # A comparison of sweeps only is not about training.
    sweeps_only = bool(replicates) and all(e.sweep for e in compared.evaluations)
    found = [] if sweeps_only else [_loss_panel(compared.groups)]
    found += [_step_panel(replicates, name) for name in names]
    if metric is not None:
        found += _setting_panels(replicates, metric)
        found.append(_cost_panel(replicates, metric))
    if (axes := pareto_axes(replicates, metric)) is not None:
        found.append(_pareto_panel(replicates, axes))
    return [panel for panel in found if panel.lines]


def _loss_panel(groups: list[RunGroup]) -> Panel:
    lines = []
    for color, group in enumerate(groups):
        mean = group.mean_loss() if len(group.runs) > 1 else []
        if mean:
            x, y = [step for step, _ in mean], [loss.mean for _, loss in mean]
            errors = [loss.deviation for _, loss in mean]
            lines.append(Line(group.label, x, y, color, 0, "band", errors))
            continue
        for style, run in enumerate(run for run in group.runs if run.loss):
            x, y = (list(values) for values in zip(*run.loss, strict=True))
            lines.append(Line(run.label, x, y, color, style, "band"))
    return Panel("training loss", "step", lines, spans=True)


def _step_panel(replicates: list[Replicates], metric: str) -> Panel:
    """A metric over steps; settings varied at a single step have their own panels."""
    series = series_along(replicates, metric, lambda r: r.step, "step")
    kept: dict[Series, list[Point]] = {}
    for group in {s.group for s in series}:
        mine = {s: points for s, points in series.items() if s.group == group}
        kept |= _varying(mine) or (mine if len(mine) == 1 else {})
    return Panel(metric, "step", _lines(kept), spans=bool(lower_is_better(metric)))


def _setting_panels(replicates: list[Replicates], metric: str) -> list[Panel]:
    """The main metric, precision and recall against each numeric setting that varies.

    Over the guidance scale this is figure 7a of the paper.
    """
    found = []
    for key in differing_settings(replicates):
        if key in _OF_PROTOCOL or key in _OTHER_AXES:
            continue
        for name in (metric, "precision", "recall"):
            series = series_along(replicates, name, functools.partial(_number, key), key)
            lines = _lines(_varying(series))
            spans = bool(lower_is_better(name))
            found.append(Panel(f"{name} vs. {key}", key, lines, spans=spans))
    return found


def _number(key: str, r: Replicates) -> float | None:
    """A setting as a number; None if it is not a number, or guidance is off."""
    if key.startswith("guidance.") and r.settings.get("guidance.kind") == "none":
        return None
    try:
        return float(plain(r.settings.get(key)))
    except ValueError:
        return None


def _cost_panel(replicates: list[Replicates], metric: str) -> Panel:
    """The metric against NFE: lines along a sampler's steps, and the best of the others.

    Evaluations on no line, such as those of a guidance sweep, show only the best for each NFE.
    """
    series = series_along(replicates, metric, Replicates.cost, "sampler.steps")
    title = f"{metric} vs. NFE"
    if len({point.x for points in series.values() for point in points}) < 2:
        return Panel(title, NFE_LABEL, [])
    joined = _varying(series)
    sign = 1.0 if lower_is_better(metric) else -1.0
    rest: dict[Origin, dict[float, Point]] = {}
    for s, points in series.items():
        best = rest.setdefault((s.group, s.protocol), {}) if s not in joined else {}
        for point in points:
            best[point.x.mean] = min(
                (best.get(point.x.mean, point), point), key=lambda p: sign * p.y.mean
            )
    dots = {origin: list(best.values()) for origin, best in rest.items()}
    lines = [*_lines(joined), *_dots(dots, "best of the others")]
    return Panel(title, NFE_LABEL, lines, spans=bool(lower_is_better(metric)))


def _pareto_panel(replicates: list[Replicates], axes: tuple[str, str]) -> Panel:
    """Every evaluation, and the Pareto front of each protocol."""
    dots: dict[Origin, list[Point]] = {}
    for r in replicates:
        x, y = (r.spread(name) for name in axes)
        if x is not None and y is not None:
            dots.setdefault((r.group, r.protocol), []).append(Point(x, y, r))
    lines = _dots(dots)
    ways = protocol_names(protocol for _, protocol in dots)
    for protocol, members in fronts(replicates, axes).items():
        x_values, y_values = ([s.mean for r in members if (s := r.spread(n))] for n in axes)
        style = list(ways).index(protocol)
        label = _comma_joined("front", ways[protocol])
        lines.append(Line(label, x_values, y_values, 0, style, "front"))
    title, spans = f"{axes[1]} vs. {axes[0]}", bool(lower_is_better(axes[1]))
    return Panel(title, axes[0], lines, axes[1], spans)


# ---- Lines ----


def series_along(
    replicates: Iterable[Replicates],
    metric: str,
    x_of: Callable[[Replicates], float | None],
    free: str,
) -> dict[Series, list[Point]]:
    """Replicates that have the metric and an x, grouped by everything except `free` and seeds.

    Args:
        free: `step`, or the setting that varies along the x axis.
    """
    found: dict[Series, list[Point]] = {}
    for r in replicates:
        x, y = x_of(r), r.spread(metric)
        if x is not None and y is not None:
            step = None if free == "step" else r.step
            settings = tuple((key, value) for key, value in r.settings.items() if key != free)
            series = Series(r.group, step, r.protocol, settings)
            found.setdefault(series, []).append(Point(Spread(x, 0.0, 1), y, r))
    return {s: sorted(points, key=lambda p: p.x) for s, points in found.items()}


def _varying(series: dict[Series, list[Point]]) -> dict[Series, list[Point]]:
    return {s: points for s, points in series.items() if len({p.x for p in points}) > 1}


def _lines(series: dict[Series, list[Point]]) -> list[Line]:
    """One line per series, named by how it differs from the others; one color per group."""
    several = len({s.group for s in series}) > 1
    lines: list[Line] = []
    for index, ((s, points), label) in enumerate(
        zip(series.items(), _series_names(series), strict=True)
    ):
        style = sum(other.group == s.group for other in list(series)[:index])
        color, style = (s.group, style) if several else (index, 0)
        lines.append(_line(label, points, color, style, "curve"))
    return lines


def _line(label: str, points: Sequence[Point], color: int, style: int, kind: LineKind) -> Line:
    x, y = [p.x.mean for p in points], [p.y.mean for p in points]
    dx, dy = [p.x.deviation for p in points], [p.y.deviation for p in points]
    return Line(label, x, y, color, style, kind, dy if any(dy) else [], dx if any(dx) else [])


def _dots(dots: dict[Origin, list[Point]], what: str = "") -> list[Line]:
    """Points that are not joined; one color per group, one marker per protocol."""
    ways = protocol_names(protocol for _, protocol in dots)
    return [
        _line(
            _comma_joined(_label(points), what, ways[protocol]),
            points,
            group,
            list(ways).index(protocol),
            "dots",
        )
        for (group, protocol), points in dots.items()
    ]


def _label(points: Sequence[Point]) -> str:
    """Name of the points' run, or of their group if there are several runs."""
    names = {p.of.label for p in points}
    return names.pop() if len(names) == 1 else points[0].of.group_label


def _comma_joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _series_names(series: dict[Series, list[Point]]) -> list[str]:
    settings = [dict(s.settings) for s in series]
    keys = dict.fromkeys(key for own in settings for key in own if key not in _OF_PROTOCOL)
    keys = {k: None for k in keys if len({plain(own.get(k)) for own in settings}) > 1}
    ways = protocol_names(s.protocol for s in series)
    names = []
    for (s, points), own in zip(series.items(), settings, strict=True):
        parts = [f"{_short(key, keys)} {plain(own.get(key)) or '-'}" for key in keys]
        if s.step is not None and len({other.step for other in series}) > 1:
            parts.insert(0, f"step {s.step:,}")
        parts += [ways[s.protocol]] if ways[s.protocol] else []
        if not parts or len({other.group for other in series}) > 1:
            parts.insert(0, _label(points))
        names.append(_comma_joined(*parts))
    return names


def _short(key: str, keys: Iterable[str]) -> str:
    last = key.rsplit(".", 1)[-1]
    same = [other for other in keys if other.rsplit(".", 1)[-1] == last]
    return last if len(same) == 1 and last != "name" else key.removesuffix(".name")


# ---- Drawing ----

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#777777")
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
_FRONT = "#444444"


def draw_panels(found: Sequence[Panel], file: IO[bytes], width_inches: float = 4.4) -> None:
    """Write a PNG with up to three panels per row, each with its legend below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = max(1, min(3, len(found)))
    rows = [found[i : i + columns] for i in range(0, len(found), columns)]
    heights = [2.9 + 0.16 * max(len(_legend(panel)) for panel in row) for row in rows]
    size = (width_inches * columns, sum(heights) or 1.0)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    figure = Figure(figsize=size, layout=layout, dpi=120)
    if not found:
        figure.text(0.5, 0.5, "nothing logged yet", ha="center", va="center")
    parts = figure.subfigures(len(rows) or 1, 1, squeeze=False, height_ratios=heights or None)
    for row, part in zip(rows, parts[:, 0], strict=False):
        cells = part.subplots(1, columns, squeeze=False)[0]
        for panel, cell in zip(row, cells, strict=False):
            _draw_panel(cell, panel)
        for cell in cells[len(row) :]:
            cell.set_axis_off()
    FigureCanvasAgg(figure).print_figure(file, format="png")


def _draw_panel(cell: Axes, panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter

    handles = [_draw_line(cell, line) for line in panel.lines]
    cell.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    cell.grid(alpha=0.3)
    values = [y for line in panel.lines for y in line.y if math.isfinite(y)]
    # A log axis within one decade has hardly any tick labels.
    if panel.spans and values and 0 < 10 * min(values) < max(values):
        cell.set_yscale("log")
    if panel.x_label == NFE_LABEL:
        cell.set_xscale("log", base=2)
    if panel.x_label in ("step", NFE_LABEL):
        cell.xaxis.set_major_formatter(EngFormatter(sep=""))
    _mark_single(cell, panel)
    labels = _legend(panel)
    cell.legend(
        handles[: len(labels)],
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        fontsize=8,
        frameon=False,
    )


def _mark_single(cell: Axes, panel: Panel) -> None:
    """Label the only value on an axis, where ticks around it would be of no use."""
    for axis, values in (
        (cell.xaxis, {x for line in panel.lines for x in line.x}),
        (cell.yaxis, {y for line in panel.lines for y in line.y if math.isfinite(y)}),
    ):
        if len(values) == 1:
            (value,) = values
            axis.set_ticks([value], [f"{value:,.6g}" if axis is cell.xaxis else f"{value:.4g}"])
            axis.set_ticks([], minor=True)
            if axis is cell.xaxis:
                below = value / 2 if cell.get_xscale() == "log" else 0.0  # in the middle
                cell.set_xlim(*((below, 2 * value) if value > 0 else (-1.0, 1.0)))


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
    color = _FRONT if line.kind == "front" else _COLORS[line.color % len(_COLORS)]
    # With more lines than colors, styles tell them apart.
    index = line.style + line.color // len(_COLORS)
    style, marker = _STYLES[index % len(_STYLES)], _MARKERS[index % len(_MARKERS)]
    if line.kind in ("curve", "dots"):
        return cell.errorbar(
            line.x,
            line.y,
            yerr=line.y_error or None,
            xerr=line.x_error or None,
            color=color,
            linestyle=style if line.kind == "curve" else "none",
            marker=marker,
            markersize=4,
            capsize=3,
            linewidth=1.3,
        )
    # Rings, so that even a front of one point shows.
    ring: dict[str, Any] = (
        {"marker": "o", "markersize": 9, "fillstyle": "none"} if line.kind == "front" else {}
    )
    (handle,) = cell.plot(line.x, line.y, color=color, linestyle=style, linewidth=1.2, **ring)
    if line.y_error:
        mean, error = np.array(line.y), np.array(line.y_error)
        cell.fill_between(line.x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
    return handle
