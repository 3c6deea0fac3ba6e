"""Jobs on a real cluster: sent, followed, refused, and continued under the same name."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from diffit_train.errors import DiffitError, UserError
from diffit_train.submit import Job, job, submit
from tests.conftest import tiny_recipe, write_pictures


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The job server of a cluster of its own, as `ray start --head` makes it."""
    port, dashboard, agent = _free_port(), _free_port(), _free_port()
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command += ["--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += ["--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    # Any other Ray session of this machine holds the agent's default port, and an agent
    # without its port takes no jobs.
    command += [f"--dashboard-agent-listen-port={agent}"]
    log = (tmp_path_factory.mktemp("head") / "log").open("wb")
    head = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=2)
            break
        except urllib.error.HTTPError:
            break  # it answers, if only to ask for its token
        except OSError:
            assert head.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
    yield url
    processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    for process in processes:
        process.kill()
    head.wait()


def test_a_chain_of_jobs_and_a_second_attempt(
    address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from diffit_train.checkpoints import committed_steps
    from diffit_train.data.autoencoder_fit import fit_autoencoder

    write_pictures(tmp_path / "pictures" / "digits")
    recipe = tiny_recipe(tmp_path)
    fit_autoencoder(recipe)
    with pytest.raises(UserError, match="job train-tiny-1 refused its input"):
        submit(job("train", recipe, "tiny", []), address)
    assert "no finished latents" in capfd.readouterr().err
    assert submit(job("encode", recipe, None, []), address) == "encode-digits-1"
    assert "24 pictures in 5 shards" in capfd.readouterr().err
    assert submit(job("train", recipe, "tiny", []), address) == "train-tiny-2"
    assert "trained 12 steps" in capfd.readouterr().err
    assert committed_steps(str(tmp_path / "runs" / "tiny"))[-1] == 12
    assert submit(job("train", recipe, "tiny", []), address) == "train-tiny-3"
    assert "trained already" in capfd.readouterr().err

    from ray.job_submission import JobSubmissionClient

    info = JobSubmissionClient(address).get_job_info("train-tiny-3")
    assert info.metadata["diffit.run"] == "tiny"
    assert info.metadata["diffit.attempt"] == "3"
    assert info.metadata["diffit.recipe_hash"] == recipe.train_hash()


def test_a_running_job_is_followed_not_doubled(address: str, tmp_path: Path) -> None:
    from ray.job_submission import JobSubmissionClient

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


def test_bad_requests_are_named(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(UserError, match="stage is 'trian'"):
        job("trian", recipe, None, [])
    with pytest.raises(UserError, match="--step is for evaluate"):
        job("train", recipe, None, ["3"])
    with pytest.raises(UserError, match="no Ray job server answers"):
        submit(job("train", recipe, None, []), f"http://127.0.0.1:{_free_port()}")
    with pytest.raises(UserError, match=r"must be as http://head:8265"):
        submit(job("train", recipe, None, []), "head:8265")


def test_what_a_job_is(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    evaluation = job("evaluate", recipe, "a run", ["0", "newest"])
    expected = "python evaluate.py recipe.yaml --run 'a run' --step 0 --step newest"
    assert evaluation.entrypoint("python") == expected
    assert evaluation.name == "evaluate-a run"
    assert job("encode", recipe, None, []).entrypoint("python") == "python encode.py recipe.yaml"
