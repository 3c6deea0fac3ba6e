"""`diffit encode`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.commands.options import (
    Address,
    Json,
    Overrides,
    RecipeName,
    Root,
    print_result,
    read_known_recipe,
)
from diffit_train.config import Recipe
from diffit_train.progress import counted, say


def encode_latents(
    recipe: Recipe, address: str | None = None, append: bool = False
) -> dict[str, Any]:
    """Encode the recipe's images; return a summary of the latents."""
    from diffit_train.data.shards import finished_manifest, latents_url, missing_files

    manifest = finished_manifest(recipe)
    if manifest is None or append or missing_files(latents_url(recipe), manifest):
        say(f"Encoding {storage.display_path(recipe.data.source)}")
        from diffit_train.data import encode as stage

        manifest = stage.encode(recipe, address, append)
    else:
        say("already encoded")
    say(
        f"latents {storage.display_path(latents_url(recipe))}: "
        f"{counted(manifest.totals.written, 'image')} in {counted(len(manifest.shards), 'shard')}, "
        f"{manifest.totals.rejected:,} rejected"
    )
    return {
        "latents": latents_url(recipe),
        **manifest.totals.model_dump(),
        "digest": manifest.digest,
    }


def encode_command(
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
    address: Address = None,
    append: Annotated[
        bool,
        typer.Option("--append", metavar="", help="Add new images as new shards."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Encode images (a folder, tar or parquet files) into shards of VAE latents.

    Example: `diffit encode imagenet256 --root s3://bucket/project data.source=s3://bucket/train`
    """
    print_result(encode_latents(read_known_recipe(name, overrides, root), address, append), as_json)
