"""Write docs/recipes.md and docs/commands.md from the typed recipe and the command line.

    make docs

Both come from the objects that the program itself uses, never from printed help, so they depend on
neither the width of a terminal nor the order of a dictionary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from diffit_train.cli.main import app
from diffit_train.config import keys, packaged_recipes
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
    for prefix, text, members in keys.sections():
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


def _recipe_row(key: keys.Key) -> tuple[str, str, str, str]:
    kind = keys.type_text(key, code=lambda text: f"`{text}`").replace("|", r"\|")
    default = keys.default_text(key)
    if key.is_section:
        default = "see below"
    elif key.field.is_required() and not key.union:
        default = "**required**"
    elif default:
        default = f"`{default}`"
    only = f"{', '.join(key.variants)}: " if key.variants else ""
    name = key.name.replace("*", "NAME")
    return f"`{name}`", kind, default, _sentence(only + key.meaning)


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
        ""
        if option.default in (None, False, "", (), []) or flag
        else f"`{keys.plain(option.default)}`"
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
