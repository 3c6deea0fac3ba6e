"""Read a recipe by path, URL or packaged name, apply overrides, and report errors clearly."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from diffit_train import storage
from diffit_train.config.base import Section, Variants, section_of, variants_of
from diffit_train.config.evaluate import DATASET, PUBLISHED
from diffit_train.config.plugins import nearest
from diffit_train.config.presets import PRESETS
from diffit_train.config.recipe import Recipe
from diffit_train.errors import UserError, redact

YAML_SUFFIXES = (".yaml", ".yml")


def packaged_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = files("diffit_train.config") / "recipes"
    return sorted(
        e.name.removesuffix(".yaml") for e in folder.iterdir() if e.name.endswith(".yaml")
    )


def load_recipe(reference: str, overrides: Sequence[str] = (), root: str | None = None) -> Recipe:
    """Read and check a recipe.

    Precedence, lowest first: 1. the defaults of the typed recipe; 2. the file; 3. `overrides`,
    each `key.sub=value` with a YAML value, where later ones win; 4. `root`, from --root.

    Local paths are made absolute, because workers run in other folders.

    Args:
        reference: a packaged name, or the path or URL of a YAML file.

    Raises:
        UserError: the recipe is invalid; names the key, its value and what is allowed.
    """
    tree = _parse(_read_text(reference), reference)
    if root_of_reference := _root_around(reference):
        _apply(tree, f"storage.root={json.dumps(root_of_reference)}")
    return _resolve(tree, reference, overrides, root)


def _root_around(reference: str) -> str | None:
    """The project that holds a stored recipe, ROOT/runs/RUN/recipe.yaml or ROOT/latents/NAME/…"""
    if not reference.endswith("/recipe.yaml"):
        return None
    folder = storage.parent(storage.absolute(reference))
    marker = {"runs": "run.json", "latents": "manifest.json"}.get(
        storage.parent(folder).rsplit("/", 1)[-1]
    )
    if marker is None or not storage.exists(storage.join(folder, marker)):
        return None
    return storage.parent(folder, 2)


def load_recipe_text(
    text: str, reference: str, overrides: Sequence[str] = (), root: str | None = None
) -> Recipe:
    """Like `load_recipe`, but from YAML text; errors name `reference`.

    Args:
        root: where a stored one was read from: a project may have been moved since.
    """
    return _resolve(_parse(text, reference), reference, overrides, root)


def _resolve(
    tree: dict[str, Any], reference: str, overrides: Sequence[str], root: str | None
) -> Recipe:
    for override in overrides:
        _choose_variant(tree, *_split(override))
    for override in overrides:
        _apply(tree, override)
    if root is not None:
        _apply(tree, f"storage.root={json.dumps(root)}")
    return _with_absolute_paths(validate(tree, reference))


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    root, data = storage.absolute(recipe.storage.root), recipe.data
    if fault := storage.odd_root(root):
        raise UserError(f"storage.root is {root!r}: {fault}")
    update: dict[str, Any] = {
        "storage": recipe.storage.model_copy(update={"root": root}),
        "data": data.model_copy(
            update={
                "source": _absolute(data.source),
                "labels": _absolute(data.labels) if data.labels else None,
            }
        ),
    }
    # a/b may be a Hub id, so only an explicit relative path is made absolute.
    if recipe.autoencoder.source.startswith("."):
        path = storage.absolute(recipe.autoencoder.source)
        update["autoencoder"] = recipe.autoencoder.model_copy(update={"source": path})
    evaluate, features = recipe.evaluate, recipe.evaluate.features
    changed: dict[str, Any] = {}
    if evaluate.reference != DATASET:
        changed["reference"] = _absolute(evaluate.reference)
    if features.source and features.source != PUBLISHED:
        changed["features"] = features.model_copy(update={"source": _absolute(features.source)})
    update["evaluate"] = evaluate.model_copy(update=changed)
    return recipe.model_copy(update=update)


def _absolute(path: str) -> str:
    return storage.absolute(path) if path and not path.startswith(storage.ROOT_PREFIX) else path


def validate(tree: dict[str, Any], reference: str) -> Recipe:
    """Validate a plain tree of values into a recipe; errors name `reference`."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = sorted({line for e in error.errors() for line in _explain(e).splitlines()})
        raise UserError(
            "\n".join([f"recipe {reference}:", *(f"  {line}" for line in lines)])
        ) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML with every key; `load_recipe` reads it back.

    It is stored and passed on, so it holds no credentials; see `tracking.tracking_uri`.
    """
    tree = recipe.model_dump(mode="json")
    evaluate = tree["evaluate"]
    for section, key in (
        (tree["tracking"], "uri"),
        (evaluate, "reference"),
        (evaluate["features"], "source"),
    ):
        if section[key]:
            section[key] = redact(section[key])
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def with_overrides(recipe: Recipe, overrides: Sequence[str], reference: str) -> Recipe:
    """The recipe with other values; errors name `reference`."""
    return _resolve(recipe.model_dump(mode="json"), reference, overrides, None)


def stored_text(recipe: Recipe) -> str:
    """The recipe as stored inside its project: without the project's root, which may be moved."""
    root, uri = recipe.storage.root, recipe.tracking.uri
    own = f"sqlite:///{storage.join(root, 'mlflow.db')}"
    update: dict[str, Any] = {"storage": recipe.storage.model_copy(update={"root": "."})}
    if uri == own:
        update["tracking"] = recipe.tracking.model_copy(update={"uri": None})
    return dump_recipe(recipe.model_copy(update=update))


