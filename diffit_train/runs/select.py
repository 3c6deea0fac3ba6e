"""The run that a command uses, and its recipe: what the command needs comes from the run.

RECIPE and KEY=VALUE only say what is to differ, and only keys that belong to the command can.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffit_train import storage
from diffit_train.config import Recipe, load_recipe, load_recipe_text, packaged_recipes, validate
from diffit_train.config.base import flatten
from diffit_train.data.known_autoencoder import recognized
from diffit_train.errors import UserError
from diffit_train.progress import say
from diffit_train.runs.identity import read_identity, run_url, stored_recipe
from diffit_train.runs.start import with_start

# Keys that may differ from the run's, by command. A key that determines the weights never may; a
# copy of the autoencoder elsewhere counts as the same one.
_WHERE = ("storage.", "tracking.")
_GENERATION = ("evaluate.", "scaling.", "model.attention", "autoencoder.source", *_WHERE)
# What a folder for diffusers samples by, where nothing else is asked for.
_SAMPLING = tuple(f"evaluate.{key}" for key in ("sampler.", "guidance.", "pixels", "precision"))
_SAMPLING += ("autoencoder.source", *_WHERE)
OWN_KEYS = {
    "sample": _GENERATION,
    "evaluate": _GENERATION,
    "export": _WHERE,
    "export --format diffusers": _SAMPLING,
}
_SHOWN = 6


def recipe_and_run(
    command: str,
    name: str | None,
    overrides: Sequence[str] | None,
    root: str | None,
    run: str | None,
) -> tuple[Recipe, str]:
    """The recipe that a command uses, and the run it works on.

    Args:
        command: its words, a key of `OWN_KEYS`.
        name: RECIPE; None for the run's own. Text with a `=` is an override.
        root: project; by default RECIPE's, or the working directory.
        run: by default RECIPE's name, or the only run of the project.

    Raises:
        UserError: no such run, or a key is to differ that does not belong to the command.
    """
    name, words = split_recipe(name, overrides)
    if name is None:
        return _own_recipe(command, words, storage.absolute(root or "."), run)
    try:
        asked = recognized(load_recipe(name, words, root))
    except UserError as error:
        raise UserError(f"{error}{_hint(name, root or '.')}") from error
    run = run or asked.name
    url = run_url(asked, run)
    asked = with_start(asked, run)
    if read_identity(url) is None:
        return asked, run  # whoever looks for its checkpoint says what to do
    stored = stored_recipe(url)
    if asked.train_hash() == stored.train_hash():
        return asked, run
    _refuse_others(command, words, asked, stored, run)
    kept = {key: getattr(asked, key) for key in ("evaluate", "scaling", "storage", "tracking")}
    merged = stored.model_copy(update=kept)
    determining = {key.replace("order.", "data.", 1) for key in flatten(stored.train_identity())}
    taken = [key for key in _differences(asked, merged) if key in determining]
    more = f" and {len(taken) - _SHOWN} more" if len(taken) > _SHOWN else ""
    say(f"taken from run {run!r}, not from {name}: {', '.join(taken[:_SHOWN])}{more}")
    # The sections have not been checked against one another.
    return validate(merged.model_dump(mode="json"), name), run


def split_recipe(name: str | None, overrides: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """RECIPE, if there is one, and the overrides: the first word may be either."""
    words = list(overrides or ())
    if name is not None and "=" in name:
        return None, [name, *words]
    return name, words


def _own_recipe(
    command: str, overrides: Sequence[str], root: str, run: str | None
) -> tuple[Recipe, str]:
    """The run's recipe with overrides."""
    if fault := storage.missing_slash(root):
        raise UserError(f"--root is {root!r}: {fault}")
    runs = storage.list_names(storage.join(root, "runs"))
    known = f"{storage.display_path(root)}, whose runs are: {', '.join(runs) or 'none'}"
    if run is None and len(runs) > 1:
        raise UserError(f"name the run with --run: there are several in {known}")
    if run is None and not runs:
        place = storage.display_path(root)
        raise UserError(f"{place} has no run; check --root, or train one first")
    run = run or runs[0]
    url = storage.join(root, "runs", run)
    if read_identity(url) is None:
        raise UserError(
            f"run {run!r} does not exist in {known}; train it first, or pass another --run or "
            "--root"
        )
    text = storage.read_bytes(storage.join(url, "recipe.yaml")).decode()
    asked = recognized(load_recipe_text(text, f"of run {run!r}", overrides, root))
    _refuse_others(command, overrides, asked, stored_recipe(url), run)
    return asked, run


def _refuse_others(
    command: str, overrides: Sequence[str], asked: Recipe, stored: Recipe, run: str
) -> None:
    """Refuse overrides that change what does not belong to the command.

    Raises:
        UserError: names the keys, with both values.
    """
    named = {text.partition("=")[0] for text in overrides}
    own = OWN_KEYS[command]
    wrong = [
        f"{key} is {mine!r}, in the run {theirs!r}"
        for key, (mine, theirs) in _differences(asked, stored).items()
        if any(key == name or key.startswith(f"{name}.") for name in named)
        and not key.startswith(own)
    ]
    if wrong:
        keys = ", ".join(key + "*" if key.endswith(".") else key for key in own)
        raise UserError(
            f"`diffit {command}` takes this from run {run!r}: {'; '.join(wrong)}; remove it, or "
            f"choose another --run (keys that can differ: {keys})"
        )


def _differences(one: Recipe, other: Recipe) -> dict[str, tuple[object, object]]:
    """Keys that differ, with both values."""
    mine, theirs = flatten(one.model_dump(mode="json")), flatten(other.model_dump(mode="json"))
    keys = sorted(mine.keys() | theirs.keys())
    pairs = {key: (mine.get(key), theirs.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _hint(name: str, root: str) -> str:
    """Advice where RECIPE is the name of a run."""
    if name in packaged_recipes() or "/" in name:
        return ""
    known = read_identity(storage.join(storage.absolute(root), "runs", name))
    return f"\nthere is a run of that name: pass --run {name}" if known else ""
