"""Jobs on a real cluster: submitted, followed, rejected, and resumed under the same name."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import aiohttp
import pytest
from ray.job_submission import JobSubmissionClient

import diffit_train
from diffit_train import retry
from diffit_train.errors import DiffitError, UserError
from diffit_train.machine_checks import differing_versions
from diffit_train.preflight import Check
from diffit_train.ray_jobs import follow
from diffit_train.ray_jobs.client import (
    CPU_INDEX,
    NoAnswerError,
    cancel_jobs,
    locked_packages,
    send_job,
)
from diffit_train.ray_jobs.fleet import FleetPlan, JobState, submit_fleet
from diffit_train.ray_jobs.follow import follow_job, submit
from diffit_train.ray_jobs.job import Job, RuntimeEnv, job
from diffit_train.ray_jobs.listing import list_jobs, stop_job
from diffit_train.ray_jobs.probe import check_cluster, on_checked_cluster
from tests.conftest import tiny_recipe, write_images
from tests.head import Head, free_port
from tests.silent import silent_server

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The job server of a separate cluster, as started by `ray start --head`."""
    with Head(tmp_path_factory.mktemp("head") / "log") as head:
        yield head.address


@pytest.mark.slow
def test_a_chain_of_jobs_and_a_second_attempt(
    address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from diffit_train.data.autoencoder_fit import fit_autoencoder
    from diffit_train.evaluation.features import fit_features
    from diffit_train.runs.checkpoints import committed_steps

    write_images(tmp_path / "images" / "digits")
    recipe = tiny_recipe(tmp_path)
    fit_autoencoder(recipe)
    train, encode = job("train", recipe, "tiny", []), job("encode", recipe, None, [])
    with pytest.raises(UserError, match=f"job {train.name}-1 rejected its input"):
        submit(train, address)
    assert "no finished latents" in capfd.readouterr().err
    assert submit(encode, address) == f"{encode.name}-1"
    assert "24 images in 5 shards" in capfd.readouterr().err
    assert submit(train, address) == f"{train.name}-2"
    assert "Trained 12 steps" in capfd.readouterr().err
    assert committed_steps(str(tmp_path / "runs" / "tiny"))[-1] == 12
    assert submit(train, address) == f"{train.name}-3"
    assert "already trained" in capfd.readouterr().err

    info = JobSubmissionClient(address).get_job_info(f"{train.name}-3")
    assert info.metadata["diffit.run"] == "tiny"
    assert info.metadata["diffit.root"] == str(tmp_path)
    assert info.metadata["diffit.attempt"] == "3"
    assert info.metadata["diffit.recipe_hash"] == recipe.train_hash()
    rows = {row.name: row for row in list_jobs(address)}
    assert rows[f"{train.name}-3"].state == "succeeded"
    assert "at step 12" in rows[f"{train.name}-3"].progress
    assert rows[f"{encode.name}-1"].stage == "encode"

    # The whole chain as one job: only what is missing is computed.
    fit_features(recipe)
    pipeline = job("pipeline", recipe, "tiny", ["0"])
    assert submit(pipeline, address) == f"{pipeline.name}-1"
    said = capfd.readouterr().err
    assert "stage 1 of 4, encode\nalready encoded" in said
    assert "already trained" in said
    assert "step 0: fd_digits" in said
    (row,) = [row for row in list_jobs(address) if row.stage == "pipeline"]
    assert row.progress == "all 4 stages are done"


def test_runs_of_one_name_under_two_roots_are_two_jobs(tmp_path: Path) -> None:
    one, two = (Job("train", tiny_recipe(tmp_path / name), "tiny") for name in "ab")
    assert one.title == two.title == "train-tiny"
    assert one.name != two.name
    remote = tiny_recipe(tmp_path, "storage.root=s3://key:secret@bucket/x", "tracking.uri=http://m")
    assert "secret" not in str(Job("train", remote, "tiny").metadata())


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


def _shell_job(monkeypatch: pytest.MonkeyPatch, folder: Path, run: str, command: str) -> Job:
    """A job whose entry point is a shell command."""
    monkeypatch.setattr(Job, "entrypoint", lambda job, python: command.format(python=python))
    return Job("train", tiny_recipe(folder), run, env=("DIFFIT_TEST_SECRET",))


def test_a_stopped_job_may_save_first(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFIT_TEST_SECRET", "x")
    # Saving takes longer than the 3 s after which Ray would kill it.
    script = tmp_path / "saves.py"
    script.write_text(
        "import signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(5)\n"
        "    print('saved', flush=True)\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('working', flush=True)\n"
        "time.sleep(600)\n"
    )
    saving = _shell_job(monkeypatch, tmp_path, "saving", f"{{python}} {script}")
    submission_id = submit(saving, address, follow=False)
    client = JobSubmissionClient(address)
    deadline = time.monotonic() + 90
    while "working" not in client.get_job_logs(submission_id):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (row,) = [row for row in list_jobs(address) if row.run == "saving"]
    assert (row.state, row.progress, row.root) == ("running", "working", str(tmp_path))
    with pytest.raises(UserError, match="no job is named 'train-nothing'; the cluster has: .*sav"):
        stop_job(address, "train-nothing")
    assert stop_job(address, "train-saving").status == "STOPPED"
    assert "saved" in client.get_job_logs(submission_id)
    assert "saved" in capfd.readouterr().err
    with pytest.raises(UserError, match="is not running: stopped"):
        stop_job(address, submission_id)


def test_a_failed_job_is_restarted_as_often_as_allowed(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFIT_TEST_SECRET", "x")
    flag = tmp_path / "flag"
    command = f"test -e {flag} || (touch {flag}; exit 1)"
    once = _shell_job(monkeypatch, tmp_path, "once", command)
    assert submit(once, address, restarts=1) == f"{once.name}-2"
    never = _shell_job(monkeypatch, tmp_path, "never", "exit 1")
    with pytest.raises(DiffitError, match=f"job {never.name}-2 ended as FAILED"):
        submit(never, address, restarts=1)
    refused = _shell_job(monkeypatch, tmp_path, "refused", "exit 2")
    with pytest.raises(UserError, match=f"job {refused.name}-1 rejected its input"):
        submit(refused, address, restarts=1)


def test_forwarded_variables_reach_workers_and_are_shown_nowhere(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "hush-9f31c2"
    monkeypatch.delenv("DIFFIT_TEST_SECRET", raising=False)
    script = tmp_path / "reads.py"
    script.write_text(
        "import os, ray\n"
        "from diffit_train.forwarded_env import load_forwarded\n"
        "from diffit_train.ray_session import connected\n"
        "load_forwarded()\n"
        "with connected():\n"
        "    ask = ray.remote(lambda: len(os.environ['DIFFIT_TEST_SECRET']))\n"
        "    print('lengths', len(os.environ['DIFFIT_TEST_SECRET']), ray.get(ask.remote()))\n"
    )
    # The script's folder, not the working directory, leads its path.
    command = f"PYTHONPATH=. {{python}} {script}"
    reads = _shell_job(monkeypatch, tmp_path, "reads", command)
    with pytest.raises(UserError, match="--env names DIFFIT_TEST_SECRET, which is not set"):
        submit(reads, address)
    monkeypatch.setenv("DIFFIT_TEST_SECRET", secret)
    submission_id = submit(reads, address)
    assert f"lengths {len(secret)} {len(secret)}" in capfd.readouterr().err
    client = JobSubmissionClient(address)
    assert secret not in client.get_job_logs(submission_id)
    assert secret not in str(client.get_job_info(submission_id))
    assert secret not in str(client.list_jobs())
    for page in (
        "/api/jobs/",
        "/api/v0/jobs",
        "/api/v0/tasks?detail=1",
        "/api/v0/workers?detail=1",
    ):
        with urllib.request.urlopen(address + page, timeout=30) as answer:
            assert secret not in answer.read().decode()


def test_a_cluster_is_checked_before_a_job_is_sent(
    address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    client = JobSubmissionClient(address)
    good = job("train", tiny_recipe(tmp_path / "root"), "checked", [])
    checks, chosen = check_cluster(good.recipe, ("train",), address)
    assert {check.check for check in checks} >= {"python", "ray", "torch", "gpus", "disk", "root"}
    assert chosen == "none"
    assert not [check for check in checks if check.fix]
    assert not [row for row in list_jobs(address) if row.stage == "doctor"]

    (tmp_path / "file").write_text("not a folder")
    changes = ("scaling.workers=3", "scaling.gpus_per_worker=1")
    bad = job("train", tiny_recipe(tmp_path / "file" / "root", *changes), "unfit", [])
    with pytest.raises(UserError, match="not ready for train-unfit: 2 problems"):
        on_checked_cluster(bad, address, None, "auto")
    said = capfd.readouterr().err
    assert "make it writable" in said
    assert "cluster: train needs 3 CPUs, but the Ray cluster has 2: lower" in said
    assert not [info for info in client.list_jobs() if "unfit" in (info.submission_id or "")]
    # What is not checked is sent as it is.
    assert on_checked_cluster(bad, address, None, "auto", check=False) == bad


def test_versions_that_differ_are_named() -> None:
    older = [Check("node", "ray", "2.9.0"), Check("node", "torch", "2.13.9")]
    (found,) = differing_versions(older)
    assert (found.check, found.found) == ("ray here and there", "2.9.0")


def test_the_runtime_environment_is_chosen_by_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[RuntimeEnv] = []

    def report(
        recipe: object, stages: object, address: str, python: object, env: RuntimeEnv, names: object
    ) -> list[Check]:
        asked.append(env)
        missing = [Check("n", "deepspeed", "missing", "pip install", package=True)]
        return missing if env == "none" else [Check("n", "deepspeed", "0.19.8")]

    monkeypatch.setattr("diffit_train.ray_jobs.probe._report", report)
    recipe, address = tiny_recipe(tmp_path), "http://head:8265"
    checks, chosen = check_cluster(recipe, ("train",), address)
    assert (chosen, asked, checks[0].fix) == ("pip", ["none", "pip"], "")
    assert "lacks packages (deepspeed missing)" in capfd.readouterr().err
    assert check_cluster(recipe, ("train",), address, None, "none")[0][0].fix
    with pytest.raises(UserError, match="--runtime-env is 'conda', but must be one of: auto, none"):
        check_cluster(recipe, ("train",), address, None, "conda")
    with pytest.raises(UserError, match="omit --python '/opt/python'"):
        check_cluster(recipe, ("train",), address, "/opt/python", "uv")


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "gpu")])
def test_what_is_sent_with_a_job(tmp_path: Path, gpus: int, device: str) -> None:
    recipe = tiny_recipe(tmp_path, f"scaling.gpus_per_worker={gpus}")
    sent: dict[str, list[str]] = {}
    requests: dict[str, dict[str, Any]] = {}

    class Client:
        """Keeps what it is asked to submit."""

        def submit_job(self, **request: Any) -> None:
            folder = Path(request["runtime_env"]["working_dir"])
            kind = request["metadata"]["kind"]
            sent[kind] = sorted(path.name for path in folder.iterdir())
            requests[kind] = request
            if kind == "pip":
                (lock,) = folder.glob("*.lock")
                shipped = REPOSITORY / "cluster" / f"requirements-{device}.lock"
                assert lock.read_bytes() == shipped.read_bytes()
            if kind == "image":
                wanted = (folder / "requirements.txt").read_text()
                assert wanted.startswith(f"diffit-train=={diffit_train.__version__}\n")

    class Named(Job):
        """Says its runtime environment in its metadata."""

        def metadata(self) -> dict[str, str]:
            return {"kind": self.runtime_env}

    for kind in get_args(RuntimeEnv):
        wanted = Named("train", recipe, "r", runtime_env=kind)
        send_job(Client(), wanted, "http://127.0.0.1:8265", None, 1)  # type: ignore[arg-type]
    files = ["recipe.yaml", "requirements.txt", "train.py"]
    assert sent["none"] == ["diffit_train", *files]
    assert sent["image"] == files
    (lock,) = set(sent["pip"]) - set(sent["none"])
    assert sent["uv"] == sent["pip"]
    pip = requests["pip"]["runtime_env"]["pip"]
    assert pip["packages"] == [f"-r ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{lock}"]
    index = ["--extra-index-url", CPU_INDEX] if device == "cpu" else []
    assert pip["pip_install_options"] == ["--require-hashes", "--no-deps", *index]
    assert "--require-hashes" in requests["uv"]["runtime_env"]["uv"]["uv_pip_install_options"]
    # The environment has a Python of its own, even on a cluster on this machine.
    assert requests["pip"]["entrypoint"].startswith("python train.py")
    assert requests["none"]["entrypoint"].startswith(sys.executable)


def test_following_survives_a_lost_connection(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server:
        """Loses the connection after the first line, answers 5xx once, then has it all."""

        def __init__(self) -> None:
            self.calls = 0

        async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("status code 503")
            yield "one\n"
            if self.calls == 1:
                raise aiohttp.ClientConnectionError
            yield "two\n"

        def get_job_info(self, submission_id: str) -> SimpleNamespace:
            return SimpleNamespace(status="RUNNING" if self.calls < 3 else "SUCCEEDED")

    monkeypatch.setattr(follow, "RECONNECT_S", 0.0)
    assert follow_job(Server(), "x").status == "SUCCEEDED"  # type: ignore[arg-type]
    said = capfd.readouterr().err
    assert said.count("one\n") == said.count("two\n") == 1
    assert "lost the connection" in said


def test_a_log_is_followed_while_the_job_is_silent_but_not_its_server(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server:
        """Says something, is silent for a while, answers twice, then not at all, then again."""

        def __init__(self) -> None:
            self.tails = self.asked = 0

        async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
            self.tails += 1
            yield "one\n"
            if self.tails == 1:
                await asyncio.sleep(60.0)
            yield "two\n"

        def get_job_info(self, submission_id: str) -> SimpleNamespace:
            self.asked += 1
            if self.asked in (3, 4):
                raise NoAnswerError("no answer")
            return SimpleNamespace(status="RUNNING" if self.tails == 1 else "SUCCEEDED")

    monkeypatch.setenv(retry.LIMIT, "0.2")
    monkeypatch.setattr(follow, "RECONNECT_S", 0.0)
    server = Server()
    assert follow_job(server, "x").status == "SUCCEEDED"  # type: ignore[arg-type]
    said = capfd.readouterr().err
    assert (server.tails, server.asked) == (2, 5)
    assert said.count("one\n") == said.count("two\n") == 1
    assert "lost the connection to the job server (NoAnswerError)" in said


def test_a_silent_job_server_is_given_up_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(retry.LIMIT, "2")
    started_s = time.monotonic()
    with silent_server() as url, pytest.raises(NoAnswerError, match=f"{url} has not answered for"):
        list_jobs(url)
    assert 2.0 <= time.monotonic() - started_s < 3.0


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


@pytest.mark.parametrize(
    ("index", "options"),
    [("https://mirror/cpu", ["--extra-index-url", "https://mirror/cpu"]), ("", [])],
)
def test_nodes_may_install_from_a_mirror(
    index: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", index)
    wanted = Job("train", tiny_recipe(tmp_path), "r", runtime_env="pip")
    given = locked_packages(wanted, tmp_path)["pip"]["pip_install_options"]
    assert given == ["--require-hashes", "--no-deps", *options]
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://user:word@mirror/cpu")
    with pytest.raises(UserError, match=r"PIP_EXTRA_INDEX_URL holds a password.*pip\.conf"):
        locked_packages(wanted, tmp_path)


def test_job_name_metadata_and_entrypoint(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    evaluation = job("evaluate", recipe, "a run", ["0", "newest"])
    expected = "python evaluate.py recipe.yaml --run 'a run' --step 0 --step newest"
    assert evaluation.entrypoint("python") == expected
    assert evaluation.title == "evaluate-a run"
    assert evaluation.name.startswith("evaluate-a run-")
    assert job("encode", recipe, None, []).entrypoint("python") == "python encode.py recipe.yaml"
    axes = ["guidance.scale=1:2:1", "sampler.steps=2,3"]
    pool = Job("evaluate", recipe, "r", ["12"], "first", axes=axes)
    assert pool.title == "evaluate-r-first"
    assert pool.entrypoint("python") == (
        "python sweep.py recipe.yaml --run r --step 12 --vary guidance.scale=1:2:1 "
        "--vary sampler.steps=2,3 --name first"
    )
