"""`diffit evaluate` and `diffit references`: Ray actors do the work piece by piece.

A chunk of pictures is committed as it is made, and so is a part of a reference: a rerun makes only
what is missing, and the result does not depend on the number of actors, nor on which of them died.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import ray

from diffit_train import ray_session, storage
from diffit_train.config import Recipe
from diffit_train.data.sources import list_pictures
from diffit_train.errors import DiffitError
from diffit_train.evaluation import chunks, references
from diffit_train.evaluation.chunks import LABELS, Layout, Range
from diffit_train.evaluation.generate import guidance_saving, network_evaluations
from diffit_train.evaluation.grid import draw_grid
from diffit_train.evaluation.labels import choose_labels
from diffit_train.evaluation.reference_files import (
    opened_reference,
    reference_file,
    reference_identity,
)
from diffit_train.evaluation.references import PartTask, Reference
from diffit_train.evaluation.result import (
    Result,
    evaluated_identity,
    evaluation_key,
    evaluation_url,
    features_digest,
    finished,
    run_url,
)
from diffit_train.evaluation.sample import class_names
from diffit_train.evaluation.scores import Figures
from diffit_train.progress import Progress, say
from diffit_train.runs.checkpoints import State, checkpoint_digest, checkpoint_url, read_state
from diffit_train.tracking import TAG_REFERENCE, Tracker, first_line, unreachable_errors

# A piece of work whose actors died this often kills them itself.
MAX_TRIES = 3
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """An evaluation of a checkpoint.

    Attributes:
        sweep: that it belongs to, or "".
        npz: write samples.npz beside the result.
        curve: under which its figures are points of the run's own curves over steps. Those of a
            sweep are not: there would be many at one step.
    """

    recipe: Recipe
    run: str
    step: int
    sweep: str = ""
    npz: bool = False
    curve: Literal["eval", "validation"] = "eval"

    @property
    def finished(self) -> Result | None:
        """Its result; None where it is to be done."""
        return finished(self.recipe, self.run, self.step)


def evaluate(requests: Sequence[Request], address: str | None = None) -> list[Result]:
    """Evaluate committed checkpoints on the Ray cluster at `address`, one after another.

    Rerunning continues. Actors are kept from one to the next where they can be.

    Raises:
        UserError: bad input; nothing was written.
        DiffitError: a chunk could not be made, or its figures are not finite.
    """
    for request in requests:
        check(request.recipe)
    results: list[Result] = []
    with ray_session.connected(address):
        fleet: Fleet | None = None
        try:
            for request in requests:
                if fleet is None or not fleet.serves(request.recipe):
                    if fleet is not None:
                        fleet.close()
                    fleet = Fleet(request.recipe)
                fleet.recipe = request.recipe
                results.append(_evaluate(request, fleet))
        finally:
            if fleet is not None:
                fleet.close()
    return results


def check(recipe: Recipe) -> None:
    """Refuse what an evaluation would fail on, before anything is started.

    The pictures of a reference are listed later, once: there may be millions.

    Raises:
        UserError: features or reference file cannot serve.
    """
    features_digest(recipe)
    references.check_reference_file(recipe)


def make_reference(recipe: Recipe, address: str | None = None) -> tuple[str, Reference]:
    """Compute the recipe's reference, or read it; where it is kept, and what it is.

    Raises:
        UserError: the pictures or the file cannot serve.
    """
    check(recipe)
    with ray_session.connected(address):
        fleet = Fleet(recipe)
        try:
            return fleet.found_reference().url, fleet.reference()
        finally:
            fleet.close()


def _evaluate(request: Request, fleet: Fleet) -> Result:
    recipe, run, step = request.recipe, request.run, request.step
    source = run_url(recipe, run)
    state = read_state(source, step)
    key = evaluation_key(recipe, source, step)
    url = evaluation_url(recipe, run, step, key)
    storage.remove_temporary(url)
    if saving := guidance_saving(recipe):
        say(saving)
    started_s = time.monotonic()
    reference = fleet.found_reference()
    fleet.generate(source, step, url, key)
    figures, labels, shown = _measured(recipe, url, key, reference.statistics)
    metrics = figures.values()
    for warning in figures.warnings():
        say(f"note: {warning}")
    grid = storage.join(url, "grid.png")
    numbers = "   ".join(f"{name} {value:.3g}" for name, value in metrics.items())
    draw_grid(shown, class_names(recipe), f"{run}, step {step:,}\n{numbers}", grid)
    if request.npz:
        write_npz(recipe, url, labels)
    cost = network_evaluations(recipe)
    try:
        child = _track(request, state, key, metrics, cost, grid, reference)
    except unreachable_errors() as error:
        raise DiffitError(
            f"the figures of step {step:,} are made ({numbers}), but MLflow does not take them: "
            f"{first_line(error)}; the same command tries again"
        ) from error
    result = Result(
        run=run,
        step=step,
        key=key,
        samples=recipe.evaluate.samples,
        metrics=metrics,
        grid=grid,
        seconds=time.monotonic() - started_s,
        network_evaluations=cost,
        evaluate=evaluated_identity(recipe),
        reference_digest=reference.digest,
        recipe_hash=recipe.train_hash(),
        mlflow_run_id=child,
    )
    storage.write_text(storage.join(url, "result.json"), result.model_dump_json(indent=1) + "\n")
    return result


def _measured(
    recipe: Recipe, url: str, key: str, reference: Reference
) -> tuple[Figures, list[np.ndarray], dict[int, list[np.ndarray]]]:
    """Figures, labels and the grid's pictures by class, reading chunk after chunk."""
    figures, labels = Figures(recipe, reference), []
    shown: dict[int, list[np.ndarray]] = {}
    evaluate = recipe.evaluate
    in_grid = _grid_labels(recipe)
    for part in chunks.committed_chunks(url):
        rows = chunks.read_chunk(url, part, key)
        figures.add(rows)
        labels.append(rows[LABELS])
        wanted = [
            (place, shown.setdefault(label, []))
            for place, label in enumerate(rows[LABELS].tolist())
            if label in in_grid and len(shown.get(label, ())) < evaluate.grid_columns
        ]
        pixels = chunks.read_pictures(url, part) if wanted else None
        for place, row in wanted:
            if pixels is not None and len(row) < evaluate.grid_columns:
                row.append(pixels[place])
    return figures, labels, shown


