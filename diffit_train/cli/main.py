"""The `diffit` command line: its commands in the order of use, and its exit status."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import diffit_train
from diffit_train.api import load_recipe
from diffit_train.cli.ablate import ablate_command
from diffit_train.cli.attention import attention_command
from diffit_train.cli.compare import compare_command
from diffit_train.cli.data import data_digits_command, fit_command
from diffit_train.cli.doctor import doctor_command
from diffit_train.cli.encode import encode_command
from diffit_train.cli.evaluate import evaluate_command, references_command
from diffit_train.cli.jobs import (
    jobs_follow_command,
    jobs_list_command,
    jobs_stop_command,
)
from diffit_train.cli.options import Overrides, RecipeName, Root, RunName, Steps
from diffit_train.cli.pipeline import pipeline_command
from diffit_train.cli.plan import plan_command
from diffit_train.cli.recipe import recipe_new_command, recipe_show_command
from diffit_train.cli.runs import runs_list_command, runs_remove_command, runs_show_command
from diffit_train.cli.submit import submit_command
from diffit_train.cli.sweep import sweep_command
from diffit_train.cli.train import train_command
from diffit_train.cli.verify import verify_command
from diffit_train.cli.weights import export_command, import_command, sample_command
from diffit_train.config import Recipe
from diffit_train.errors import DiffitError, Interrupted, UserError, first_line
from diffit_train.jobs.node import load_forwarded
from diffit_train.progress import say

# Packages whose version decides what a run does.
VERSIONS = ("torch", "ray", "deepspeed", "mlflow", "diffusers")
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

# Each command by its words, in the order of use.
COMMANDS: dict[str, Callable[..., None]] = {
    "recipe show": recipe_show_command,
    "recipe new": recipe_new_command,
    "data digits": data_digits_command,
    "fit": fit_command,
    "plan": plan_command,
    "doctor": doctor_command,
    "encode": encode_command,
    "verify": verify_command,
    "train": train_command,
    "runs list": runs_list_command,
    "runs show": runs_show_command,
    "runs remove": runs_remove_command,
    "references": references_command,
    "evaluate": evaluate_command,
    "sweep": sweep_command,
    "pipeline": pipeline_command,
    "ablate": ablate_command,
    "sample": sample_command,
    "attention": attention_command,
    "compare": compare_command,
    "import": import_command,
    "export": export_command,
    "submit": submit_command,
    "jobs list": jobs_list_command,
    "jobs follow": jobs_follow_command,
    "jobs stop": jobs_stop_command,
}
GROUPS = {
    "recipe": "Show and begin recipes.",
    "data": "Data sets that need no download.",
    "runs": "The runs of a project.",
    "jobs": "Jobs that `diffit submit` sent to a cluster.",
}


class OrderedGroup(TyperGroup):
    """Lists the commands in the order of `COMMANDS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The command names, in that order."""
        order = list(dict.fromkeys(words.split()[0] for words in COMMANDS))
        return sorted(super().list_commands(ctx), key=order.index)


app = typer.Typer(
    name="diffit",
    cls=OrderedGroup,
    help="Train diffusion vision transformers (DiffiT): encode images to latents, train, "
    "evaluate and compare, on this machine or on a Ray cluster.\n\n"
    "RECIPE is the name of a packaged recipe, or the path or URL of a YAML file. Rerun any "
    "command to resume it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
_groups = {name: typer.Typer(help=text, no_args_is_help=True) for name, text in GROUPS.items()}
for _name, _group in _groups.items():
    app.add_typer(_group, name=_name)
for _words, _command in COMMANDS.items():
    _first, _, _second = _words.partition(" ")
    (_groups[_first] if _second else app).command(_second or _first)(_command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(diffit_train.__version__)
        for name in VERSIONS:
            typer.echo(f"{name} {metadata.version(name)}")
        typer.echo(f"python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_version, is_eager=True, help="Print the versions."
        ),
    ] = False,
) -> None:
    """Options of `diffit` itself."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `diffit` and exit with its status.

    Args:
        arguments: the words after `diffit`; None for the arguments of the process.
    """
    words = None if arguments is None else list(arguments)
    sys.exit(exit_status(lambda: app(words)))


def run_job(body: Callable[[Recipe, str | None, list[str]], object]) -> None:
    """Run an entry point of `pipelines/` and exit with its status.

    Args:
        body: gets the recipe, the name of the run and the steps of the command line.
    """
    load_forwarded()
    command = typer.Typer(pretty_exceptions_enable=False)

    @command.command(help=body.__doc__)
    def job(
        name: RecipeName,
        overrides: Overrides = None,
        root: Root = None,
        run: RunName = None,
        step: Steps = None,
    ) -> None:
        body(load_recipe(name, overrides or (), root), run, step or [])

    sys.exit(exit_status(command))


def exit_status(body: Callable[[], object]) -> int:
    """Run a command; return its exit status: 0 ok, 1 failed, 2 bad input, 130 interrupted."""
    try:
        body()
    except UserError as error:
        say(f"error: {error}")
        return BAD_INPUT
    except (DiffitError, OSError) as error:  # OSError: a full disk, an unreadable folder
        say(f"failed: {error}")
        return FAILED
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as error:  # typer reports an interruption this way
        status = error.code if isinstance(error.code, int) else 0
        announced = isinstance(error, Interrupted)
        return _interrupted() if status == INTERRUPTED and not announced else status
    except Exception as error:
        # MLflow is not imported for its errors.
        if type(error).__module__.partition(".")[0] not in ("mlflow", "sqlalchemy"):
            raise
        say(f"failed: MLflow: {first_line(error)}; check its server, or restore mlflow.db")
        return FAILED
    finally:
        sys.stdout.flush()
    return 0


def _interrupted() -> int:
    say("interrupted; rerun the same command to resume")
    return INTERRUPTED
