"""`diffit runs`: what runs a project has, and how far they are."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.cli.options import (
    Json,
    ProjectRoot,
    checked_name,
    complete_run,
    print_result,
)
from diffit_train.errors import DiffitError, UserError, first_line, redact
from diffit_train.evaluation.result import run_results
from diffit_train.progress import Progress, counted, loss_and_rate, print_rows, say
from diffit_train.runs.checkpoints import step_name
from diffit_train.runs.lease import Holder, read_holder
from diffit_train.runs.run import METADATA, Project, Run
from diffit_train.tracking import Tracker, unreachable_errors

GB = 1e9
POLL_S = 2.0


def list_runs(root: str) -> list[dict[str, Any]]:
    """Each run of a project: state, step, last loss, number of evaluations, last sign of life."""
    return [_summary(run) for run in _project(root).runs]


def _project(root: str) -> Project:
    project = Project(root)
    if not storage.exists(project.root):
        raise UserError(f"--root {project.root} does not exist; give the folder of a project")
    return project


def _existing(root: str, name: str) -> Run:
    """A run whose folder exists, even if it is half removed."""
    project = _project(root)
    run = Run(project.root, name)
    if not storage.exists(run.url):
        known = ", ".join(run.name for run in project.runs) or "none"
        raise UserError(
            f"run {name!r} does not exist in {storage.display_path(project.root)}, whose runs are: "
            f"{known}"
        )
    return run


def _summary(run: Run) -> dict[str, Any]:
    recipe, holder = run.recipe, read_holder(run.url)
    progress = holder.progress if holder else {}
    trained = progress.get("step", 0) if holder and holder.is_training else 0
    return {
        "run": run.name,
        "state": _state(run, holder),
        "step": max(int(trained), run.checkpoints.latest_step),
        "steps": recipe.train.steps,
        "loss": progress.get("loss"),
        "images_per_s": progress.get("images_per_s"),
        "checkpoints": len(run.checkpoints),
        "evaluations": len(list(run_results(run))),
        "last_write_s": holder.written_s if holder else None,
        "recipe": recipe.name,
    }


def _state(run: Run, holder: Holder | None) -> str:
    """The state of a run in a word."""
    if holder is not None and not holder.released:
        return "training" if holder.is_training else "killed"
    if run.checkpoints and run.checkpoints.latest_step >= run.recipe.train.steps:
        return "finished"
    if holder is not None and holder.failed:
        return "failed"
    return "stopped" if run.checkpoints else "empty"


def show_run(root: str, name: str) -> dict[str, Any]:
    """A run's state, checkpoints with sizes, exported files and evaluations."""
    run = _existing(root, name)
    files, start = storage.sizes(run.url), run.recipe.train.start
    checkpoints = []
    for step in run.checkpoints:
        folder = f"checkpoints/{step_name(step)}/"
        size = sum(size for path, size in files.items() if path.startswith(folder))
        checkpoints.append({"step": step, "bytes": size, "holds": run.checkpoints[step].weights})
    return {
        **_summary(run),
        "url": run.url,
        "bytes": sum(files.values()),
        "started_from": start and f"{start.run}@{start.step} {start.weights}",
        "checkpoints": checkpoints,
        "exports": [
            {"file": path, "bytes": size}
            for path, size in sorted(files.items())
            if path.startswith("export/") and path.endswith(".safetensors")
        ],
        "evaluations": [
            {
                "step": result.step,
                "evaluation": result.key,
                "samples": result.samples,
                **result.metrics,
            }
            for result in run_results(run)
        ],
    }


