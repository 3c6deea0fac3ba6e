"""Runs that start from another run's checkpoint (`diffit train --init-from`)."""

from __future__ import annotations

from diffit_train.config import Recipe
from diffit_train.config.base import require_name
from diffit_train.config.train import Start
from diffit_train.errors import UserError
from diffit_train.runs.checkpoints import checkpoint_digest, read_index, require_step, weights_of
from diffit_train.runs.identity import read_identity, run_url, stored_recipe


def init_from(recipe: Recipe, run: str, source: str | None = None, weights: str = "ema") -> Recipe:
    """The recipe with `train.start` filled in.

    An existing run keeps the checkpoint it started from, even if its source has trained further
    or been removed. If the resolution differs, the fixed positions keep the range that the source
    was trained with.

    Args:
        run: the new run.
        source: RUN or RUN@STEP, by default the newest checkpoint; None for the source that the
            run was started from, if any.
        weights: raw, or the name of an EMA.

    Raises:
        UserError: the run, checkpoint or EMA does not exist.
    """
    if source is None:
        return with_start(recipe, run)
    name, _, step = source.partition("@")
    if step and not step.isdigit():
        raise UserError(
            f"--init-from is {source!r}, but must be RUN or RUN@STEP, such as first@5000"
        )
    require_name("--init-from", name)
    if name == run:
        raise UserError(f"--init-from is run {run!r} itself; choose another --run for the new run")
    begun = with_start(recipe, run)
    kept = begun.train.start
    if kept and kept.run == name and kept.weights == weights and step in ("", str(kept.step)):
        return begun
    url = run_url(recipe, name)
    if read_identity(url) is None:
        raise UserError(f"--init-from is {source!r}, but run {name!r} does not exist in {url}")
    number = require_step(url, int(step) if step else None)
    known = weights_of(read_index(url, number))
    if weights not in known:
        raise UserError(f"--init-weights is {weights!r}, but {source} holds {', '.join(known)}")
    digest = checkpoint_digest(url, number)
    start = Start(run=name, step=number, weights=weights, digest=digest)
    theirs = stored_recipe(url)
    spread = theirs.model.position_side or _side(theirs)
    return _started(recipe, start, spread if _side(theirs) != _side(recipe) else None)


def with_start(recipe: Recipe, run: str) -> Recipe:
    """The recipe, with the `train.start` of the existing run if it was started by `--init-from`."""
    url = run_url(recipe, run)
    if recipe.train.start is not None or read_identity(url) is None:
        return recipe
    stored = stored_recipe(url)
    if stored.train.start is None:
        return recipe
    return _started(recipe, stored.train.start, stored.model.position_side)


def _started(recipe: Recipe, start: Start, side: int | None) -> Recipe:
    """The recipe with a start, and with `side` as `model.position_side` unless it sets its own."""
    update = {"position_side": recipe.model.position_side or side}
    model = recipe.model.model_copy(update=update)
    train = recipe.train.model_copy(update={"start": start})
    return recipe.model_copy(update={"train": train, "model": model})


def _side(recipe: Recipe) -> int | None:
    """Side of the grid that fixed positions span; None for a model without them."""
    if recipe.model.on_pixels:
        return None
    return recipe.latent_size // recipe.model.patch_size
