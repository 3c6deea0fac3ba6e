"""`diffit recipe`: show and begin recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from diffit_train import storage
from diffit_train.cli.options import (
    Json,
    Overrides,
    Root,
    checked_name,
    complete_recipe,
    print_result,
    read_recipe,
)
from diffit_train.config import packaged_recipes
from diffit_train.config.keys import commented, recipe_text, recipe_title
from diffit_train.errors import UserError
from diffit_train.progress import print_rows, say

OptionalRecipe = Annotated[
    str | None,
    typer.Argument(
        metavar="[RECIPE]",
        autocompletion=complete_recipe,
        help="Packaged recipe, or the path or URL of a YAML file.",
        show_default=False,
    ),
]


def recipe_show_command(
    name: OptionalRecipe = None,
    overrides: Overrides = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Print a recipe as it is resolved, which is a recipe again; without RECIPE, list them.

    Every key is shown with its value and what it means.

    Example: `diffit recipe show imagenet256 train.lr=1e-4 > mine.yaml`
    """
    if name is None:
        titles = {recipe: recipe_title(recipe_text(recipe)) for recipe in packaged_recipes()}
        if not as_json:
            rows = [{"recipe": recipe, "what it is": title} for recipe, title in titles.items()]
            print_rows("recipes", rows)
        print_result(titles, as_json)
        return
    recipe = read_recipe(name, overrides, root)
    if not as_json:
        typer.echo(commented(recipe), nl=False)
    print_result(recipe.model_dump(mode="json"), as_json)


def recipe_new_command(
    name: Annotated[
        str, typer.Argument(metavar="NAME", callback=checked_name, help="Name of the new recipe.")
    ],
    source: Annotated[
        str, typer.Option("--from", metavar="RECIPE", help="Packaged recipe to begin with.")
    ] = "demo",
) -> None:
    """Write NAME.yaml, a copy of a packaged recipe to be changed.

    Example: `diffit recipe new mine --from imagenet256`
    """
    if source not in packaged_recipes():
        raise UserError(
            f"--from is {source!r}, but must be one of: {', '.join(packaged_recipes())}"
        )
    path = Path(f"{name}.yaml")
    if path.exists():
        raise UserError(f"{path} exists; choose another name, or remove it")
    text = re.sub(r"\A(#.*\n)+", f"# Begun as a copy of {source}.\n", recipe_text(source))
    text = re.sub(r"^name: .*$", f"name: {name}", text, flags=re.M)
    storage.write_text(str(path.absolute()), text)
    say(f"wrote {path}; `diffit recipe show {path}` prints every key")