def remove_run(root: str, name: str, yes: bool, in_mlflow: bool = False) -> dict[str, Any]:
    """List a run's files and evaluations, ask, and remove them.

    Args:
        yes: whether not to ask.
        in_mlflow: whether to delete the run and its evaluations in MLflow as well.

    Raises:
        UserError: it is being trained.
        DiffitError: MLflow did not delete its runs; no file was removed.
    """
    run = _existing(root, name)
    evaluations = storage.join(run.root, "evaluations", name)
    places = [place for place in (evaluations, run.url) if storage.exists(place)]
    files_in = {place: storage.sizes(place) for place in places}
    total = sum(sum(files.values()) for files in files_in.values())
    rows = [
        {
            "GB": f"{sum(files.values()) / GB:.3f}",
            "files": f"{len(files):,}",
            "where": storage.display_path(place),
        }
        for place, files in files_in.items()
    ]
    print_rows(f"run {name}", rows)
    metadata = run.metadata if in_mlflow else None
    if metadata is None:
        say("MLflow keeps the run's curves")
    else:
        with _mlflow_errors():
            tracker = Tracker.of(run.recipe)
            recorded = tracker.with_evaluations(metadata.uuid)
            place = redact(tracker.uri)
        say(f"{counted(len(recorded), 'run')} in MLflow at {place} will be deleted as well")
    say("A registered model loses its weights with the run")
    agreed = yes or _agreed(name, total / GB)
    if agreed:
        with run.acquire():
            if metadata is not None:
                with _mlflow_errors():
                    tracker.delete(recorded)
            storage.remove(evaluations)
            # Without it the folder is no run any more; a killed removal can be repeated.
            storage.remove(storage.join(run.url, METADATA))
            storage.remove(run.url)
        say(f"removed {total / GB:.3f} GB")
    return {"run": name, "bytes": total, "removed": agreed}


@contextmanager
def _mlflow_errors() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except unreachable_errors() as error:
        raise DiffitError(
            f"the run cannot be deleted in MLflow: {first_line(error)}; rerun the command, or "
            "without --mlflow to remove the files alone"
        ) from error


def _agreed(run: str, gigabytes: float) -> bool:
    if not sys.stdin.isatty():
        say(f"{gigabytes:.3f} GB can be removed; rerun with --yes to remove them")
        return False
    return typer.confirm(f"Remove run {run}, {gigabytes:.3f} GB?", default=False, err=True)


