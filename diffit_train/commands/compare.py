"""`diffit compare`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from diffit_train import storage
from diffit_train.commands.options import Json, print_result
from diffit_train.errors import UserError


def compare_command(
    selection: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN|RUN@STEP|RUN/SWEEP]...",
            help="Runs by name; with @STEP (or @newest) or /SWEEP only those of their evaluations. "
            "Default: every run.",
            show_default=False,
        ),
    ] = None,
    root: Annotated[
        str, typer.Option(help="Folder of the project, whose MLflow store is read.")
    ] = ".",
    uri: Annotated[
        str | None, typer.Option("--tracking-uri", help="MLflow, where it is not under the root.")
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="Experiment to compare. Default: every one in the store.")
    ] = None,
    plot: Annotated[
        str | None, typer.Option(help="Where the curves go. Default: ROOT/compare.png.")
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(help="File for a report with curves and sample grids that opens anywhere."),
    ] = None,
    csv: Annotated[
        str | None, typer.Option(help="File for a table with a row for each evaluation.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Metric to rank by. Default: fid, else another distance."),
    ] = None,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", metavar="", help="Print the tables as GitHub's Markdown."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Print runs, checkpoints or sweeps side by side, and draw their curves.

    Evaluations that differ in seeds only are shown as mean and standard deviation, too. Those with
    other numbers of samples, features or references are never ranked together.

    Example: `diffit compare --root my-project`

    Example: `diffit compare first@400000 second@400000 --root my-project --html comparison.html`
    """
    from diffit_train.compare.comparison import compare_store

    if markdown and as_json:
        raise UserError("--markdown and --json both print; choose one of them")
    comparison = compare_store(
        root,
        uri,
        experiment,
        plot and storage.absolute(plot),
        selection=selection or (),
        metric=metric,
        html=html and storage.absolute(html),
        csv=csv and storage.absolute(csv),
    )
    if as_json:
        print_result(comparison.as_json(), as_json)
    elif markdown:
        sys.stdout.write(comparison.markdown())
    else:
        comparison.print_table()
