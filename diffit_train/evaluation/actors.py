"""The Ray actors of evaluations, and a pool that replaces actors that die."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray

from diffit_train import ray_session, storage
from diffit_train.config import Recipe
from diffit_train.data.sources import list_images
from diffit_train.errors import DiffitError
from diffit_train.evaluation import chunks, references
from diffit_train.evaluation.chunks import LABELS, Layout, Range
from diffit_train.evaluation.labels import choose_labels
from diffit_train.evaluation.reference_files import (
    opened_reference,
    reference_file,
    reference_identity,
)
from diffit_train.evaluation.references import FoundReference, PartTask, Reference
from diffit_train.progress import Progress

# A task whose actor died this often is taken to be the cause.
MAX_TRIES = 3

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluationTarget:
    """A checkpoint and its evaluation.

    Attributes:
        source: folder of the run.
        step: step of the checkpoint.
        url: folder of the evaluation.
        key: key of the evaluation.
    """

    source: str
    step: int
    url: str
    key: str


@dataclass(frozen=True)
class ChunkTask:
    """Images of an evaluation that are generated and committed together."""

    target: EvaluationTarget
    part: Range


class EvaluationActor:
    """A Ray actor that generates and measures images; loads autoencoder and features once."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.recipe = Recipe.model_validate(recipe)
        self.loaded: tuple[dict[str, Any], str, int] | None = None
        self.autoencoder: Any = None

    def ready(self) -> None:
        """Load the feature network; errors raised here keep their reason."""
        import torch

        from diffit_train.evaluation.feature_networks import load_features

        gpu = self.recipe.scaling.gpus_per_actor > 0
        self.device = torch.device("cuda" if gpu else "cpu")
        self.network = load_features(self.recipe, self.device)

    def chunk(self, recipe: dict[str, Any], task: ChunkTask) -> int:
        """Generate, measure and commit a range of images; return their number."""
        self._load(recipe, task)
        evaluate, (first, stop) = self.recipe.evaluate, task.part
        size, classes = evaluate.batch_size, self.recipe.data.num_classes
        pixels, measured = [], []
        for start in range(first, stop, size):
            indices = range(start, start + size)
            labels = choose_labels(evaluate.labels, evaluate.seed, indices, classes)
            keys = [(evaluate.seed, i) for i in indices]
            images = self.generator(keys, labels.tolist())
            rows = {LABELS: labels, **self.network.extract(images)}
            inside = slice(0, min(size, stop - start))
            pixels.append(images[inside])
            measured.append({name: values[inside] for name, values in rows.items()})
        joined = {name: np.concatenate([m[name] for m in measured]) for name in measured[0]}
        chunks.write_chunk(
            task.target.url, task.part, task.target.key, np.concatenate(pixels), joined
        )
        return task.part.size

    def _load(self, recipe: dict[str, Any], task: ChunkTask) -> None:
        if self.loaded == (recipe, task.target.source, task.target.step):
            return
        self.recipe = Recipe.model_validate(recipe)
        from diffit_train.data.autoencoder import load_autoencoder
        from diffit_train.evaluation.generate import Generator, run_weights

        if self.autoencoder is None:
            self.autoencoder = load_autoencoder(self.recipe, self.device)
        weights = run_weights(self.recipe, task.target.source, task.target.step)
        self.generator = Generator(self.recipe, weights, self.autoencoder)
        self.loaded = (recipe, task.target.source, task.target.step)

    def reference_part(self, task: PartTask, target: str) -> int:
        """Measure and commit a part of an image source; return its number of images."""
        part = references.measure_part(self.network, task)
        try:
            references.write_part(target, part)
        except FileNotFoundError:
            # A concurrent evaluation finished the same reference and removed the folder.
            references.write_part(target, part)
        return len(task.items)

    def npz_reference(self, file: str) -> Reference:
        """Read the reference from a file in ADM's or EDM's format."""

        def extract(pixels: np.ndarray) -> np.ndarray:
            return self.network.extract(pixels)[chunks.FEATURES]

        with (
            opened_reference(self.recipe, file) as path,
            references.opened_npz(self.recipe, path) as opened,
        ):
            return opened.read(self.recipe, extract)


