"""`diffit recipe`: list, show and begin recipes, and look up their keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer

from diffit_train import storage
from diffit_train.commands.options import (
    Json,
    Overrides,
    RecipeName,
    Root,
    checked_name,
    print_result,
    read_recipe,
)
from diffit_train.config import Recipe, dump_recipe, packaged_recipes
from diffit_train.config.keys import Key, described_keys, recipe_text, recipe_title
from diffit_train.errors import UserError
from diffit_train.progress import print_rows, say


def recipe_list_command(as_json: Json = False) -> None:
    """List the recipes that ship with this package.

    Example: `diffit recipe list`
    """
    rows = [{"recipe": n, "what it is": recipe_title(recipe_text(n))} for n in packaged_recipes()]
    if as_json:
        print_result(rows, as_json)
    else:
        print_rows("recipes", rows)


def recipe_show_command(
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Print a recipe as it is resolved: every key with its value and what it means.

    Standard output is a recipe itself.

    Example: `diffit recipe show imagenet256 train.lr=1e-4 > mine.yaml`
    """
    recipe = read_recipe(name, overrides, root)
    if as_json:
        print_result(recipe.model_dump(mode="json"), as_json)
    else:
        typer.echo(commented(recipe), nl=False)


def recipe_keys_command(
    prefix: Annotated[
        str, typer.Argument(metavar="[PREFIX]", help="Only keys that begin so, e.g. train.")
    ] = "",
    as_json: Json = False,
) -> None:
    """List the keys of a recipe: type, default and meaning.

    Example: `diffit recipe keys evaluate.sampler`
    """
    found = described_keys(prefix)
    if not found:
        raise UserError(f"no key begins with {prefix!r}; `diffit recipe keys` lists all")
    if as_json:
        print_result([asdict(key) for key in found], as_json)
        return
    for key in found:
        default = "required" if key.default == "required" else f"default {key.default}"
        typer.echo(f"{key.key}: {key.type}; {default}\n    {key.meaning}")


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
    with storage.atomic_file(str(path.absolute())) as temporary:
        temporary.write_text(text)
    say(f"wrote {path}; `diffit recipe show {path}` prints every key")


def commented(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with what each key means above it."""
    keys = described_keys()
    lines = []
    for path, line in _paths(dump_recipe(recipe)):
        indent = line[: len(line) - len(line.lstrip(" "))]
        meaning = _meaning(path, keys)
        if meaning:
            lines.append(f"{indent}# {meaning}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _paths(text: str) -> Iterator[tuple[str, str]]:
    """Each line of a YAML mapping with the dotted name of the key in it; empty for no key."""
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = re.match(r"( *)([\w.-]+):( |$)", line)
        if match is None:
            yield "", line
            continue
        depth = len(match[1])
        stack = [(d, name) for d, name in stack if d < depth] + [(depth, match[2])]
        yield ".".join(name for _, name in stack), line


def _meaning(path: str, keys: list[Key]) -> str:
    found = [key.meaning for key in keys if path and fnmatchcase(path, key.key)]
    return " ".join(found[0].split()) if found else ""
