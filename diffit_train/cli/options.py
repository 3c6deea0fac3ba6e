"""Arguments and options shared by several commands."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.config import Recipe, load_recipe, packaged_recipes
from diffit_train.config.base import require_name
from diffit_train.errors import UserError
from diffit_train.jobs.job import RuntimeEnvChoice


def checked_name(given: typer.CallbackParam, value: str | None) -> str | None:
    """Callback of an option or argument that names a folder."""
    if value is None:
        return None
    return require_name(given.opts[0] if given.opts[0].startswith("-") else "NAME", value)


def complete_recipe(incomplete: str) -> list[str]:
    """Packaged recipes, for the shell."""
    return [name for name in packaged_recipes() if name.startswith(incomplete)]


def complete_run(context: typer.Context, incomplete: str) -> list[str]:
    """The runs of the local root given so far, for the shell."""
    root = context.params.get("root") or "."
    if not storage.is_local(root):
        return []
    names = storage.list_names(storage.join(storage.absolute(root), "runs"))
    return [name for name in names if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        autocompletion=complete_recipe,
        help=f"Packaged recipe ({', '.join(packaged_recipes())}), or the path or URL of a YAML "
        "file.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Recipe keys to override, e.g. train.lr=1e-4.",
        show_default=False,
    ),
]
# Of commands that use a trained run.
OptionalRecipe = Annotated[
    str | None,
    typer.Argument(
        metavar="[RECIPE]",
        autocompletion=complete_recipe,
        help="Recipe (name, path or URL) whose settings for this command to use. Default: those "
        "of the run.",
        show_default=False,
    ),
]
RunOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Recipe keys that are to differ from the run's, e.g. evaluate.sampler.steps=50.",
        show_default=False,
    ),
]
Root = Annotated[
    str | None,
    typer.Option(help="Project folder or s3://bucket/prefix (storage.root)."),
]
ProjectRoot = Annotated[str, typer.Option("--root", help="Project folder or s3://bucket/prefix.")]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster, e.g. 10.0.0.1:6379 or auto. Default: this machine."),
]
RunName = Annotated[
    str | None,
    typer.Option(
        "--run",
        callback=checked_name,
        autocompletion=complete_run,
        help="Name of the run. Default: the recipe's name.",
    ),
]
Step = Annotated[str, typer.Option("--step", help="Step of the checkpoint, or `newest`.")]
Steps = Annotated[
    list[str] | None,
    typer.Option("--step", help="Step of a checkpoint, or `newest`; repeatable."),
]
InitFrom = Annotated[
    str | None,
    typer.Option("--init-from", help="Start a new run from the weights of RUN or RUN@STEP."),
]
InitWeights = Annotated[
    str, typer.Option(help="Weights for --init-from: raw, or the name of an EMA.")
]
ClusterPython = Annotated[
    str | None,
    typer.Option("--python", help="Python interpreter on the cluster. Default: its `python`."),
]
RuntimeEnvOption = Annotated[
    RuntimeEnvChoice,
    typer.Option(
        "--runtime-env",
        help="Where a job's packages come from. none: the cluster's Python, and this package's "
        "source is sent; image: the cluster also has this package, and nothing is sent; pip, uv: "
        "Ray installs the lock file on each node. auto: none if the cluster has all packages, "
        "else pip.",
    ),
]
CheckCluster = Annotated[
    bool,
    typer.Option(
        "--check/--no-check", metavar="", help="Check every node by a short job before submitting."
    ),
]
MaxConcurrent = Annotated[int, typer.Option(min=1, help="Maximum number of concurrent jobs.")]
Retries = Annotated[int, typer.Option(min=0, help="Retries of a failed job.")]
# Flags take no value, so help shows none.
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        metavar="",
        help="Allow weights that are pickles: a PyTorch file, read as tensors only, or a folder of "
        "DeepSpeed's, which can run any code; use it only for files you trust.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print the result as JSON to standard output.")
]


def output(option: str, value: str) -> str:
    """The absolute URL of an output that an option names, if it can be written.

    Raises:
        UserError: it cannot; names the option.
    """
    if fault := storage.missing_slash(value):
        raise UserError(f"{option} is {value!r}: {fault}")
    url = storage.absolute(value)
    if storage.is_local(url):
        path = storage.local_path(url)
        above = storage.existing(path.parent)
        problem = "is not a folder" if not above.is_dir() else "cannot be written to"
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise UserError(
                f"{option} is {value!r}, but {above} {problem}; choose another {option}"
            )
    return url


def print_result(value: Any, as_json: bool) -> None:
    """Print a result as JSON to standard output if --json was given."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")


def read_recipe(name: str, overrides: list[str] | None, root: str | None) -> Recipe:
    """The recipe of a command line."""
    return load_recipe(name, overrides or (), root)
