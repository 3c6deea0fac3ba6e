"""A cluster started by `ray start --head`, with a job server, on its own ports."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

import psutil

READY_S = 120.0


def free_port() -> int:
    """A free port on this machine."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class Head:
    """A head node with two CPUs; all its processes are killed on exit.

    Args:
        log: where it writes.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self.port, dashboard, agent = free_port(), free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
        command += ["--num-cpus=2", f"--port={self.port}", f"--dashboard-port={dashboard}"]
        command += ["--dashboard-host=127.0.0.1", "--disable-usage-stats"]
        # Ray connects a job's driver to the newest cluster of this folder. The paths of sockets
        # must be short.
        self.folder = tempfile.mkdtemp(prefix="ray-")
        command += [f"--temp-dir={self.folder}"]
        # Any other Ray session on this machine occupies the agent's default port, and an agent
        # without its port accepts no jobs.
        self.command = [*command, f"--dashboard-agent-listen-port={agent}"]

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        deadline_s = time.monotonic() + READY_S
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/api/version", timeout=2)
                return self
            except urllib.error.HTTPError:
                return self  # it responds, even if only to require a token
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError(f"no head: {self.log.read_text()[-500:]}") from None
                time.sleep(0.5)

    def children(self) -> list[psutil.Process]:
        """All processes of the cluster except the first."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def __exit__(self, *_: object) -> None:
        for process in [psutil.Process(self.process.pid), *self.children()]:
            process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)  # processes that are ending may write there