def _grid_labels(recipe: Recipe) -> set[int]:
    """Labels of the rows of the grid: the first that occur, as few random ones skip classes."""
    evaluate, classes = recipe.evaluate, recipe.data.num_classes
    labels = choose_labels(evaluate.labels, evaluate.seed, range(evaluate.samples), classes)
    return set(np.unique(labels)[: evaluate.grid_rows].tolist())


def write_npz(recipe: Recipe, url: str, labels: list[np.ndarray] | None = None) -> str:
    """Write an evaluation's pictures as ADM's samples.npz, if it is not there; its place."""
    target = storage.join(url, "samples.npz")
    if not storage.exists(target):
        if labels is None:
            key = url.rstrip("/").rsplit("/", 1)[-1]
            parts = chunks.committed_chunks(url)
            labels = [chunks.read_chunk(url, part, key)[LABELS] for part in parts]
        chunks.write_samples(url, target, recipe.evaluate.samples, labels)
        say(f"pictures: {storage.shown(target)}")
    return target


def _track(
    request: Request,
    state: State,
    key: str,
    metrics: dict[str, float],
    cost: float,
    grid: str,
    reference: FoundReference,
) -> str:
    """Log to a child of the training run, and to that run itself for its curve over steps.

    A killed evaluation that is run again logs the same values at the same step.
    """
    recipe, run = request.recipe, request.run
    tracker, source = Tracker.of(recipe), run_url(recipe, run)
    params = {k: v for k, v in recipe.flat().items() if k.startswith("evaluate.")}
    tags = {
        "diffit.recipe_hash": recipe.train_hash(),
        "diffit.evaluation_key": key,
        "diffit.checkpoint": checkpoint_url(source, state.step),
        "diffit.checkpoint_digest": checkpoint_digest(source, state.step),
        TAG_REFERENCE: reference.digest,
        "mlflow.source.name": "diffit evaluate",
    }
    if request.sweep:
        tags["diffit.sweep"] = request.sweep
    child = tracker.evaluation_run(
        recipe.tracking.experiment,
        state.mlflow_run_id,
        f"{state.step}/{key}",
        f"{run}-step-{state.step}-{key}",
        {**params, "step": state.step, "run": run},
        tags,
    )
    name = reference.url.rsplit("/", 1)[-1].removesuffix(".safetensors")
    tracker.log_dataset(child, name, name.rsplit("-", 1)[-1], reference.url)
    named = {f"eval/{name}": value for name, value in metrics.items()}
    curves = [(child, {**named, "cost/network_evaluations": cost})]
    if not request.sweep:
        own = {f"{request.curve}/{name}": value for name, value in metrics.items()}
        curves.append((state.mlflow_run_id, own))
    for run_id, values in curves:
        first = next(iter(values))
        if tracker.value_at(run_id, first, state.step) != values[first]:
            tracker.log_metrics(run_id, values, state.step)
    with storage.local_copy(grid) as path:
        tracker.log_artifact(child, path)
    tracker.finish(child)
    return child


