"""Write docs/recipes.md and docs/commands.md from the typed recipe and the command line.

    make docs

Both come from the objects that the program itself uses, never from printed help, so they depend on
neither the width of a terminal nor the order of a dictionary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from diffit_train.cli.main import app
from diffit_train.config import Recipe, keys, packaged_recipes
from diffit_train.config.base import CUSTOM, Section, variants_of
from diffit_train.config.plugins import Plugged
from diffit_train.config.presets import PRESETS

DOCS = Path(__file__).resolve().parent
GENERATED = "<!-- Written by docs/generate.py. Run `make docs` instead of editing this page. -->"

RECIPES_HEAD = """
# Recipe keys

A single YAML recipe fully specifies a run. Every command takes a RECIPE, which is the name of a
packaged recipe or the path or URL of a YAML file, followed by any keys to change:

```
diffit train demo --root my-project --run wide model.hidden_size=192 train.lr=2e-3
```

Precedence, lowest first: the defaults below, the file, the `KEY=VALUE` arguments from left to
right, `--root`. Values are YAML. Unknown keys, impossible values and sizes that do not divide are
refused before anything starts, with a message that names the key, its value and what is allowed. In
a path, `root:` stands for the project's root.

`autoencoder`, `model`, `diffusion`, `evaluate.sampler`, `evaluate.guidance` and `evaluate.features`
come in variants, which one key chooses: `model.architecture`, `evaluate.sampler.name` and so on.
Keys that only some variants have begin with their names below; other variants refuse them. A
`KEY=VALUE` that chooses another variant keeps the keys that both have with the same default, and
takes its defaults for the others.

