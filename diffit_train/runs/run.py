"""A project and its runs.

    ROOT/runs/RUN/
        recipe.yaml     what the run was trained with
        run.json        marks the folder as a run, and distinguishes it from another of its name
        log.jsonl       records of training
        checkpoints/    see `checkpoints`

A run resolves its URL, recipe, metadata, checkpoints and MLflow id once. What is read is kept
until `refresh`.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Self

from pydantic import ValidationError

from diffit_train import storage
from diffit_train.config import Recipe, load_recipe_text, stored_text
from diffit_train.config.base import flatten, require_name
from diffit_train.config.model import LatentModel
from diffit_train.config.train import Start
from diffit_train.errors import DiffitError, UserError
from diffit_train.runs import lease
from diffit_train.runs.checkpoints import NEWEST, SNAPSHOTS, Checkpoint, Checkpoints

# Marks a folder as a run.
METADATA = "run.json"


class RunMetadata(storage.Record):
    """run.json; `uuid` distinguishes two successive runs of the same name.

    `latents` is the `samples_digest` of the latents it trains on, empty before training.
    """

    uuid: str
    name: str
    recipe_hash: str
    latents: str


class Run:
    """A run of a project, with the recipe that is used for it.

    Args:
        root: of the project.
        name: of the run, which may not exist yet.
        recipe: None for the run's own.
    """

    def __init__(self, root: str, name: str, recipe: Recipe | None = None) -> None:
        self.root, self.name = root, name
        self.url = storage.join(root, "runs", name)
        self.checkpoints = Checkpoints(self.url)
        self.snapshots = Checkpoints(storage.join(self.url, SNAPSHOTS))
        if recipe is not None:
            self.recipe = recipe

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} in {storage.display_path(self.root)}>"

    # ---- What it is ----

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe in use."""
        return self.stored_recipe

    @cached_property
    def stored_recipe(self) -> Recipe:
        """The recipe that the run was trained with; its root is the run's.

        Raises:
            UserError: it is missing, damaged, or not the one that the run began with.
        """
        name = storage.join(self.url, "recipe.yaml")
        repair = "`diffit train` with the recipe of the run writes it again"
        try:
            text = storage.read_bytes(name).decode()
            recipe = load_recipe_text(text, name, root=self.root)
        except FileNotFoundError as error:
            raise UserError(f"{name} is missing; {repair}") from error
        except (UnicodeDecodeError, UserError) as error:
            raise UserError(f"{name} is damaged: {error}; delete it; {repair}") from error
        try:
            metadata = self.metadata
        except DiffitError:  # raised where the metadata is needed
            return recipe
        if metadata is not None and metadata.recipe_hash != recipe.train_hash():
            raise UserError(
                f"{name} is damaged: its hash is not that of run.json; delete it; {repair}"
            )
        return recipe

    @cached_property
    def metadata(self) -> RunMetadata | None:
        """run.json; None if the run does not exist."""
        try:
            data = storage.read_bytes(storage.join(self.url, METADATA))
            return RunMetadata.model_validate_json(data)
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise DiffitError(
                f"{self.url}/run.json is damaged: {error.errors()[0]['msg']}; delete it and train "
                "the run again with its recipe: training resumes, as another run in MLflow"
            ) from error

    def using(self, recipe: Recipe) -> Self:
        """The same run with another recipe, for example other settings of evaluation."""
        run = copy.copy(self)
        run.recipe = recipe
        return run

    def refresh(self) -> Self:
        """Read again what other commands may have changed; the recipe in use stays."""
        for name in ("stored_recipe", "metadata"):
            self.__dict__.pop(name, None)
        self.checkpoints.refresh()
        self.snapshots.refresh()
        return self

    def check(self) -> RunMetadata | None:
        """The run's metadata, or None if it does not exist.

        Raises:
            UserError: it was trained with another recipe; the message lists the differing keys.
        """
        if self.metadata is None or self.metadata.recipe_hash == self.recipe.train_hash():
            return self.metadata
        changed = differences(self.recipe.train_identity(), self.stored_recipe.train_identity())
        keys = "; ".join(
            f"{key.removeprefix('order.')} is {mine!r}, there {theirs!r}"
            for key, (mine, theirs) in changed.items()
        )
        fix = ""
        if not self.checkpoints:
            remove = f"diffit runs remove {self.name} --root {storage.display_path(self.root)}"
            fix = f", or, since it has no checkpoint, remove it: {remove}"
        raise UserError(
            f"run {self.name!r} in {self.root} was trained with another recipe"
            + (f" ({keys})" if keys else "")
            + f"; choose another --run, or use the same recipe{fix}"
        )

    def checkpoint(self, step: int | str = NEWEST) -> Checkpoint:
        """The checkpoint of a step, or the newest.

        Raises:
            UserError: the run or the checkpoint does not exist, or as `check`.
        """
        if self.check() is None:
            raise UserError(
                f"run {self.name!r} does not exist in {self.root}; train it first, or pass another "
                "--run"
            )
        return self.checkpoints[step]

    @property
    def finished_step(self) -> int | None:
        """The step of the newest checkpoint if it completes the recipe, else None.

        Raises:
            UserError: as `check`.
        """
        if self.check() is None:
            return None
        step = self.checkpoints.latest_step
        return step if step >= self.recipe.train.steps else None

    @property
    def mlflow_run_id(self) -> str:
        """Its id in MLflow, from the newest checkpoint."""
        return self.checkpoints[NEWEST].state.mlflow_run_id

    @property
    def log(self) -> list[dict[str, Any]]:
        """The records of log.jsonl, one every `train.log_every` steps."""
        url = storage.join(self.url, "log.jsonl")
        if not storage.exists(url):
            return []
        return [json.loads(line) for line in storage.read_bytes(url).splitlines()]

    # ---- Writing it ----

    def acquire(
        self, wait: bool = False, lost: Callable[[], None] = lambda: None
    ) -> AbstractContextManager[lease.Lease]:
        """Hold the run while the block runs, so that no other command writes to it.

        Args:
            wait: whether to wait for another command that holds it.
            lost: called by a thread if another command takes over.

        Raises:
            UserError: another command holds it.
        """
        return lease.acquire(self.url, wait, lost)

    def new_metadata(self, latents: str = "") -> RunMetadata:
        """Metadata of a new run; nothing is written."""
        return RunMetadata(
            uuid=uuid.uuid4().hex,
            name=self.name,
            recipe_hash=self.recipe.train_hash(),
            latents=latents,
        )

    def create(self, metadata: RunMetadata | None = None) -> RunMetadata:
        """Write recipe.yaml, then run.json, which marks the folder as a run."""
        storage.write_text(storage.join(self.url, "recipe.yaml"), stored_text(self.recipe))
        return self._write(metadata or self.new_metadata())

    def _write(self, metadata: RunMetadata) -> RunMetadata:
        storage.write_text(storage.join(self.url, METADATA), metadata.model_dump_json(indent=1))
        self.metadata = metadata
        self.__dict__.pop("stored_recipe", None)
        return metadata

    def record_steps(self) -> None:
        """Store the `train.steps` that an existing run is extended to in its recipe."""
        url = storage.join(self.url, "recipe.yaml")
        if not storage.exists(url):  # removed, as it was damaged
            storage.write_text(url, stored_text(self.recipe))
        stored, steps = self.stored_recipe, self.recipe.train.steps
        if stored.train.steps != steps:
            train = stored.train.model_copy(update={"steps": steps})
            self.stored_recipe = stored.model_copy(update={"train": train})
            storage.write_text(url, stored_text(self.stored_recipe))

    def check_latents(self, digest: str) -> None:
        """Refuse to resume on latents other than those that the run began with.

        Args:
            digest: the `samples_digest` of the latents.

        Raises:
            UserError: they were encoded again or appended to, so that the order of samples differs.
        """
        known = self.metadata.latents if self.metadata else ""
        if known not in ("", digest) and self.checkpoints:
            raise UserError(
                f"the latents of run {self.name!r} were encoded again or appended to since it "
                "began, so that it would continue with other samples; restore them, or begin "
                "another --run, with --init-from to keep the weights"
            )

    def record_latents(self, digest: str) -> None:
        """Store the digest of the latents, if it was not."""
        if self.metadata is not None and self.metadata.latents != digest:
            self._write(self.metadata.model_copy(update={"latents": digest}))

    def remove_unfinished(self) -> None:
        """Remove the checkpoints and snapshots that were never committed."""
        self.checkpoints.remove_unfinished()
        self.snapshots.remove_unfinished()
        storage.remove_temporary(self.url)


