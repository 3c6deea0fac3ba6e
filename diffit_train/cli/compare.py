"""`diffit compare`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from diffit_train.cli.options import Json, output, print_result
from diffit_train.errors import UserError
from diffit_train.runs.run import Project


def _tracking_of_runs(root: str, selection: Sequence[str]) -> str | None:
    """The tracking URI that the runs were trained with; None for the root's own database."""
    chosen = {text.partition("@")[0].partition("/")[0] for text in selection}
    runs = [run for run in Project(root).runs if not chosen or run.name in chosen]
    return next((uri for run in runs if (uri := run.recipe.tracking.uri)), None)


def compare_command(
    selection: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN|RUN@STEP|RUN/SWEEP]...",
            help="Runs to compare; add @STEP (or @newest) or /SWEEP to select some of a run's "
            "evaluations. Default: every run.",
            show_default=False,
        ),
    ] = None,
    root: Annotated[str, typer.Option(help="Project folder; its MLflow store is read.")] = ".",
    uri: Annotated[
        str | None,
        typer.Option(
            "--tracking-uri",
            help="MLflow tracking URI. Default: that of the runs, which is ROOT/mlflow.db unless "
            "they have a tracking.uri.",
        ),
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="MLflow experiment to compare. Default: all of them.")
    ] = None,
    plot: Annotated[
        str | None, typer.Option(help="PNG file for the curves. Default: ROOT/compare.png.")
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(help="HTML file for a self-contained report with curves and sample grids."),
    ] = None,
    csv: Annotated[str | None, typer.Option(help="CSV file with one row per evaluation.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Metric to rank by. Default: fid, or else another distance."),
    ] = None,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", metavar="", help="Print the tables as GitHub Markdown."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare runs, checkpoints or sweeps in tables, and plot their curves.

    Evaluations that differ only in seeds are also summarized as mean and standard deviation.
    Evaluations with different numbers of samples, features or references are never ranked together.

    Example: `diffit compare --root my-project`

    Example: `diffit compare first@400000 second@400000 --root my-project --html comparison.html`
    """
    from diffit_train.reports.compare import compare_store

    if markdown and as_json:
        raise UserError("--markdown and --json exclude each other; choose one")
    comparison = compare_store(
        root,
        uri or _tracking_of_runs(root, selection or ()),
        experiment,
        plot and output("--plot", plot),
        selection=selection or (),
        metric=metric,
        html=html and output("--html", html),
        csv=csv and output("--csv", csv),
    )
    if as_json:
        print_result(comparison.as_json(), as_json)
    elif markdown:
        sys.stdout.write(comparison.markdown())
    else:
        comparison.print_table()