The resolved recipe is stored with every output. [What belongs to the hash of an
output](storage.md#recipe-hashes) and what may change between attempts is described under storage.
"""

COMMANDS_HEAD = """
# Commands

Every command shows its progress on standard error and continues where an earlier call stopped.
Exit status: 0 done, 1 failed, 2 bad input (one message, nothing written), 130 interrupted. A
training run that SIGTERM told to stop exits with 143. Ctrl-C lets a training save first; a second
one quits at once.

`sample`, `evaluate`, `sweep` and `export` take what they need from the run: its recipe is
stored with it. RECIPE and `KEY=VALUE` only say what is to differ, and only keys that belong to the
command can: `evaluate.*`, `scaling.*`, `tracking.*`, and, where images are generated,
`model.attention` and a copy of the autoencoder; for `export --format diffusers`, how it samples.
Without `--run`, RECIPE's name, or the only run of the project, is meant.

RECIPE is the name of a packaged recipe, or the path or URL of a YAML file; `KEY=VALUE` arguments
change its keys, which are listed in [recipes.md](recipes.md).
"""


# ---- Recipe keys ----


def recipes_page() -> str:
    """The page of recipe keys."""
    parts = [GENERATED, RECIPES_HEAD.strip(), _packaged_table(), _preset_table()]
    for prefix, text, members in sections():
        title = prefix.replace("*", "NAME") or "Top level"
        heading = f"## `{title}`" if prefix else f"## {title}"
        parts.append(f"{heading}\n\n{_paragraphs(text)}")
        parts.append(
            _table(("key", "type", "default", "meaning"), [_recipe_row(key) for key in members])
        )
    return "\n\n".join(parts) + "\n"


def _packaged_table() -> str:
    rows = []
    for name in packaged_recipes():
        head = keys.recipe_title(keys.recipe_text(name))
        link = f"[`{name}`](../diffit_train/config/recipes/{name}.yaml)"
        rows.append((link, head))
    return "## Packaged recipes\n\n" + _table(("recipe", "what it is"), rows)


def _preset_table() -> str:
    keys = list(dict.fromkeys(key for preset in PRESETS.values() for key in preset))
    rows = [(f"`{name}`", *(str(p.get(key, "")) for key in keys)) for name, p in PRESETS.items()]
    text = "## Model presets\n\n`model.preset` stands for these keys of `model`; others given "
    return text + "next to it change them.\n\n" + _table(("preset", *keys), rows)


@dataclass(frozen=True)
class Key:
    """A key, or a section, of the recipe.

    Attributes:
        name: dotted; `*` stands for a custom name.
        schema: its JSON schema.
        variants: those of its section that have it; empty if all do.
    """

    name: str
    field: FieldInfo
    schema: dict[str, Any]
    variants: tuple[str, ...] = ()

    @property
    def is_section(self) -> bool:
        """Whether it is a section."""
        return "$ref" in self.schema or "oneOf" in self.schema


def sections() -> Iterator[tuple[str, str, list[Key]]]:
    """Every section of the recipe: dotted name, meaning and keys."""
    return _sections("", Recipe)


def all_names() -> list[str]:
    """Dotted names of every key and section; `*` stands for a custom name."""
    names = [key.name for _, _, members in sections() for key in members]
    return [*dict.fromkeys(names), *(name for name, _, _ in sections() if name.endswith(".*"))]


def _sections(name: str, *variants: type[Section], text: str = "", union: Any = None) -> Any:
    """A section and those in it, as `sections`."""
    members: dict[str, Key] = {}
    for model in variants:
        values = union[0].values(model) if union else ()
        values = tuple("custom class" if value == CUSTOM else value for value in values)
        properties = model.model_json_schema()["properties"]
        for n, field in model.model_fields.items():
            dotted, schema = f"{name}.{n}".lstrip("."), properties[n]
            same = n if union and n == union[0].key else f"{n} {schema}"
            more = members[same].variants if same in members else ()
            members[same] = Key(dotted, field, schema, (*more, *values))
    if union:
        mark, known = union
        tags = _plugged(known[CUSTOM].model_fields[mark.key]) if CUSTOM in known else {}
        tags = tags or {"enum": list(known)}
        chosen = {**tags, "default": mark.default, "description": keys.tag_meaning(mark, known)}
        members[mark.key] = replace(members[mark.key], schema=chosen, variants=())
        all_variants = len(known)
        members = {
            same: replace(key, variants=()) if len(key.variants) == all_variants else key
            for same, key in members.items()
        }
    yield name, text or variants[0].__doc__ or "", list(members.values())
    for key in members.values():
        if inner := variants_of(key.field):
            models = dict.fromkeys(inner[1].values())
            yield from _sections(key.name, *models, text=key.field.description or "", union=inner)
        for model in _models(key.field.annotation) if not inner else ():
            by_name = ".*" if get_origin(key.field.annotation) is dict else ""
            yield from _sections(key.name + by_name, model)


def _models(annotation: Any) -> list[type[Section]]:
    """The sections inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _plugged(field: FieldInfo) -> dict[str, Any]:
    """The schema of a key that may name a custom class; empty if it may not."""
    for item in field.metadata:
        if isinstance(item, Plugged):
            return {"enum": [*item.own, CUSTOM], "group": item.group}
    return {}


def _recipe_row(key: Key) -> tuple[str, str, str, str]:
    name, schema = key.name.replace("*", "NAME"), {**key.schema, **_plugged(key.field)}
    default = "see below" if key.is_section else "**required**"
    if not key.is_section and "default" in schema:
        default = f"`{_plain(schema['default'])}`"
    only = f"{', '.join(key.variants)}: " if key.variants else ""
    meaning = schema.get("description") or _models(key.field.annotation)[0].__doc__ or ""
    return f"`{name}`", _type(schema), default, _sentence(only + meaning.split("\n\n")[0])


_BOUNDS = {
    "exclusiveMinimum": "> {}",
    "minimum": "≥ {}",
    "exclusiveMaximum": "< {}",
    "maximum": "≤ {}",
    "multipleOf": "multiple of {}",
    "maxLength": "of at most {} characters",
    "pattern": "as `{}`",
}


def _type(schema: dict[str, Any]) -> str:
    """The type of a key with its bounds, from its JSON schema."""
    if "$ref" in schema or "oneOf" in schema:
        return "section"
    if "anyOf" in schema:
        return r" \| ".join(_type(part) for part in schema["anyOf"])
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        group = [f"entry point in `{schema['group']}`"] if "group" in schema else []
        return r" \| ".join([*(f"`{_plain(value)}`" for value in values), *group])
    if schema.get("type") == "array":
        items = schema.get("prefixItems", [])
        many = len(items) if items else "list"
        return f"{many} of {_type(items[0] if items else schema['items'])}"
    if schema.get("type") == "object":
        values = [*schema.get("patternProperties", {}).values()]
        return f"{_type(values[0]) if values else 'value'} by name"
    names = {"string": "text", "boolean": "true or false", "null": "`null`"}
    given = {k: schema[k] for k in _BOUNDS if k in schema}
    bounds = [_BOUNDS[k].format(v if isinstance(v, str) else f"{v:g}") for k, v in given.items()]
    if schema.get("minLength") == 1:
        bounds.append("not empty")
    return " ".join([names.get(schema["type"], schema["type"]), ", ".join(bounds)]).strip()


def _plain(value: Any) -> str:
    """A value as a recipe would have it."""
    if isinstance(value, float):
        return f"{value:g}" if value != int(value) or abs(value) >= 1e6 else f"{value:.1f}"
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_plain(v)}' for k, v in value.items() if v is not None)}}}"
    return value if isinstance(value, str) and value else json.dumps(value)


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
