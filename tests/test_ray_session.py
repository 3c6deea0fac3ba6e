"""Ray sessions: who can reach a private cluster, and waiting for a cluster that grows."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest

from diffit_train import ray_session, retry
from diffit_train.data import encode
from diffit_train.errors import DiffitError
from diffit_train.evaluation.pool import EvaluationPool
from diffit_train.training import driver
from tests.conftest import tiny_recipe
from tests.silent import silent_server

# In its own process, because the tests of a process share one Ray session.
LISTENERS = """
import json, psutil, ray
from diffit_train.ray_session import connected, is_private
with connected():
    ray.get(ray.remote(lambda: None).remote())
    me = psutil.Process()
    processes = (me, *me.children(recursive=True))
    found = {
        f"{process.name()} {socket.laddr.ip}"
        for process in processes
        for socket in process.net_connections("tcp")
        if socket.status == psutil.CONN_LISTEN
    }
    folder = ray._private.worker._global_node.get_session_dir_path()
    mode = __import__("os").stat(folder).st_mode & 0o777
    words = [word for process in processes for word in process.cmdline()[:4]]
    scripts = sorted({word.rsplit("/", 1)[-1] for word in words if word.endswith(".py")})
    print(json.dumps([mode, sorted(found), is_private(), scripts]))
"""


def test_a_private_cluster_is_for_its_user_on_loopback_only() -> None:
    command = [sys.executable, "-c", LISTENERS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    mode, found, private, scripts = json.loads(done.stdout.splitlines()[-1])
    assert oct(mode) == "0o700"
    assert private
    # Neither an autoscaler nor a reader of logs nor a dashboard.
    assert not set(scripts) & {"monitor.py", "log_monitor.py", "dashboard.py"}
    listeners = [line.rsplit(" ", 1) for line in found]
    assert {"gcs_server", "raylet"} <= {name for name, _ in listeners}
    assert {address for _, address in listeners} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


# A head without enough CPUs, and a node that joins later.
GROWING = """
import threading, time
import ray
from ray.cluster_utils import Cluster
from diffit_train import ray_session, retry
from diffit_train.errors import UserError

ray_session.GROWTH_POLL_S = 0.2
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
print("private", ray_session.is_private())
try:
    ray_session.require(3, 0, "training")
except UserError as error:
    print("refused:", error)
try:
    ray_session.require(1, 1, "training", wait_s=1.0)
except UserError as error:
    print("gave up:", error)
waiting = threading.Thread(target=ray_session.require, args=(3, 0, "training", 120.0))
waiting.start()
time.sleep(1.0)
print("waits", waiting.is_alive())
cluster.add_node(num_cpus=2)
waiting.join(60.0)
print("goes on", not waiting.is_alive())
ray.shutdown()
cluster.shutdown()
"""


def test_work_waits_for_a_cluster_that_grows() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROWING], capture_output=True, text=True, check=True
    )
    assert "private False" in done.stdout
    assert "refused: training needs 3 CPUs, but the Ray cluster has 1; lower" in done.stdout
    assert "gave up: training needs 1 GPUs, but the Ray cluster has 0; lower" in done.stdout
    assert "waits True" in done.stdout
    assert "goes on True" in done.stdout
    assert "waiting up to 120 s for nodes: training needs 3 CPUs" in done.stderr


# A command whose Ray is at work.
WORKING = """
import sys, time
import ray
from diffit_train.cli import exit_status
from diffit_train.ray_session import connected

def command():
    with connected():
        working = ray.remote(lambda: time.sleep(1000)).remote()
        time.sleep(1.0)
        print("working", flush=True)
        ray.get(working)

sys.exit(exit_status(command))
"""


@contextmanager
def _working() -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """The command and the processes of its Ray."""
    command = [sys.executable, "-c", WORKING]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "working\n"
        processes = psutil.Process(driver.pid).children(recursive=True)
        try:
            yield driver, processes
        finally:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            driver.kill()


@pytest.mark.slow
def test_all_processes_of_a_killed_command_end_soon() -> None:
    with _working() as (driver, processes):
        names = {process.name() for process in processes}
        assert {"raylet", "gcs_server", "ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= names
        driver.kill()
        deadline_s = time.monotonic() + 30.0
        while left := [process for process in processes if ray_session._alive(process)]:
            assert time.monotonic() < deadline_s, left
            time.sleep(0.2)


@pytest.mark.slow
def test_a_dead_raylet_is_one_line_and_status_1() -> None:
    with _working() as (driver, processes):
        (raylet,) = [process for process in processes if process.name() == "raylet"]
        raylet.kill()
        assert driver.wait(timeout=30.0) == 1
        assert driver.stderr is not None
        said = list(driver.stderr)
    assert len(said) == 1
    assert said[0].startswith("failed: Ray on this machine has died (raylet, process ")


def test_a_silent_cluster_is_given_up_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(retry.LIMIT, "2")
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test may have a session
    started_s = time.monotonic()
    with silent_server() as url:
        address = url.removeprefix("http://")
        with (
            pytest.raises(DiffitError, match="accepts connections, but has not answered for 2 s"),
            ray_session.connected(address),
        ):
            raise AssertionError("not reached")
    assert 2.0 <= time.monotonic() - started_s < 3.0


class _Asked(Exception):
    """What a stage asked the cluster for: CPUs, GPUs, purpose, seconds to wait."""


@pytest.mark.parametrize(
    ("stage", "needs"),
    [
        ("encode", (1.0, 1.0, "encoding", 600.0)),
        ("train", (12.0, 3.0, "training", 600.0)),
        ("evaluate", (4.0, 2.0, "evaluation", 600.0)),
    ],
)
def test_stages_ask_for_what_the_recipe_says_they_need(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str, needs: tuple[object, ...]
) -> None:
    def require(*asked: object) -> None:
        raise _Asked(*asked)

    monkeypatch.setattr(ray_session, "require", require)
    monkeypatch.setattr(ray_session, "connected", lambda *_: nullcontext())
    for name in ("_check_latents", "_check_order", "tracking_uri", "_kernel"):
        monkeypatch.setattr(driver, name, lambda *_: None)
    changes = ["workers=3..4", "cpus_per_worker=4", "gpus_per_worker=1", "evaluate_actors=4"]
    changes += ["encode_min_actors=2", "encode_actors=3", "gpus_per_actor=0.5", "wait_s=600"]
    recipe = tiny_recipe(tmp_path, *(f"scaling.{change}" for change in changes))
    run = {
        "encode": lambda: ExitStack().enter_context(encode._cluster(recipe, None)),
        "train": lambda: driver.train(recipe, "tiny"),
        "evaluate": lambda: EvaluationPool(recipe).actors,
    }[stage]
    monkeypatch.setattr(encode, "_require_autoencoder", lambda recipe: None)
    with pytest.raises(_Asked) as asked:
        run()
    assert asked.value.args == needs
