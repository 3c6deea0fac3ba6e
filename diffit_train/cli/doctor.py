"""`diffit doctor`: check this machine, or every node of a cluster, before work is sent there."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from typing import Annotated, cast

import typer

from diffit_train.cli.options import (
    ClusterPython,
    Json,
    Overrides,
    RecipeName,
    Root,
    RuntimeEnvOption,
    print_result,
    read_recipe,
)
from diffit_train.config.scaling import ClusterStage
from diffit_train.errors import DiffitError, UserError
from diffit_train.jobs.doctor import check_cluster, check_machine, check_nodes
from diffit_train.jobs.job import CLUSTER_STAGES
from diffit_train.progress import counted, print_rows, say


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
    stage: Annotated[
        list[str] | None,
        typer.Option(help="Stage that a cluster must be large enough for. Default: all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine, or with --address every node of a cluster, for a recipe.

    Python, packages, GPUs and their memory, disk, whether the root can be written and MLflow be
    reached; of a cluster also its size. Inside a Ray job it checks every node of the job's cluster.
    Exit status 1 if something needs fixing.

    Example: `diffit doctor imagenet256 --root s3://bucket/project --address http://head:8265`
    """
    recipe = read_recipe(name, overrides, root)
    stages = tuple(cast(ClusterStage, word) for word in stage or CLUSTER_STAGES)
    if unknown := set(stages) - set(CLUSTER_STAGES):
        raise UserError(
            f"--stage is {', '.join(unknown)}, but must be one of {', '.join(CLUSTER_STAGES)}"
        )
    inside = address is None and "RAY_ADDRESS" in os.environ
    nodes = address or "this cluster"
    where = f"every node of {nodes}" if address or inside else "this machine"
    say(f"checking {where} for recipe {recipe.name}")
    if address is not None:
        checks, _ = check_cluster(recipe, stages, address, python, runtime_env)
    elif inside:
        checks = check_nodes(recipe, stages)
    else:
        checks = check_machine(recipe, platform.node())
    if as_json:
        print_result([asdict(check) for check in checks], as_json)
    else:
        print_rows("checks", [check.row() for check in checks])
    problems = [check.problem() for check in checks if check.fix]
    for problem in problems:
        say(f"  {problem}")
    if problems:
        raise DiffitError(
            f"{where} is not ready for {recipe.name}: {counted(len(problems), 'problem')}"
        )
    say("all checks passed")
