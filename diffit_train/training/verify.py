"""`diffit verify run`: check every file of a run, and make again what can be.

The log comes back from MLflow, the recipe and the identity from MLflow and the newest checkpoint,
the ranges of skipped steps from bad-steps.jsonl, and exports from their checkpoints.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from diffit_train import storage
from diffit_train.config import Recipe, stored_text
from diffit_train.config.load import validate
from diffit_train.errors import DiffitError, UserError
from diffit_train.metric_names import TRAINING
from diffit_train.models.published import read_weights_file
from diffit_train.progress import say
from diffit_train.redaction import first_line
from diffit_train.runs import lease
from diffit_train.runs.checkpoints import (
    SNAPSHOTS,
    State,
    committed_steps,
    damage,
    read_index,
    read_state,
    step_name,
)
from diffit_train.runs.identity import (
    IDENTITY,
    RunIdentity,
    read_identity,
    stored_recipe,
    write_identity,
)
from diffit_train.runs.import_export import export_weights
from diffit_train.tracking import TAG_RUN, Tracker, tracking_uri, unreachable_errors
from diffit_train.training.log import (
    BAD_STEPS,
    PASSED_OVER,
    REBUILT,
    SkippedSteps,
    TrainingLog,
)

RECIPE, LOG, EXPORTS = "recipe.yaml", "log.jsonl", "export"
_EXPORT = re.compile(r"(?P<kind>.+)-(?P<step>[0-9]{10})\.safetensors")


def verify_run(url: str) -> dict[str, str]:
    """What is damaged in a run's folder: the reason by file or checkpoint; reads every byte.

    Raises:
        UserError: the folder holds no run.
    """
    if not storage.list_names(url):
        raise UserError(f"{url} is not the folder of a run: it does not exist, or is empty")
    checks: dict[str, Callable[[], object]] = {
        IDENTITY: lambda: _require_identity(url),
        RECIPE: lambda: stored_recipe(url),
        PASSED_OVER: lambda: SkippedSteps.read(url),
        BAD_STEPS: lambda: _bad_steps(url),
        LOG: lambda: _check_log(url),
    }
    for name in storage.list_names(storage.join(url, EXPORTS)):
        if name.endswith(".safetensors"):
            file = storage.join(url, EXPORTS, name)
            checks[f"{EXPORTS}/{name}"] = lambda file=file: read_weights_file(file)  # type: ignore[misc]
    bad = {}
    for name, check in checks.items():
        try:
            check()
        except DiffitError as error:
            bad[name] = getattr(error, "reason", None) or str(error).partition(";")[0]
    for folder in ("", SNAPSHOTS):
        base = storage.join(url, folder) if folder else url
        for step in committed_steps(base):
            if (reason := damage(base, step)) is not None:
                bad[f"{folder}/{step_name(step)}".lstrip("/")] = reason
    return bad


def _require_identity(url: str) -> None:
    if read_identity(url) is None:
        raise UserError(f"{url}/{IDENTITY} is missing")


def _check_log(url: str) -> None:
    state = _newest_state(url)
    TrainingLog(url, state.step if state else 0, state.log if state else None)


def _newest_state(url: str) -> State | None:
    for step in reversed(committed_steps(url)):
        try:
            return read_state(url, step)
        except DiffitError:  # damaged; reported with the checkpoint
            continue
    return None


def _bad_steps(url: str) -> list[int]:
    """The steps of bad-steps.jsonl, as they were skipped."""
    name, found = storage.join(url, BAD_STEPS), []
    if not storage.exists(name):
        return []
    for number, line in enumerate(storage.read_bytes(name).splitlines(), 1):
        try:
            found.append(int(json.loads(line)["step"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{name} is damaged in line {number}; delete that line") from error
    return found


# ---- Making again ----


def repair_run(url: str, bad: dict[str, str], uri: str | None = None) -> None:
    """Make again what `verify_run` found damaged, where that is possible.

    Args:
        uri: MLflow's; None for that of the run's recipe, or the file under its root.

    Raises:
        UserError: a command trains the run.
    """
    with lease.held(url, False, say, lambda: None):
        _repair(url, bad, uri)


def _repair(url: str, bad: dict[str, str], uri: str | None) -> None:
    # The recipe first: the others need it.
    steps: dict[str, Callable[[], None]] = {
        RECIPE: lambda: _repair_recipe(url, uri),
        IDENTITY: lambda: _repair_identity(url, uri),
        PASSED_OVER: lambda: _repair_passed_over(url),
        LOG: lambda: _repair_log(url, uri),
    }
    for name, repair in steps.items():
        if name in bad:
            _attempt(name, repair)
    for name in bad:
        if name.startswith(f"{EXPORTS}/"):
            _attempt(name, lambda name=name: _repair_export(url, name))  # type: ignore[misc]
        elif step_name(0)[:5] in name:
            say(f"{name} cannot be made again; `diffit train` resumes from the newest intact one")


def _attempt(name: str, repair: Callable[[], None]) -> None:
    failures: tuple[type[Exception], ...] = (DiffitError, *unreachable_errors())
    try:
        repair()
    except failures as error:
        say(f"{name} could not be made again: {first_line(error)}")
    else:
        say(f"{name} was made again")


def _tracker(url: str, uri: str | None) -> Tracker:
    if uri is None:
        try:
            uri = tracking_uri(stored_recipe(url))
        except UserError:
            root = url.rstrip("/").rsplit("/runs/", 1)[0]
            if not storage.is_local(root):
                raise
            uri = f"sqlite:///{root}/mlflow.db"
    return Tracker(uri)


def _required_state(url: str) -> State:
    state = _newest_state(url)
    if state is None:
        raise UserError(f"{url} has no intact checkpoint, which names its run in MLflow")
    return state


def _repair_log(url: str, uri: str | None) -> None:
    """The fields that MLflow has, and a mark, as the checkpoints know the former log."""
    state = _required_state(url)
    tracker = _tracker(url, uri)
    records: dict[int, dict[str, Any]] = {}
    for field, metric in TRAINING.items():
        for step, value in tracker.history(state.mlflow_run_id, metric):
            if step <= state.step:
                records.setdefault(step, {"step": step})[field] = value
    if not records:
        raise UserError(f"MLflow has no metrics of run {state.mlflow_run_id}")
    log = TrainingLog.empty(url)
    for step in sorted(records):
        log.append(records[step])
    storage.write_text(log.url, log.text())
    storage.write_text(storage.join(url, REBUILT), log.mark().sealed())


def _repair_passed_over(url: str) -> None:
    """Each rollback skips a row of `train.max_consecutive_bad_steps` bad steps."""
    most = stored_recipe(url).train.max_consecutive_bad_steps
    skipped = SkippedSteps()
    row: list[int] = []
    for step in _bad_steps(url):
        row = [*row, step] if row and step == row[-1] + 1 else [step]
        if len(row) == most:
            skipped, row = skipped.adding(row[0], row[-1]), []
    skipped.write(url)


def _repair_recipe(url: str, uri: str | None) -> None:
    """From MLflow's parameters; kept only if the hash is that of the checkpoints."""
    state = _required_state(url)
    tree: dict[str, Any] = {}
    for key, text in _tracker(url, uri).params(state.mlflow_run_id).items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        try:
            node[last] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            node[last] = text
    made = _validated(tree, url, state.recipe_hash)
    storage.write_text(storage.join(url, RECIPE), stored_text(made))


