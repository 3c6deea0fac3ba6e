"""The picture of `diffit ablate`: each row's distances beside the paper's."""

from __future__ import annotations

from typing import IO, Any


def draw_ablation(result: dict[str, Any], file: IO[bytes]) -> None:
    """Draw an ablation as a PNG image: a dot for each seed, a bar for the mean, the paper's FID.

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
    ours.barh(places, [row["mean"] for row in rows], height=0.6, color="C0", alpha=0.35)
    for place, row in zip(places, rows, strict=True):
        ours.plot(row["values"], [place] * len(row["values"]), "o", color="C0", markersize=4)
    values = [value for row in rows for value in row["values"]]
    span = max(values) - min(values) or abs(max(values)) or 1.0
    # From below the lowest dot, not from 0: rows often differ by less than a tenth.
    ours.set_xlim(min(values) - span / 4, max(values) + span / 10)
    ours.set_yticks(places, [f"{row['name']}: {row['title']}" for row in rows])
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
