"""Slurm, really: a training is preempted, requeued by its script, and goes on."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffit_train.config import dump_recipe
from diffit_train.runs.checkpoints import Checkpoints
from tests.conftest import tiny_recipe, train
from tests.faults.test_cluster import LONG
from tests.slurm import Slurm, why_not
from tests.training.test_train import _copy, _losses, _no_doubled_points

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.usefixtures("ray_session"),
]

SCRIPT = Path(__file__).resolve().parents[2] / "cluster/slurm/diffit.sbatch"
# One worker on each node of one CPU; long enough for three interruptions.
LONGER = (*LONG, "train.steps=3000", "scaling.workers=2", "scaling.max_failures=5")
STOP_S = 119
JOB_S = 900.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


@pytest.fixture(scope="module")
def undisturbed(encoded: Path, ray_session: None) -> list[tuple[int, float]]:
    """The curve of two workers that nothing disturbs."""
    train(tiny_recipe(encoded, *LONGER), "undisturbed-by-slurm")
    return _losses(encoded, "undisturbed-by-slurm")


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    with Slurm(2) as cluster:
        yield cluster


def _submit(slurm: Slurm, root: Path, *changes: str, restarts: int = 100) -> str:
    (root / "recipe.yaml").write_text(dump_recipe(tiny_recipe(root, *LONGER, *changes)))
    slurm.environment |= {"DIFFIT_SHARED": str(root / "shared"), "DIFFIT_RESTARTS": str(restarts)}
    options = ["--nodes=2", "--cpus-per-task=1", "--gpus-per-node=0", "--mem=2G", "--time=59:00"]
    options += [f"--signal=B:TERM@{STOP_S}", "--output=job.log", f"--chdir={root}"]
    return slurm.submit(SCRIPT, *options, arguments=["train", "recipe.yaml", "--run", "killed"])


def _wait(slurm: Slurm, job: str, root: Path, what: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + JOB_S
    while not what():
        said = _log(root)[-4000:]
        assert slurm.state(job) not in ENDED, said
        assert time.monotonic() < deadline_s, said
        time.sleep(0.2)


def _log(root: Path) -> str:
    log = root / "job.log"
    return log.read_text() if log.exists() else ""


def _steps(root: Path) -> list[int]:
    return Checkpoints(str(root / "runs" / "killed")).steps


def _resumed(root: Path) -> list[int]:
    """Where each attempt began."""
    found = re.findall(
        r"^(?:Training|Resuming) from step ([\d,]+) on 2 workers", _log(root), re.MULTILINE
    )
    return [int(step.replace(",", "")) for step in found]


def _saved(root: Path) -> list[int]:
    """Where each attempt was stopped."""
    found = re.findall(r"^Stopped at step ([\d,]+)", _log(root), re.MULTILINE)
    return [int(step.replace(",", "")) for step in found]


def test_a_job_is_requeued_and_resumes(
    slurm: Slurm, encoded: Path, tmp_path: Path, undisturbed: list[tuple[int, float]]
) -> None:
    _copy(encoded, tmp_path)
    job = _submit(slurm, tmp_path)
    _wait_for_step(slurm, job, tmp_path, 300)
    slurm.run("scancel", "--signal=TERM", "--batch", job)

    _wait_for_step(slurm, job, tmp_path, 800, attempt=2)
    (tmp_path / "urgent.sh").write_text("#!/bin/bash\nsleep 1\n")
    slurm.submit(tmp_path / "urgent.sh", "--partition=urgent", "--nodes=2")

    _wait(slurm, job, tmp_path, lambda: len(_resumed(tmp_path)) == 3)
    # Less than STOP_S are left; Slurm looks every half minute.
    *_, minutes, _ = slurm.run("squeue", "--noheader", "--format=%M", f"--job={job}").split(":")
    _limit(slurm, job, int(minutes) + 2)
    _wait(slurm, job, tmp_path, lambda: _log(tmp_path).count("requeued: it was stopped") == 3)
    _limit(slurm, job, 59)

    _wait(slurm, job, tmp_path, lambda: slurm.state(job) == "COMPLETED")
    log = _log(tmp_path)
    print(log)
    assert len(re.findall("attempt [1-4]: Ray on node1 node2", log)) == 4
    assert log.count("requeued: it was stopped") == 3
    assert _resumed(tmp_path) == [0, *_saved(tmp_path)]
    mine = _losses(tmp_path, "killed")
    assert [step for step, _ in mine] == [step for step, _ in undisturbed]
    expected = [loss for _, loss in undisturbed]
    assert [loss for _, loss in mine] == pytest.approx(expected, rel=1e-4)
    _no_doubled_points(tmp_path, undisturbed)
    _nothing_is_left(tmp_path, job)


def _limit(slurm: Slurm, job: str, minutes: int) -> None:
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}", check=True)


def _wait_for_step(slurm: Slurm, job: str, root: Path, step: int, attempt: int = 1) -> None:
    """Wait until an attempt has trained to a step."""
    _wait(slurm, job, root, lambda: len(_resumed(root)) >= attempt and _steps(root)[-1] >= step)


def _nothing_is_left(root: Path, job: str) -> None:
    # Prometheus keeps watching its folder, in which no job is listed.
    assert [path.name for path in (root / "shared").rglob("*")] == ["metrics"]
    assert not list(Path("/tmp").glob(f"ray-{job}-*"))


def test_a_lost_node_requeues_the_job(slurm: Slurm, encoded: Path, tmp_path: Path) -> None:
    _copy(encoded, tmp_path)
    job = _submit(slurm, tmp_path, "scaling.max_failures=0")
    _wait_for_step(slurm, job, tmp_path, 300)
    raylets = [process for process in slurm.processes_of(job) if process.name() == "raylet"]
    assert len(raylets) == 2
    raylets[1].kill()
    _wait(slurm, job, tmp_path, lambda: "requeued: Ray ended on a node" in _log(tmp_path))
    _wait(slurm, job, tmp_path, lambda: len(_resumed(tmp_path)) == 2)
    assert _resumed(tmp_path)[1] >= 300

    slurm.run("scancel", job, check=True)
    _wait_for_end(slurm, job)
    assert slurm.state(job) == "CANCELLED"
    assert "requeued: it was stopped" not in _log(tmp_path)
    # Slurm's process tracking by cgroup would not have to wait for Ray's daemons to end themselves.
    _wait_until(lambda: not slurm.processes_of(job))


def test_restarts_are_limited(slurm: Slurm, encoded: Path, tmp_path: Path) -> None:
    _copy(encoded, tmp_path)
    job = _submit(slurm, tmp_path, restarts=0)
    _wait_for_step(slurm, job, tmp_path, 100)
    slurm.run("scancel", "--signal=TERM", "--batch", job)
    _wait_for_end(slurm, job)
    assert slurm.state(job) == "FAILED"
    assert "not requeued: it has been 0 times; sbatch again resumes" in _log(tmp_path)
    assert _steps(tmp_path)[-1] == _saved(tmp_path)[0]
    _nothing_is_left(tmp_path, job)

    # Sent again it resumes; this time, it is not to be requeued by the word of its owner.
    job = _submit(slurm, tmp_path)
    _wait_for_step(slurm, job, tmp_path, _saved(tmp_path)[0] + 100, attempt=2)
    slurm.run("scontrol", "update", f"JobId={job}", "Requeue=0", check=True)
    slurm.run("scancel", "--signal=TERM", "--batch", job)
    _wait_for_end(slurm, job)
    assert slurm.state(job) == "FAILED"
    assert "not requeued: Slurm refuses" in _log(tmp_path)
    assert _resumed(tmp_path) == [0, _saved(tmp_path)[0]]
    assert _steps(tmp_path)[-1] == _saved(tmp_path)[1]


def _wait_for_end(slurm: Slurm, job: str) -> None:
    _wait_until(lambda: not slurm.running(job))


def _wait_until(what: Callable[[], object], within_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
