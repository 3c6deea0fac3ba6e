"""`diffit plan`: print what `diffit_train.planning` estimates."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.commands.options import (
    Json,
    Overrides,
    RecipeName,
    Root,
    print_result,
    read_recipe,
)
from diffit_train.planning import Machine, plan


def print_plan(result: dict[str, Any]) -> None:
    """Print the plan as tables to standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    parameters, work, memory = result["parameters"], result["multiply_adds"], result["memory"]
    time, disk = result["time"], result["storage"]
    model = result["model"]

    def table(title: str, *columns: str) -> Table:
        console.print(title)  # rich would wrap a table's own title to the table's width
        made = Table(*columns, show_header=len(columns) > 2)
        for column in made.columns[1:]:
            column.justify = "right"
        return made

    sizes = (
        f"{model['architecture']}, width {model['hidden_size']}, depth {model['depth']}, "
        f"{model['num_heads']} heads, {(model['latent_size'] // model['patch_size']) ** 2} tokens"
    )
    counts = table(f"{result['recipe']}: {sizes}", "", "")
    for name, value in parameters.items():
        counts.add_row("parameters" if name == "total" else f"  {name}", f"{value:,}")
    counts.add_row("multiply-adds per image, forward pass", f"{work['forward'] / 1e9:,.1f} G")
    plain = work["forward_without_attention_products"]
    counts.add_row("  without attention products", f"{plain / 1e9:,.1f} G")
    counts.add_row("multiply-adds per training step", f"{work['training_step'] / 1e12:,.1f} T")
    console.print(counts)

    title = (
        f"GiB per GPU, world size {memory['world_size']}, {memory['batch_per_gpu']} images per "
        f"GPU, {memory['precision']}, EMAs: {memory['emas']}, activation checkpointing: "
        f"{memory['activation_checkpointing']}"
    )
    parts = ("weights", "gradients", "master", "moments", "ema", "bucket", "activations", "total")
    rows = table(title, "ZeRO stage", *parts, f"fits {time['gpu']}")
    for stage, values in memory["zero_stage"].items():
        shown = [f"{values[part] / storage.GIB:,.2f}" for part in parts]
        rows.add_row(stage, *shown, "yes" if values["fits"] else "no")
    console.print(rows)

    rest = table(f"{time['gpu']} at {time['mfu']:.0%} MFU (bf16)", "", "")
    rest.add_row("images/s", f"{time['images_per_s']:,.0f}")
    rest.add_row("  per GPU", f"{time['images_per_s_per_gpu']:,.0f}")
    rest.add_row("seconds per step", f"{time['step_s']:.3f}")
    epochs = "" if time["epochs"] is None else f" ({time['epochs']:,.0f} epochs)"
    rest.add_row(f"hours for {time['steps']:,} steps{epochs}", f"{time['hours']:,.1f}")
    rest.add_row("GPU-hours", f"{time['gpu_hours']:,.0f}")
    if time["cost"] is not None:
        price = time["price_per_gpu_hour"]
        rest.add_row(f"cost at {price:g} per GPU-hour", f"{time['cost']:,.0f}")
    rest.add_row("checkpoint, GiB", f"{disk['checkpoint'] / storage.GIB:,.2f}")
    if disk["latents"] is not None:
        rest.add_row(
            f"latents of {disk['images']:,} images, GiB", f"{disk['latents'] / storage.GIB:,.1f}"
        )
    console.print(rest)


def plan_command(
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
    gpu: Annotated[str, typer.Option(help="GPU type assumed in the estimate.")] = "H100",
    mfu: Annotated[float, typer.Option(help="Model FLOPs utilization assumed.")] = 0.4,
    price: Annotated[float | None, typer.Option(help="Price per GPU-hour.")] = None,
    emas: Annotated[
        int | None, typer.Option(min=0, help="Number of EMAs. Default: the recipe's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate what a run needs: compute, memory per GPU, storage, hours and cost.

    Example: `diffit plan imagenet256 --gpu H100 --mfu 0.4 --price 2.5 scaling.workers=16`
    """
    recipe = read_recipe(name, overrides, root)
    result = plan(recipe, Machine(gpu, mfu, price), emas)
    if as_json:
        print_result(result, as_json)
    else:
        print_plan(result)
