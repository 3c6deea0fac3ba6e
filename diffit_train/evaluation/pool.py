"""The Ray actors of evaluations, which Ray restarts when they die, and what they are used for."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import ray

from diffit_train import ray_session, storage
from diffit_train.config import Recipe
from diffit_train.data.sources import list_images
from diffit_train.errors import DiffitError
from diffit_train.evaluation import chunks, references
from diffit_train.evaluation.actors import ChunkTask, EvaluationActor, EvaluationTarget
from diffit_train.evaluation.chunks import Range
from diffit_train.evaluation.references import PartTask, ReferenceSource, StoredReference
from diffit_train.evaluation.scores import grid_rows
from diffit_train.progress import Progress

# A task whose actor died this often is taken to be the cause.
MAX_TRIES = 3
# Tasks of an actor at a time: while one commits its images, the next generates.
SLOTS = 2

T = TypeVar("T")


class Actors:
    """Ray actors that take tasks as they become idle.

    A task whose actor dies goes to the next idle one: after the loss of a node the remaining actors
    do the work, and those that Ray restarts join once resources are free. (With
    `ray.util.ActorPool`, or in a pipeline of Ray Data, the task would wait for its own actor.)

    Args:
        start: creates an actor, which must have a method `ready` that loads what it needs. Ray must
            restart it (`max_restarts=-1`) and may repeat its tasks (`max_task_retries=-1`).
    """

    def __init__(self, start: Callable[[], Any], count: int) -> None:
        self.actors = [start() for _ in range(count)]
        self.begun_s = time.monotonic()
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        for actor in self.actors:
            self._start(actor)

    def _start(self, actor: Any) -> None:
        self._starting[actor.ready.options(max_task_retries=MAX_TRIES).remote()] = actor

    def run(
        self, tasks: Sequence[T], call: Callable[[Any, T], Any], name: Callable[[T], str]
    ) -> Iterator[tuple[T, Any]]:
        """Run all tasks, started in order; yield (task, value) as each finishes.

        Args:
            call: starts a task on an actor, without retries by Ray.
            name: name of a task in errors.

        Raises:
            DiffitError: a task or the start of an actor failed, or a task's actors died repeatedly.
        """
        waiting, deaths = deque(enumerate(tasks)), Counter[int]()
        running: dict[Any, tuple[Any, int, T]] = {}
        while waiting or running:
            while waiting and self._idle:
                actor = max(self._idle, key=self._idle.count)  # the least busy
                self._idle.remove(actor)
                number, task = waiting.popleft()
                running[call(actor, task)] = (actor, number, task)
            (done,), _ = ray.wait([*running, *self._starting], num_returns=1)
            if done in self._starting:
                self._started(done)
                continue
            actor, number, task = running.pop(done)
            try:
                value = _get(done)
            except ray.exceptions.RayActorError as error:
                deaths[number] += 1
                if deaths[number] == MAX_TRIES:
                    raise DiffitError(
                        f"{name(task)} failed {MAX_TRIES} times because its actor died; lower "
                        "evaluate.batch_size if it ran out of memory"
                    ) from error
                waiting.appendleft((number, task))
                if actor not in self._starting.values():  # all of its tasks fail
                    self._idle = [other for other in self._idle if other is not actor]
                    self._start(actor)
                continue
            self._idle.append(actor)
            yield task, value

    def _started(self, ready: Any) -> None:
        try:
            _get(ready)
        except ray.exceptions.RayActorError as error:
            raise DiffitError(
                "evaluation failed: its actors die before they start; check Ray's logs, and "
                "whether they ran out of memory"
            ) from error
        self._idle += [self._starting.pop(ready)] * SLOTS

    def existed_s(self) -> float:
        """Seconds for which actors have existed, added up."""
        return len(self.actors) * (time.monotonic() - self.begun_s)

    def close(self) -> None:
        """Stop the actors."""
        for actor in self.actors:
            ray.kill(actor)


class Generation(NamedTuple):
    """The images of an evaluation that are still to be generated.

    `keep_all` says whether all images are stored, or those of the grid only.
    """

    recipe: Recipe
    target: EvaluationTarget
    missing: Sequence[Range]
    keep_all: bool


class Usage(NamedTuple):
    """Seconds for which actors existed, and those in which they generated or measured images."""

    existed_s: float
    worked_s: float

    def since(self, before: Usage) -> Usage:
        """What was added after `before`."""
        return Usage(self.existed_s - before.existed_s, self.worked_s - before.worked_s)

    @property
    def idle_fraction(self) -> float | None:
        """Fraction of the time in which actors existed without work; None without actors."""
        return max(0.0, 1.0 - self.worked_s / self.existed_s) if self.existed_s > 0 else None


@dataclass(frozen=True)
class _Task:
    """A chunk of the `number`-th generation."""

    number: int
    chunk: ChunkTask


class EvaluationPool:
    """The actors of evaluations that differ only in checkpoint, sampler, guidance and seed.

    They are started when they are first needed: an evaluation whose images are all there, against a
    reference that is, needs none.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._actors: Actors | None = None
        self._reference: StoredReference | None = None
        self._worked_s = 0.0

    @property
    def actors(self) -> Actors:
        """The actors, started now if they were not.

        Raises:
            UserError: the cluster has too few CPUs or GPUs.
        """
        if self._actors is None:
            scaling = self.recipe.scaling
            ray_session.require(
                *scaling.needs("evaluate"), "evaluation", scaling.node_wait_timeout_s
            )
            options: dict[str, Any] = {
                "num_cpus": 1,
                "num_gpus": scaling.gpus_per_actor or None,
                "max_concurrency": SLOTS,
                "max_restarts": -1,
                "max_task_retries": -1,
            }
            if not scaling.gpus_per_actor:
                options["runtime_env"] = {"env_vars": ray_session.KEEP_FREED_MEMORY}
            remote = ray.remote(**options)(EvaluationActor)
            plain = self.recipe.model_dump(mode="json")
            self._actors = Actors(lambda: remote.remote(plain), scaling.evaluate_actors)
        return self._actors

    def usage(self) -> Usage:
        """How long the actors have existed and worked."""
        existed_s = self._actors.existed_s() if self._actors else 0.0
        return Usage(existed_s, self._worked_s)

    def close(self) -> None:
        """Stop the actors."""
        if self._actors is not None:
            self._actors.close()

    def generate(self, wanted: Sequence[Generation]) -> Iterator[tuple[int, Range]]:
        """Generate what is missing of evaluations of recipes that this pool serves.

        All chunks are in one queue, so that no actor waits for the end of an evaluation.

        Yields:
            Number of the evaluation, and a chunk of it that has been committed.
        """
        plain = [one.recipe.model_dump(mode="json") for one in wanted]
        tasks = [
            _Task(number, ChunkTask(one.target, part, _kept(one, part)))
            for number, one in enumerate(wanted)
            for part in one.missing
        ]

        def call(actor: Any, task: _Task) -> Any:
            return _once(actor.chunk).remote(plain[task.number], task.chunk)

        def name(task: _Task) -> str:
            url = storage.display_path(task.chunk.target.url)
            return f"{url}/{chunks.chunk_name(task.chunk.part)}"

        if tasks:
            for task, seconds in self.actors.run(tasks, call, name):
                self._worked_s += seconds
                yield task.number, task.chunk.part

    def reference(self) -> StoredReference:
        """The recipe's reference, computed if missing."""
        if self._reference is None:
            source = ReferenceSource.of(self.recipe)
            self._reference = self._of_file(source) if source.file else self._of_images(source)
        return self._reference

    def _of_file(self, source: ReferenceSource) -> StoredReference:
        stored = source.stored()
        assert stored is not None, "the reference was downloaded when the recipe was checked"
        if not stored.exists:
            ((_, reference),) = self.actors.run(
                [source.file], lambda actor, _: _once(actor.npz_reference).remote(), str
            )
            stored.write(reference)
        return stored

    def _of_images(self, source: ReferenceSource) -> StoredReference:
        stored = source.stored()
        if stored is None or not stored.exists:
            listing = list_images(self.recipe)
            stored = source.stored(listing)
            assert stored is not None
            tasks = references.part_tasks(self.recipe, listing)
            while not stored.exists:
                self._measure(tasks, stored.parts)
                try:
                    parts = references.read_reference_parts(stored.parts, tasks)
                    stored.write(references.joined(parts, listing.url))
                except FileNotFoundError:
                    # A concurrent evaluation finished the same reference and removed its parts.
                    continue
        storage.remove(stored.parts)
        return stored

    def _measure(self, tasks: Sequence[PartTask], url: str) -> None:
        there = set(storage.list_names(url))

        missing = [task for task in tasks if not {task.name, f"{task.name}.json"} <= there]

        def call(actor: Any, task: PartTask) -> Any:
            return _once(actor.reference_part).remote(task, storage.join(url, task.name))

        total, left = (sum(len(task.items) for task in some) for some in (tasks, missing))
        with Progress("reference", total, "images", total - left) as shown:
            if missing:
                for _, (count, seconds) in self.actors.run(missing, call, lambda t: t.name):
                    self._worked_s += seconds
                    shown.update(shown.done + count)


def _kept(one: Generation, part: Range) -> tuple[int, ...] | None:
    return None if one.keep_all else tuple(grid_rows(one.recipe, part))


def _once(method: Any) -> Any:
    """A method of an actor that Ray does not repeat when the actor dies."""
    return method.options(max_task_retries=0)


def _get(call: Any) -> Any:
    """The value of a call; a DiffitError inside it is raised unchanged."""
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DiffitError):
            raise error.cause from error
        raise DiffitError(f"evaluation failed: {error.cause!r}") from error
