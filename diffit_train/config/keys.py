"""The keys of a recipe in words: name, type, default and meaning, from the typed sections."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import takewhile
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from diffit_train.config.base import CUSTOM, Section, Variants, section_of, variants_of
from diffit_train.config.load import dump_recipe
from diffit_train.config.plugins import Plugged
from diffit_train.config.recipe import Recipe

# How a value of a key is marked in a text.
Code = Callable[[str], str]
_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}


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
            yield key, " ".join((field.description or "").split())


def recipe_text(name: str) -> str:
    """The YAML of a packaged recipe."""
    return (files("diffit_train.config") / "recipes" / f"{name}.yaml").read_text()


def recipe_title(text: str) -> str:
    """What a recipe is, from the first paragraph of the comment at its head."""
    lines = (line.strip("# ") for line in text.splitlines() if line.startswith("#"))
    return " ".join(takewhile(bool, lines)).rstrip(".")


@dataclass(frozen=True)
class Key:
    """A key, or a section, of the recipe.

    Attributes:
        name: dotted; `*` stands for a custom name.
        variants: those of its section that have it; empty if all do.
    """

    name: str
    field: FieldInfo
    meaning: str
    variants: tuple[str, ...] = ()
    union: tuple[Variants, dict[str, type[Section]]] | None = None

    @property
    def is_section(self) -> bool:
        """Whether it is a section."""
        return not self.union and bool(section_of(self.field) or variants_of(self.field))


def sections() -> Iterator[tuple[str, str, list[Key]]]:
    """Every section of the recipe: dotted name, meaning and keys."""
    yield from _section("", Recipe, Recipe.__doc__ or "")


def _section(name: str, model: type[Section], text: str) -> Iterator[tuple[str, str, list[Key]]]:
    prefix = f"{name}." if name else ""
    keys = [Key(prefix + n, field, meaning(field)) for n, field in model.model_fields.items()]
    yield name, text, keys
    yield from _inner(keys)


def _inner(keys: Sequence[Key]) -> Iterator[tuple[str, str, list[Key]]]:
    """The sections among keys."""
    for key in keys:
        if union := variants_of(key.field):
            inner = _variant_keys(f"{key.name}.", *union)
            yield key.name, key.meaning, inner
            yield from _inner(inner)
            continue
        for model, suffix in _models(key.field.annotation):
            yield from _section(key.name + suffix, model, model.__doc__ or "")


def _variant_keys(prefix: str, mark: Variants, known: dict[str, type[Section]]) -> list[Key]:
    """The keys of a union: the one that chooses, those of all, and those of some variants."""
    chosen = next(iter(known.values())).model_fields[mark.key]
    keys = {mark.key: Key(prefix + mark.key, chosen, tag_meaning(mark, known), (), (mark, known))}
    for name, model in known.items():
        for n, field in model.model_fields.items():
            if n != mark.key:
                same = f"{n} {field!r}"
                owners = keys[same].variants if same in keys else ()
                named = "custom class" if name == CUSTOM else name
                keys[same] = Key(prefix + n, field, meaning(field), (*owners, named))
    return [replace(k, variants=()) if len(k.variants) == len(known) else k for k in keys.values()]


def tag_meaning(mark: Variants, known: dict[str, type[Section]]) -> str:
    """What the values of the key mean that chooses a variant."""
    texts = [model.model_fields[mark.key].description or "" for model in known.values()]
    return "; ".join(dict.fromkeys(texts))


def all_names() -> list[str]:
    """Dotted names of every key and section; `*` stands for a custom name."""
    names = [key.name for _, _, keys in sections() for key in keys]
    return [*dict.fromkeys(names), *(name for name, _, _ in sections() if name.endswith(".*"))]


def _models(annotation: Any) -> Iterator[tuple[type[Section], str]]:
    """Sections inside an annotation, with `.*` for those that are values of a dictionary."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, ""
        return
    suffix = ".*" if get_origin(annotation) is dict else ""
    for argument in get_args(annotation):
        for inner, deeper in _models(argument):
            yield inner, suffix + deeper


