"""Many evaluations of a run at once: every combination of some keys' values and of checkpoints."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from diffit_train import storage
from diffit_train.config import Recipe, dump_recipe, load_recipe_text, load_stored_recipe
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.result import Result, finished_result

DEFINITION = "sweep.json"
CANCELLED = "cancelled"
# More evaluations than this in one sweep are taken for a slip of the pen.
MOST_MEMBERS = 10_000
_SECTION = "evaluate."
_SWEEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What a sweep may not vary: the metrics of its members would not be comparable.
_FIXED = ("evaluate.features.", "evaluate.reference", "evaluate.num_neighbors")


class Member(storage.Record):
    """One evaluation of a sweep: a checkpoint, and the values of the keys that vary."""

    step: int
    changes: dict[str, Any]

    def recipe(self, recipe: Recipe) -> Recipe:
        """The sweep's recipe with this member's values."""
        overrides = [f"{key}={yaml.safe_dump(value)}" for key, value in self.changes.items()]
        return load_recipe_text(dump_recipe(recipe), "the sweep's recipe", overrides)


class Sweep(storage.Record):
    """sweep.json: what a name stands for."""

    schema_version: Literal[1] = 1
    name: str
    run: str
    recipe: str
    identity: dict[str, Any]
    members: list[Member]

    def loaded(self) -> Recipe:
        """Its recipe."""
        return load_stored_recipe(self.recipe, f"the recipe of sweep {self.name!r}")

    def url(self) -> str:
        """Its folder."""
        return sweep_url(self.loaded().storage.root, self.run, self.name)


def sweep_url(root: str, run: str, name: str) -> str:
    """Folder of a sweep."""
    return storage.join(root, "evaluations", run, "sweeps", name)


# ---- What is to be done ----


def parse_values(text: str) -> tuple[str, list[Any]]:
    """`guidance.scale=1.0:5.0:0.4` or `sampler.steps=50,250` to a key of the recipe and its values.

    A range holds both its ends, and its steps are those of decimal numbers. Keys are those of the
    recipe's section `evaluate`, whose name may be left out.

    Raises:
        UserError: not of that form.
    """
    key, equals, values = text.partition("=")
    key = key.strip()
    if not equals or not key or not values.strip():
        raise UserError(
            f"--sweep is {text!r}, but must be KEY=VALUES, as guidance.scale=1.0:5.0:0.4 or "
            "sampler.steps=50,250"
        )
    if not key.startswith(_SECTION):
        key = _SECTION + key
    if key.startswith(_FIXED):
        raise UserError(f"--sweep {text}: a sweep cannot vary {key}, by which metrics are made")
    found: list[Any] = []
    for part in _split_values(values):
        found += _range(part, text) if part.count(":") == 2 else [_plain(part, text)]
    if len({repr(value) for value in found}) < len(found):
        raise UserError(f"--sweep {text} holds a value twice")
    return key, found


def _split_values(values: str) -> list[str]:
    parts = [part.strip() for part in values.split(",")]
    return [part for part in parts if part]


def _plain(part: str, text: str) -> Any:
    try:
        return yaml.safe_load(part)
    except yaml.YAMLError as error:
        raise UserError(f"--sweep {text}: {part!r} is no value") from error


def _range(part: str, text: str) -> list[int | float]:
    try:
        first, last, step = (Decimal(word.strip()) for word in part.split(":"))
    except InvalidOperation as error:
        raise UserError(
            f"--sweep {text}: {part!r} must be FIRST:LAST:STEP in numbers, as 1.0:5.0:0.4"
        ) from error
    if not all(number.is_finite() for number in (first, last, step)) or step <= 0 or last < first:
        raise UserError(f"--sweep {text}: {part!r} must rise from FIRST to LAST by a positive STEP")
    count = int((last - first) / step) + 1
    if count > MOST_MEMBERS:
        raise UserError(f"--sweep {text}: {part!r} holds {count:,} values")
    whole = all(number == number.to_integral_value() for number in (first, step))
    numbers = [first + step * i for i in range(count)]
    return [int(number) if whole else float(number) for number in numbers]


def plan_sweep(
    recipe: Recipe, run: str, steps: Sequence[int], texts: Sequence[str], name: str | None
) -> Sweep:
    """The sweep of all combinations, every one of them checked.

    Args:
        name: of the sweep; None for one made of its keys.

    Raises:
        UserError: a bad key or value, a name that cannot be, or far too many combinations.
    """
    axes = [parse_values(text) for text in texts]
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--sweep names {key} twice; give all its values at once")
    name = name or "-by-".join(key.removeprefix(_SECTION) for key in keys)
    if not _SWEEP_NAME.fullmatch(name):
        raise UserError(
            f"--name is {name!r}, but must be letters, digits, '.', '_' and '-', as first-sweep"
        )
    combinations = list(itertools.product(*(values for _, values in axes)))
    count = len(combinations) * len(steps)
    if count > MOST_MEMBERS:
        raise UserError(f"the sweep has {count:,} evaluations; at most {MOST_MEMBERS:,} can be")
    changes = [dict(zip(keys, values, strict=True)) for values in combinations]
    members = [Member(step=step, changes=change) for step in steps for change in changes]
    for change in changes:
        Member(step=0, changes=change).recipe(recipe)
    return Sweep(
        name=name,
        run=run,
        recipe=dump_recipe(recipe),
        identity=recipe.evaluate_identity(),
        members=members,
    )


def open_sweep(sweep: Sweep) -> None:
    """Write what the sweep is, or find it there as it is.

    Raises:
        UserError: there is another sweep of that name.
    """
    url = sweep.url()
    place = storage.join(url, DEFINITION)
    if storage.exists(place):
        there = read_sweep(url)
        if (there.members, there.identity) != (sweep.members, sweep.identity):
            raise UserError(
                f"there is another sweep {sweep.name!r} in {storage.display_path(url)}, of "
                f"{len(there.members)} evaluations; give this one another name by --name"
            )
    storage.remove(storage.join(url, CANCELLED))
    storage.write_text(place, sweep.model_dump_json(indent=1) + "\n")


def read_sweep(url: str) -> Sweep:
    """A sweep by its folder.

    Raises:
        UserError: there is none.
        DiffitError: its definition is damaged.
    """
    try:
        return Sweep.model_validate_json(storage.read_bytes(storage.join(url, DEFINITION)))
    except FileNotFoundError as error:
        raise UserError(f"there is no sweep in {storage.display_path(url)}") from error
    except ValidationError as error:
        raise DiffitError(f"{url}/{DEFINITION} is damaged; delete it and sweep again") from error


def cancel_sweep(url: str) -> None:
    """Let whoever drives the sweep know that it is not wanted any more."""
    storage.write_text(storage.join(url, CANCELLED), "")


def is_cancelled(url: str) -> bool:
    """Whether it was cancelled since it was last begun."""
    return storage.exists(storage.join(url, CANCELLED))


# ---- What came of it ----


def results(sweep: Sweep) -> list[Result | None]:
    """The result of each member; None where it is to be done."""
    recipe = sweep.loaded()
    return [finished_result(m.recipe(recipe), sweep.run, m.step) for m in sweep.members]


def rows(sweep: Sweep, found: Sequence[Result | None]) -> list[dict[str, Any]]:
    """A row for each finished member: step, the keys that vary, cost, metrics, folder."""
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
