"""The paper's ablations, of `ablations.yaml`."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from diffit_train.config.load import load_recipe, with_overrides
from diffit_train.config.recipe import Recipe
from diffit_train.errors import UserError

SCALES = ("tiny", "small", "full")
Changes = dict[str, Any]


class Row(BaseModel):
    """A row of a table: what it changes, at all scales or by scale; without, the recipe as it is.

    Attributes:
        fid: the paper's; None where it gives none.
    """

    model_config = ConfigDict(extra="forbid")

    title: str
    fid: float | None = None
    set: Changes = {}


class Ablation(BaseModel):
    """A table or figure of the paper.

    Attributes:
        recipe: at full scale.
        trains: whether rows differ in training; else one run is evaluated in several ways.
        best_first: names of the rows from the lowest FID, where the paper gives no numbers.
        set: changes of every row, by scale.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    title: str
    recipe: str = "cifar10"
    rows: dict[str, Row]
    trains: bool = True
    best_first: list[str] = []
    set: dict[str, Changes] = {}

    def order(self) -> list[str]:
        """Names of the rows from the paper's lowest FID."""
        known = {name: row.fid for name, row in self.rows.items() if row.fid is not None}
        return self.best_first or sorted(known, key=lambda name: known[name])

    def recipe_of(
        self,
        row: str,
        scale: str,
        seed: int,
        overrides: Sequence[str] = (),
        root: str | None = None,
    ) -> Recipe:
        """The recipe of a row.

        Args:
            overrides: applied before the row's own, to every row alike.
        """
        scaled, own = _file()["scales"][self.recipe][scale], self.rows[row].set
        common = [*_words(scaled.get("set", {})), f"train.seed={seed}", *overrides]
        rest = {**self.set.get(scale, {}), **own.get(scale, {} if own.keys() & {*SCALES} else own)}
        recipe = load_recipe(scaled["recipe"], common, root)
        return with_overrides(recipe, _words(rest), f"of row {row}")

    def run_of(self, row: str, scale: str, seed: int) -> str:
        """Name of a row's run; the unchanged recipe has one run for all tables."""
        if not self.rows[row].set:
            return f"{self.recipe}-{scale}-seed{seed}"
        return f"{self.name}-{scale}-{row if self.trains else 'run'}-seed{seed}"


def _words(changes: Changes) -> list[str]:
    """Changes as KEY=VALUE."""
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


@functools.cache
def _file() -> dict[str, Any]:
    text = (files("diffit_train.config") / "ablations.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def ablation_names() -> list[str]:
    """Names of the tables and figures."""
    return list(_file()["tables"])


def find_ablation(name: str) -> Ablation:
    """An ablation by name.

    Raises:
        UserError: there is none.
    """
    if name not in ablation_names():
        raise UserError(f"ablation {name!r} does not exist; known: {', '.join(ablation_names())}")
    return Ablation(name=name, **_file()["tables"][name])
