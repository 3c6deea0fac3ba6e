"""To be replaced by the objects of `run`."""

from __future__ import annotations

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data.manifest import Manifest
from diffit_train.runs.checkpoints import NEWEST as NEWEST
from diffit_train.runs.run import METADATA as IDENTITY
from diffit_train.runs.run import Run as Run
from diffit_train.runs.run import RunMetadata as RunMetadata

__all__ = ["IDENTITY", "NEWEST", "RunMetadata"]


def run_url(recipe: Recipe, run: str) -> str:
    """Folder of a run."""
    return Run(recipe.storage.root, run).url


def _at(url: str) -> Run:
    return Run(storage.parent(url, 2), url.rsplit("/", 1)[-1])


def read_identity(url: str) -> RunMetadata | None:
    """As `Run.metadata`."""
    return _at(url).metadata


def check_recipe(recipe: Recipe, run: str) -> RunMetadata | None:
    """As `Run.check`."""
    return Run(recipe.storage.root, run, recipe).check()


def stored_recipe(url: str) -> Recipe:
    """As `Run.stored_recipe`."""
    return _at(url).stored_recipe


def create_identity(recipe: Recipe, run: str, latents: str = "") -> RunMetadata:
    """As `Run.create`."""
    it = Run(recipe.storage.root, run, recipe)
    return it.create(it.new_metadata(latents))


def new_metadata(recipe: Recipe, run: str, latents: str = "") -> RunMetadata:
    """As `Run.new_metadata`."""
    return Run(recipe.storage.root, run, recipe).new_metadata(latents)


def store_run(recipe: Recipe, identity: RunMetadata) -> RunMetadata:
    """As `Run.create`."""
    return Run(recipe.storage.root, identity.name, recipe).create(identity)


def record_steps(recipe: Recipe, run: str) -> None:
    """As `Run.record_steps`."""
    Run(recipe.storage.root, run, recipe).record_steps()


def check_latents(url: str, identity: RunMetadata, manifest: Manifest) -> None:
    """As `Run.check_latents`."""
    _at(url).check_latents(manifest.samples_digest)


def record_latents(url: str, identity: RunMetadata, manifest: Manifest) -> RunMetadata:
    """As `Run.record_latents`."""
    run = _at(url)
    run.record_latents(manifest.samples_digest)
    assert run.metadata is not None
    return run.metadata


def finished_step(recipe: Recipe, run: str) -> int | None:
    """As `Run.finished_step`."""
    return Run(recipe.storage.root, run, recipe).finished_step


def find_checkpoint(recipe: Recipe, run: str, step: str) -> tuple[str, int]:
    """As `Run.checkpoint`."""
    it = Run(recipe.storage.root, run, recipe)
    return it.url, it.checkpoint(step).step
