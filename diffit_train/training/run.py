"""A run's folder: who it is, whether it is finished, and its training log. No torch is needed."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from diffit_train import storage
from diffit_train.checkpoints import (
    checkpoint_digest,
    committed_steps,
    read_index,
    read_state,
    require_step,
)
from diffit_train.config import Recipe, dump_recipe, validate
from diffit_train.config.recipe import Start
from diffit_train.errors import DiffitError, UserError

# Where snapshots of averages lie under a run, in the format of checkpoints.
SNAPSHOTS = "ema-snapshots"
_PERF = (
    *("images_per_s", "step_s", "data_wait_fraction", "mfu", "memory_gib"),
    *("data_s", "forward_s", "backward_s", "optimizer_s", "checkpoint_s"),
)
# Names under which a record's fields go to MLflow.
_METRICS = {
    **{name: f"train/{name}" for name in ("loss", "grad_norm", "lr", "skipped_steps")},
    **{f"loss_q{q}": f"train/loss_q{q}" for q in range(4)},
    **{name: f"perf/{name}" for name in _PERF},
}


def as_metrics(record: dict[str, Any]) -> dict[str, float]:
    """A record of the log by the names of MLflow's metrics."""
    return {_METRICS[key]: value for key, value in record.items() if key in _METRICS}


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


def stored_recipe(url: str) -> Recipe:
    """The recipe of the run in a folder."""
    return validate(yaml.safe_load(storage.read_bytes(storage.join(url, "recipe.yaml"))), url)


def _differences(recipe: Recipe, url: str) -> str:
    """`: train.lr is 0.1, there 0.2` for the keys that make the recipes differ."""
    stored = stored_recipe(url)
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

    The file is written whole before each checkpoint, so what it holds up to a checkpoint's step
    belongs to that checkpoint, and a resumed run drops what lies behind.
    """

    def __init__(self, url: str, up_to_step: int) -> None:
        self.url = storage.join(url, "log.jsonl")
        self.records: list[dict[str, Any]] = []
        if storage.exists(self.url):
            lines = storage.read_bytes(self.url).decode().splitlines()
            self.records = [r for r in map(json.loads, lines) if r["step"] <= up_to_step]

    def append(self, record: dict[str, Any]) -> None:
        """Take in a record; it is durable after the next checkpoint."""
        self.records.append(record)

    def text(self) -> str:
        """All records as they stand now, a line each."""
        return "".join(json.dumps(r, allow_nan=False) + "\n" for r in self.records)


@dataclass(frozen=True)
class PassedOver:
    """passed-over.json: steps whose batches are not trained on, as (first, last)."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def read(cls, url: str) -> PassedOver:
        """Those of a run's folder."""
        place = storage.join(url, "passed-over.json")
        if not storage.exists(place):
            return cls()
        return cls(tuple((int(a), int(b)) for a, b in storage.read_json(place)))

    def __contains__(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self.ranges)

    def adding(self, first: int, last: int) -> PassedOver:
        """These and one more range."""
        return PassedOver((*self.ranges, (first, last)))

    def write(self, url: str) -> None:
        """Replace the file."""
        storage.write_json(storage.join(url, "passed-over.json"), self.ranges)


def append_bad_step(url: str, record: dict[str, Any]) -> None:
    """Add a line to bad-steps.jsonl."""
    place = storage.join(url, "bad-steps.jsonl")
    before = storage.read_bytes(place).decode() if storage.exists(place) else ""
    storage.write_text(place, before + json.dumps(record) + "\n")


def mark_unsent(url: str) -> None:
    """Note that MLflow lacks points of the log, as it was out of reach when training ended."""
    storage.write_text(storage.join(url, "metrics-unsent"), "")


def send_unsent(recipe: Recipe, run: str, say: Callable[[str], None]) -> None:
    """Send the points that MLflow lacks, if there are any."""
    url = run_url(recipe, run)
    mark = storage.join(url, "metrics-unsent")
    if not storage.exists(mark):
        return
    from diffit_train.tracking import MetricsOutbox

    steps = committed_steps(url)
    outbox = MetricsOutbox(recipe, read_state(url, steps[-1]).mlflow_run_id, say)
    for record in TrainingLog(url, steps[-1]).records:
        outbox.put(record["step"], as_metrics(record))
    if not outbox.close():
        storage.remove(mark)
        say("sent the metrics that MLflow lacked")


def starting_from(recipe: Recipe, run: str, source: str, weights: str) -> Recipe:
    """The recipe with `train.start` filled in.

    A run that exists keeps the checkpoint that it started from, though its source may have
    trained on since, or be gone. Where the resolution differs, the fixed positions keep the
    spread that the source has learnt.

    Args:
        run: the new run.
        source: RUN or RUN@STEP, without a step the newest checkpoint.
        weights: raw, or the name of an average.

    Raises:
        UserError: there is no such run, checkpoint or average.
    """
    name, _, step = source.partition("@")
    if step and not step.isdigit():
        raise UserError(f"--from is {source!r}, but must be RUN or RUN@STEP, as first@5000")
    if name == run:
        raise UserError(f"--from names run {run!r} itself; give the new run another name by --run")
    begun = begun_from(recipe, run)
    kept = begun.train.start
    if kept and kept.run == name and kept.weights == weights and step in ("", str(kept.step)):
        return begun
    url = run_url(recipe, name)
    if read_identity(url) is None:
        raise UserError(f"--from is {source!r}, but there is no run {name!r} in {url}")
    number = require_step(url, int(step) if step else None)
    kind = "master" if weights == "raw" else weights
    known = read_index(url, number).kinds
    if kind not in known:
        raise UserError(f"--from-weights is {weights!r}, but {source} holds {', '.join(known)}")
    digest = checkpoint_digest(url, number)
    start = Start(run=name, step=number, weights=weights, digest=digest)
    theirs = stored_recipe(url)
    spread = theirs.model.position_side or _side(theirs)
    return _started(recipe, start, spread if _side(theirs) != _side(recipe) else None)


def begun_from(recipe: Recipe, run: str) -> Recipe:
    """The recipe, with what `--from` once filled in where the run exists and had it."""
    url = run_url(recipe, run)
    if recipe.train.start is not None or read_identity(url) is None:
        return recipe
    stored = stored_recipe(url)
    if stored.train.start is None:
        return recipe
    return _started(recipe, stored.train.start, stored.model.position_side)


def _started(recipe: Recipe, start: Start, side: int | None) -> Recipe:
    """The recipe with a start, and the spread of its positions where it says none itself."""
    update = {"position_side": recipe.model.position_side or side}
    model = recipe.model.model_copy(update=update)
    train = recipe.train.model_copy(update={"start": start})
    return recipe.model_copy(update={"train": train, "model": model})


def _side(recipe: Recipe) -> int:
    return recipe.latent_size // recipe.model.patch_size
