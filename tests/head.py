"""A cluster as `ray start --head` makes it, with a job server, on ports of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

READY_S = 120.0


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class Head:
    """A head node of two CPUs; everything of it is ended on leaving.

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
        # Any other Ray session of this machine holds the agent's default port, and an agent
        # without its port takes no jobs.
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
                return self  # it answers, if only to ask for its token
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError(f"no head: {self.log.read_text()[-500:]}") from None
                time.sleep(0.5)

    def children(self) -> list[psutil.Process]:
        """All processes of the cluster but the first."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in [psutil.Process(self.process.pid), *self.children()]:
            process.kill()
        self.process.wait()