class Project:
    """A project: latents, runs and evaluations under a root folder or `s3://bucket/prefix`."""

    def __init__(self, root: str) -> None:
        if fault := storage.missing_slash(root):
            raise UserError(f"--root is {root!r}: {fault}")
        self.root = storage.absolute(root)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {storage.display_path(self.root)}>"

    @property
    def runs(self) -> Sequence[Run]:
        """Its runs, by name."""
        folder = storage.join(self.root, "runs")
        runs = [Run(self.root, name) for name in storage.list_names(folder)]
        return [run for run in runs if run.metadata is not None]

    def run(self, name: str | None = None) -> Run:
        """A run that exists.

        Args:
            name: None for the only run of the project.

        Raises:
            UserError: there is no such run, or there are several.
        """
        names = storage.list_names(storage.join(self.root, "runs"))
        shown = storage.display_path(self.root)
        known = f"{shown}, whose runs are: {', '.join(names) or 'none'}"
        if name is None and len(names) > 1:
            raise UserError(f"name the run with --run: there are several in {known}")
        if name is None and not names:
            raise UserError(f"{shown} has no run; check --root, or train one first")
        run = Run(self.root, name or names[0])
        if run.metadata is None:
            raise UserError(
                f"run {run.name!r} does not exist in {known}; train it first, or pass another "
                "--run or --root"
            )
        return run

    def latents_url(self, name: str) -> str:
        """Folder of the latents of a data set."""
        return storage.join(self.root, "latents", name)


