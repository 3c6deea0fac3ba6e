"""The picture of `diffit ablate`: each row's distances beside the paper's."""

from __future__ import annotations

from typing import IO, Any


def draw_ablation(result: dict[str, Any], file: IO[bytes]) -> None:
    """Draw an ablation as a PNG image: a dot for each seed, a line for the mean, the paper's FID.

    The two panels have axes of their own, since only the order can be compared.

    Args:
        result: of `diffit ablate`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result["rows"]
    places = list(range(len(rows)))
    figure = Figure(figsize=(8.0, 1.6 + 0.45 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    known = any(row["paper"] is not None for row in rows)
    ours, *theirs = figure.subplots(1, 2 if known else 1, sharey=True, squeeze=False)[0]
    # Dots and lines, not bars: rows often differ by less than a tenth, so the axis begins at the
    # lowest.
    for place, row in zip(places, rows, strict=True):
        ours.plot(row["values"], [place] * len(row["values"]), "o", color="C0", markersize=5)
        ours.plot([row["mean"]] * 2, [place - 0.3, place + 0.3], color="C0", linewidth=2)
    ours.margins(x=0.08, y=0.1)
    ours.grid(axis="x", color="0.9")
    ours.set_yticks(places, [_label(row) for row in rows])
    ours.invert_yaxis()
    ours.set_xlabel(f"{result['metric']}, scale {result['scale']}")
    for cell in theirs:
        given = [(place, row["paper"]) for place, row in zip(places, rows, strict=True)]
        shown = [(place, fid) for place, fid in given if fid is not None]
        bars = cell.barh([p for p, _ in shown], [f for _, f in shown], height=0.6, color="0.75")
        cell.bar_label(bars, fmt="%.2f", padding=3)
        cell.set_xlim(0.0, 1.15 * max(fid for _, fid in shown))
        cell.set_xlabel("FID in the paper")
    count = result["seeds"]
    seeds = "1 seed" if count == 1 else f"{count} seeds"
    figure.suptitle(f"{result['ablation']}: {result['title']}; {seeds}")
    figure.savefig(file, format="png", dpi=120)


def _label(row: dict[str, Any]) -> str:
    name, title = row["name"], row["title"]
    return str(title) if name in title.split() else f"{name}: {title}"
