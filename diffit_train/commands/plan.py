"""`diffit plan`: print what `diffit_train.planning` estimates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffit_train import planning, storage
from diffit_train.commands.options import (
    Json,
    Overrides,
    RecipeName,
    Root,
    print_result,
    read_recipe,
)
from diffit_train.config.presets import PAPER_COSTS
from diffit_train.node_sizes import NodeSize, node_sizes
from diffit_train.planning import GPUS_PER_NODE, NODE_LINK_GB_PER_S, Machine, plan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def quantity(value: float, digits: int = 1) -> str:
    """A count with the prefix that leaves at least one digit before the point: 118.5 G."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:,.{digits}f} {prefix}"
    return f"{value:,.0f}"


def significant(value: float) -> str:
    """A number with at least two significant digits."""
    if value >= 10 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{max(1, 1 - math.floor(math.log10(value)))}f}"


def gib(size: int) -> str:
    """Bytes in GiB: two decimals; below 0.1, two significant digits."""
    value = size / storage.GIB
    return significant(value) if value < 0.1 else f"{value:,.2f}"


def between(values: Sequence[float] | None) -> str:
    """A range, best first."""
    if values is None:
        return "-"
    low, high = (significant(value) for value in sorted(values))
    return low if low == high else f"{low} to {high}"


def print_plan(result: dict[str, Any]) -> None:
    """Print the plan as tables to standard output."""
    from rich.console import Console

    console = Console(width=110)
    _print_model(console, result)
    if not result["on_gpus"]:
        gpu = result["time"]["gpu"]
        console.print(
            "This recipe trains on CPUs, whose speed is not estimated. What follows is for "
            f"{gpu} GPUs in their place."
        )
    _print_memory(console, result)
    _print_training(console, result)
    _print_project(console, result)


def _table(console: Console, title: str, *columns: str) -> Table:
    """A table whose title is printed first: rich would wrap its own to the table's width."""
    from rich.table import Table

    console.print(title)
    made = Table(*columns, show_header=len(columns) > 2)
    for column in made.columns[1:]:
        column.justify = "right"
    return made


def _print_model(console: Console, result: dict[str, Any]) -> None:
    model, work = result["model"], result["multiply_adds"]
    sizes = f"{model['architecture']}, {model['summary']}"
    rows = _table(console, f"{result['recipe']}: {sizes}", "", "")
    for name, value in result["parameters"].items():
        rows.add_row("parameters" if name == "total" else f"  {name}", f"{value:,}")
    rows.add_row("multiply-adds per image, forward pass", quantity(work["forward"]))
    plain = work["forward_without_attention_products"]
    rows.add_row("  without attention products", quantity(plain))
    rows.add_row("multiply-adds per training step", quantity(work["training_step"]))
    console.print(rows)


def _print_memory(console: Console, result: dict[str, Any]) -> None:
    memory = result["memory"]
    title = (
        f"GiB per GPU, world size {memory['world_size']}, {memory['batch_per_gpu']} images per "
        f"GPU, {memory['precision']}, EMAs: {memory['emas']}, activation checkpointing: "
        f"{memory['activation_checkpointing']}"
    )
    parts = ("weights", "gradients", "master", "moments", "ema", "bucket", "activations", "total")
    rows = _table(console, title, "ZeRO stage", *parts, f"fits {result['time']['gpu']}")
    for stage, values in memory["zero_stage"].items():
        rows.add_row(
            stage, *(gib(values[part]) for part in parts), "yes" if values["fits"] else "no"
        )
    console.print(rows)


def _print_training(console: Console, result: dict[str, Any]) -> None:
    time, disk = result["time"], result["storage"]
    assumed = f", {time['assumed_mfu']:.0%} MFU while computing" if time["assumed_mfu"] else ""
    title = f"Training on {time['gpus']} {time['gpu']}{assumed}; estimated ranges"
    rows = _table(console, title, "", "")
    rows.add_row("images/s", between(time["images_per_s"]))
    rows.add_row("  per GPU", between(time["images_per_s_per_gpu"]))
    rows.add_row("seconds per step", between(time["step_s"]))
    for part, words in STEP_PARTS.items():
        rows.add_row(f"  {words}", between(time["step_parts_s"][part]))
    rows.add_row("MFU, %", between([100 * value for value in time["mfu"]]))
    rows.add_row("checkpoint, GiB", gib(disk["checkpoint"]))
    held = result["memory"]["latents_on_host"]
    rows.add_row("latents in the host memory of a worker, GiB", gib(held))
    if disk["latents"] is not None:
        rows.add_row(f"latents of {disk['images']:,} images, GiB", gib(disk["latents"]))
    console.print(rows)
    if result["on_gpus"] and time["images_per_gpu"] < time["images_to_keep_a_gpu_busy"]:
        console.print(
            f"Warning: {time['images_per_gpu']} images per GPU and step leave it idle while the "
            f"host launches kernels; about {time['images_to_keep_a_gpu_busy']} keep it busy. Use "
            "fewer workers, a larger train.batch_size, or train.compile=true.",
            soft_wrap=True,
        )


