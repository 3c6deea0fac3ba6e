"""Processes that neither work nor end: where they hang, and how to end them.

A process that introduces itself (`this_process`) can be ended from any node of the Ray cluster:
`end_processes` fetches the stack traces of its threads, which a signal handler in C writes even
while the interpreter is blocked, and kills it. A stopped process (SIGSTOP) writes none, but is
killed as well.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil

from diffit_train import storage
from diffit_train.errors import DiffitError

# Of a run or a root, for stack traces of processes that hung.
FOLDER = "stacks"
# Until a first step, chunk or shard is done: kernels compile, caches are cold.
FIRST_FACTOR = 4.0
DUMP_S = 2.0
ANSWER_S = 30.0
ENDED = "it has ended"
SIGNAL = getattr(signal, "SIGUSR2", None)

_stacks: IO[bytes] | None = None


class Process(NamedTuple):
    """A process of the cluster.

    Attributes:
        node: Ray's id of its node.
        started: when it was started, as its machine says; tells it from a later one of its number.
        stacks: descriptor of the file that its stack traces go to; -1 if it writes none.
    """

    node: str
    host: str
    pid: int
    started: float
    stacks: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"process {self.pid} on {self.host}"


def this_process() -> Process:
    """Introduce this process, a worker of Ray, and let it write stack traces on a signal."""
    global _stacks
    import ray

    # The file has no name, so that nothing is left of a killed process; read through /proc.
    if _stacks is None and SIGNAL is not None and sys.platform == "linux":
        _stacks = tempfile.TemporaryFile(prefix="diffit-stacks-")  # noqa: SIM115, kept to the end
        faulthandler.register(SIGNAL, file=_stacks, all_threads=True)
    return Process(
        node=ray.get_runtime_context().get_node_id(),
        host=socket.gethostname(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        stacks=_stacks.fileno() if _stacks is not None else -1,
    )


def running(pid: int, started: float) -> psutil.Process | None:
    """The process of this machine with a number, unless it has ended and another has its number.

    Args:
        started: when it was started, as psutil's `create_time` gives it, in seconds.
    """
    try:
        process = psutil.Process(pid)
        another = abs(process.create_time() - started) > 1.0
        return None if another or process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


class Ending(NamedTuple):
    """How a process was ended.

    Attributes:
        text: the stack traces of its threads, or why there are none.
        of_itself: whether it had ended before it was killed.
    """

    text: str
    of_itself: bool


def stacks_here(process: Process) -> str:
    """The stack traces of a process of this node, or why there are none."""
    found = running(process.pid, process.started)
    if found is None:
        return ENDED
    try:
        state = found.status()
        if process.stacks < 0 or state == psutil.STATUS_STOPPED:
            return f"its state is {state!r}, in which it writes no stack traces"
        return _dumped(found, Path(f"/proc/{process.pid}/fd/{process.stacks}"))
    except psutil.NoSuchProcess:
        return ENDED
    except psutil.AccessDenied as error:
        return f"its stack traces cannot be asked for: {error}"


def kill_here(process: Process) -> str:
    """Kill a process of this node; returns why not, or nothing."""
    found = running(process.pid, process.started)
    if found is None:
        return ENDED
    try:
        found.kill()
    except psutil.NoSuchProcess:
        return ENDED
    except psutil.AccessDenied as error:
        return f"it could not be killed: {error}"
    return ""


def _dumped(process: psutil.Process, file: Path) -> str:
    """Ask for stack traces, and read them once they no longer grow."""
    assert SIGNAL is not None
    try:
        before = file.stat().st_size
        process.send_signal(SIGNAL)
        deadline_s, size = time.monotonic() + DUMP_S, before
        while time.monotonic() < deadline_s:
            time.sleep(0.2)
            grown = file.stat().st_size
            if grown == size > before:
                break
            size = grown
        text = file.read_bytes()[before:].decode(errors="replace")
    except OSError as error:
        return f"its stack traces cannot be read: {error}"
    return text or "it wrote no stack traces"


def end_processes(processes: Sequence[Process]) -> list[Ending]:
    """Kill processes on the nodes of the connected cluster, once all have written stack traces.

    The end of one may end others that wait for it. A node that does not answer is named.
    """
    texts, faults = _asked(stacks_here, processes), _asked(kill_here, processes)
    return [
        Ending(text if fault in ("", ENDED) else f"{fault}\n{text}", fault == ENDED)
        for text, fault in zip(texts, faults, strict=True)
    ]


def _asked(function: Callable[[Process], str], processes: Sequence[Process]) -> list[str]:
    """What a function says of each process, called on its node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    calls = [
        remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(process.node, soft=False)
        ).remote(process)
        for process in processes
    ]
    ray.wait(calls, num_returns=len(calls), timeout=ANSWER_S)
    return [_answer(call) for call in calls]


def _answer(call: Any) -> str:
    import ray

    try:
        return str(ray.get(call, timeout=0))
    except (ray.exceptions.RayError, TimeoutError) as error:
        return f"its node did not answer ({type(error).__name__})"


def store_stacks(url: str, text: str, say: Callable[[str], None]) -> str:
    """Write stack traces to a new file of a folder; returns its name as the end of a sentence."""
    file = storage.join(url, f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:6]}.txt")
    try:
        storage.write_text(file, text)
    except (OSError, DiffitError) as error:
        say(f"Could not store stack traces: {error}")
        return ""
    return f"; stack traces: {file}"
