"""Check files against the records that committed them, and remove what is damaged.

A record holds the SHA-256 of each file that it commits: manifest.json of shards, index.json of the
slices of a checkpoint, state.json of the log, chunk-….json and result.json of an evaluation,
NAME.json of a reference. An export holds its own. Whoever reads such a file checks it as well.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pydantic import ValidationError

from diffit_train import storage
from diffit_train.data.manifest import INPUTS, MANIFEST, load_manifest, read_inputs, recipe_of
from diffit_train.data.shards import read_shard_bytes
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.committed import DamagedFile, read_record
from diffit_train.evaluation.features import FeaturesInfo
from diffit_train.evaluation.result import RESULT, read_result
from diffit_train.models.published import read_weights_file
from diffit_train.progress import Progress, say
from diffit_train.runs.checkpoints import COMMIT, SNAPSHOTS, Checkpoint, step_name
from diffit_train.runs.run import METADATA, Run
from diffit_train.training.log import (
    SKIPPED_STEPS,
    WRITE_RANGES,
    SkippedSteps,
    TrainingLog,
)

THREADS = 4
TRAIN = "`diffit train`, with the recipe of the run"
LOG = "nothing: it begins again where training resumes, and MLflow has the records before"
EVALUATE = "`diffit evaluate`, with the same settings"
ROOT_FOLDERS = ("latents", "references", "features", "runs", "evaluations")


@dataclass(frozen=True)
class Check:
    """What is checked together.

    Attributes:
        name: its path, relative to what is verified.
        run: raises a DiffitError if it is damaged.
        rebuild: what writes it again once it is removed.
        remove: URLs to remove, in this order; none if it cannot be written again.
    """

    name: str
    run: Callable[[], object]
    rebuild: str
    remove: tuple[str, ...] = ()


@dataclass(frozen=True)
class Damage:
    """A check that failed, and why."""

    check: Check
    reason: str


def verify(url: str) -> list[Damage]:
    """What is damaged in latents, a run, an evaluation, references, an export or a root.

    Raises:
        UserError: it is none of these.
    """
    checks, damages = list(_checks(url)), []
    with ThreadPoolExecutor(THREADS) as pool, Progress("verify", len(checks), "parts") as progress:
        for number, failed in enumerate(pool.map(_damage, checks), 1):
            progress.update(number)
            damages += [failed] if failed else []
    return damages


def remove_damaged(damages: list[Damage]) -> list[Damage]:
    """Remove what can be written again; what is left.

    Raises:
        UserError: a run of it is being trained; nothing was removed.
    """
    urls = [url for damage in damages for url in damage.check.remove]
    places = [re.match(r"(.+)/runs/([^/]+)/", url) for url in urls]
    with contextlib.ExitStack() as held:
        for root, run in sorted({(match[1], match[2]) for match in places if match}):
            held.enter_context(Run(root, run).acquire())
        for check in (damage.check for damage in damages):
            for url in check.remove:
                storage.remove(url)
            if check.remove:
                say(f"Removed {check.name}; rebuilt by {check.rebuild}")
    return [damage for damage in damages if not damage.check.remove]


def _damage(check: Check) -> Damage | None:
    try:
        check.run()
    except FileNotFoundError:
        reason = "it is missing"
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"])
    except DiffitError as error:
        reason = getattr(error, "what", "") or str(error).partition(";")[0]
    else:
        return None
    return Damage(check, reason)


def _checks(url: str) -> Iterator[Check]:
    """The checks of a file or folder of any kind."""
    names, folder = set(storage.list_names(url)), url.rsplit("/", 1)[-1]
    if url.endswith(".safetensors") or "model_index.json" in names:
        yield from _export(url)
    elif MANIFEST in names:
        yield from _latents(url)
    elif names & {METADATA, "checkpoints"}:
        yield from _run(Run(storage.parent(url, 2), folder))
    elif RESULT in names or any(name.startswith("chunk-") for name in names):
        yield from _evaluation(url)
    elif folder == "references":
        yield from _references(url)
    elif names & {*ROOT_FOLDERS, "mlflow.db"}:
        yield from _root(url)
    else:
        raise UserError(
            f"{url} is neither latents, a run, an evaluation, references, an export nor a root; "
            "check the path"
        )


def _latents(url: str) -> Iterator[Check]:
    encode, file = "`diffit encode`, with the recipe of the latents", storage.join(url, MANIFEST)
    yield Check(MANIFEST, lambda: load_manifest(url), encode, (file,))
    try:
        manifest = load_manifest(url)
    except DiffitError:
        return
    for name, check in ((INPUTS, read_inputs), ("recipe.yaml", recipe_of)):
        yield Check(name, functools.partial(check, url), encode, (storage.join(url, name),))
    for entry in manifest.shards:
        run = functools.partial(read_shard_bytes, url, entry)
        yield Check(entry.name, run, encode, (storage.join(url, entry.name),))


def _run(run: Run) -> Iterator[Check]:
    files: dict[str, Callable[[], object]] = {
        METADATA: lambda: _check_metadata(run),
        "recipe.yaml": lambda: run.stored_recipe,
        "log.jsonl": lambda: _check_log(run),
    }
    for name, check in files.items():
        rebuild = LOG if name == "log.jsonl" else TRAIN
        yield Check(name, check, rebuild, (storage.join(run.url, name),))
    yield Check(SKIPPED_STEPS, lambda: SkippedSteps.read(run.url), WRITE_RANGES)
    kinds = (("", run.checkpoints, TRAIN), (SNAPSHOTS, run.snapshots, "a new training only"))
    for folder, checkpoints, rebuild in kinds:
        for step in checkpoints:
            checkpoint, name = checkpoints[step], f"{folder}/{step_name(step)}".lstrip("/")
            check = functools.partial(_check_checkpoint, checkpoint)
            remove = (storage.join(checkpoint.url, COMMIT), checkpoint.url)
            yield Check(name, check, rebuild, remove)
    for name in storage.list_names(storage.join(run.url, "export")):
        if name.endswith((".safetensors", "-diffusers")):
            yield from _named("export", _export(storage.join(run.url, "export", name)))


def _check_metadata(run: Run) -> None:
    if run.metadata is None:
        raise DamagedFile(storage.join(run.url, METADATA), "it is missing")


def _check_log(run: Run) -> None:
    for step in reversed(run.checkpoints.steps):
        try:
            mark = run.checkpoints[step].state.log
        except DiffitError:  # reported with the checkpoint
            continue
        TrainingLog(run.url, step, mark)
        return


def _check_checkpoint(checkpoint: Checkpoint) -> None:
    if reason := checkpoint.find_corruption():
        raise DamagedFile(checkpoint.url, reason)


def _export(url: str) -> Iterator[Check]:
    """A weight file, or those of a folder for diffusers, which is written again as a whole."""
    name, rebuild = url.rsplit("/", 1)[-1], "`diffit export`"
    for file in [""] if name.endswith(".safetensors") else storage.sizes(url):
        if not file or file.endswith(".safetensors"):
            run = functools.partial(read_weights_file, f"{url}/{file}".rstrip("/"))
            yield Check(f"{name}/{file}".rstrip("/"), run, rebuild, (url,))


def _evaluation(url: str) -> Iterator[Check]:
    """A result goes with what it was computed from."""
    result, names = storage.join(url, RESULT), storage.list_names(url)
    if RESULT in names:
        yield Check(RESULT, lambda: read_result(url), EVALUATE, (result,))
        with contextlib.suppress(ValidationError):
            for name, sha256 in read_result(url).files.items():
                file = storage.join(url, name)
                run = functools.partial(_check_file, file, sha256)
                yield Check(name, run, EVALUATE, (result, file))
    for name in names:
        if name.startswith("chunk-") and name.endswith(".json"):
            images = name.removeprefix("chunk-").removesuffix(".json")  # their range
            files = [storage.join(url, file) for file in names if images in file]
            run = functools.partial(_check_committed, storage.join(url, name))
            yield Check(name, run, EVALUATE, (result, storage.join(url, name), *files))


def _references(url: str) -> Iterator[Check]:
    for name in storage.sizes(url):
        if name.endswith(".json") and not name.startswith("weights/"):
            record = storage.join(url, name)
            run = functools.partial(_check_committed, record)
            rebuild = "`diffit references` or `diffit evaluate`"
            yield Check(name, run, rebuild, (record, record.removesuffix(".json")))


def _check_committed(record: str) -> None:
    for file, sha256 in read_record(record).files.items():
        _check_file(storage.join(storage.parent(record), file), sha256)


def _check_file(url: str, sha256: str) -> None:
    with storage.local_copy(url) as path:
        if storage.sha256_file(path) != sha256:
            raise DamagedFile(url, f"{url.rsplit('/', 1)[-1]} differs from its recorded sha256")


def _features(url: str) -> Iterator[Check]:
    """Another network would not measure the same: a fitted one is never removed."""
    for name in storage.list_names(url):
        folder = storage.join(url, name)

        def run(folder: str = folder) -> None:
            data = storage.read_bytes(storage.join(folder, "features.json"))
            info = FeaturesInfo.model_validate_json(data)
            _check_file(storage.join(folder, "model.safetensors"), info.sha256)

        if storage.exists(storage.join(folder, "features.json")):
            yield Check(name, run, "a copy; or delete it, fit another, and evaluate again")


def _root(root: str) -> Iterator[Check]:
    folders = ["latents", "runs"]
    for run in storage.list_names(storage.join(root, "evaluations")):
        steps = storage.list_names(storage.join(root, "evaluations", run))
        folders += [f"evaluations/{run}/{step}" for step in steps if step.startswith("step-")]
    for folder in folders:
        for name in storage.list_names(storage.join(root, folder)):
            with contextlib.suppress(UserError):  # nothing was committed in it yet
                yield from _named(f"{folder}/{name}", _checks(storage.join(root, folder, name)))
    yield from _named("references", _references(storage.join(root, "references")))
    yield from _named("features", _features(storage.join(root, "features")))
    if storage.is_local(root) and storage.exists(storage.join(root, "mlflow.db")):
        yield Check("mlflow.db", lambda: _check_database(root), "a backup, or sqlite3's .recover")


def _named(path: str, checks: Iterable[Check]) -> Iterator[Check]:
    """The checks of a folder, named by their path from above it."""
    for check in checks:
        yield replace(check, name=f"{path}/{check.name}")


def _check_database(root: str) -> None:
    file = storage.local_path(storage.join(root, "mlflow.db"))
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as base:
            rows = base.execute("PRAGMA integrity_check(1)").fetchall()
    except sqlite3.DatabaseError as error:
        rows = [(str(error),)]
    if rows != [("ok",)]:
        raise DamagedFile(str(file), " ".join(str(rows[0][0]).split()))
