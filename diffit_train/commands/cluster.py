"""`diffit cluster render`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffit_train.commands.options import (
    Json,
    Overrides,
    RecipeName,
    Root,
    RunName,
    print_result,
    read_recipe,
)
from diffit_train.progress import counted, say
from diffit_train.provision.render import ALL, PROVIDERS, render, write
from diffit_train.provision.target import IMAGE, Target

PROVIDER_NAMES = ", ".join((*PROVIDERS, ALL))


def cluster_render_command(
    name: RecipeName,
    out: Annotated[Path, typer.Option(help="Folder to write to.", show_default=False)],
    overrides: Overrides = None,
    root: Root = None,
    run: RunName = None,
    provider: Annotated[str, typer.Option(help=f"One of: {PROVIDER_NAMES}.")] = ALL,
    image: Annotated[str, typer.Option(help="Container image with this package.")] = IMAGE,
    gpu: Annotated[str, typer.Option(help="GPU model of the worker nodes.")] = "H100",
    gpus_per_node: Annotated[
        int,
        typer.Option(min=1, help="GPUs of a worker node; without GPUs, its training workers."),
    ] = 8,
    namespace: Annotated[str, typer.Option(help="Kubernetes namespace.")] = "diffit",
    redis: Annotated[
        str,
        typer.Option(
            help="HOST:PORT of a Redis that keeps the state of the cluster for many jobs when its "
            "head is lost. Default: none."
        ),
    ] = "",
    site: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="For slurm: partition, account, venv, time_limit and others; may be repeated.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the files that run a recipe on a cluster, sized by what `diffit plan` computes.

    Example: `diffit cluster render imagenet256 --root s3://bucket/project --out my-cluster`
    """
    target = Target(
        recipe=read_recipe(name, overrides, root),
        reference=name,
        overrides=tuple(overrides or ()),
        run=run or "",
        image=image,
        gpu=gpu,
        gpus_per_node=gpus_per_node,
        namespace=namespace,
        redis=redis,
        site=tuple(site or ()),
    )
    written = write(render(target, provider), out)
    say(
        f"wrote {counted(len(written), 'file')} to {out}; {out / 'README.md'} says what each one is"
    )
    print_result({"files": [str(path) for path in written]}, as_json)
