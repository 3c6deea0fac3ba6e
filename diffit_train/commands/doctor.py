"""`diffit doctor`: check this machine, or every node of a cluster, before work is sent there."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Annotated

import typer

from diffit_train.commands.options import (
    ClusterPython,
    Json,
    Overrides,
    RecipeName,
    Root,
    RuntimeEnvOption,
    print_result,
    read_recipe,
)
from diffit_train.errors import DiffitError
from diffit_train.machine_checks import check_every_node, check_machine
from diffit_train.preflight import Check, print_report
from diffit_train.progress import counted, print_rows, say
from diffit_train.ray_jobs.job import CLUSTER_STAGES
from diffit_train.ray_jobs.probe import check_cluster


def doctor_command(
    name: RecipeName = "demo",
    overrides: Overrides = None,
    root: Root = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray job server, e.g. http://head:8265. Default: check this machine."),
    ] = None,
    python: ClusterPython = None,
    runtime_env: RuntimeEnvOption = "auto",
    stages: Annotated[str | None, typer.Option("--report-for", hidden=True)] = None,
    as_json: Json = False,
) -> None:
    """Check this machine, or with --address every node of a cluster, for a recipe.

    Python, packages, GPUs and their memory, disk, whether the root can be written and MLflow be
    reached; of a cluster also its size. Exit status 1 if something needs fixing.

    Example: `diffit doctor imagenet256 --root s3://bucket/project --address http://head:8265`
    """
    recipe = read_recipe(name, overrides, root)
    if stages is not None:
        wanted = [stage for stage in CLUSTER_STAGES if stage in stages.split(",")]
        print_report(check_every_node(recipe, wanted))
        return
    where = "this machine" if address is None else f"every node of {address}"
    say(f"checking {where} for recipe {recipe.name}")
    if address is None:
        checks = check_machine(recipe, platform.node())
    else:
        checks, _ = check_cluster(recipe, CLUSTER_STAGES, address, python, runtime_env)
    _show(checks, as_json)
    problems = [check.problem() for check in checks if check.fix]
    for problem in problems:
        say(f"  {problem}")
    if problems:
        raise DiffitError(
            f"{where} is not ready for {recipe.name}: {counted(len(problems), 'problem')}"
        )
    say("all checks passed")


def _show(checks: list[Check], as_json: bool) -> None:
    if as_json:
        print_result([asdict(check) for check in checks], as_json)
    else:
        print_rows("checks", [check.row() for check in checks])
