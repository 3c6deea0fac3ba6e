"""Jobs on a real cluster: submitted, followed, rejected, and resumed under the same name."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from diffit_train.errors import DiffitError, UserError
from diffit_train.ray_jobs import FleetPlan, Job, JobState, cancel_jobs, job, submit, submit_fleet
from tests.conftest import tiny_recipe, write_images
from tests.head import Head, free_port


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The job server of a separate cluster, as started by `ray start --head`."""
    with Head(tmp_path_factory.mktemp("head") / "log") as head:
        yield head.address


def test_a_chain_of_jobs_and_a_second_attempt(
    address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from diffit_train.data.autoencoder_fit import fit_autoencoder
    from diffit_train.runs.checkpoints import committed_steps

    write_images(tmp_path / "images" / "digits")
    recipe = tiny_recipe(tmp_path)
    fit_autoencoder(recipe)
    with pytest.raises(UserError, match="job train-tiny-1 rejected its input"):
        submit(job("train", recipe, "tiny", []), address)
    assert "no finished latents" in capfd.readouterr().err
    assert submit(job("encode", recipe, None, []), address) == "encode-digits-1"
    assert "24 images in 5 shards" in capfd.readouterr().err
    assert submit(job("train", recipe, "tiny", []), address) == "train-tiny-2"
    assert "Trained 12 steps" in capfd.readouterr().err
    assert committed_steps(str(tmp_path / "runs" / "tiny"))[-1] == 12
    assert submit(job("train", recipe, "tiny", []), address) == "train-tiny-3"
    assert "already trained" in capfd.readouterr().err

    info = JobSubmissionClient(address).get_job_info("train-tiny-3")
    assert info.metadata["diffit.run"] == "tiny"
    assert info.metadata["diffit.attempt"] == "3"
    assert info.metadata["diffit.recipe_hash"] == recipe.train_hash()


def test_a_running_job_is_followed_not_doubled(address: str, tmp_path: Path) -> None:
    client = JobSubmissionClient(address)
    waiting = Job("train", tiny_recipe(tmp_path), "waiting")
    client.submit_job(
        entrypoint="sleep 5", submission_id="slow", metadata={"diffit.name": waiting.name}
    )
    assert submit(waiting, address) == "slow"
    assert client.get_job_status("slow") == "SUCCEEDED"
    client.submit_job(
        entrypoint="sleep 3; exit 1", submission_id="bad", metadata={"diffit.name": waiting.name}
    )
    with pytest.raises(DiffitError, match="job bad ended as FAILED"):
        submit(waiting, address)


class _Shell:
    """Jobs that are shell commands; each creates a file when it is done."""

    def __init__(self, folder: Path, commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.seen = folder, list[list[str]]()
        recipe, sweep = tiny_recipe(folder), f"s{abs(hash(folder)) % 10**8}"
        self.jobs = [Job("evaluate", recipe, "r", (), sweep, n) for n in range(len(commands))]

        def entrypoint(job: Job, python: str) -> str:
            done = self.folder / f"done-{job.number}"
            log = self.folder / f"log-{job.number}"
            return f"echo begun >> {log}; {commands[job.number]} && touch {done}"

        monkeypatch.setattr(Job, "entrypoint", entrypoint)

    def attempts(self, number: int) -> int:
        return len((self.folder / f"log-{number}").read_text().splitlines())

    def run(self, address: str, at_most: int, retries: int) -> list[JobState]:
        plan = FleetPlan(
            at_most,
            retries,
            lambda job: (self.folder / f"done-{job.number}").exists(),
            lambda: (self.folder / "cancelled").exists(),
            lambda states: self.seen.append([state.state for state in states]),
            pause_s=0.2,
        )
        return submit_fleet(self.jobs, address, plan)


def test_a_fleet_of_jobs_runs_to_completion(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second fails once, the third always, the fourth is rejected, the fifth is already done.
    flag = tmp_path / "flag"
    once = f"(test -e {flag} || (touch {flag}; exit 1))"
    shell = _Shell(tmp_path, ["sleep 1", once, "exit 1", "exit 2", "exit 3"], monkeypatch)
    (tmp_path / "done-4").touch()
    states = shell.run(address, at_most=2, retries=1)
    assert [s.state for s in states] == ["done", "done", "failed", "failed", "done"]
    assert [shell.attempts(n) for n in range(4)] == [1, 2, 2, 1]
    assert not (tmp_path / "log-4").exists()
    assert "ended as FAILED" in states[2].reason
    assert max(row.count("running") for row in shell.seen) == 2


def test_a_cancelled_fleet_ends_and_can_be_resumed(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = _Shell(tmp_path, ["sleep 60", "true"], monkeypatch)
    names = [job.name for job in shell.jobs]
    found: list[JobState] = []
    thread = threading.Thread(target=lambda: found.extend(shell.run(address, 1, 2)))
    thread.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "log-0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (tmp_path / "cancelled").touch()
    assert cancel_jobs(names, address) == 1
    thread.join(60)
    assert [state.state for state in found] == ["cancelled", "cancelled"]
    assert not (tmp_path / "log-1").exists()

    # A job that still runs, as after the driver of the fleet died, is followed.
    (tmp_path / "cancelled").unlink()
    done = tmp_path / "done-0"
    JobSubmissionClient(address).submit_job(
        entrypoint=f"sleep 3; touch {done}",
        submission_id=f"orphan-{tmp_path.name}",
        metadata={"diffit.name": names[0], "diffit.attempt": "9"},
    )
    states = shell.run(address, at_most=2, retries=0)
    assert [state.state for state in states] == ["done", "done"]
    assert states[0].submission_id == f"orphan-{tmp_path.name}"
    assert shell.attempts(0) == 1


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(UserError, match="stage is 'trian'"):
        job("trian", recipe, None, [])
    with pytest.raises(UserError, match="--step is only for evaluate"):
        job("train", recipe, None, ["3"])
    with pytest.raises(UserError, match="could not reach a Ray job server"):
        submit(job("train", recipe, None, []), f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"must look like http://head:8265"):
        submit(job("train", recipe, None, []), "head:8265")


def test_job_name_metadata_and_entrypoint(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    evaluation = job("evaluate", recipe, "a run", ["0", "newest"])
    expected = "python evaluate.py recipe.yaml --run 'a run' --step 0 --step newest"
    assert evaluation.entrypoint("python") == expected
    assert evaluation.name == "evaluate-a run"
    assert job("encode", recipe, None, []).entrypoint("python") == "python encode.py recipe.yaml"
