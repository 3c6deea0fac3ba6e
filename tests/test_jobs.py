"""Jobs on a real cluster: submitted, followed, rejected, and resumed under the same name."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import aiohttp
import pytest
from ray.job_submission import JobSubmissionClient

import diffit_train
from diffit_train import storage
from diffit_train.cli.jobs import jobs_stop_command
from diffit_train.cli.main import app, exit_status
from diffit_train.errors import DiffitError, UserError
from diffit_train.jobs import doctor, fleet
from diffit_train.jobs.client import CPU_INDEX, connect, list_jobs, locked_packages, send_job
from diffit_train.jobs.doctor import check_cluster, checked, differing_versions, read_report
from diffit_train.jobs.fleet import Fleet, JobState, require_success, submit
from diffit_train.jobs.job import Job, RuntimeEnv, job
from diffit_train.jobs.node import Check
from diffit_train.runs.checkpoints import Checkpoints
from diffit_train.runs.run import Run, open_run
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
    from diffit_train.data.fit import fit_autoencoder
    from diffit_train.evaluation.feature_networks import fit_features

    write_images(tmp_path / "images" / "digits")
    recipe = tiny_recipe(tmp_path)
    fit_autoencoder(recipe)
    train, encode = job("train", open_run(recipe, "tiny"), []), job("encode", open_run(recipe), [])
    with pytest.raises(UserError, match=f"{train.name}-1"):
        submit(train, address)
    assert "no finished latents" in capfd.readouterr().err
    assert submit(encode, address) == f"{encode.name}-1"
    assert "24 images in 5 shards" in capfd.readouterr().err
    assert submit(train, address) == f"{train.name}-2"
    assert "Trained 12 steps" in capfd.readouterr().err
    assert Checkpoints(str(tmp_path / "runs" / "tiny")).steps[-1] == 12
    assert submit(train, address) == f"{train.name}-3"
    assert "already trained" in capfd.readouterr().err

    info = JobSubmissionClient(address).get_job_info(f"{train.name}-3")
    assert info.metadata["diffit.run"] == "tiny"
    assert info.metadata["diffit.root"] == str(tmp_path)
    assert info.metadata["diffit.attempt"] == "3"
    assert info.metadata["diffit.recipe_hash"] == recipe.train_hash()
    rows = {row["name"]: row for row in list_jobs(connect(address))}
    assert rows[f"{train.name}-3"]["state"] == "succeeded"
    assert "at step 12" in rows[f"{train.name}-3"]["progress"]
    assert rows[f"{encode.name}-1"]["stage"] == "encode"

    # The whole chain as one job: only what is missing is computed.
    fit_features(recipe)
    pipeline = job("pipeline", open_run(recipe, "tiny"), ["0"])
    assert submit(pipeline, address) == f"{pipeline.name}-1"
    said = capfd.readouterr().err
    assert "stage 1 of 4, encode\nalready encoded" in said
    assert "already trained" in said
    assert "step 0: fd_digits" in said
    (row,) = [row for row in list_jobs(connect(address)) if row["stage"] == "pipeline"]
    assert row["progress"] == "all 4 stages are done"


def test_runs_of_one_name_under_two_roots_are_two_jobs(tmp_path: Path) -> None:
    one, two = (Job("train", open_run(tiny_recipe(tmp_path / name), "tiny")) for name in "ab")
    assert one.title == two.title == "train-tiny"
    assert one.name != two.name
    remote = tiny_recipe(tmp_path, "storage.root=s3://key:secret@bucket/x", "tracking.uri=http://m")
    assert "secret" not in str(Job("train", Run(remote.storage.root, "tiny", remote)).metadata())


def test_a_running_job_is_followed_not_doubled(address: str, tmp_path: Path) -> None:
    client = JobSubmissionClient(address)
    waiting = Job("train", open_run(tiny_recipe(tmp_path), "waiting"))
    client.submit_job(
        entrypoint="sleep 2", submission_id="slow", metadata={"diffit.name": waiting.name}
    )
    assert submit(waiting, address) == "slow"
    assert client.get_job_status("slow") == "SUCCEEDED"


def _shell_job(monkeypatch: pytest.MonkeyPatch, folder: Path, run: str, command: str) -> Job:
    """A job whose entry point is a shell command."""
    monkeypatch.setattr(Job, "entrypoint", lambda job, python: command.format(python=python))
    return Job("train", open_run(tiny_recipe(folder), run), env=("DIFFIT_TEST_SECRET",))


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
        "print('computing', flush=True)\n"
        "time.sleep(600)\n"
    )
    saving = _shell_job(monkeypatch, tmp_path, "saving", f"{{python}} {script}")
    submission_id = submit(saving, address, follow=False)
    client = JobSubmissionClient(address)
    deadline = time.monotonic() + 90
    while "computing" not in client.get_job_logs(submission_id):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (row,) = [row for row in list_jobs(client) if row["run"] == "saving"]
    assert (row["state"], row["progress"], row["root"]) == ("running", "computing", str(tmp_path))
    with pytest.raises(UserError, match="'train-nothing'.*saving"):
        jobs_stop_command("train-nothing", address)
    jobs_stop_command("train-sav*", address)
    assert client.get_job_status(submission_id) == "STOPPED"
    assert "saved" in client.get_job_logs(submission_id)
    assert "saved" in capfd.readouterr().err
    with pytest.raises(UserError, match=rf"{submission_id} \(stopped\)"):
        jobs_stop_command(submission_id, address)


def test_a_failed_job_is_restarted_and_resumes(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFIT_TEST_SECRET", "x")
    flag = tmp_path / "flag"
    once = _shell_job(monkeypatch, tmp_path, "once", f"test -e {flag} || (touch {flag}; exit 1)")
    assert submit(once, address, restarts=1) == f"{once.name}-2"


def test_the_end_of_a_job_is_the_end_of_the_command() -> None:
    ended = JobState("x", state="failed", submission_id="x-1", reason="ended as FAILED: node died")
    with pytest.raises(DiffitError, match="x-1 .*FAILED: node died"):
        require_success(ended)
    with pytest.raises(DiffitError, match="x-1"):
        require_success(replace(ended, state="stopped"))
    with pytest.raises(UserError, match="x-1"):
        require_success(replace(ended, refused=True))
    require_success(replace(ended, state="done"))


def test_forwarded_variables_reach_workers_and_are_shown_nowhere(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "hush-9f31c2"
    monkeypatch.delenv("DIFFIT_TEST_SECRET", raising=False)
    script = tmp_path / "reads.py"
    script.write_text(
        "import os, ray\n"
        "from diffit_train.jobs.node import load_forwarded\n"
        "from diffit_train.ray_session import connected\n"
        "load_forwarded()\n"
        "with connected():\n"
        "    ask = ray.remote(lambda: len(os.environ['DIFFIT_TEST_SECRET']))\n"
        "    print('lengths', len(os.environ['DIFFIT_TEST_SECRET']), ray.get(ask.remote()))\n"
    )
    # The script's folder, not the working directory, leads its path.
    command = f"PYTHONPATH=. {{python}} {script}"
    reads = _shell_job(monkeypatch, tmp_path, "reads", command)
    with pytest.raises(UserError, match="--env .*DIFFIT_TEST_SECRET"):
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
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    client = JobSubmissionClient(address)
    (tmp_path / "file").write_text("not a folder")
    changes = ("scaling.workers=3", "scaling.gpus_per_worker=1")
    recipe = tiny_recipe(tmp_path / "file" / "root", *changes)
    bad = job("train", Run(recipe.storage.root, "unfit", recipe), [])
    checks, chosen = check_cluster(recipe, ("train",), address)
    assert {check.check for check in checks} >= {"python", "ray", "torch", "gpus", "disk", "root"}
    assert chosen == "none"
    assert {check.check for check in checks if check.fix} == {"root", "train"}
    monkeypatch.setattr(doctor, "check_cluster", lambda *_: (checks, chosen))
    with pytest.raises(UserError, match="train-unfit: 2"):
        checked(bad, address, None, "auto")
    said = capfd.readouterr().err
    assert "make it writable" in said
    assert "cluster: train needs 3 CPUs, but the Ray cluster has 2: lower" in said
    assert not [info for info in client.list_jobs() if "unfit" in (info.submission_id or "")]
    # What is not checked is sent as it is.
    assert checked(bad, address, None, "auto", check=False) == bad


def test_a_report_is_found_in_a_log() -> None:
    checks = [Check("node", "ray", "2.9.0", "fix [it]"), Check("node", "gpus", "0")]
    text = json.dumps([asdict(check) for check in checks], indent=2)
    assert (
        read_report(f"[2026 E] native\nchecking\n{text}\n  node: ray 2.9.0: fix [it]\n") == checks
    )
    assert read_report("[2026 E] native\nfailed: no cluster\n") is None


def test_versions_that_differ_are_named() -> None:
    older = [Check("node", "ray", "2.9.0"), Check("node", "torch", "2.13.9")]
    (found,) = differing_versions(older)
    assert (found.check, found.found) == ("ray here and there", "2.9.0")


def test_the_runtime_environment_is_chosen_by_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[RuntimeEnv] = []

    def report(job: Job, address: str, python: object) -> list[Check]:
        asked.append(job.runtime_env)
        missing = [Check("n", "deepspeed", "missing", "pip install", package=True)]
        return missing if job.runtime_env == "none" else [Check("n", "deepspeed", "0.19.8")]

    monkeypatch.setattr("diffit_train.jobs.doctor._report", report)
    recipe, address = tiny_recipe(tmp_path), "http://head:8265"
    checks, chosen = check_cluster(recipe, ("train",), address)
    assert (chosen, asked, checks[0].fix) == ("pip", ["none", "pip"], "")
    assert "lacks packages (deepspeed missing)" in capfd.readouterr().err
    assert check_cluster(recipe, ("train",), address, None, "none")[0][0].fix
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
        wanted = Named("train", open_run(recipe, "r"), runtime_env=kind)
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


class _Server:
    """A job server with one job, whose log is given by a function of how often it was asked for."""

    def __init__(self, log: Callable[[int], AsyncIterator[str]], tails: int) -> None:
        self.log, self.tails_needed, self.tails, self.pings = log, tails, 0, 0
        self.answers: Callable[[int], None] = lambda pings: None

    def ping(self, address: str) -> None:
        self.pings += 1
        self.answers(self.pings)

    def list_jobs(self) -> list[SimpleNamespace]:
        status = "RUNNING" if self.tails < self.tails_needed else "SUCCEEDED"
        metadata = {"diffit.name": "x"}
        return [SimpleNamespace(submission_id="x-1", status=status, metadata=metadata)]

    def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        self.tails += 1
        return self.log(self.tails)

    def follow(self, monkeypatch: pytest.MonkeyPatch) -> JobState:
        monkeypatch.setattr(fleet, "connect", lambda address: self)
        monkeypatch.setattr(fleet, "ping", self.ping)
        monkeypatch.setattr(fleet, "POLL_S", 0.0)
        state = JobState("x", state="running", submission_id="x-1")
        Fleet("http://head:8265", [state]).run()
        return state


def test_a_log_is_printed_once_over_lost_connections(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def log(tail: int) -> AsyncIterator[str]:
        if tail == 2:
            raise RuntimeError("status code 503")
        yield "one\n"
        if tail == 1:
            raise aiohttp.ClientConnectionError
        if tail == 3:
            await asyncio.sleep(60.0)  # a job that computes, or a lost server: asked again
        yield "two\n"

    def away(pings: int) -> None:
        if pings in (3, 4):
            raise ConnectionError("refused")

    monkeypatch.setenv(storage.RETRY_LIMIT, "2")
    server = _Server(log, tails=4)
    server.answers = away
    assert server.follow(monkeypatch).state == "done"
    printed = capfd.readouterr().err
    assert printed.count("one\n") == printed.count("two\n") == 1
    assert printed.count("waiting for http://head:8265: refused") == 1


def test_a_job_server_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def log(tail: int) -> AsyncIterator[str]:
        yield ""

    def away(pings: int) -> None:
        raise ConnectionError("refused")

    monkeypatch.setenv(storage.RETRY_LIMIT, "0.01")
    server = _Server(log, tails=9)
    server.answers = away
    with pytest.raises(DiffitError, match="unreachable"):
        server.follow(monkeypatch)


def test_a_silent_job_server_is_given_up_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.RETRY_LIMIT, "1")
    with silent_server() as url:
        assert exit_status(lambda: app(["jobs", "list", "--address", url])) == 1
        with pytest.raises(DiffitError, match=f"{url} "):
            connect(url)


def _fleet(folder: Path, count: int) -> list[Job]:
    run, sweep = open_run(tiny_recipe(folder), "r"), f"s{abs(hash(folder)) % 10**8}"
    return [Job("evaluate", run, (), sweep, number) for number in range(count)]


class _Cluster:
    """Runs each attempt of a job until it is listed twice; then it has ended with a status."""

    def __init__(self, ends: dict[int, list[int]]) -> None:
        self.ends, self.jobs, self.at_once = ends, list[SimpleNamespace](), 0

    def send(self, client: object, job: Job, address: str, python: None, attempt: int) -> str:
        code = self.ends[job.number][attempt - 1]
        metadata = {"diffit.name": job.name, "diffit.attempt": str(attempt)}
        info = SimpleNamespace(
            submission_id=f"{job.name}-{attempt}",
            metadata=metadata,
            driver_exit_code=code,
            message="a reason, last available logs",
            looks=0,
        )
        self.jobs.append(info)
        return str(info.submission_id)

    def list_jobs(self) -> list[SimpleNamespace]:
        for info in self.jobs:
            info.looks += 1
            ended = "FAILED" if info.driver_exit_code else "SUCCEEDED"
            info.status = ended if info.looks > 2 else "RUNNING"
        self.at_once = max(self.at_once, sum(info.status == "RUNNING" for info in self.jobs))
        return self.jobs


def test_a_fleet_of_jobs_runs_to_completion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second fails once, the third always, the fourth is rejected, the fifth is already done.
    cluster = _Cluster({0: [0], 1: [1, 0], 2: [1, 1], 3: [2]})
    monkeypatch.setattr(fleet, "connect", lambda address: cluster)
    monkeypatch.setattr(fleet, "ping", lambda address: None)
    monkeypatch.setattr(fleet, "send_job", cluster.send)
    monkeypatch.setattr(fleet, "POLL_S", 0.0)
    states = [JobState(job.name, job) for job in _fleet(tmp_path, 5)]
    states[4].state = "done"
    Fleet("", states, max_concurrent=2, retries=1, show=lambda states: None).run()
    assert [state.state for state in states] == ["done", "done", "failed", "failed", "done"]
    assert [state.failures for state in states] == [0, 1, 2, 1, 0]
    assert states[2].reason == "ended as FAILED: a reason"
    assert len(cluster.jobs) == 6
    assert cluster.at_once == 2


def test_a_stopped_job_ends_its_fleet(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Job, "entrypoint", lambda job, python: "echo begun-$((1+1)); sleep 60")
    client, jobs = JobSubmissionClient(address), _fleet(tmp_path, 2)
    states = [JobState(job.name, job) for job in jobs]
    thread = threading.Thread(target=Fleet(address, states, show=lambda states: None).run)
    thread.start()
    deadline = time.monotonic() + 60
    while not states[0].submission_id or "begun-2" not in client.get_job_logs(f"{jobs[0].name}-1"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    jobs_stop_command(f"evaluate-r-{jobs[0].sweep}-*", address)
    thread.join(60)
    assert [state.state for state in states] == ["stopped", "stopped"]


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(UserError, match="stage is 'trian'"):
        job("trian", open_run(recipe), [])
    with pytest.raises(UserError, match="--step is only for evaluate"):
        job("train", open_run(recipe), ["3"])
    with pytest.raises(UserError, match="http"):
        submit(job("train", open_run(recipe), []), f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"must look like http://head:8265"):
        submit(job("train", open_run(recipe), []), "head:8265")


@pytest.mark.parametrize(
    ("index", "options"),
    [("https://mirror/cpu", ["--extra-index-url", "https://mirror/cpu"]), ("", [])],
)
def test_nodes_may_install_from_a_mirror(
    index: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", index)
    wanted = Job("train", open_run(tiny_recipe(tmp_path), "r"), runtime_env="pip")
    given = locked_packages(wanted, tmp_path)["pip"]["pip_install_options"]
    assert given == ["--require-hashes", "--no-deps", *options]
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://user:word@mirror/cpu")
    with pytest.raises(UserError, match=r"PIP_EXTRA_INDEX_URL .*pip\.conf"):
        locked_packages(wanted, tmp_path)


def test_job_name_metadata_and_entrypoint(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    evaluation = job("evaluate", open_run(recipe, "a run"), ["0", "newest"])
    expected = "python evaluate.py recipe.yaml --run 'a run' --step 0 --step newest"
    assert evaluation.entrypoint("python") == expected
    assert evaluation.title == "evaluate-a run"
    assert evaluation.name.startswith("evaluate-a run-")
    assert (
        job("encode", open_run(recipe), []).entrypoint("python") == "python encode.py recipe.yaml"
    )
    axes = ["guidance.scale=1:2:1", "sampler.steps=2,3"]
    pool = Job("evaluate", open_run(recipe, "r"), ["12"], "first", axes=axes)
    assert pool.title == "evaluate-r-first"
    assert pool.entrypoint("python") == (
        "python -m diffit_train sweep recipe.yaml --run r --step 12 "
        "--vary guidance.scale=1:2:1 "
        "--vary sampler.steps=2,3 --name first"
    )