class ActorPool:
    """Ray actors that take tasks as they become idle.

    An actor that dies is replaced, and its task goes to the next idle one: after the loss of a node
    the remaining actors do the work, and the replacements join once resources are free.

    Args:
        start: creates an actor, which must have a method `ready`.
        count: number of actors.
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
        """Run all tasks, in any order; yield (task, value) as each finishes.

        Args:
            call: starts a task on an actor.
            name: name of a task in errors.

        Raises:
            DiffitError: a task failed, or its actors died repeatedly.
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
                            f"{name(tasks[number])} failed {MAX_TRIES} times because its actor "
                            "died; lower evaluate.batch_size if it ran out of memory"
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
                    "evaluation failed: its actors die before they start; check Ray's logs, and "
                    "whether they ran out of memory"
                ) from error
            self._replace(actor)
            return
        self._deaths = 0
        self.idle.append(actor)

    def _replace(self, actor: Any) -> None:
        self.actors.remove(actor)
        self._begin()

    def close(self) -> None:
        """Stop the actors."""
        for actor in self.actors:
            ray.kill(actor)


class EvaluationPool:
    """The actors of evaluations that differ only in checkpoint, sampler, guidance and seed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        scaling = recipe.scaling
        count = scaling.evaluate_actors
        gpus = count * scaling.gpus_per_actor
        ray_session.require(count, gpus, "evaluation", scaling.wait_s)
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": scaling.gpus_per_actor or None}
        if not scaling.gpus_per_actor:
            options["runtime_env"] = {"env_vars": ray_session.KEEP_FREED_MEMORY}
        remote = ray.remote(**options)(EvaluationActor)
        plain = recipe.model_dump(mode="json")
        self.actors = ActorPool(lambda: remote.remote(plain), count)
        self._reference: FoundReference | None = None

    def serves(self, recipe: Recipe) -> bool:
        """Whether another recipe can use these actors and their reference."""
        mine, theirs = (_shared_setup(one) for one in (self.recipe, recipe))
        return mine == theirs

    def close(self) -> None:
        """Stop the actors."""
        self.actors.close()

    def generate(self, recipe: Recipe, target: EvaluationTarget) -> None:
        """Generate the missing chunks of an evaluation of a recipe that this pool serves."""
        evaluate, batches = recipe.evaluate, recipe.scaling.evaluate_batches
        layout = Layout(evaluate.samples, evaluate.batch_size, batches)
        missing = layout.missing(chunks.committed_chunks(target.url))
        done = evaluate.samples - sum(part.size for part in missing)

        plain = recipe.model_dump(mode="json")

        def call(actor: Any, task: ChunkTask) -> Any:
            return actor.chunk.remote(plain, task)

        def name(task: ChunkTask) -> str:
            return f"{storage.display_path(target.url)}/{chunks.chunk_name(task.part)}"

        tasks = [ChunkTask(target, part) for part in missing]
        title = f"evaluate step {target.step:,}"
        with Progress(title, evaluate.samples, "images", done) as shown:
            for _, count in self.actors.run(tasks, call, name):
                shown.update(shown.done + count)

    def reference(self) -> FoundReference:
        """The recipe's reference, computed if missing."""
        if self._reference is None:
            file = reference_file(self.recipe)
            self._reference = self._of_file(file) if file else self._of_images()
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

    def _of_images(self) -> FoundReference:
        listing = list_images(self.recipe)
        identity = references.source_identity(self.recipe, listing)
        url = references.reference_url(self.recipe, identity)
        parts = f"{url}.parts"
        tasks = list(references.part_tasks(self.recipe, listing))
        while not storage.exists(url):
            self._measure(tasks, parts)
            try:
                found = references.joined(
                    references.read_reference_parts(parts, tasks), listing.url
                )
            except FileNotFoundError:
                # A concurrent evaluation finished the same reference and removed its parts.
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
        with Progress("reference", total, "images", total - left) as shown:
            for _, count in self.actors.run(missing, call, references.part_name):
                shown.update(shown.done + count)


def _shared_setup(recipe: Recipe) -> dict[str, Any]:
    """The keys that determine what actors load and what a reference depends on."""
    plain = recipe.model_dump(mode="json", exclude={"train": True, "tracking": True})
    evaluate = plain.pop("evaluate")
    kept = ("features", "reference", "reference_images")
    return {**plain, "evaluate": {key: evaluate[key] for key in kept}}


def _get(call: Any) -> Any:
    """The value of a call; a DiffitError inside it is raised unchanged."""
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DiffitError):
            raise error.cause from error
        raise DiffitError(f"evaluation failed: {error.cause!r}") from error
