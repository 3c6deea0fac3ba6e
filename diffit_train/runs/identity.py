"""A run's folder: its identity, its recipe, and whether it is finished."""

from __future__ import annotations

import uuid

from pydantic import ValidationError

from diffit_train import storage
from diffit_train.config import Recipe, load_recipe_text, stored_text
from diffit_train.config.base import flatten
from diffit_train.data.shards import Manifest
from diffit_train.errors import DiffitError, UserError
from diffit_train.runs.checkpoints import committed_steps, require_step

# `--step` value that means the newest checkpoint.
NEWEST = "newest"


# Marks a folder as a run.
IDENTITY = "run.json"


class RunMetadata(storage.Record):
    """run.json; `uuid` distinguishes two successive runs of the same name.

    `latents` is the `samples_digest` of the latents it trains on, empty before training.
    """

    uuid: str
    name: str
    recipe_hash: str
    latents: str


def run_url(recipe: Recipe, run: str) -> str:
    """Folder of a run."""
    return storage.join(recipe.storage.root, "runs", run)


def read_identity(url: str) -> RunMetadata | None:
    """The identity of the run in a folder; None if there is no run."""
    try:
        return RunMetadata.model_validate_json(storage.read_bytes(storage.join(url, IDENTITY)))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise DiffitError(
            f"{url}/run.json is damaged: {reason}; delete it and train the run again with its "
            "recipe: training resumes, as another run in MLflow"
        ) from error


def check_recipe(recipe: Recipe, run: str) -> RunMetadata | None:
    """The run's identity, or None if it does not exist.

    Raises:
        UserError: the run was trained with another recipe; the message lists the differing keys.
    """
    url = run_url(recipe, run)
    identity = read_identity(url)
    if identity is None or identity.recipe_hash == recipe.train_hash():
        return identity
    fix = ""
    if not committed_steps(url):
        remove = f"diffit runs remove {run} --root {storage.display_path(recipe.storage.root)}"
        fix = f", or, since it has no checkpoint, remove it: {remove}"
    raise UserError(
        f"run {run!r} in {recipe.storage.root} was trained with another recipe"
        f"{_differences(recipe, url)}; choose another --run, or use the same recipe{fix}"
    )


def stored_recipe(url: str) -> Recipe:
    """The recipe of the run in a folder ROOT/runs/RUN; its root is that ROOT.

    Raises:
        UserError: it is missing, damaged, or not the one that the run was begun with.
    """
    name = storage.join(url, "recipe.yaml")
    repair = "`diffit train` with the recipe of the run writes it again"
    try:
        text = storage.read_bytes(name).decode()
        recipe = load_recipe_text(text, name, root=storage.parent(url, 2))
    except FileNotFoundError as error:
        raise UserError(f"{name} is missing; {repair}") from error
    except (UnicodeDecodeError, UserError) as error:
        raise UserError(f"{name} is damaged: {error}; delete it; {repair}") from error
    try:
        identity = read_identity(url)
    except DiffitError:  # said where the identity is needed
        return recipe
    if identity is not None and identity.recipe_hash != recipe.train_hash():
        raise UserError(f"{name} is damaged: its hash is not that of run.json; delete it; {repair}")
    return recipe


def _differences(recipe: Recipe, url: str) -> str:
    """` (train.lr is 0.1, there 0.2)` for the keys that differ."""
    stored = stored_recipe(url)
    mine, theirs = flatten(recipe.train_identity()), flatten(stored.train_identity())
    changed = [
        f"{key.removeprefix('order.')} is {mine.get(key)!r}, there {theirs.get(key)!r}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]
    return f" ({'; '.join(changed)})" if changed else ""


def create_identity(recipe: Recipe, run: str, latents: str = "") -> RunMetadata:
    """A new run's identity, stored."""
    return store_run(recipe, new_metadata(recipe, run, latents))


def new_metadata(recipe: Recipe, run: str, latents: str = "") -> RunMetadata:
    """A new run's identity; nothing is written."""
    return RunMetadata(
        uuid=uuid.uuid4().hex, name=run, recipe_hash=recipe.train_hash(), latents=latents
    )


def store_run(recipe: Recipe, identity: RunMetadata) -> RunMetadata:
    """Write recipe.yaml, then run.json, which marks the folder as a run."""
    url = run_url(recipe, identity.name)
    storage.write_text(storage.join(url, "recipe.yaml"), stored_text(recipe))
    return write_identity(url, identity)


def write_identity(url: str, identity: RunMetadata) -> RunMetadata:
    """Store the identity of the run in a folder."""
    storage.write_text(storage.join(url, IDENTITY), identity.model_dump_json(indent=1))
    return identity


def record_steps(recipe: Recipe, run: str) -> None:
    """Store the `train.steps` that an existing run is extended to in its recipe."""
    url = run_url(recipe, run)
    if not storage.exists(storage.join(url, "recipe.yaml")):  # removed, as it was damaged
        storage.write_text(storage.join(url, "recipe.yaml"), stored_text(recipe))
    stored = stored_recipe(url)
    if stored.train.steps != recipe.train.steps:
        train = stored.train.model_copy(update={"steps": recipe.train.steps})
        text = stored_text(stored.model_copy(update={"train": train}))
        storage.write_text(storage.join(url, "recipe.yaml"), text)


def check_latents(url: str, identity: RunMetadata, manifest: Manifest) -> None:
    """Refuse to resume a run on latents other than those that it began with.

    Raises:
        UserError: they were encoded again or appended to, so that the order of samples is another.
    """
    if identity.latents in ("", manifest.samples_digest) or not committed_steps(url):
        return
    raise UserError(
        f"the latents of run {identity.name!r} were encoded again or appended to since it began, "
        "so that it would continue with other samples; restore them, or begin another --run, with "
        "--init-from to keep the weights"
    )


def record_latents(url: str, identity: RunMetadata, manifest: Manifest) -> RunMetadata:
    """The identity with the digest of the latents, stored if it was not."""
    if identity.latents == manifest.samples_digest:
        return identity
    return write_identity(url, identity.model_copy(update={"latents": manifest.samples_digest}))


def finished_step(recipe: Recipe, run: str) -> int | None:
    """The newest committed step if it completes the recipe, else None.

    Raises:
        UserError: as `check_recipe`.
    """
    if check_recipe(recipe, run) is None:
        return None
    steps = committed_steps(run_url(recipe, run))
    return steps[-1] if steps and steps[-1] >= recipe.train.steps else None


def find_checkpoint(recipe: Recipe, run: str, step: str) -> tuple[str, int]:
    """Folder of a run and the requested step.

    Raises:
        UserError: the run or the checkpoint does not exist.
    """
    if check_recipe(recipe, run) is None:
        raise UserError(
            f"run {run!r} does not exist in {recipe.storage.root}; train it first, or pass "
            "another --run"
        )
    url = run_url(recipe, run)
    return url, require_step(url, parse_step(step))


def parse_step(text: str) -> int | None:
    """`--step` as a number; None for the newest.

    Raises:
        UserError: neither a number nor `newest`.
    """
    if text == NEWEST:
        return None
    if not text.isdigit():
        raise UserError(f"--step is {text!r}, but must be a step number or {NEWEST!r}")
    return int(text)
