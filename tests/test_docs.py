"""The documents say what is there: generated pages are fresh, and every command line exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import typer

from diffit_train.cli.main import app
from diffit_train.config import Recipe, load_recipe, packaged_recipes
from diffit_train.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
MORE_PAGES = [REPOSITORY / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
README_BYTES = 10_000
BANNED = r"pictures?|mend(s|ed|ing)?|anew|neighbours?|colours?|behaviours?|initialis\w*|optimis\w*"


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


GENERATOR = _generator()
KEYS = GENERATOR.all_names()
COMMANDS: dict[str, Any] = dict(GENERATOR.leaf_commands())


@pytest.mark.parametrize("path", GENERATOR.pages(), ids=lambda path: path.name)
def test_generated_pages_are_fresh(path: Path) -> None:
    fresh = path.exists() and path.read_text(encoding="utf-8") == GENERATOR.pages()[path]
    assert fresh, f"{path.name} is not what the code says; run `make docs` and commit the result"


def test_generated_pages_do_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = GENERATOR.pages()
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("NO_COLOR", "1")
    assert GENERATOR.pages() == wide


def test_readme_is_short() -> None:
    assert (REPOSITORY / "README.md").stat().st_size <= README_BYTES


# ---- Command lines ----


class Line(NamedTuple):
    """A command line, and the page that it is on."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def _lines(path: Path) -> Iterator[Line]:
    """Every `diffit …` and `python -m …` in code blocks and inline code."""
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        joined = re.sub(r"\\\n\s*", " ", block)
        yield from _commands(path, joined.splitlines())
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)
    yield from _commands(path, [" ".join(span.split()) for span in spans])


def _commands(path: Path, lines: list[str]) -> Iterator[Line]:
    for line in lines:
        found = re.match(r"\s*(?:\$ )?(?:\S*/bin/)?((?:diffit|python -m)(?: .*)?)$", line)
        if found:
            yield Line(path.name, found[1].removesuffix("&").strip())


LINES = sorted({line for path in PAGES for line in _lines(path)})


def _words(text: str) -> list[str]:
    """Words of a command line, without the signs of a form: `[OPTIONS]`, `A|B`, `…`."""
    without = re.sub(r"\[(KEY=VALUE|OPTIONS|RUN[^]]*)\](\.\.\.)?", "", text)
    words = shlex.split(re.sub(r"[\[\]…]|\.\.\.(?= |$)", " ", without), comments=True)
    return [word for word in words if word]


def _alternatives(words: list[str]) -> list[list[str]]:
    """`runs show|remove` as two; an option's value keeps its bars."""
    for i, word in enumerate(words[:4]):
        if re.fullmatch(r"[a-z]+(\|[a-z]+)+", word):
            return [
                whole
                for choice in word.split("|")
                for whole in _alternatives([*words[:i], choice, *words[i + 1 :]])
            ]
    return [words]


def _check_diffit(words: list[str]) -> None:
    group, given = typer.main.get_command(app), list(words)
    if not given or given[0].startswith("-"):
        assert set(given) <= {"--help", "--version", "--install-completion"}, (
            f"options of diffit itself: {given}"
        )
        return
    name = ""
    while hasattr(group, "commands"):
        if not given and name:  # a group by itself, as `diffit runs`
            return
        name = f"{name} {given[0]}".strip()
        assert given[0] in group.commands, f"there is no command `diffit {name}`"
        group = group.commands[given.pop(0)]
    positional = _check_options(name, group, given)
    _check_arguments(group, positional)


def _check_options(name: str, command: Any, given: list[str]) -> list[str]:
    """Every option exists, sweeps name keys; the words that are no options."""
    options = {
        word: p
        for p in command.params
        if p.param_type_name == "option"
        for word in (*p.opts, *p.secondary_opts)
    }
    positional, words = [], iter(given)
    for word in words:
        if not word.startswith("-") or word in ("--", "-"):
            positional.append(word)
            continue
        option, _, value = word.partition("=")
        if option == "--help":
            continue
        assert option in options, f"`diffit {name}` has no option {option}"
        if not options[option].is_flag:
            value = value or next(words, "")
            if option == "--vary" and "." in value.partition("=")[0]:
                key = value.partition("=")[0].removeprefix("evaluate.")
                assert _is_key(f"evaluate.{key}"), f"no recipe key evaluate.{key}"
    return positional


