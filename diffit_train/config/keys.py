"""The keys of a recipe in words: name, type, default and meaning, from the typed sections."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from importlib.resources import files
from itertools import takewhile
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from diffit_train.config.load import dump_recipe
from diffit_train.config.recipe import Recipe
from diffit_train.plugins import Plugged

# How a value of a key is marked in a text.
Code = Callable[[str], str]
_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}


def commented(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with what each key means above it."""
    meanings = [
        (f"{section}.{name}".lstrip("."), " ".join(meaning(field).split()))
        for section, model in sections()
        for name, field in model.model_fields.items()
        if not is_section(field)
    ]
    lines: list[str] = []
    stack: list[tuple[int, str]] = []  # depth and name of the sections around a line
    for line in dump_recipe(recipe).splitlines():
        if match := re.match(r"( *)([\w.-]+):( |$)", line):
            depth = len(match[1])
            stack = [*((d, name) for d, name in stack if d < depth), (depth, match[2])]
            path = ".".join(name for _, name in stack)
            texts = [text for pattern, text in meanings if fnmatchcase(path, pattern) and text]
            lines += [f"{match[1]}# {text}" for text in texts[:1]]
        lines.append(line)
    return "\n".join(lines) + "\n"


def recipe_text(name: str) -> str:
    """The YAML of a packaged recipe."""
    return (files("diffit_train.config") / "recipes" / f"{name}.yaml").read_text()


def recipe_title(text: str) -> str:
    """What a recipe is, from the first paragraph of the comment at its head."""
    lines = (line.strip("# ") for line in text.splitlines() if line.startswith("#"))
    return " ".join(takewhile(bool, lines)).rstrip(".")


def sections(
    model: type[BaseModel] = Recipe, prefix: str = ""
) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of the recipe with its dotted name; `*` stands for a name of one's own."""
    yield prefix, model
    for name, field in model.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        for inner, suffix in _inner_models(field.annotation):
            yield from sections(inner, key + suffix)


def all_names() -> list[str]:
    """Dotted names of every key and section; `*` stands for a name of one's own."""
    found = []
    for prefix, model in sections():
        found += [f"{prefix}.{name}" if prefix else name for name in model.model_fields]
        if prefix.endswith(".*"):
            found.append(prefix)
    return found


def _inner_models(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """Models inside an annotation, with `.*` for those that are values of a dictionary."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, ""
        return
    suffix = ".*" if get_origin(annotation) is dict else ""
    for argument in get_args(annotation):
        for inner, deeper in _inner_models(argument):
            yield inner, suffix + deeper


# ---- One key ----


def is_section(field: FieldInfo) -> bool:
    """Whether a field is a section of its own."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def meaning(field: FieldInfo) -> str:
    """What a key, or a section, is for."""
    if is_section(field):
        return (field.annotation.__doc__ or "").strip().split("\n\n")[0]
    return field.description or ""


def default_text(field: FieldInfo) -> str:
    """The default as a recipe would have it; empty for a section, or where there is none."""
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


def type_text(field: FieldInfo, code: Code = str) -> str:
    """The type of a key with its bounds.

    Args:
        code: marks values, such as the choices of a key.
    """
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
    if plugged := [item for item in metadata if isinstance(item, Plugged)]:
        own = " | ".join(code(name) for name in plugged[0].own)
        return f"{own} | {code('MODULE:CLASS')} | entry point in {code(plugged[0].group)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
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