def _validated(tree: dict[str, Any], url: str, recipe_hash: str) -> Recipe:
    made = validate(tree, f"from MLflow's parameters of {url}")
    if made.train_hash() != recipe_hash:
        raise UserError(
            "MLflow's parameters do not give the recipe that was trained; write it yourself, with "
            f"`diffit recipe show`, to {url}/{RECIPE}"
        )
    return made


def _repair_identity(url: str, uri: str | None) -> None:
    state = _required_state(url)
    uuid = _tracker(url, uri).tag(state.mlflow_run_id, TAG_RUN)
    if uuid is None:
        raise UserError(f"MLflow's run {state.mlflow_run_id} has no tag {TAG_RUN}")
    name = url.rstrip("/").rsplit("/", 1)[-1]
    # The latents are recorded again when training resumes.
    write_identity(
        url, RunIdentity(uuid=uuid, name=name, recipe_hash=state.recipe_hash, latents="")
    )


def _repair_export(url: str, name: str) -> None:
    found = _EXPORT.fullmatch(name.removeprefix(f"{EXPORTS}/"))
    step = int(found["step"]) if found else -1
    kinds = read_index(url, step).kinds if step in committed_steps(url) else ()
    kind = found["kind"] if found else ""
    if kind not in kinds and not (kind == "raw" and "master" in kinds):
        raise UserError(
            "its checkpoint is gone, or it is a reconstructed EMA; delete it, and run `diffit "
            "export` or `diffit ema reconstruct` again"
        )
    recipe = stored_recipe(url)
    root, run = url.rstrip("/").rsplit("/runs/", 1)
    here = recipe.model_copy(update={"storage": recipe.storage.model_copy(update={"root": root})})
    export_weights(here, run, step, kind)
