"""A real S3 server for tests: SeaweedFS, every component bound to one address."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

KEY, SECRET, BUCKET = "diffit-key", "diffit-secret", "bucket"


def free_port() -> int:
    """A free port; port + 10000 is also free, for gRPC."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            if port + 10000 > 65535:
                continue
            try:
                second.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            return port


# A clean shutdown can take long, and written data is already in the kernel.
STOP_S = 3.0


class S3Server:
    """`weed server` with its S3 gateway; can be stopped and restarted with its data.

    Args:
        address: where it listens.
        enter: words before its command, such as those that enter another network namespace.
    """

    def __init__(self, folder: Path, address: str = "127.0.0.1", enter: Sequence[str] = ()) -> None:
        self.folder, self.address, self.enter = folder, address, enter
        self.ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """URL of the gateway."""
        return f"http://{self.address}:{self.ports['s3']}"

    def environment(self) -> dict[str, str]:
        """Environment variables for any S3 client."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start, and wait until it responds."""
        data, log = self.folder / "data", self.folder / "log"
        data.mkdir(parents=True, exist_ok=True)
        command = [*self.enter, str(Path(sys.executable).parent / "weed"), "server"]
        command += [f"-dir={data}", f"-ip={self.address}", f"-ip.bind={self.address}"]
        command += ["-s3", "-volume.max=20"]
        command += ["-master.volumeSizeLimitMB=64", "-master.telemetry=false"]
        command += [f"-master.port={self.ports['master']}", f"-volume.port={self.ports['volume']}"]
        command += [f"-filer.port={self.ports['filer']}", f"-s3.port={self.ports['s3']}"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]
        environment = {**os.environ, **self.environment()}
        with log.open("ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(self.endpoint, timeout=2)
                break
            except urllib.error.HTTPError:
                break  # it responds, even if with an error
            except OSError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    text = log.read_text(errors="replace")[-3000:]
                    raise RuntimeError(f"the S3 server did not start:\n{text}") from error
                time.sleep(0.2)

    def stop(self) -> None:
        """Stop it; its data is kept."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
