"""Ray sessions: who can reach a private cluster, and waiting for a cluster that grows."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffit_train import ray_session
from diffit_train.data import encode
from diffit_train.evaluation.pool import EvaluationPool
from diffit_train.runs.run import open_run
from diffit_train.training import driver
from tests.conftest import tiny_recipe

# In its own process, because the tests of a process share one Ray session.
PRIVATE = """
import os
from pathlib import Path
import ray
from diffit_train.ray_session import connected
with connected():
    context = ray.get_runtime_context()
    folder = Path(context.get_temp_dir(), context.get_session_name())
    print(oct(folder.stat().st_mode & 0o777), os.environ["RAY_AUTH_MODE"])
"""


def test_a_private_cluster_is_for_its_user_only(tmp_path: Path) -> None:
    variables = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
    done = subprocess.run(
        [sys.executable, "-c", PRIVATE],
        capture_output=True,
        text=True,
        check=True,
        env=variables | {"HOME": str(tmp_path)},
    )
    assert done.stdout.split() == ["0o700", "token"]
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0


# A head without enough CPUs, and a node that joins later.
GROWING = """
import threading, time
import ray
from ray.cluster_utils import Cluster
from diffit_train import ray_session
from diffit_train.errors import UserError

ray_session.GROWTH_POLL_S = 0.2
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
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
    assert "refused: training needs 3 CPUs, but the Ray cluster has 1; lower" in done.stdout
    assert "gave up: training needs 1 GPUs, but the Ray cluster has 0; lower" in done.stdout
    assert "waits True" in done.stdout
    assert "goes on True" in done.stdout
    assert "waiting up to 120 s for nodes: training needs 3 CPUs" in done.stderr


class _Asked(Exception):
    """What a stage asked the cluster for: CPUs, GPUs, purpose, seconds to wait."""


@pytest.mark.parametrize(
    ("stage", "needs"),
    [
        ("encode", (1.0, 0.5, "encoding", 600.0)),
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
    monkeypatch.setattr(driver, "_check", lambda run: None)
    changes = ["workers=3..4", "cpus_per_worker=4", "gpus_per_worker=1", "evaluate_actors=4"]
    changes += ["encode_actors=3", "gpus_per_actor=0.5", "node_wait_timeout_s=600"]
    recipe = tiny_recipe(tmp_path, *(f"scaling.{change}" for change in changes))
    run = {
        "encode": lambda: encode.encode(recipe),
        "train": lambda: driver.train(open_run(recipe, "tiny")),
        "evaluate": lambda: EvaluationPool(recipe).actors,
    }[stage]
    monkeypatch.setattr(encode, "find_work", lambda *_: SimpleNamespace(tasks=()))
    for name in ("require_autoencoder", "_check_rejected"):
        monkeypatch.setattr(encode, name, lambda *_: None)
    with pytest.raises(_Asked) as asked:
        run()
    assert asked.value.args == needs