# ---- Actors ----


@dataclass(frozen=True)
class ChunkTask:
    """Pictures of a checkpoint that are made and committed at once."""

    source: str
    step: int
    part: Range
    url: str
    key: str


class Worker:
    """A Ray actor that generates and measures; autoencoder and features are loaded once."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.recipe = Recipe.model_validate(recipe)
        self.loaded: tuple[dict[str, Any], str, int] | None = None
        self.autoencoder: Any = None

    def ready(self) -> None:
        """Load the feature network; raises here, where the reason can be told."""
        import torch

        from diffit_train.evaluation.features import load_features

        gpu = self.recipe.scaling.gpus_per_actor > 0
        self.device = torch.device("cuda" if gpu else "cpu")
        self.network = load_features(self.recipe, self.device)

    def chunk(self, recipe: dict[str, Any], task: ChunkTask) -> int:
        """Generate, measure and commit pictures `first` to `stop`; how many they are."""
        self._load(recipe, task)
        evaluate, (first, stop) = self.recipe.evaluate, task.part
        size, classes = evaluate.batch_size, self.recipe.data.num_classes
        pixels, measured = [], []
        for start in range(first, stop, size):
            indices = range(start, start + size)
            labels = choose_labels(evaluate.labels, evaluate.seed, indices, classes)
            keys = [(evaluate.seed, i) for i in indices]
            pictures = self.generator(keys, labels.tolist())
            rows = {LABELS: labels, **self.network.extract(pictures)}
            inside = slice(0, min(size, stop - start))
            pixels.append(pictures[inside])
            measured.append({name: values[inside] for name, values in rows.items()})
        joined = {name: np.concatenate([m[name] for m in measured]) for name in measured[0]}
        chunks.write_chunk(task.url, task.part, task.key, np.concatenate(pixels), joined)
        return task.part.size

    def _load(self, recipe: dict[str, Any], task: ChunkTask) -> None:
        if self.loaded == (recipe, task.source, task.step):
            return
        self.recipe = Recipe.model_validate(recipe)
        from diffit_train.data.autoencoder import load_autoencoder
        from diffit_train.evaluation.generate import Generator
        from diffit_train.evaluation.sample import run_weights

        if self.autoencoder is None:
            self.autoencoder = load_autoencoder(self.recipe, self.device)
        weights = run_weights(self.recipe, task.source, task.step)
        self.generator = Generator(self.recipe, weights, self.autoencoder)
        self.loaded = (recipe, task.source, task.step)

    def reference_part(self, task: PartTask, target: str) -> int:
        """Measure and commit a part of a picture source; how many pictures it has."""
        part = references.measure_part(self.network, task)
        try:
            references.write_part(target, part)
        except FileNotFoundError:
            # Another evaluation, done with the same, has removed the folder meanwhile.
            references.write_part(target, part)
        return len(task.items)

    def npz_reference(self, file: str) -> Reference:
        """The reference that a file of ADM or EDM holds."""

        def extract(pixels: np.ndarray) -> np.ndarray:
            return self.network.extract(pixels)[chunks.FEATURES]

        with (
            opened_reference(self.recipe, file) as path,
            references.opened_npz(self.recipe, path) as opened,
        ):
            return opened.read(self.recipe, extract)


class Actors:
    """Ray actors that take tasks as they become idle.

    One that dies is replaced, and its task goes to whichever is idle first: where a node is gone,
    those that are left do the work, and the new one joins them once there is room for it.

    Args:
        start: makes an actor; it must have a method `ready`.
        count: how many.
    """

    def __init__(self, start: Callable[[], Any], count: int) -> None:
        self.start = start
        self.actors: list[Any] = []
        self.idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._deaths = 0
        for _ in range(count):
            self._begin()

    def _begin(self) -> None:
        actor = self.start()
        self.actors.append(actor)
        self._starting[actor.ready.remote()] = actor

    def run(
        self, tasks: Sequence[T], call: Callable[[Any, T], Any], name: Callable[[T], str]
    ) -> Iterator[tuple[T, Any]]:
        """Do all tasks, in any order; (task, what came of it) as each ends.

        Args:
            call: starts a task on an actor.
            name: a task's name in errors.

        Raises:
            DiffitError: a task failed, or its actors died again and again.
        """
        waiting, tries = deque(range(len(tasks))), Counter[int]()
        running: dict[Any, tuple[Any, int]] = {}
        while waiting or running:
            while waiting and self.idle:
                actor, number = self.idle.pop(), waiting.popleft()
                tries[number] += 1
                running[call(actor, tasks[number])] = (actor, number)
            calls = [*running, *self._starting]
            ray.wait(calls, num_returns=1)
            ended, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
            for ready in ended:
                if ready in self._starting:
                    self._started(ready)
                    continue
                actor, number = running.pop(ready)
                try:
                    value = _get(ready)
                except ray.exceptions.RayActorError as error:
                    if tries[number] == MAX_TRIES:
                        raise DiffitError(
                            f"{name(tasks[number])} failed {MAX_TRIES} times: its actor died; "
                            "lower evaluate.batch_size if memory ran out"
                        ) from error
                    waiting.append(number)
                    self._replace(actor)
                    continue
                self.idle.append(actor)
                yield tasks[number], value

    def _started(self, ready: Any) -> None:
        actor = self._starting.pop(ready)
        try:
            _get(ready)
        except ray.exceptions.RayActorError as error:
            self._deaths += 1
            if self._deaths == MAX_TRIES * len(self.actors):
                raise DiffitError(
                    "evaluation failed: its actors die before they have begun; see Ray's logs, "
                    "and whether memory ran out"
                ) from error
            self._replace(actor)
            return
        self._deaths = 0
        self.idle.append(actor)

    def _replace(self, actor: Any) -> None:
        self.actors.remove(actor)
        self._begin()

    def close(self) -> None:
        """End the actors."""
        for actor in self.actors:
            ray.kill(actor)


class FoundReference(NamedTuple):
    """A reference and where it is kept.

    `digest` tells what it is: the SHA-256 of a file, else a hash of pictures and features.
    """

    url: str
    digest: str
    statistics: Reference


class Fleet:
    """The actors of evaluations that differ in checkpoint, sampler, guidance and seed only."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        scaling = recipe.scaling
        count = scaling.evaluate_actors
        ray_session.require(count, count * scaling.gpus_per_actor, "evaluation")
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": scaling.gpus_per_actor or None}
        if not scaling.gpus_per_actor:
            options["runtime_env"] = {"env_vars": ray_session.KEEP_FREED_MEMORY}
        remote = ray.remote(**options)(Worker)
        plain = recipe.model_dump(mode="json")
        self.actors = Actors(lambda: remote.remote(plain), count)
        self._reference: FoundReference | None = None

    def serves(self, recipe: Recipe) -> bool:
        """Whether these actors, and their reference, are those of another recipe too."""
        mine, theirs = (_lasting(one) for one in (self.recipe, recipe))
        return mine == theirs

    def close(self) -> None:
        """End the actors."""
        self.actors.close()

    def generate(self, source: str, step: int, url: str, key: str) -> None:
        """Make the chunks that are missing."""
        evaluate, batches = self.recipe.evaluate, self.recipe.scaling.evaluate_batches
        layout = Layout(evaluate.samples, evaluate.batch_size, batches)
        missing = layout.missing(chunks.committed_chunks(url))
        done = evaluate.samples - sum(part.size for part in missing)

        plain = self.recipe.model_dump(mode="json")

        def call(actor: Any, task: ChunkTask) -> Any:
            return actor.chunk.remote(plain, task)

        def name(task: ChunkTask) -> str:
            return f"{storage.shown(url)}/{chunks.chunk_name(task.part)}"

        tasks = [ChunkTask(source, step, part, url, key) for part in missing]
        title = f"evaluate step {step:,}"
        with Progress(title, evaluate.samples, "pictures", done) as shown:
            for _, count in self.actors.run(tasks, call, name):
                shown.update(shown.done + count)

    def reference(self) -> Reference:
        """The recipe's reference, made where it is missing."""
        return self.found_reference().statistics

    def found_reference(self) -> FoundReference:
        """The recipe's reference, made where it is missing, and where it is kept."""
        if self._reference is None:
            file = reference_file(self.recipe)
            self._reference = self._of_file(file) if file else self._of_pictures()
        return self._reference

    def _of_file(self, file: str) -> FoundReference:
        digest = reference_identity(self.recipe)
        assert digest is not None, "the reference was downloaded when the recipe was checked"
        identity = references.file_identity(self.recipe, digest)
        url = references.reference_url(self.recipe, identity)
        if not storage.exists(url):
            ((_, found),) = self.actors.run(
                [file], lambda actor, task: actor.npz_reference.remote(task), str
            )
            references.write_reference(url, identity, found)
        return FoundReference(url, digest, references.read_reference(url, identity))

    def _of_pictures(self) -> FoundReference:
        listing = list_pictures(self.recipe)
        identity = references.source_identity(self.recipe, listing)
        url = references.reference_url(self.recipe, identity)
        parts = f"{url}.parts"
        tasks = list(references.part_tasks(self.recipe, listing))
        while not storage.exists(url):
            self._measure(tasks, parts)
            try:
                found = references.joined(references.read_parts(parts, tasks), listing.url)
            except FileNotFoundError:
                # Another evaluation was at the same, has finished it and cleared up.
                continue
            references.write_reference(url, identity, found)
        storage.remove(parts)
        return FoundReference(url, identity, references.read_reference(url, identity))

    def _measure(self, tasks: Sequence[PartTask], url: str) -> None:
        there = set(storage.list_names(url))
        missing = [task for task in tasks if references.part_name(task) not in there]

        def call(actor: Any, task: PartTask) -> Any:
            return actor.reference_part.remote(task, storage.join(url, references.part_name(task)))

        total, left = (sum(len(task.items) for task in some) for some in (tasks, missing))
        with Progress("reference", total, "pictures", total - left) as shown:
            for _, count in self.actors.run(missing, call, references.part_name):
                shown.update(shown.done + count)


def _lasting(recipe: Recipe) -> dict[str, Any]:
    """What actors have loaded, and what a reference depends on."""
    plain = recipe.model_dump(mode="json", exclude={"train": True, "tracking": True})
    evaluate = plain.pop("evaluate")
    kept = ("features", "reference", "reference_pictures")
    return {**plain, "evaluate": {key: evaluate[key] for key in kept}}


def _get(call: Any) -> Any:
    """The value of a call; a failure inside it is raised as what it was."""
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DiffitError):
            raise error.cause from error
        raise DiffitError(f"evaluation failed: {error.cause!r}") from error
