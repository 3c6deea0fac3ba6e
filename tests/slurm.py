"""A Slurm cluster of this machine: munged, slurmctld and one slurmd per node, on loopback.

It needs root, and Slurm's daemons: on Debian, `apt-get install slurm-wlm munge`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.head import free_port

READY_S = 30.0
STOP_S = 10.0
DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
# A requeued job may start again when the credentials of its last start have expired.
CREDENTIALS_EXPIRE_S = 5

CONFIGURATION = """
ClusterName=diffit
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={expire}
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,batch_sched_delay=0
JobRequeue=1
FirstJobId={first_job}
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=spot Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace_s} State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP
"""


def why_not() -> str:
    """Why Slurm cannot run here; empty where it can."""
    missing = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no {', '.join(missing)}; on Debian: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons switch users, which needs root"


class Slurm:
    """Nodes of one CPU each; every daemon and job is ended on leaving.

    Args:
        nodes: how many.
        grace_s: between the signal to a preempted job and its end.

    Partition `urgent` preempts partition `spot`.
    """

    def __init__(self, nodes: int = 2, grace_s: int = 120) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="diffit-slurm-"))
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self.processes: list[subprocess.Popen[bytes]] = []
        host = os.uname().nodename
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} "
            "CPUs=1 RealMemory=4096 State=UNKNOWN"
            for name in self.names
        ]
        text = CONFIGURATION.format(
            controller=free_port(),
            folder=self.folder,
            expire=CREDENTIALS_EXPIRE_S,
            # Ports and folders of a job follow from its id, also next to another such cluster.
            first_job=secrets.randbelow(60000) + 1000,
            nodes="\n".join(lines),
            grace_s=grace_s,
        )
        self.configuration = self.folder / "slurm.conf"
        self.configuration.write_text(text)
        (self.folder / "state").mkdir()
        self.environment = {**os.environ, "SLURM_CONF": str(self.configuration), "PATH": PATH}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        socket = self.folder / "munge.socket"
        # mkdtemp's 0700 lets only this user reach the socket, which munged would have open to all.
        munge = ["munged", "--foreground", "--force", f"--socket={socket}", f"--key-file={key}"]
        munge += [f"--{name}-file={self.folder}/munged.{name}" for name in ("pid", "log", "seed")]
        self._daemon("munged", munge)
        self._wait(socket.exists, "munged")
        self._daemon("slurmctld", ["slurmctld", "-D", "-f", str(self.configuration)])
        for name in self.names:
            self._daemon(name, ["slurmd", "-D", "-N", name, "-f", str(self.configuration)])
        self._wait(self._idle, "slurmctld")

    def _daemon(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=self.environment)
        self.processes.append(process)

    def _wait(self, ready: Callable[[], bool], name: str) -> None:
        deadline_s = time.monotonic() + READY_S
        while not ready():
            ended = any(process.poll() is not None for process in self.processes)
            if ended or time.monotonic() > deadline_s:
                said = [path.read_text(errors="replace") for path in self.folder.glob("*.out")]
                raise RuntimeError(f"{name} did not start:\n" + "\n".join(said)[-3000:])
            time.sleep(0.2)

    def _idle(self) -> bool:
        found = self.run("sinfo", "--noheader", "--Node", "--partition=spot", "--format=%T")
        return found.split() == ["idle"] * len(self.names)

    def run(self, *command: str, check: bool = False) -> str:
        """Run one of Slurm's commands; its output."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout

    def submit(self, script: Path, *options: str, arguments: Sequence[str] = ()) -> str:
        """Send a job from the script's folder; its id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(script), *arguments],
            cwd=script.parent,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"sbatch: {done.stderr}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """A job's state, as RUNNING or COMPLETED."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word).get("JobState", "")

    def running(self, job: str) -> bool:
        """Whether a job has not come to its end on every node."""
        return self.run("squeue", "--noheader", f"--job={job}").strip() != ""

    def processes_of(self, job: str) -> list[psutil.Process]:
        """All processes of a job on all nodes, the oldest first."""
        found = [p for p in self._of_jobs() if _environment(p).get("SLURM_JOB_ID") == job]
        return sorted(found, key=lambda process: process.create_time())

    def _of_jobs(self) -> list[psutil.Process]:
        """Daemons and jobs know this cluster by their environment, also where they detach."""
        ours = str(self.configuration)
        return [p for p in psutil.process_iter() if _environment(p).get("SLURM_CONF") == ours]

    def _stop(self) -> None:
        if len(self.processes) > 1:
            self.run("scancel", "--signal=KILL", "--full", "--state=RUNNING")
            self.run("scancel", f"--user={os.environ.get('USER', 'root')}")
        mine = [process.pid for process in self.processes]
        mine += [process.pid for process in self._of_jobs()]
        for pid in mine:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for daemon in self.processes:
            daemon.wait(STOP_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return {}