def _print_project(console: Console, result: dict[str, Any]) -> None:
    time = result["time"]
    epochs = "" if time["epochs"] is None else f", {time['epochs']:,.0f} epochs"
    title = f"The whole project; training takes {time['steps']:,} steps{epochs}"
    price = time["price_per_gpu_hour"]
    columns = ["stage", "GPUs", "hours", "GPU-hours"]
    columns += [] if price is None else [f"cost at {price:g} per GPU-hour"]
    rows = _table(console, title, *columns)
    for row in result["stages"]:
        cells = [row["stage"], f"{row['gpus']:g}", between(row["hours"]), between(row["gpu_hours"])]
        rows.add_row(*cells, *([] if price is None else [between(row["cost"])]))
    console.print(rows)
    unknown = [row["stage"] for row in result["stages"] if row["hours"] is None]
    if unknown:
        console.print(
            f"Not estimated: {', '.join(unknown)} (the size of the autoencoder, or the number of "
            "images, is not known).",
            soft_wrap=True,
        )


# The parts of a step, as they are shown.
STEP_PARTS = {
    "compute": "matrix products",
    "memory": "memory traffic of the rest",
    "launch": "launching kernels, on the host",
    "optimizer": "optimizer and EMAs",
    "exchange": "communication",
}


def print_comparison(mine: dict[str, Any], others: dict[str, dict[str, Any]]) -> None:
    """Print plans side by side, with the paper's figures where it has them.

    Args:
        others: by the name of the preset.
    """
    from rich.console import Console
    from rich.table import Table

    console, stage = Console(width=110), str(mine["zero_stage"])
    names = ", ".join(others)
    console.print(f"{mine['recipe']} and the same recipe with model.preset={names}")
    shown = Table("", mine["recipe"], *others)
    for column in shown.columns[1:]:
        column.justify = "right"
    columns = [_comparison(mine, stage, None)]
    columns += [_comparison(other, stage, PAPER_COSTS.get(name)) for name, other in others.items()]
    for title in columns[0]:
        cells = [column[title] for column in columns]
        if any(cell != "-" for cell in cells):
            shown.add_row(title, *cells)
    console.print(shown)


def _comparison(
    planned: dict[str, Any], stage: str, paper: tuple[float, float, float] | None
) -> dict[str, str]:
    """A column of the comparison; a peer that cannot be trained here has counts only."""
    forward, total = planned["multiply_adds"]["forward"], planned["parameters"]["total"]
    cells = {"parameters": f"{total:,}", "multiply-adds per image": quantity(forward)}
    time, memory = planned.get("time"), planned.get("memory")
    resident = memory["zero_stage"][stage]["total"] if memory else None
    cells[f"GiB per GPU, ZeRO {stage}"] = "-" if resident is None else gib(resident)
    for title, key in (
        ("seconds per step", "step_s"),
        ("images/s", "images_per_s"),
        ("GPU-hours of training", "gpu_hours"),
    ):
        cells[title] = between(time[key]) if time else "-"
    parameters, flops, fid = paper or (None, None, None)
    cells["paper: parameters, M"] = "-" if parameters is None else f"{parameters:g}"
    cells["paper: GFLOPs at 256x256"] = "-" if flops is None else f"{flops:g}"
    cells["paper: FID at 256x256"] = "-" if fid is None else f"{fid:.2f}"
    return cells


def print_nodes(sizes: Mapping[str, NodeSize]) -> None:
    """Print what each node needs to standard output."""
    from rich.console import Console

    console = Console(width=110)
    columns = ["nodes", "CPUs", "GPUs", "memory", "/dev/shm", "object store", "disk", "shard cache"]
    rows = _table(
        console, "Nodes, and each one's GiB; `workers` suits every stage", "", *columns, "grace, s"
    )
    for name, size in sizes.items():
        parts = (size.memory, size.shm, size.object_store, size.disk, size.shard_cache)
        cells = [size.nodes, size.cpus, size.gpus, *(part // storage.GIB for part in parts)]
        rows.add_row(name, *map(str, [*cells, size.grace_s]))
    console.print(rows)
    cache = sizes["train"].shard_cache // storage.GIB
    console.print(f"Train with scaling.shard_cache_gib={cache} scaling.shard_cache_folder=FOLDER")


def plan_command(
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
    gpu: Annotated[str, typer.Option(help="GPU type assumed in the estimate.")] = "H100",
    mfu: Annotated[
        float | None,
        typer.Option(help="MFU assumed while a GPU computes. Default: estimated, as a range."),
    ] = None,
    price: Annotated[float | None, typer.Option(help="Price per GPU-hour.")] = None,
    emas: Annotated[
        int | None, typer.Option(min=0, help="Number of EMAs. Default: the recipe's.")
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(help="GB/s between the GPUs of a node, one way. Default: the GPU's."),
    ] = None,
    node_link: Annotated[
        float, typer.Option(help="GB/s between nodes for each GPU, one way.")
    ] = NODE_LINK_GB_PER_S,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node.")] = GPUS_PER_NODE,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="A model preset to compare with, such as dit_xl; may be repeated."),
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
        if as_json:
            print_result({name: asdict(size) for name, size in sizes.items()}, as_json)
        else:
            print_nodes(sizes)
        return
    others = {each: planning.compare(recipe, each, machine, emas) for each in compare or ()}
    if as_json:
        print_result({**result, "compared": others} if others else result, as_json)
        return
    print_plan(result)
    if others:
        print_comparison(result, others)
