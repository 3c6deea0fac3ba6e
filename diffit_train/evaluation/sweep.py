"""Sweeps: evaluate a run with every combination of some keys' values and checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from diffit_train import storage
from diffit_train.config import (
    Recipe,
    load_recipe_text,
    stored_text,
    with_overrides,
)
from diffit_train.config.base import require_name
from diffit_train.config.evaluate import FREE_KEYS
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.result import Evaluation, Result
from diffit_train.runs.run import Run
from diffit_train.tracking import CREDENTIALS, require_forwarded

DEFINITION = "sweep.json"
# More evaluations than this in one sweep are assumed to be a mistake.
MOST_MEMBERS = 10_000
_SECTION = "evaluate."
# Keys that a sweep cannot vary: its metrics would not be comparable.
_FIXED = ("evaluate.features.", "evaluate.reference")


class Member(storage.Record):
    """One evaluation of a sweep: a checkpoint, and values of the varied keys."""

    step: int
    changes: dict[str, Any]

    def recipe(self, recipe: Recipe) -> Recipe:
        """The sweep's recipe with this member's values."""
        overrides = [f"{key}={yaml.safe_dump(value)}" for key, value in self.changes.items()]
        return with_overrides(recipe, overrides, "the sweep's recipe")


class Sweep(storage.Record):
    """sweep.json: the definition of a sweep."""

    schema_version: Literal[1] = 1
    name: str
    run: str
    recipe: str
    identity: dict[str, Any]
    members: list[Member]

    def loaded(self, root: str) -> Recipe:
        """The recipe of the sweep, of the project at `root`."""
        return load_recipe_text(self.recipe, f"the recipe of sweep {self.name!r}", root=root)

    def url(self, root: str) -> str:
        """Folder of the sweep."""
        return sweep_url(root, self.run, self.name)


def sweep_url(root: str, run: str, name: str) -> str:
    """Folder of a sweep."""
    return storage.join(root, "evaluations", run, "sweeps", name)


# ---- Definition ----


def parse_values(text: str) -> tuple[str, list[Any]]:
    """Parse `guidance.scale=1.0:5.0:0.4` or `sampler.steps=50,250` into a recipe key and values.

    A range FIRST:LAST:STEP includes both ends, in exact decimal steps. Keys are those of the
    recipe's section `evaluate`; the prefix `evaluate.` is optional.

    Raises:
        UserError: the text does not have that form.
    """
    key, equals, values = text.partition("=")
    key = key.strip()
    if not equals or not key or not values.strip():
        raise UserError(
            f"--vary is {text!r}, but must be KEY=VALUES, such as guidance.scale=1.0:5.0:0.4 or "
            "sampler.steps=50,250"
        )
    if not key.startswith(_SECTION):
        key = _SECTION + key
    if key.startswith(_FIXED):
        raise UserError(
            f"--vary {text}: a sweep cannot vary {key}: metrics would not be comparable"
        )
    if key.removeprefix(_SECTION) in FREE_KEYS:
        raise UserError(f"--vary {text}: {key} changes no metric; set it as KEY=VALUE instead")
    found: list[Any] = []
    for part in _split_values(values):
        found += _range(part, text) if part.count(":") == 2 else [_plain(part, text)]
    if len({repr(value) for value in found}) < len(found):
        raise UserError(f"--vary {text} has duplicate values; list each value once")
    return key, found


def _split_values(values: str) -> list[str]:
    parts = [part.strip() for part in values.split(",")]
    return [part for part in parts if part]


def _plain(part: str, text: str) -> Any:
    try:
        return yaml.safe_load(part)
    except yaml.YAMLError as error:
        raise UserError(f"--vary {text}: {part!r} is not a valid YAML value") from error


def _range(part: str, text: str) -> list[int | float]:
    try:
        first, last, step = (Decimal(word.strip()) for word in part.split(":"))
    except InvalidOperation as error:
        raise UserError(
            f"--vary {text}: {part!r} must be numbers FIRST:LAST:STEP, such as 1.0:5.0:0.4"
        ) from error
    if not all(number.is_finite() for number in (first, last, step)) or step <= 0 or last < first:
        raise UserError(
            f"--vary {text}: {part!r} must ascend from FIRST to LAST by a positive STEP"
        )
    count = int((last - first) / step) + 1
    if count > MOST_MEMBERS:
        raise UserError(
            f"--vary {text}: {part!r} has {count:,} values; the maximum is {MOST_MEMBERS:,}"
        )
    whole = all(number == number.to_integral_value() for number in (first, step))
    numbers = [first + step * i for i in range(count)]
    return [int(number) if whole else float(number) for number in numbers]


def plan_sweep(run: Run, steps: Sequence[int], texts: Sequence[str], name: str | None) -> Sweep:
    """The sweep over all combinations, each of them validated.

    Args:
        name: name of the sweep; None to derive it from its keys.

    Raises:
        UserError: an invalid key, value or name, or too many combinations.
    """
    recipe, axes = run.recipe, [parse_values(text) for text in texts]
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--vary has {key} twice; give all its values in one --vary")
    name = name or "-by-".join(key.removeprefix(_SECTION) for key in keys)
    require_name("--name", name)
    combinations = list(itertools.product(*(values for _, values in axes)))
    count = len(combinations) * len(steps)
    if count > MOST_MEMBERS:
        raise UserError(
            f"the sweep has {count:,} evaluations, but the maximum is {MOST_MEMBERS:,}; use fewer "
            "values"
        )
    changes = [dict(zip(keys, values, strict=True)) for values in combinations]
    members = [Member(step=step, changes=change) for step in steps for change in changes]
    for change in changes:
        Member(step=0, changes=change).recipe(recipe)
    require_forwarded(recipe, "a sweep", [CREDENTIALS])
    return Sweep(
        name=name,
        run=run.name,
        recipe=stored_text(recipe),
        identity=recipe.evaluate_identity(),
        members=members,
    )


def open_sweep(sweep: Sweep, root: str) -> None:
    """Write the sweep's definition, or check that the existing one is the same.

    Raises:
        UserError: a different sweep has that name.
    """
    url = sweep.url(root)
    definition = storage.join(url, DEFINITION)
    if storage.exists(definition):
        existing = read_sweep(url)
        if (existing.members, existing.identity) != (sweep.members, sweep.identity):
            raise UserError(
                f"there is another sweep {sweep.name!r} in {storage.display_path(url)}, with "
                f"{len(existing.members)} evaluations; choose another name with --name"
            )
    storage.write_text(definition, sweep.model_dump_json(indent=1))


def read_sweep(url: str) -> Sweep:
    """Read a sweep's definition from its folder.

    Raises:
        UserError: there is none.
        DiffitError: its definition is damaged.
    """
    try:
        return Sweep.model_validate_json(storage.read_bytes(storage.join(url, DEFINITION)))
    except FileNotFoundError as error:
        raise UserError(f"there is no sweep in {storage.display_path(url)}") from error
    except ValidationError as error:
        raise DiffitError(
            f"{url}/{DEFINITION} is damaged; delete it and start the sweep again"
        ) from error


# ---- Results ----


def results(sweep: Sweep, root: str) -> list[Result | None]:
    """The result of each member; None if it is not done."""
    run = Run(root, sweep.run, sweep.loaded(root))
    return [Evaluation(run.using(m.recipe(run.recipe)), m.step).read() for m in sweep.members]


def rows(sweep: Sweep, found: Sequence[Result | None]) -> list[dict[str, Any]]:
    """One row per finished member: step, varied keys, NFE, metrics, evaluation key."""
    return [
        {
            "step": member.step,
            **{key.removeprefix(_SECTION): value for key, value in member.changes.items()},
            "nfe": result.nfe,
            **result.metrics,
            "evaluation": result.key,
        }
        for member, result in zip(sweep.members, found, strict=True)
        if result is not None
    ]
