"""The Ray actors of evaluations: a pool that replaces actors that die, and what it is used for."""

from __future__ import annotations

import math
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
from diffit_train.evaluation.reference_files import reference_file, reference_identity
from diffit_train.evaluation.references import FoundReference, PartTask
from diffit_train.evaluation.scoring import grid_rows
from diffit_train.hang import processes
from diffit_train.hang.processes import Process
from diffit_train.progress import Progress, say

# A task whose actor died this often is taken to be the cause.
MAX_TRIES = 3
# Tasks of an actor at a time: while one commits its images, the next generates.
SLOTS = 2

# Between looks at actors that may hang.
LOOK_S = 2.0

T = TypeVar("T")


class ActorPool:
    """Ray actors that take tasks as they become idle.

    An actor that dies is replaced, and its tasks go to the next idle ones: after the loss of a node
    the remaining actors do the work, and the replacements join once resources are free. An actor
    whose task takes far longer than others is killed.

    Args:
        start: creates an actor, which must have a method `introduce` that returns its
            `Process`, and a method `ready` that returns its age in seconds.
        count: number of actors.
        slots: tasks of an actor at a time.
        hang_s: what a task may take in any case; see `processes.limit_s`.
        stacks_url: folder for stack traces of killed actors.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        count: int,
        slots: int = 1,
        hang_s: float = math.inf,
        stacks_url: str = "",
    ) -> None:
        self.start, self.slots = start, slots
        self.hang_s, self.stacks_url = hang_s, stacks_url
        self.actors: list[Any] = []
        self.idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._loading: dict[Any, tuple[Any, float]] = {}
        self._processes: dict[Any, Process] = {}
        self._durations_s: dict[Any, list[float]] = {}
        self._deaths = 0
        self._born_s: dict[Any, float] = {}
        self._ended_s = 0.0
        for _ in range(count):
            self._begin()

    def _begin(self) -> None:
        actor = self.start()
        self.actors.append(actor)
        self._starting[actor.introduce.remote()] = actor

    def run(
        self, tasks: Sequence[T], call: Callable[[Any, T], Any], name: Callable[[T], str]
    ) -> Iterator[tuple[T, Any]]:
        """Run all tasks, started in order; yield (task, value) as each finishes.

        Args:
            call: starts a task on an actor.
            name: name of a task in errors.

        Raises:
            DiffitError: a task failed, or its actors died repeatedly.
        """
        waiting, tries = deque(range(len(tasks))), Counter[int]()
        self._durations_s = {}
        running: dict[Any, tuple[Any, int, float]] = {}
        while waiting or running:
            while waiting and self.idle:
                actor, number = self._least_busy(), waiting.popleft()
                tries[number] += 1
                running[call(actor, tasks[number])] = (actor, number, time.monotonic())
            calls = [*running, *self._starting, *self._loading]
            ray.wait(calls, num_returns=1, timeout=LOOK_S)
            ended, going = ray.wait(calls, num_returns=len(calls), timeout=0)
            # Before anything is yielded: what ends while the caller is busy does not hang.
            since = {one: (actor, begun_s) for one, (actor, _, begun_s) in running.items()}
            since |= self._loading
            self._end_hanging([since[one] for one in going if one in since])
            for ready in ended:
                if ready in self._starting or ready in self._loading:
                    self._started(ready)
                    continue
                actor, number, begun_s = running.pop(ready)
                try:
                    value = _get(ready)
                except ray.exceptions.RayActorError as error:
                    if tries[number] == MAX_TRIES:
                        raise DiffitError(
                            f"{name(tasks[number])} failed {MAX_TRIES} times because its actor "
                            "died or hung; lower evaluate.batch_size if it ran out of memory"
                        ) from error
                    waiting.appendleft(number)
                    self._replace(actor)
                    continue
                self.idle.append(actor)
                self._durations_s.setdefault(actor, []).append(time.monotonic() - begun_s)
                yield tasks[number], value

    def _end_hanging(self, working: Sequence[tuple[Any, float]]) -> None:
        """Kill actors that take too long; their calls then fail.

        Args:
            working: actors that have a task or load, and since when.
        """
        taken = [duration_s for some in self._durations_s.values() for duration_s in some]
        for actor, since_s in working:
            # An actor's first task loads weights and compiles.
            known_s = taken if actor in self._durations_s else []
            taken_s = time.monotonic() - since_s
            if taken_s > processes.limit_s(self.hang_s, known_s) and actor in self._processes:
                process = self._processes.pop(actor)
                what = f"{process.name} has evaluated for {taken_s:.0f} s without a result"
                processes.end_and_report(process, what, self.stacks_url, say)
                ray.kill(actor)

    def _least_busy(self) -> Any:
        """Take a slot of the actor with the most free ones."""
        free = Counter(self.idle)
        actor = max(self.idle, key=lambda one: free[one])
        self.idle.remove(actor)
        return actor

    def _started(self, call: Any) -> None:
        """An actor has answered `introduce` or `ready`, or died."""
        introduced = call in self._starting
        actor = self._starting.pop(call) if introduced else self._loading.pop(call)[0]
        try:
            value = _get(call)
        except ray.exceptions.RayActorError as error:
            self._deaths += 1
            if self._deaths == MAX_TRIES * len(self.actors):
                raise DiffitError(
                    "evaluation failed: its actors die before they start; check Ray's logs, and "
                    "whether they ran out of memory"
                ) from error
            self._replace(actor)
            return
        if introduced:
            self._processes[actor] = value
            self._loading[actor.ready.remote()] = (actor, time.monotonic())
            return
        self._deaths = 0
        self._born_s[actor] = time.monotonic() - value
        self.idle += [actor] * self.slots

    def _replace(self, actor: Any) -> None:
        # All tasks of a dead actor fail, but it is replaced once.
        if actor not in self.actors:
            return
        self._forget(actor)
        self.idle = [other for other in self.idle if other is not actor]
        self._begin()

    def _forget(self, actor: Any) -> None:
        self.actors.remove(actor)
        self._processes.pop(actor, None)
        if actor in self._born_s:
            self._ended_s += time.monotonic() - self._born_s.pop(actor)

    def existed_s(self) -> float:
        """Seconds for which actors have existed, added up."""
        now_s = time.monotonic()
        return self._ended_s + sum(now_s - born_s for born_s in self._born_s.values())

    def close(self) -> None:
        """Stop the actors."""
        for actor in list(self.actors):
            ray.kill(actor)
            self._forget(actor)


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
    def idle_share(self) -> float | None:
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
        self._actors: ActorPool | None = None
        self._reference: FoundReference | None = None
        self._worked_s = 0.0

    @property
    def actors(self) -> ActorPool:
        """The actors, started now if they were not.

        Raises:
            UserError: the cluster has too few CPUs or GPUs.
        """
        if self._actors is None:
            scaling = self.recipe.scaling
            ray_session.require(*scaling.needs("evaluate"), "evaluation", scaling.wait_s)
            options: dict[str, Any] = {
                "num_cpus": 1,
                "num_gpus": scaling.gpus_per_actor or None,
                "max_concurrency": SLOTS,
            }
            if not scaling.gpus_per_actor:
                options["runtime_env"] = {"env_vars": ray_session.KEEP_FREED_MEMORY}
            remote = ray.remote(**options)(EvaluationActor)
            plain = self.recipe.model_dump(mode="json")
            count = scaling.evaluate_actors
            stacks = storage.join(self.recipe.storage.root, processes.FOLDER)
            self._actors = ActorPool(
                lambda: remote.remote(plain), count, SLOTS, scaling.hang_s, stacks
            )
        return self._actors

    def serves(self, recipe: Recipe) -> bool:
        """Whether another recipe can use these actors and their reference."""
        mine, theirs = (_shared_setup(one) for one in (self.recipe, recipe))
        return mine == theirs

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
            return actor.chunk.remote(plain[task.number], task.chunk)

        def name(task: _Task) -> str:
            url = storage.display_path(task.chunk.target.url)
            return f"{url}/{chunks.chunk_name(task.chunk.part)}"

        if tasks:
            for task, seconds in self.actors.run(tasks, call, name):
                self._worked_s += seconds
                yield task.number, task.chunk.part

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
        if not references.is_stored(url):
            ((_, found),) = self.actors.run(
                [file], lambda actor, task: actor.npz_reference.remote(task), str
            )
            references.write_reference(url, identity, found)
        return FoundReference(url, identity, digest)

    def _of_images(self) -> FoundReference:
        known = references.encoded_identity(self.recipe)
        if known is not None:
            url = references.reference_url(self.recipe, known)
            if references.is_stored(url):
                storage.remove(f"{url}.parts")  # of a killed command
                return FoundReference(url, known, known)
        listing = list_images(self.recipe)
        identity = references.source_identity(self.recipe, listing.digest())
        references.remember_listing(self.recipe, listing)
        url = references.reference_url(self.recipe, identity)
        parts = f"{url}.parts"
        tasks = list(references.part_tasks(self.recipe, listing))
        while not references.is_stored(url):
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
        return FoundReference(url, identity, identity)

    def _measure(self, tasks: Sequence[PartTask], url: str) -> None:
        there = set(storage.list_names(url))

        def is_there(task: PartTask) -> bool:
            name = references.part_name(task)
            return {name, f"{name}.json"} <= there

        missing = [task for task in tasks if not is_there(task)]

        def call(actor: Any, task: PartTask) -> Any:
            return actor.reference_part.remote(task, storage.join(url, references.part_name(task)))

        total, left = (sum(len(task.items) for task in some) for some in (tasks, missing))
        with Progress("reference", total, "images", total - left) as shown:
            if missing:
                for _, (count, seconds) in self.actors.run(missing, call, references.part_name):
                    self._worked_s += seconds
                    shown.update(shown.done + count)


def _kept(one: Generation, part: Range) -> tuple[int, ...] | None:
    return None if one.keep_all else tuple(grid_rows(one.recipe, part))


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
