"""`diffit encode`."""

from __future__ import annotations

from typing import Annotated

import typer

from diffit_train.api import encode, load_recipe
from diffit_train.cli.options import (
    Address,
    Json,
    Overrides,
    RecipeName,
    Root,
    print_result,
)
from diffit_train.data.manifest import latents_url


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
    recipe = load_recipe(name, overrides or (), root)
    manifest = encode(recipe, address=address, append=append)
    summary = {**manifest.totals.model_dump(), "digest": manifest.digest}
    print_result({"latents": latents_url(recipe), **summary}, as_json)
