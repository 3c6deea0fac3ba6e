"""The run that a command uses: what the command needs comes from the run.

RECIPE and KEY=VALUE only name what is to differ, and only keys that belong to the command can.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffit_train import storage
from diffit_train.config import Recipe, load_recipe, load_recipe_text, packaged_recipes, validate
from diffit_train.config.base import flatten
from diffit_train.data.alias import resolve_alias
from diffit_train.errors import UserError
from diffit_train.progress import say
from diffit_train.runs.run import Project, Run, differences, open_run

# Keys that may differ from the run's, by command. A key that determines the weights never may; a
# copy of the autoencoder elsewhere counts as the same one.
_WHERE = ("storage.", "tracking.")
_GENERATION = ("evaluate.", "scaling.", "model.attention", "autoencoder.source", *_WHERE)
# What a folder for diffusers samples by, where nothing else is asked for.
_SAMPLING = tuple(f"evaluate.{key}" for key in ("sampler.", "guidance.", "pixels", "precision"))
_SAMPLING += ("autoencoder.source", *_WHERE)
ALLOWED_KEYS = {
    "sample": _GENERATION,
    "evaluate": _GENERATION,
    "export": _WHERE,
    "export --format diffusers": _SAMPLING,
}
_SHOWN = 6


def select_run(
    command: str,
    name: str | None = None,
    overrides: Sequence[str] | None = None,
    root: str | None = None,
    run: str | None = None,
) -> Run:
    """The run that a command uses, with the recipe to use it by.

    Args:
        command: its words, a key of `ALLOWED_KEYS`.
        name: RECIPE; None for the run's own. Text with a `=` is an override.
        root: project; by default RECIPE's, or the working directory.
        run: by default RECIPE's name, or the only run of the project.

    Raises:
        UserError: no such run, or a key is to differ that does not belong to the command.
    """
    name, words = split_recipe(name, overrides)
    if name is None:
        return with_overrides(Project(root or ".").run(run), command, words)
    try:
        recipe = resolve_alias(load_recipe(name, words, root))
    except UserError as error:
        raise UserError(f"{error}{_hint(name, root or '.')}") from error
    chosen = open_run(recipe, run)
    asked = chosen.recipe
    # Where there is no run, whoever looks for its checkpoint explains what to do.
    if chosen.metadata is None or asked.train_hash() == chosen.stored_recipe.train_hash():
        return chosen
    stored = chosen.stored_recipe
    _refuse_others(command, words, asked, chosen)
    kept = {key: getattr(asked, key) for key in ("evaluate", "scaling", "storage", "tracking")}
    merged = stored.model_copy(update=kept)
    determining = {key.replace("order.", "data.", 1) for key in flatten(stored.train_identity())}
    taken = [key for key in _differences(asked, merged) if key in determining]
    more = f" and {len(taken) - _SHOWN} more" if len(taken) > _SHOWN else ""
    say(f"taken from run {chosen.name!r}, not from {name}: {', '.join(taken[:_SHOWN])}{more}")
    # The sections have not been checked against one another.
    return chosen.using(validate(merged.model_dump(mode="json"), name))


def with_overrides(run: Run, command: str, overrides: Sequence[str]) -> Run:
    """The run, used with overrides of its own recipe.

    Raises:
        UserError: a key is to differ that does not belong to the command.
    """
    text = storage.read_bytes(storage.join(run.url, "recipe.yaml")).decode()
    asked = resolve_alias(load_recipe_text(text, f"of run {run.name!r}", overrides, run.root))
    _refuse_others(command, overrides, asked, run)
    return run.using(asked)


def split_recipe(name: str | None, overrides: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """RECIPE, if there is one, and the overrides: the first word may be either."""
    words = list(overrides or ())
    if name is not None and "=" in name:
        return None, [name, *words]
    return name, words


def _refuse_others(command: str, overrides: Sequence[str], asked: Recipe, run: Run) -> None:
    """Refuse overrides that change what does not belong to the command.

    Raises:
        UserError: names the keys, with both values.
    """
    names = {text.partition("=")[0] for text in overrides}
    allowed = ALLOWED_KEYS[command]
    wrong = [
        f"{key} is {mine!r}, in the run {theirs!r}"
        for key, (mine, theirs) in _differences(asked, run.stored_recipe).items()
        if any(key == name or key.startswith(f"{name}.") for name in names)
        and not key.startswith(allowed)
    ]
    if wrong:
        keys = ", ".join(key + "*" if key.endswith(".") else key for key in allowed)
        raise UserError(
            f"`diffit {command}` takes this from run {run.name!r}: {'; '.join(wrong)}; remove it, "
            f"or choose another --run (keys that can differ: {keys})"
        )


def _differences(mine: Recipe, theirs: Recipe) -> dict[str, tuple[object, object]]:
    """Keys that differ, with both values."""
    return differences(mine.model_dump(mode="json"), theirs.model_dump(mode="json"))


def _hint(name: str, root: str) -> str:
    """Advice where RECIPE is the name of a run."""
    if name in packaged_recipes() or "/" in name:
        return ""
    known = Run(storage.absolute(root), name).metadata
    return f"\nthere is a run of that name: pass --run {name}" if known else ""
