"""A run's folder: who it is, whether it is finished, and its training log. No torch is needed."""

from __future__ import annotations

import json
import uuid
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from diffit_train import storage
from diffit_train.checkpoints import committed_steps
from diffit_train.config import Recipe, dump_recipe, validate
from diffit_train.errors import DiffitError, UserError


class RunIdentity(BaseModel):
    """run.json: `uuid` tells apart two runs that bore the same name one after the other."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uuid: str
    name: str
    recipe_hash: str


def run_url(recipe: Recipe, run: str) -> str:
    """Folder of a run."""
    return storage.join(recipe.storage.root, "runs", run)


def read_identity(url: str) -> RunIdentity | None:
    """The identity of the run in a folder; None where there is no run."""
    try:
        return RunIdentity.model_validate_json(storage.read_bytes(storage.join(url, "run.json")))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DiffitError(f"{url}/run.json is damaged: {error}; choose another --run") from error


def check_recipe(recipe: Recipe, run: str) -> RunIdentity | None:
    """The run's identity, if it exists.

    Raises:
        UserError: the name holds the checkpoints of another recipe; the differing keys are named.
    """
    url = run_url(recipe, run)
    identity = read_identity(url)
    if identity is None or identity.recipe_hash == recipe.train_hash():
        return identity
    raise UserError(
        f"run {run!r} in {recipe.storage.root} was trained by another recipe"
        f"{_differences(recipe, url)}; choose another name by --run, or give the same recipe"
    )


def _differences(recipe: Recipe, url: str) -> str:
    """`: train.lr is 0.1, there 0.2` for the keys that make the recipes differ."""
    stored = validate(yaml.safe_load(storage.read_bytes(storage.join(url, "recipe.yaml"))), url)
    mine, theirs = _leaves(recipe.train_identity()), _leaves(stored.train_identity())
    changed = [
        f"{key} is {mine.get(key)!r}, there {theirs.get(key)!r}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]
    return f" ({'; '.join(changed)})" if changed else ""


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= _leaves(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}".removeprefix("order.")] = value
    return out


def create_identity(recipe: Recipe, run: str) -> RunIdentity:
    """Write recipe.yaml, then run.json, which makes the folder a run."""
    url = run_url(recipe, run)
    identity = RunIdentity(uuid=uuid.uuid4().hex, name=run, recipe_hash=recipe.train_hash())
    storage.write_text(storage.join(url, "recipe.yaml"), dump_recipe(recipe))
    storage.write_text(storage.join(url, "run.json"), identity.model_dump_json(indent=2) + "\n")
    return identity


def finished_step(recipe: Recipe, run: str) -> int | None:
    """The newest committed step where the recipe's steps are done, else None.

    Raises:
        UserError: as `check_recipe`.
    """
    if check_recipe(recipe, run) is None:
        return None
    steps = committed_steps(run_url(recipe, run))
    return steps[-1] if steps and steps[-1] >= recipe.train.steps else None


class TrainingLog:
    """log.jsonl: a record every `log_every` steps.

    It is written whole before each checkpoint, so what it holds up to a checkpoint's step
    belongs to that checkpoint, and a resumed run drops what lies behind.
    """

    def __init__(self, url: str, up_to_step: int) -> None:
        self.url = storage.join(url, "log.jsonl")
        self.records: list[dict[str, Any]] = []
        if storage.exists(self.url):
            lines = storage.read_bytes(self.url).decode().splitlines()
            self.records = [r for r in map(json.loads, lines) if r["step"] <= up_to_step]

    def append(self, record: dict[str, Any]) -> None:
        """Take in a record; it is durable after the next `write`."""
        self.records.append(record)

    def write(self) -> None:
        """Replace the file by all records."""
        lines = (json.dumps(r, allow_nan=False) + "\n" for r in self.records)
        storage.write_text(self.url, "".join(lines))
