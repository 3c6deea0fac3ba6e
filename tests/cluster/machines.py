"""Machines that run here: namespaces of network, processes, mounts and host name, on one bridge.

A machine has an address, a loopback, a /tmp, a /dev/shm and processes of its own. It shares with
the others only the disk that the program lies on and the clock. Nothing is added to the network of
this host. It needs root and Linux; with the process that made them, all machines end.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

SUBNET = "10.77.0"
GATEWAY = f"{SUBNET}.1"
TOOLS = ("ip", "nsenter", "unshare", "setpriv")
REPOSITORY = Path(__file__).parents[2]
PREFIX = "diffit"
READY_S = 30.0
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"

# The first process of a machine. It reaps processes that lost their parent, as an init has to.
INIT = r"""
set -e
name=$1 folder=$2; shift 2
hostname "$name"
for path in "$@"; do  # of what lies below /tmp, the machine keeps only these
  if [[ $path == /tmp/* ]]; then
    mkdir -p "$folder$path"
    mount --bind "$path" "$folder$path"
  fi
done
for file in hosts resolv.conf; do mount --bind "$folder/$file" "/etc/$file"; done
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount --rbind "$folder/tmp" /tmp
echo ready
trap 'exit 0' TERM
while :; do sleep 1000 & wait; done
"""


def why_not() -> str:
    """Why machines cannot be made here; empty where they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in TOOLS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no {', '.join(missing)}; on Debian: apt-get install iproute2 util-linux"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "delete", probe)
    except RuntimeError as error:
        return f"no network namespaces: {error}"
    return ""


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Machine:
    """A machine of a network.

    Attributes:
        address: on `eth0`.
        folder: its own, under the same path on the machine; holds the machine's /tmp, as `tmp`.
    """

    def __init__(self, name: str, address: str, namespace: str, folder: Path) -> None:
        self.name, self.address, self.namespace = name, address, namespace
        self.folder = folder
        self.holder: subprocess.Popen[str] | None = None

    @property
    def tmp(self) -> Path:
        """Its /tmp, as this process sees it."""
        return self.folder / "tmp"

    def boot(self) -> None:
        """Start its first process."""
        self.tmp.mkdir(parents=True)
        self.tmp.chmod(0o1777)
        keep = [str(REPOSITORY), sys.prefix, sys.base_prefix, str(self.folder)]
        # The first process ends with `unshare`, and that one with this process, however it ends.
        command = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.namespace]
        command += ["unshare", "--mount", "--uts", "--ipc", "--pid", "--mount-proc"]
        command += ["--kill-child=KILL", "bash", "-c", INIT, "init", self.name, str(self.folder)]
        self.holder = subprocess.Popen(
            [*command, *keep], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"machine {self.name} did not start")

    @property
    def enter(self) -> list[str]:
        """Words before a command that run it on the machine."""
        assert self.holder is not None
        task = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        (init,) = task.read_text().split()
        return ["nsenter", f"--target={init}", "--mount", "--uts", "--ipc", "--net", "--pid"]

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command on the machine; it writes to a log."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [*self.enter, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.environment(environment),
                cwd="/",
                start_new_session=True,
            )

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the machine to its end."""
        return subprocess.run(
            [*self.enter, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment(environment),
            cwd="/",
            timeout=timeout_s,
            check=False,
        )

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a process of the machine starts with: nothing of this process but the path."""
        own = {"PATH": PATH, "HOME": "/tmp/home", "LANG": "C.UTF-8", "HF_HUB_OFFLINE": "1"}
        return {**own, **(more or {})}

    def bytes_received(self) -> int:
        """Bytes that have come over its interface."""
        path = "/sys/class/net/eth0/statistics/rx_bytes"
        return int(self.run(["cat", path]).stdout)

    def end(self) -> None:
        """End all its processes at once."""
        if self.holder is not None:
            self.holder.kill()
            self.holder.wait()
            self.holder = None


class Network:
    """A bridge, and the machines on it; all of it is gone when the block is left."""

    def __init__(self) -> None:
        self.prefix = f"{PREFIX}-{os.getpid()}"
        self.switch = f"{self.prefix}-switch"
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.prefix}-"))
        self.machines: dict[str, Machine] = {}
        self.names: dict[str, str] = {}

    def __enter__(self) -> Self:
        remove_leftovers()
        try:
            _ip("netns", "add", self.switch)
            self._inside(self.switch, "link", "add", "bridge", "type", "bridge")
            self._inside(self.switch, "address", "add", f"{GATEWAY}/24", "dev", "bridge")
            self._inside(self.switch, "link", "set", "bridge", "up")
        except BaseException:
            self._remove()
            raise
        return self

    def _inside(self, namespace: str, *words: str) -> None:
        _ip("-netns", namespace, *words)

    def reserve(self, *names: str) -> None:
        """Give names addresses; machines that start from now on know them."""
        for name in names:
            self.names[name] = f"{SUBNET}.{len(self.names) + 2}"

    def add(self, name: str) -> Machine:
        """Start a machine under a reserved name."""
        address, namespace = self.names[name], f"{self.prefix}-{name}"
        folder = self.folder / name
        machine = self.machines[name] = Machine(name, address, namespace, folder)
        _ip("netns", "add", namespace)
        end = ("type", "veth", "peer", "name", name, "netns", self.switch)
        self._inside(namespace, "link", "add", "eth0", *end)
        self._inside(namespace, "address", "add", f"{address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            self._inside(namespace, "link", "set", interface, "up")
        # To nowhere, but programs ask the routing table for the address that others see.
        self._inside(namespace, "route", "add", "default", "via", GATEWAY)
        self._inside(self.switch, "link", "set", name, "master", "bridge", "up")
        folder.mkdir()
        (folder / "hosts").write_text(self._hosts(name))
        (folder / "resolv.conf").write_text("")  # nobody else knows names
        machine.boot()
        return machine

    def _hosts(self, own: str) -> str:
        """As on a Debian machine, where the own name is an address of the loopback."""
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {own}"]
        lines += [f"{address} {name}" for name, address in self.names.items() if name != own]
        return "\n".join(lines) + "\n"

    def cut(self, machine: Machine) -> None:
        """Take a machine off the network, without a word to anyone; its processes run on."""
        self._inside(self.switch, "link", "delete", machine.name)

    def join(self, machine: Machine) -> None:
        """Let this process, and what it starts from now on, use a machine's network."""
        with Path(f"/run/netns/{machine.namespace}").open("rb") as namespace:
            clone_newnet = 0x40000000
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), clone_newnet):
                raise OSError(ctypes.get_errno(), f"cannot enter {machine.namespace}")

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for machine in self.machines.values():
            machine.end()
        _remove_namespaces(self.prefix)
        shutil.rmtree(self.folder, ignore_errors=True)


def remove_leftovers() -> None:
    """Remove the namespaces of processes that were killed before they could."""
    for namespace in namespaces():
        found = re.fullmatch(rf"({PREFIX}-(\d+))-.+", namespace)
        if found and not Path(f"/proc/{found[2]}").exists():
            _remove_namespaces(found[1])
            for folder in Path(tempfile.gettempdir()).glob(f"{found[1]}-*"):
                shutil.rmtree(folder, ignore_errors=True)


def namespaces() -> list[str]:
    """Names of all network namespaces."""
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line]


def _remove_namespaces(prefix: str) -> None:
    for namespace in namespaces():
        if namespace.startswith(f"{prefix}-"):
            _ip("netns", "delete", namespace)


def wait_until(
    what: str, ready: object, log: Path | None = None, within_s: float = READY_S
) -> None:
    """Wait until `ready()` is true.

    Raises:
        RuntimeError: it was not in time; with the end of the log.
    """
    assert callable(ready)
    deadline_s = time.monotonic() + within_s
    while not ready():
        if time.monotonic() > deadline_s:
            said = log.read_text(errors="replace")[-3000:] if log and log.exists() else ""
            raise RuntimeError(f"{what}: not within {within_s:g} s\n{said}")
        time.sleep(0.3)