def _read_text(reference: str) -> str:
    if reference.endswith(YAML_SUFFIXES) or "/" in reference:
        if fault := storage.missing_slash(reference):
            raise UserError(f"recipe is {reference!r}: {fault}")
        try:
            return storage.read_bytes(reference).decode()
        except (OSError, UnicodeDecodeError) as error:
            # Object stores give no reason other than that the file is missing.
            missing = "No such file" if isinstance(error, FileNotFoundError) else str(error)
            reason = (error.strerror or missing) if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(f"cannot read recipe file {reference}: {reason}") from error
    known = packaged_recipes()
    if reference not in known:
        raise UserError(
            f"no packaged recipe is named {reference!r}{nearest(reference, known)}; known: "
            f"{', '.join(known)}; for your own recipe, give its path or URL, for example "
            "my/recipe.yaml"
        )
    return (files("diffit_train.config") / "recipes" / f"{reference}.yaml").read_text()


def _parse(text: str, reference: str) -> dict[str, Any]:
    try:
        tree = _yaml(text)
    except ValueError as error:
        raise UserError(f"recipe {reference} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"recipe {reference} must be a mapping of sections, not {_shown(tree)}")
    return tree


def _yaml(text: str) -> Any:
    """The plain values of a YAML document.

    Raises:
        ValueError: it is not one.
    """
    try:
        return yaml.safe_load(text)
    # For values such as `!!bool x` or the date 2001-99-99, PyYAML raises more than its own errors.
    except (
        yaml.YAMLError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ValueError(str(error) or type(error).__name__) from error


_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 200


def _shown(value: Any) -> str:
    """A value in a message, without credentials, and shortened."""
    return redact(_SHOWN.repr(value))


def _split(override: str) -> tuple[list[str], Any]:
    """The parts of the key, and the value."""
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UserError(
            f"override {override!r} must have the form key.sub=value, for example train.lr=1e-4"
        )
    try:
        return key.split("."), _yaml(text)
    except ValueError as error:
        raise UserError(f"override {override!r}: value {text!r} is not valid YAML") from error


def _choose_variant(tree: dict[str, Any], parts: list[str], value: Any) -> None:
    """Drop from the file what a variant that an override chooses does not have."""
    if parts == ["model", "preset"] and value in PRESETS:
        for size in PRESETS[value]:
            _node(tree, ["model"]).pop(size, None)
        parts, value = ["model", "architecture"], PRESETS[value]["architecture"]
    model: type[Section] = Recipe
    for depth, part in enumerate(parts[:-1]):
        field = model.model_fields.get(part)
        if field is None:
            return
        if variants := variants_of(field):
            mark, known = variants
            node = _node(tree, parts[: depth + 1])
            was = known.get(mark.name(node.get(mark.key, mark.default), known))
            new = known.get(mark.name(value, known))
            if parts[depth + 1 :] == [mark.key] and was and new and was is not new:
                for name in {*node} - {*_common(was, new)}:
                    del node[name]
            return
        model = section_of(field) or model


def _common(one: type[Section], other: type[Section]) -> list[str]:
    """Names of the keys that two variants share, with the same type and default."""
    theirs = other.model_fields
    return [
        name
        for name, mine in one.model_fields.items()
        if name in theirs
        and (mine.annotation, mine.default) == (theirs[name].annotation, theirs[name].default)
    ]


def _node(tree: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """The section of a tree; empty if it has none."""
    node: Any = tree
    for part in parts:
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _apply(tree: dict[str, Any], override: str) -> None:
    (*sections, last), value = _split(override)
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {section!r} is {child!r}, not a section")
        node = child
    node[last] = value


@dataclass
class _Place:
    """Where an error is: its key, the section around it, and how its variant was chosen."""

    key: str = ""
    field: FieldInfo | None = None
    section: type[Section] | None = Recipe
    union: tuple[Variants, dict[str, type[Section]]] | None = None
    chosen: str = ""


def _place(error: ErrorDetails) -> _Place:
    """The place of an error; pydantic's locations also name variants and a union's members."""
    place, names = _Place(), []
    for number, part in enumerate(map(str, error["loc"]), 1):
        if place.field and (union := variants_of(place.field)):
            place.union, place.chosen, place.section = union, part, union[1].get(part)
            place.field = None
            continue
        if place.field:
            place.section, place.union = section_of(place.field), None
        unknown = error["type"] == "extra_forbidden" and number == len(error["loc"])
        if place.section or unknown or not set("-[") & set(part):
            names.append(part)
        place.field = place.section.model_fields.get(part) if place.section else None
    place.key = ".".join(names)
    return place


def _unknown_key(place: _Place, last: str) -> str:
    """A message on a key that does not exist, or not with the variant."""
    around = place.key.removesuffix(last).rstrip(".")
    name, colon, value = last.partition(":")
    if colon and value:
        return f"unknown key {place.key!r}; YAML needs a space after the colon: {name}: {value}"
    known = list(place.section.model_fields) if place.section else []
    if place.union:
        mark, variants = place.union
        if owners := [value for value, model in variants.items() if last in model.model_fields]:
            return (
                f"{place.key} is a key of {around}.{mark.key}={' or '.join(owners)}, but "
                f"{around}.{mark.key} is {place.chosen!r}"
            )
    if not around:
        inside = {part: section_of(field) for part, field in Recipe.model_fields.items()}
        whole = [f"{part}.{last}" for part, s in inside.items() if s and last in s.model_fields]
        if whole:
            return f"unknown key {last!r} (did you mean {' or '.join(map(repr, whole))}?)"
    allowed = f"; allowed here: {', '.join(known)}" if known else ""
    return f"unknown key {place.key!r}{nearest(last, known) or allowed}"


def _explain(error: ErrorDetails) -> str:
    place = _place(error)
    key = place.key
    if error["type"] == "extra_forbidden":
        return _unknown_key(place, str(error["loc"][-1]))
    if error["type"] == "union_tag_invalid":
        union, tag = place.field and variants_of(place.field), error["ctx"]["tag"]
        assert union
        mark, known = union
        return (
            f"{key}.{mark.key} is {tag!r}, but must be one of {', '.join(known)}"
            f"{nearest(tag, known)}"
        )
    if error["type"] == "union_tag_not_found":
        return f"{key} is {_shown(error['input'])}, but must be a section"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not key:
        return message
    if isinstance(error["input"], dict):
        return message if key in message else f"{key}: {message}"
    return f"{key} is {_shown(error['input'])}: {message[0].lower()}{message[1:]}"
