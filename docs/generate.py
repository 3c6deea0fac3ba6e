"""Write docs/recipes.md and docs/commands.md from the typed recipe and the command line.

    make docs

Both come from the objects that the program itself uses, never from printed help, so they depend on
neither the width of a terminal nor the order of a dictionary.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from diffit_train.cli import app
from diffit_train.config import Recipe, packaged_recipes
from diffit_train.config.presets import PRESETS

DOCS = Path(__file__).resolve().parent
GENERATED = "<!-- Written by docs/generate.py. Run `make docs` instead of editing this page. -->"

RECIPES_HEAD = """
# Recipe keys

A recipe is one YAML file that says all of a run. Every command takes a RECIPE, which is the name of
a packaged recipe or the path or URL of a YAML file, followed by any keys to change:

```
diffit train demo --root my-project --run wide model.hidden_size=192 train.lr=2e-3
```

Precedence, lowest first: the defaults below, the file, the `KEY=VALUE` arguments from left to
right, `--root`. Values are YAML. Unknown keys, impossible values and sizes that do not divide are
refused before anything starts, with a message that names the key, its value and what is allowed. In
a path, `root:` stands for the project's root.

The resolved recipe is stored with every output. [What belongs to the hash of an
output](storage.md#recipe-hashes) and what may change between attempts is described under storage.
"""

COMMANDS_HEAD = """
# Commands

Every command shows its progress on standard error and continues where an earlier call stopped.
Exit status: 0 done, 1 failed, 2 bad input (one message, nothing written), 130 interrupted. A
training run that SIGTERM told to stop exits with 143.

RECIPE is the name of a packaged recipe, or the path or URL of a YAML file; `KEY=VALUE` arguments
change its keys, which are listed in [recipes.md](recipes.md).
"""


# ---- Recipe keys ----


def sections(
    model: type[BaseModel] = Recipe, prefix: str = ""
) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of the recipe with its dotted name; `*` stands for a name of one's own."""
    yield prefix, model
    for name, field in model.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        for inner, suffix in _inner_models(field.annotation):
            yield from sections(inner, key + suffix)


def recipe_keys() -> list[str]:
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


def recipes_page() -> str:
    """The page of recipe keys."""
    parts = [GENERATED, RECIPES_HEAD.strip(), _packaged_table(), _preset_table()]
    for prefix, model in sections():
        title = prefix.replace("*", "NAME") or "Top level"
        rows = [
            _recipe_row(prefix.replace("*", "NAME"), *item) for item in model.model_fields.items()
        ]
        heading = f"## `{title}`" if prefix else f"## {title}"
        parts.append(f"{heading}\n\n{_paragraphs(model.__doc__ or '')}")
        parts.append(_table(("key", "type", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _packaged_table() -> str:
    folder = files("diffit_train.config") / "recipes"
    rows = []
    for name in packaged_recipes():
        head = (folder / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ").rstrip(".")
        link = f"[`{name}`](../diffit_train/config/recipes/{name}.yaml)"
        rows.append((link, head))
    return "## Packaged recipes\n\n" + _table(("recipe", "what it is"), rows)


def _preset_table() -> str:
    keys = list(dict.fromkeys(key for preset in PRESETS.values() for key in preset))
    rows = [(f"`{name}`", *(str(p.get(key, "")) for key in keys)) for name, p in PRESETS.items()]
    text = "## Model presets\n\n`model.preset` stands for these keys of `model`; others given "
    return text + "next to it change them.\n\n" + _table(("preset", *keys), rows)


def _recipe_row(prefix: str, name: str, field: FieldInfo) -> tuple[str, str, str, str]:
    key = f"{prefix}.{name}" if prefix else name
    meaning = field.description or ""
    if _is_section(field):
        meaning = (field.annotation.__doc__ or "").strip().split("\n\n")[0]
    return f"`{key}`", _type(field), _default(field), _sentence(meaning)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "see below" if _is_section(field) else "**required**"
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return ""
    if isinstance(default, BaseModel):
        return "see below"
    if isinstance(default, dict):
        default = {n: _set_only(v) for n, v in default.items()}
    return f"`{_plain(default)}`"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _set_only(value: Any) -> Any:
    return value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value


def _plain(value: Any) -> str:
    """A value as a recipe would have it."""
    if isinstance(value, float):
        return f"{value:g}" if value != int(value) or abs(value) >= 1e6 else f"{value:.1f}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_plain(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
    return value if isinstance(value, str) and value else json.dumps(value)


_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}


def _type(field: FieldInfo) -> str:
    return _type_name(field.annotation, field.metadata)


def _type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *more = arguments
        return _type_name(inner, [*_constraints(more), *metadata])
    if origin is Literal:
        return " \\| ".join(f"`{_plain(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        # A constraint of a union is one of the type that is not null.
        named = [_type_name(a, () if a is type(None) else metadata) for a in arguments]
        return " \\| ".join(named)
    if origin is dict:
        return f"{_type_name(arguments[1])} by name"
    if origin in (tuple, list):
        inner = [_type_name(a) for a in arguments if a is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in arguments or len(inner) == 1 else _pair(inner)
    if annotation is type(None):
        return "`null`"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return _NAMES.get(annotation, str(annotation)) + _bounds(_constraints(metadata))


def _pair(inner: list[str]) -> str:
    return f"[{', '.join(inner)}]" if len(set(inner)) > 1 else f"{len(inner)} of {inner[0]}"


def _constraints(metadata: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for item in metadata:
        found += item.metadata if isinstance(item, FieldInfo) else [item]
    return found


def _bounds(metadata: Sequence[Any]) -> str:
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
            words.append(f"as `{pattern}`".replace("|", r"\|"))
    return " " + ", ".join(words) if words else ""


# ---- Commands ----


def leaf_commands(group: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command by its words, in the order of the help."""
    group = typer.main.get_command(app) if group is None else group
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if getattr(command, "hidden", False):
            continue
        if hasattr(command, "commands"):
            yield from leaf_commands(command, (*words, name))
        else:
            yield " ".join((*words, name)), command


def commands_page() -> str:
    """The page of commands."""
    commands = list(leaf_commands())
    summary = _table(
        ("command", "what it does"),
        [(f"[`diffit {n}`](#diffit-{n.replace(' ', '-')})", _summary(c)) for n, c in commands],
    )
    parts = [GENERATED, COMMANDS_HEAD.strip(), summary]
    parts += [_command(name, command) for name, command in commands]
    return "\n\n".join(parts) + "\n"


def _summary(command: Any) -> str:
    return _escaped(_help_paragraphs(command)[0])


def _help_paragraphs(command: Any) -> list[str]:
    text = re.sub(r"[\b\f]", "", command.help or "")
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip())]


def _command(name: str, command: Any) -> str:
    shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    options = [p for p in shown if p.param_type_name == "option"]
    parts = [f"## `diffit {name}`", "```\n" + _usage(name, arguments, options) + "\n```"]
    examples = []
    for paragraph in _help_paragraphs(command):
        if example := re.fullmatch(r"Example: `(.*)`", paragraph):
            examples.append(example[1])
        else:
            parts.append(_escaped(paragraph))
    if arguments:
        meanings = [(f"`{_metavar(p)}`", _sentence(p.help or "")) for p in arguments]
        parts.append(_table(("argument", "meaning"), meanings))
    if options:
        rows = [_option_row(p) for p in options]
        parts.append(_table(("option", "value", "default", "meaning"), rows))
    if examples:
        parts.append("```\n" + "\n".join(examples) + "\n```")
    return "\n\n".join(parts)


def _usage(name: str, arguments: Sequence[Any], options: Sequence[Any]) -> str:
    words = [f"diffit {name}"]
    for argument in arguments:
        metavar = _metavar(argument)
        optional = not argument.required and not metavar.startswith("[")
        words.append(f"[{metavar}]" if optional else metavar)
    words += [f"{o.opts[0]} {_value(o)}" for o in options if o.required]
    return " ".join([*words, "[OPTIONS]"] if options else words)


def _metavar(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def _option_row(option: Any) -> tuple[str, str, str, str]:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = f"`{_value(option)}`" if _value(option) else ""
    if option.multiple:
        value += ", repeatable"
    flag = option.is_flag
    default = (
        "" if option.default in (None, False, "", (), []) or flag else f"`{_plain(option.default)}`"
    )
    if flag and option.secondary_opts:
        default = f"`{option.opts[0] if option.default else option.secondary_opts[0]}`"
    default = "**required**" if option.required else default
    return names, value, default, _sentence(option.help or "")


def _value(option: Any) -> str:
    if option.is_flag:
        return ""
    if option.metavar:
        return str(option.metavar)
    # typer keeps the annotation in `type_descriptor`; before it did, click's type had a name.
    described = getattr(option, "type_descriptor", None)
    name = str(option.type.name if described is None else described.annotation)
    if "float" in name:
        return "NUMBER"
    return "INTEGER" if "int" in name else "TEXT"


# ---- Markdown ----


def _paragraphs(text: str) -> str:
    return "\n\n".join(_escaped(" ".join(p.split())) for p in re.split(r"\n\s*\n", text.strip()))


def _sentence(text: str) -> str:
    return _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    """Text for a Markdown table: `*` and `<` outside of code would be read as markup."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part.replace("|", r"\|") if part.startswith("`") else re.sub(r"([|*<])", r"\\\1", part)
        for part in parts
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pages() -> dict[Path, str]:
    """The text of each generated page by its path."""
    return {DOCS / "recipes.md": recipes_page(), DOCS / "commands.md": commands_page()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
