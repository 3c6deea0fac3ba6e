"""A recipe in words: what a packaged one is, and what the keys of a resolved one mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from itertools import takewhile

from diffit_train.config.base import Section, Variants, variants_of
from diffit_train.config.load import dump_recipe
from diffit_train.config.recipe import Recipe


def commented(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with what each key means above it."""
    meanings = dict(_meanings(recipe))
    lines: list[str] = []
    stack: list[tuple[int, str]] = []  # depth and name of the sections around a line
    for line in dump_recipe(recipe).splitlines():
        if match := re.match(r"( *)([\w.-]+):( |$)", line):
            depth = len(match[1])
            stack = [*((d, name) for d, name in stack if d < depth), (depth, match[2])]
            if text := meanings.get(".".join(name for _, name in stack)):
                lines.append(f"{match[1]}# {text}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _meanings(section: Section, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and meanings of the values of a section."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        inner = {key: value} if isinstance(value, Section) else {}
        if isinstance(value, dict):
            inner = {f"{key}.{n}": v for n, v in value.items() if isinstance(v, Section)}
        for part, model in inner.items():
            yield from _meanings(model, f"{part}.")
            if union := variants_of(field):
                yield f"{part}.{union[0].key}", tag_meaning(*union)
        if not isinstance(value, Section):
            yield key, described(field.description)


def recipe_text(name: str) -> str:
    """The YAML of a packaged recipe."""
    return (files("diffit_train.config") / "recipes" / f"{name}.yaml").read_text()


def recipe_title(text: str) -> str:
    """What a recipe is, from the first paragraph of the comment at its head."""
    lines = (line.strip("# ") for line in text.splitlines() if line.startswith("#"))
    return " ".join(takewhile(bool, lines)).rstrip(".")


def tag_meaning(mark: Variants, known: Mapping[str, type[Section]]) -> str:
    """What the values of the key mean that chooses a variant."""
    texts = [described(model.model_fields[mark.key].description) for model in known.values()]
    return "; ".join(dict.fromkeys(texts))


def described(text: str | None) -> str:
    """The description of a key on one line."""
    return " ".join((text or "").split())
