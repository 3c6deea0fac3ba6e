"""A cluster of several raylets on this machine, and `diffit train` as a process to fault."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from tests.head import free_port

_BEGUN = re.compile(r"^(?:Training|Resuming) from step ([\d,]+) on (\d+) workers?")
_PROGRESS = re.compile(r"^train +([\d,]+)/")


class Nodes:
    """A head node, and one-CPU nodes that can die and come back.

    Args:
        count: nodes in addition to the head.
        head_cpus: CPUs of the head, which is never killed.
        job_server: whether the head accepts jobs.
    """

    def __init__(self, count: int, head_cpus: int = 0, *, job_server: bool = False) -> None:
        from ray._private.utils import write_ray_address
        from ray.cluster_utils import Cluster

        # The job's controller, which watches for preemptions, reads it from here.
        os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
        arguments: dict[str, Any] = {"num_cpus": head_cpus, "include_dashboard": job_server}
        self.folder = ""
        if job_server:
            # Ray connects a job's driver to the newest cluster of this folder.
            self.folder = arguments["temp_dir"] = tempfile.mkdtemp(prefix="ray-")
            arguments["dashboard_port"] = free_port()
            arguments["dashboard_agent_listen_port"] = free_port()
        self.cluster = Cluster(initialize_head=True, head_node_args=arguments)
        if job_server:
            write_ray_address(self.cluster.gcs_address, self.folder)
        self.nodes = [self.add() for _ in range(count)]

    @property
    def address(self) -> str:
        """The cluster's --address."""
        return str(self.cluster.address)

    @property
    def job_server(self) -> str:
        """The --address of `diffit submit`."""
        return f"http://{self.cluster.webui_url}"

    def add(self) -> Any:
        """Add a node; on a busy machine it may not be up within Ray's 30 s, so try again."""
        # In one folder, a node would replace the working directory of a job under another's feet.
        arguments = {"num_cpus": 1, "runtime_env_dir_name": f"runtime-{uuid.uuid4().hex[:8]}"}
        for _ in range(4):
            with contextlib.suppress(Exception):
                return self.cluster.add_node(**arguments)
        return self.cluster.add_node(**arguments)

    def kill(self, node: Any) -> None:
        """Kill a node's raylet and everything on it, without notice."""
        self.cluster.remove_node(node, allow_graceful=False)

    def announce_end(self, node: Any, seconds: float) -> None:
        """Announce a node's preemption to Ray."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        deadline_ms = int((time.time() + seconds) * 1000)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        client = GcsClient(address=self.address)
        accepted, why = client.drain_node(node.node_id, reason, "spot reclaim", deadline_ms)
        assert accepted, why

    def workers(self) -> list[psutil.Process]:
        """Training workers on all nodes."""
        nodes = [self.cluster.head_node, *self.cluster.worker_nodes]
        found = []
        for node in nodes:
            raylet = node.all_processes["raylet"][0].process.pid
            found += psutil.Process(raylet).children(recursive=True)
        return [process for process in found if _name(process).startswith("ray::RayTrainW")]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.shutdown()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""


@dataclass
class Line:
    """A line of the command's output, and its time."""

    at_s: float
    text: str


@dataclass
class Begun:
    """A worker group that started training."""

    at_s: float
    step: int
    workers: int


@dataclass
class Driver:
    """`diffit train` in its own process."""

    recipe: Path
    run: str
    address: str | None = None
    root: str = "."
    lines: list[Line] = field(default_factory=list)

    def start(self) -> None:
        """Start or resume."""
        command = [sys.executable, "-c", "from diffit_train.cli.main import main; main()", "train"]
        command += [self.recipe.name, "--root", self.root, "--run", self.run]
        command += ["--address", self.address] if self.address else []
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            command, cwd=self.recipe.parent, env=environment, stderr=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for text in process.stderr:
            self.lines.append(Line(time.monotonic(), text.rstrip()))

    def end(self, number: signal.Signals, timeout_s: float = 120) -> int:
        """Send a signal and wait for the end; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=timeout_s)

    def begun(self, since_s: float) -> Begun | None:
        """The start of the first worker group after a given time; None if there is none yet."""
        for line in list(self.lines):
            match = _BEGUN.match(line.text)
            if match and line.at_s > since_s:
                return Begun(line.at_s, int(match[1].replace(",", "")), int(match[2]))
        return None

    def wait_begun(self, since_s: float, timeout_s: float = 600) -> Begun:
        """Wait for the first worker group that starts training after a given time."""
        found = self.wait(lambda: self.begun(since_s), timeout_s)
        assert isinstance(found, Begun)
        return found

    def wait(self, what: Callable[[], Any], timeout_s: float = 240) -> Any:
        """Poll `what` while the command runs; returns its first true value."""
        deadline = time.monotonic() + timeout_s
        while not (value := what()):
            said = "\n".join(line.text for line in self.lines[-20:])
            assert self.process.poll() is None, f"the command ended:\n{said}"
            assert time.monotonic() < deadline, f"waited {timeout_s} s:\n{said}"
            time.sleep(0.05)
        return value

    def said(self, text: str, since_s: float = 0.0) -> bool:
        """Whether a line after a given time contains the text."""
        return any(text in line.text for line in list(self.lines) if line.at_s > since_s)

    def stepped(self, since_s: float) -> int | None:
        """The newest step shown on the progress line after a given time."""
        shown = self.steps_shown(since_s)
        return shown[-1] if shown else None

    def steps_shown(self, since_s: float, until_s: float = math.inf) -> list[int]:
        """The steps shown on the progress line in a span of time."""
        lines = [line.text for line in list(self.lines) if since_s < line.at_s <= until_s]
        found = (_PROGRESS.match(text) for text in lines)
        return [int(match[1].replace(",", "")) for match in found if match]