def open_run(
    recipe: Recipe, name: str | None = None, init: str | None = None, init_weights: str = "ema"
) -> Run:
    """The run that a recipe trains, new or existing, with `train.start` resolved.

    An existing run keeps the checkpoint it started from, even if its source has trained further
    or been removed. If the resolution differs, the fixed positions keep the range that the source
    was trained with.

    Args:
        name: None for the recipe's.
        init: RUN or RUN@STEP to start from, by default the newest checkpoint; None for the source
            that the run was started from, if any.
        init_weights: its weights: raw, or the name of an EMA.

    Raises:
        UserError: the source run, checkpoint or EMA does not exist.
    """
    run = Run(recipe.storage.root, name or recipe.name, recipe)
    if recipe.train.start is None and run.metadata is not None:
        stored = run.stored_recipe
        if stored.train.start is not None:
            run = run.using(_started(recipe, stored.train.start, _position_side(stored)))
    return run if init is None else _initialized(run, recipe, init, init_weights)


def _initialized(run: Run, recipe: Recipe, init: str, weights: str) -> Run:
    """The run with the start that --init-from names, unless it has that one."""
    name, _, step = init.partition("@")
    if step and not step.isdigit():
        raise UserError(f"--init-from is {init!r}, but must be RUN or RUN@STEP, such as first@5000")
    require_name("--init-from", name)
    if name == run.name:
        raise UserError(f"--init-from is run {name!r} itself; choose another --run for the new run")
    kept = run.recipe.train.start
    if kept and kept.run == name and kept.weights == weights and step in ("", str(kept.step)):
        return run
    source = Run(run.root, name)
    if source.metadata is None:
        raise UserError(f"--init-from is {init!r}, but run {name!r} does not exist in {source.url}")
    checkpoint = source.checkpoints[step or NEWEST]
    if weights not in checkpoint.weights:
        known = ", ".join(checkpoint.weights)
        raise UserError(f"--init-weights is {weights!r}, but {init} holds {known}")
    start = Start(run=name, step=checkpoint.step, weights=weights, digest=checkpoint.digest)
    theirs = source.recipe
    spread = _position_side(theirs) or _grid_side(theirs)
    same = _grid_side(theirs) == _grid_side(recipe)
    return run.using(_started(recipe, start, None if same else spread))


def _started(recipe: Recipe, start: Start, side: int | None) -> Recipe:
    """The recipe with a start, and with `side` as `model.position_side` unless it sets its own."""
    model = recipe.model
    if isinstance(model, LatentModel):
        model = model.model_copy(update={"position_side": model.position_side or side})
    train = recipe.train.model_copy(update={"start": start})
    return recipe.model_copy(update={"train": train, "model": model})


def _position_side(recipe: Recipe) -> int | None:
    """`model.position_side`; None for a model without it."""
    return recipe.model.position_side if isinstance(recipe.model, LatentModel) else None


def _grid_side(recipe: Recipe) -> int | None:
    """Side of the grid that fixed positions span; None for a model without them."""
    model = recipe.model
    return recipe.latent_size // model.patch_size if isinstance(model, LatentModel) else None


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[object, object]]:
    """The dotted keys of two nested documents that differ, with both values."""
    ours, others = flatten(mine), flatten(theirs)
    return {
        key: (ours.get(key), others.get(key))
        for key in sorted(ours.keys() | others.keys())
        if ours.get(key) != others.get(key)
    }
