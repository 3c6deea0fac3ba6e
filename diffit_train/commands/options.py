"""Arguments and options that several commands share."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from diffit_train.config import Recipe, load_recipe, packaged_recipes

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help=f"Packaged recipe ({', '.join(packaged_recipes())}), or path or URL of a YAML file.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Keys of the recipe to change, as train.lr=1e-4.",
        show_default=False,
    ),
]
Root = Annotated[
    str | None,
    typer.Option(help="Folder or s3://bucket/prefix that holds the project (storage.root)."),
]
ProjectRoot = Annotated[str, typer.Option("--root", help="Folder of the project.")]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster, as 10.0.0.1:6379 or auto. Default: this machine."),
]
RunName = Annotated[
    str | None, typer.Option("--run", help="Name of the run. Default: the recipe's name.")
]
Steps = Annotated[
    list[str] | None,
    typer.Option("--step", help="Checkpoint by its step, or `newest`; may be repeated."),
]
Source = Annotated[
    str | None,
    typer.Option("--from", help="RUN or RUN@STEP whose weights a new run starts from."),
]
SourceWeights = Annotated[
    str, typer.Option("--from-weights", help="Which of them: raw, or the name of an average.")
]
# A flag takes no value, so help shows none.
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", metavar="", help="Read a weight file that is a pickle.")
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print the result as JSON on standard output.")
]


def print_result(value: Any, as_json: bool) -> None:
    """Print a result as JSON on standard output where --json asks for it."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")


def read_recipe(name: str, overrides: list[str] | None, root: str | None) -> Recipe:
    """The recipe of a command line."""
    return load_recipe(name, overrides or (), root)