def _check_arguments(command: Any, positional: list[str]) -> None:
    """Packaged recipes exist, every override is a key, and the recipe takes the values."""
    overrides = [w for w in positional if re.match(r"[a-z]\w*(\.[\w*-]+)+=", w)]
    for word in overrides:
        key = word.partition("=")[0]
        assert _is_key(key), f"no recipe key {key}"
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    metavars = [p.metavar for p in arguments]
    if "RECIPE" not in metavars or metavars.index("RECIPE") >= len(positional):
        return
    recipe = positional[metavars.index("RECIPE")]
    if not re.fullmatch(r"[a-z0-9]+", recipe):  # RECIPE, a path or a URL
        return
    assert recipe in packaged_recipes(), f"no packaged recipe {recipe}"
    if not any(w.partition("=")[2].isupper() for w in overrides):  # KEY=N shows a form
        load_recipe(recipe, overrides)


def _is_key(key: str) -> bool:
    return any(fnmatchcase(key, known) and key.count(".") == known.count(".") for known in KEYS)


def _check_python(words: list[str]) -> None:
    module, given = words[0], words[1:]
    source = REPOSITORY / (module.replace(".", "/") + ".py")
    if not source.exists():
        assert importlib.util.find_spec(module) is not None, f"there is no module {module}"
        return
    text = source.read_text(encoding="utf-8")
    for word in given:
        if word.startswith("--"):
            option = word.partition("=")[0]
            declared = re.search(rf"add_argument\(\s*\"{option}\"", text)
            assert declared, f"{module} has no option {option}"
    first = given[0] if given and not given[0].startswith("-") else None
    if first and first.islower():
        assert f'"{first}"' in text, f"{module} has no {first!r}"


def _check(text: str) -> None:
    for words in _alternatives(_words(text)):
        if words[0] == "diffit":
            _check_diffit(words[1:])
        else:
            _check_python(words[2:])


@pytest.mark.parametrize("line", LINES, ids=str)
def test_command_lines_exist(line: Line) -> None:
    _check(line.text)


def test_command_lines_are_found() -> None:
    """Of every form in which a document may have them."""
    text = {line.text for line in LINES}
    assert len(text) > 60
    assert "python -m tests.conformance FOLDER" in text  # a code block
    assert "python -m tests.benchmarks.block" in text
    assert "diffit verify" in text  # inline
    assert any("--fleet --max-concurrent 8" in line for line in text)  # continued by a backslash


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("diffit trian demo", "no command"),
        ("diffit train demo --rot x", "no option --rot"),
        ("diffit train demo train.learning_rate=1", "no recipe key"),
        ("diffit train dmo", "no packaged recipe"),
        ("diffit sweep demo --vary guidance.sale=1,2", "no recipe key"),
        ("diffit runs show|stop NAME", "no command"),
        ("python -m tests.benchmarks.block --batches 2", "no option --batches"),
        ("python -m tests.benchmarks.blocks", "no module"),
        ("diffit train demo train.steps=-1", "train.steps is -1"),
    ],
)
def test_wrong_command_lines_are_noticed(text: str, fault: str) -> None:
    with pytest.raises((AssertionError, UserError), match=fault):
        _check(text)


# ---- Keys and files named in passing ----


def _inline(path: Path) -> Iterator[str]:
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    yield from re.findall(r"(?<!`)`([^`]+)`(?!`)", text)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_recipe_keys_exist(path: Path) -> None:
    sections = "|".join(Recipe.model_fields)
    for span in _inline(path):
        found = re.match(rf"((?:{sections})(?:\.\w+)+)(?=$|[=:])", span)
        if found and not found[1].endswith((".py", ".yaml")):
            key = found[1].replace(".NAME", ".name")
            assert _is_key(key), f"{path.name}: there is no recipe key {found[1]}"


@pytest.mark.parametrize("name", ["architecture.md", "../CONTRIBUTING.md"])
def test_files_exist(name: str) -> None:
    for span in _inline(DOCS / name):
        if re.fullmatch(r"[\w/]+\.py", span):
            there = [(base / span).exists() for base in (REPOSITORY, REPOSITORY / "diffit_train")]
            known = any(there) or any((REPOSITORY / "diffit_train").glob(f"*/{span}"))
            assert known, f"{name} names {span}, which is not there"


# ---- Links and words ----


def _anchors(path: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    heads = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", [*PAGES, *MORE_PAGES], ids=lambda path: path.name)
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    targets = re.findall(r"\]\(\s*([^)\s]+)\s*\)", text)
    targets += re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name} links to {target}, which is not there"
        if anchor and there.suffix == ".md":
            assert anchor in _anchors(there), f"{path.name} links to {target}: no such heading"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_documents_use_the_words_of_the_field(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    # Behind a slash is a folder: `diffit upgrade` names those of earlier versions.
    found = [
        f"{path.name}:{number}: {match[0]}"
        for number, line in enumerate(lines, 1)
        for match in re.finditer(rf"(?i)(?<!/)\b({BANNED})\b", line)
    ]
    assert not found, found


def test_every_command_is_in_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    missing = [name for name in COMMANDS if f"`diffit {name}`" not in readme]
    assert not missing, f"README.md does not name {missing}"