# ---- One key ----


def meaning(field: FieldInfo) -> str:
    """What a key, or a section, is for."""
    if section := section_of(field):
        return (section.__doc__ or "").strip().split("\n\n")[0]
    return " ".join((field.description or "").split())


def default_text(key: Key) -> str:
    """The default as a recipe would have it; empty for a section, or where there is none."""
    if key.union:
        return key.union[0].default
    field = key.field
    if field.is_required():
        return ""
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined or isinstance(default, BaseModel):
        return ""
    if isinstance(default, dict):
        default = {name: _set_only(value) for name, value in default.items()}
    return plain(default)


def _set_only(value: Any) -> Any:
    return value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value


def plain(value: Any) -> str:
    """A value as a recipe would have it."""
    if isinstance(value, float):
        return f"{value:g}" if value != int(value) or abs(value) >= 1e6 else f"{value:.1f}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(plain(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {plain(v)}" for k, v in value.items()) + "}"
    return value if isinstance(value, str) and value else json.dumps(value)


def type_text(key: Key, code: Code = str) -> str:
    """The type of a key with its bounds.

    Args:
        code: marks values, such as the choices of a key.
    """
    field = key.field
    if key.union:
        mark, known = key.union
        if CUSTOM not in known:
            return " | ".join(map(code, known))
        field = known[CUSTOM].model_fields[mark.key]
    if key.is_section:
        return "section"
    return _type(field.annotation, field.metadata, code)


def _type(annotation: Any, metadata: Sequence[Any], code: Code) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *more = arguments
        return _type(inner, [*_constraints(more), *metadata], code)
    if origin is Literal:
        return " | ".join(code(plain(value)) for value in arguments)
    if origin in (Union, types.UnionType):
        # A constraint of a union is one of the type that is not null.
        return " | ".join(_type(a, () if a is type(None) else metadata, code) for a in arguments)
    if origin is dict:
        return f"{_type(arguments[1], (), code)} by name"
    if origin in (tuple, list):
        inner = [_type(a, (), code) for a in arguments if a is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in arguments or len(inner) == 1 else _pair(inner)
    if annotation is type(None):
        return code("null")
    if annotation is Any:
        return "value"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    if plugged := [item for item in metadata if isinstance(item, Plugged)]:
        own = " | ".join(code(name) for name in plugged[0].own)
        return f"{own} | {code('MODULE:CLASS')} | entry point in {code(plugged[0].group)}"
    return _NAMES.get(annotation, str(annotation)) + _bounds(_constraints(metadata), code)


def _pair(inner: list[str]) -> str:
    return f"[{', '.join(inner)}]" if len(set(inner)) > 1 else f"{len(inner)} of {inner[0]}"


def _constraints(metadata: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for item in metadata:
        found += item.metadata if isinstance(item, FieldInfo) else [item]
    return found


def _bounds(metadata: Sequence[Any], code: Code) -> str:
    words = []
    for item in metadata:
        for kind, symbol, value in (
            (Gt, "> ", getattr(item, "gt", None)),
            (Ge, "≥ ", getattr(item, "ge", None)),
            (Lt, "< ", getattr(item, "lt", None)),
            (Le, "≤ ", getattr(item, "le", None)),
            (MultipleOf, "multiple of ", getattr(item, "multiple_of", None)),
        ):
            if isinstance(item, kind) and value is not None:
                words.append(symbol + (str(value) if isinstance(value, int) else f"{value:g}"))
        if isinstance(item, MaxLen):
            words.append(f"of at most {item.max_length} characters")
        if isinstance(item, MinLen) and item.min_length == 1:
            words.append("not empty")
        if pattern := getattr(item, "pattern", None):
            words.append(f"as {code(pattern)}")
    return " " + ", ".join(words) if words else ""
