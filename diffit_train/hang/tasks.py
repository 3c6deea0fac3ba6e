"""Ends processes whose task of a Ray Data pipeline hangs, as Ray Data waits for it without end.

Tasks list themselves on a board, an actor. A thread of the driver kills the process of a task that
takes far longer than others of its kind; Ray then repeats the task elsewhere.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffit_train.background import beside
from diffit_train.hang import processes
from diffit_train.hang.processes import Process, this_process

LOOK_S = 2.0


class Task(NamedTuple):
    """A task in progress.

    Attributes:
        kind: of tasks that take about as long as each other.
        name: what the task works on; empty if several processes work on the same.
        process: that does it.
        begun_s: when it was listed, by the board's clock.
    """

    kind: str
    name: str
    process: Process
    begun_s: float

    def said(self, taken_s: float) -> str:
        """What it has done for how long, as a sentence."""
        doing = f"{self.kind} {self.name}".strip()
        return f"{self.process.name} has been {doing} for {taken_s:.0f} s"


class Board:
    """The tasks in progress, and how long others took."""

    def __init__(self) -> None:
        self.tasks: dict[str, Task] = {}
        self.durations_s: dict[str, list[float]] = defaultdict(list)
        self.kills: Counter[tuple[str, str]] = Counter()
        self.idle: dict[Process, str] = {}
        self.changed_s = time.monotonic()

    def begin(self, token: str, kind: str, name: str, process: Process) -> int:
        """List a task; returns how often a process was killed over it."""
        for other, task in list(self.tasks.items()):
            if name and (task.kind, task.name) == (kind, name):  # its process died
                del self.tasks[other]
        self.changed_s = time.monotonic()
        self.tasks[token] = Task(kind, name, process, self.changed_s)
        self.idle.pop(process, None)
        return self.kills[kind, name]

    def end(self, token: str) -> None:
        """Take a task off the list."""
        self.changed_s = time.monotonic()
        task = self.tasks.pop(token, None)
        if task is not None:
            self.durations_s[task.kind].append(self.changed_s - task.begun_s)
            self.idle[task.process] = task.kind

    def take_hanging(self, hang_s: float) -> list[tuple[Task, float]]:
        """Take the tasks that hang off the list; with each, the seconds that it has taken."""
        now_s, found = time.monotonic(), []
        for token, task in list(self.tasks.items()):
            taken_s = now_s - task.begun_s
            if taken_s > processes.limit_s(hang_s, self.durations_s[task.kind]):
                del self.tasks[token]
                self.kills[task.kind, task.name] += 1
                found.append((task, taken_s))
        return found or ([] if self.tasks else self._take_idle(hang_s, now_s))

    def _take_idle(self, hang_s: float, now_s: float) -> list[tuple[Task, float]]:
        """All processes, if none has begun anything for long: Ray may wait for a stopped one."""
        idle_s = now_s - self.changed_s
        known = [processes.limit_s(hang_s, self.durations_s[k]) for k in set(self.idle.values())]
        if not known or idle_s <= max(known):
            return []
        found = [(Task("idle", "", process, self.changed_s), idle_s) for process in self.idle]
        self.idle, self.changed_s = {}, now_s
        return found


def new_board() -> Any:
    """A board on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()


@contextmanager
def listed(board: Any, kind: str, name: str = "") -> Iterator[int]:
    """List a task on a board during the block; yields how often a process was killed over it."""
    token = uuid.uuid4().hex
    kills = ray.get(board.begin.remote(token, kind, name, this_process()))
    try:
        yield kills
    finally:
        board.end.remote(token)


@contextmanager
def ending_hanging(
    board: Any, hang_s: float, stacks_url: str, say: Callable[[str], None]
) -> Iterator[None]:
    """Kill processes whose tasks hang, during the block.

    Args:
        hang_s: what a task may take in any case; see `processes.limit_s`.
        stacks_url: folder for their stack traces.
    """

    def watch(ended: threading.Event) -> None:
        with suppress(RayActorError):  # the board's node is the driver's: the session is over
            while not ended.wait(min(LOOK_S, hang_s / 5)):
                for task, taken_s in ray.get(board.take_hanging.remote(hang_s)):
                    said = task.said(taken_s)
                    processes.end_and_report(task.process, said, stacks_url, say)

    try:
        with beside("task-watch", watch):
            yield
    finally:
        ray.kill(board)
