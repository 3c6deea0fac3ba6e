"""The batch script for Slurm: shells and shellcheck accept it; what follows what, with stubs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster/slurm/diffit.sbatch"
SHELLCHECK = str(Path(sys.executable).with_name("shellcheck"))
STUBS = {
    # Ray's step lasts until it is told to end; it knows its processes' environment.
    "srun": """[[ $* == *ray_node* ]] || exit 0
        echo "$RAY_AUTH_MODE $(stat -c '%a %s' "$RAY_AUTH_TOKEN_PATH")"
        [[ $ENDED ]] && touch "$folder/ended"
        echo Ray runtime started >"$folder/ray-0.log"
        trap 'echo Ray ended; exit 0' TERM; while sleep 0.05; do :; done""",
    "diffit": """trap 'echo saved; exit 143' TERM; echo "diffit $*"; cat "$shared"/metrics/*
        touch begun; [[ $STATUS == never ]] && while sleep 0.05; do :; done
        exit "$STATUS" """,
    "scontrol": """[[ $1 == requeue ]] && echo "requeue $2" || printf '%s\\n' node1 node2""",
    "squeue": 'echo "$STATE"',
    "hostname": "echo 127.0.0.1",
    "sleep": '[[ $1 == 5 ]] || exec /bin/sleep "$@"',
}


def test_shellcheck_accepts_it() -> None:
    done = subprocess.run([SHELLCHECK, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def shared() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("variables", "status", "said", "never"),
    [
        ({"STATUS": "0"}, 0, ["diffit train ended with status 0", "Ray ended"], "requeue"),
        ({"STATUS": "1"}, 1, ["ended with status 1", "Ray's logs stay"], "requeue"),
        ({"STATUS": "2", "ENDED": "1"}, 2, ["status 2", "Ray runtime started"], "requeue"),
        ({"STATUS": "1", "ENDED": "1"}, 1, ["requeued: Ray ended", "requeue 77"], "ended with"),
        ({"STATUS": "never"}, 143, ["saved", "Ray ended", "requeue 77"], "not requeued"),
        ({"STATUS": "never", "STATE": "COMPLETING"}, 143, ["job is COMPLETING"], "requeue 77"),
        ({"STATUS": "never", "SLURM_RESTART_COUNT": "7"}, 143, ["been 7 times"], "requeue 77"),
    ],
)
def test_what_follows_what(
    variables: dict[str, str],
    status: int,
    said: list[str],
    never: str,
    tmp_path: Path,
    shared: Path,
) -> None:
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    environment = {
        **{"PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "DIFFIT_JOIN_S": "9"},
        **{"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "1", "DIFFIT_RESTARTS": "7"},
        **{"DIFFIT_SHARED": str(shared), "ENDED": "", "STATE": "RUNNING", **variables},
    }
    command = ["bash", str(SCRIPT), "train", "imagenet256", "--run", "a run"]
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    if environment["STATUS"] == "never":
        deadline_s = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        job.terminate()
    assert job.wait(timeout=60) == status
    text = (tmp_path / "log").read_text()
    head = "--address 127.0.0.1:22310"
    assert f"diffit train imagenet256 scaling.node_wait_timeout_s=9 --run a run {head}" in text
    assert '[{"targets": ["node1:22313","node2:22314"]}]' in text
    assert "token 600 64" in text
    assert all(line in text for line in said), text
    assert never not in text
    assert [path for path in shared.rglob("*") if path.is_file()] == []