def follow_training(
    root: str, run: str, pause: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """Follow a run's training until it ends.

    Args:
        pause: sleeps for a number of seconds between looks.

    Raises:
        DiffitError: training failed, or has given no sign of life for long.
    """
    followed = _existing(root, run)
    steps, holder = followed.recipe.train.steps, read_holder(followed.url)
    if holder is None:
        raise UserError(f"run {run!r} has no training to follow; `diffit runs show {run}` shows it")
    start = int(holder.progress.get("step", followed.checkpoints.latest_step))
    with Progress(f"{run}", steps, "steps", start) as progress:
        while holder is not None and holder.is_training:
            step = int(holder.progress.get("step", start))
            progress.update(step, loss_and_rate(holder.progress))
            pause(POLL_S)
            holder = read_holder(followed.url)
    summary = _summary(followed.refresh())
    say(f"run {run}: {summary['state']} at step {summary['step']:,} of {steps:,}")
    if summary["state"] in ("failed", "killed"):
        how = "failed" if summary["state"] == "failed" else "was killed"
        raise DiffitError(f"training of {run!r} {how}")
    return {name: summary[name] for name in ("run", "state", "step", "steps")}


def newest_training(root: str) -> str:
    """The run that is being trained, or else the one that was trained last.

    Raises:
        UserError: there is none, or several are being trained.
    """
    runs = {run.name: read_holder(run.url) for run in _project(root).runs}
    holders = {run: holder for run, holder in runs.items() if holder is not None}
    training = [run for run, holder in holders.items() if holder.is_training]
    if len(training) > 1:
        raise UserError(f"several runs are being trained; name one: {', '.join(training)}")
    if not holders:
        raise UserError(f"{storage.display_path(root)} has no run that was trained")
    return training[0] if training else max(holders, key=lambda run: holders[run].written_s)


def _ago(written_s: float | None) -> str:
    if written_s is None:
        return "-"
    return f"{timedelta(seconds=round(time.time() - written_s))} ago"


def runs_list_command(root: ProjectRoot = ".", as_json: Json = False) -> None:
    """List the runs of a project: state, step, loss, checkpoints, evaluations, last progress.

    Example: `diffit runs list --root my-project`
    """
    runs, place = list_runs(root), storage.display_path(storage.absolute(root))
    rows = [
        {
            "run": row["run"],
            "state": row["state"],
            "step": f"{row['step']:,} of {row['steps']:,}",
            "loss": "-" if row["loss"] is None else f"{row['loss']:.4f}",
            "checkpoints": str(row["checkpoints"]),
            "evaluations": str(row["evaluations"]),
            "last progress": _ago(row["last_write_s"]),
            "recipe": row["recipe"],
        }
        for row in runs
    ]
    if rows and not as_json:
        print_rows(f"runs of {place}", rows)
    elif not as_json:
        say(f"{place} has no run; see `diffit train --help`")
    print_result(runs, as_json)


def runs_show_command(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            callback=checked_name,
            autocompletion=complete_run,
            help="Name of a run. Default: the current or most recent one.",
            show_default=False,
        ),
    ] = None,
    root: ProjectRoot = ".",
    follow: Annotated[
        bool, typer.Option("--follow", metavar="", help="Follow its training until it ends.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a run: state, checkpoints with sizes, exported files, evaluations.

    Example: `diffit runs show first --root my-project --follow`
    """
    run = run or newest_training(root)
    if follow:
        print_result(follow_training(root, run), as_json)
        return
    shown = show_run(root, run)
    if not as_json:
        _print_run(run, shown)
    print_result(shown, as_json)


def _print_run(run: str, shown: dict[str, Any]) -> None:
    place, size = storage.display_path(shown["url"]), shown["bytes"] / GB
    step = f"step {shown['step']:,} of {shown['steps']:,}"
    say(
        f"run {run}, recipe {shown['recipe']}: {shown['state']} at {step}, {size:.3f} GB in {place}"
    )
    if shown["started_from"]:
        say(f"started from {shown['started_from']}")
    if shown["loss"] is not None:
        speed = f"loss {shown['loss']:.4f}, {shown['images_per_s']:,.0f} images/s"
        say(f"last progress {_ago(shown['last_write_s'])}: {speed}")
    if shown["checkpoints"]:
        rows = [
            {
                "step": f"{row['step']:,}",
                "GB": f"{row['bytes'] / GB:.3f}",
                "holds": ", ".join(row["holds"]),
            }
            for row in shown["checkpoints"]
        ]
        print_rows(counted(len(rows), "checkpoint"), rows)
    for row in shown["exports"]:
        say(f"{row['file']}  {row['bytes'] / GB:.3f} GB")
    for metrics in dict.fromkeys(tuple(row) for row in shown["evaluations"]):
        rows = [row for row in shown["evaluations"] if tuple(row) == metrics]
        print_rows(counted(len(rows), "evaluation"), rows)


def runs_remove_command(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            callback=checked_name,
            autocompletion=complete_run,
            help="Name of a run.",
            show_default=False,
        ),
    ],
    root: ProjectRoot = ".",
    yes: Annotated[bool, typer.Option("--yes", metavar="", help="Remove without asking.")] = False,
    in_mlflow: Annotated[
        bool,
        typer.Option(
            "--mlflow",
            metavar="",
            help="Delete it in MLflow as well, so that `diffit compare` no longer shows it. MLflow "
            "can restore it until `mlflow gc` runs.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """List a run's files and evaluations with sizes, and ask to remove them.

    Example: `diffit runs remove first --root my-project`
    """
    print_result(remove_run(root, run, yes, in_mlflow), as_json)
