"""`diffit plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from diffit_train.cli.options import (
    Json,
    Overrides,
    RecipeName,
    Root,
    print_result,
    read_recipe,
)
from diffit_train.jobs.plan import (
    GPUS_PER_NODE,
    NODE_LINK_GB_PER_S,
    Machine,
    compare,
    node_sizes,
    plan,
    print_comparison,
    print_nodes,
    print_plan,
)

# The least rate in GB/s: a typo of 0 would divide by it.
LEAST = 1e-3


def plan_command(
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
    gpu: Annotated[str, typer.Option(help="GPU type assumed in the estimate.")] = "H100",
    mfu: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1,
            help="MFU assumed while a GPU computes. Default: estimated, as a range.",
        ),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price per GPU-hour.")] = None,
    emas: Annotated[
        int | None, typer.Option(min=0, help="Number of EMAs. Default: the recipe's.")
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(
            min=LEAST, help="GB/s between the GPUs of a node, one way. Default: the GPU's."
        ),
    ] = None,
    node_link: Annotated[
        float, typer.Option(min=LEAST, help="GB/s between nodes for each GPU, one way.")
    ] = NODE_LINK_GB_PER_S,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = GPUS_PER_NODE,
    presets: Annotated[
        list[str] | None,
        typer.Option(
            "--compare", help="A model preset to compare with, such as dit_xl; may be repeated."
        ),
    ] = None,
    nodes: Annotated[
        bool,
        typer.Option(
            help="Show what nodes each stage needs instead, for the files in cluster/. Without "
            "GPUs, --gpus-per-node is the number of training workers of a node."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Estimate what a run needs: compute, memory per GPU, storage, hours and cost.

    Example: `diffit plan imagenet256 --gpu H100 --price 2.5 --compare dit_xl scaling.workers=16`
    """
    recipe = read_recipe(name, overrides, root)
    machine = Machine(gpu, mfu, price, link, node_link, gpus_per_node)
    result = plan(recipe, machine, emas)
    if nodes:
        sizes = node_sizes(recipe, result, gpus_per_node)
        if not as_json:
            print_nodes(sizes)
        print_result({kind: size._asdict() for kind, size in sizes.items()}, as_json)
        return
    others = {preset: compare(recipe, preset, machine, emas) for preset in presets or ()}
    if not as_json:
        print_plan(result)
    if others and not as_json:
        print_comparison(result, others)
    print_result({**result, "compared": others} if others else result, as_json)
