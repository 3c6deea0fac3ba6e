"""Rendered files: those of `cluster/`, the command, the other providers, monitoring, hooks."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from diffit_train.cli import app
from diffit_train.config import load_recipe
from diffit_train.errors import UserError
from diffit_train.metric_names import CHECKPOINT_AGE, RANK_PHASE, TRAINING
from diffit_train.provision.hooks import drain_worker, stop_driver
from diffit_train.provision.kuberay import RAY_VERSION
from diffit_train.provision.monitoring import PREFIX, dashboard
from diffit_train.provision.ray_up import ray_up
from diffit_train.provision.render import PROVIDERS, render
from diffit_train.provision.target import Target, object_name

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
ROOT = "s3://bucket/project"


def target(name: str = "imagenet256", *overrides: str, **options: Any) -> Target:
    return Target(load_recipe(name, overrides, ROOT), name, overrides, **options)


def test_cluster_holds_what_the_command_renders(tmp_path: Path) -> None:
    command = re.search(
        r"^(diffit cluster render .*) --out", (CLUSTER / "README.md").read_text(), re.M
    )
    assert command is not None
    words = [*command[1].split()[1:], "--out", str(tmp_path)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    rendered = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    there = {p.relative_to(CLUSTER): p.read_text() for p in CLUSTER.rglob("*") if p.is_file()}
    locks = {path for path in there if path.suffix == ".lock"}
    assert {path: text for path, text in there.items() if path not in locks} == rendered, (
        f"cluster/ is not what the code renders: run {command[0]} cluster"
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_provider_writes_its_own_files_and_the_shared_ones(provider: str) -> None:
    files = render(target(), provider)
    assert {"Containerfile", "README.md", "monitoring/prometheus.yml"} <= set(files)
    others = {p for p in PROVIDERS if p != provider}
    assert not [name for name in files if name.startswith(tuple(others))]
    assert all(f"`{name}`" in files["README.md"] for name in files if name != "README.md")


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: render(target(), "nomad"), "--provider is 'nomad'.*kuberay"),
        (lambda: render(Target(load_recipe("demo"), "demo"), "kuberay"), "share no folder"),
        (lambda: render(Target(load_recipe("demo"), "demo"), "ray-up"), "share no folder"),
        (lambda: target(gpu="H9"), "--gpu is 'H9'"),
        (lambda: target(namespace="No_good"), "--namespace is"),
        (lambda: target(redis="redis://:word@host"), "--redis is"),
        (
            lambda: ray_up(target("imagenet256", "scaling.workers=16", gpus_per_node=16)),
            "--gpus-per-node is 16, but instances with H100 have 1 or 8",
        ),
    ],
)
def test_bad_input_is_named(make: Any, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        make()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("a", "train"), "a-train"),
        (("A_b", "train"), "a-b-train-812913ef"),
        (("7", "train"), "run-7-train-"),
        (("x" * 60, "train"), "x" * 38 + "-"),
    ],
)
def test_names_are_short_and_stay_apart(words: tuple[str, ...], name: str) -> None:
    assert object_name(*words).startswith(name)
    assert len(object_name(*words)) <= 47
    assert object_name("A_b", "train") != object_name("a-b", "train")


# ---- Locks ----


@pytest.mark.parametrize("device", ["cpu", "gpu", "build"])
def test_locks_hold_hashes_and_nothing_local(device: str) -> None:
    text = (CLUSTER / f"requirements-{device}.lock").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    packages = [line for line in lines if not line.startswith(" ")]
    assert all(re.fullmatch(r"[a-z0-9._-]+==[\w.+]+( ; .*)? \\", line) for line in packages)
    assert all(
        re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", x) for x in lines if x[0] == " "
    )
    assert not re.search(r"file:|/opt/|/home/|/tmp/", "\n".join(lines))
    if device != "build":
        assert f"\nray=={RAY_VERSION} " in text
        assert ("\nnvidia-nccl" in text) == (device == "gpu")


# ---- ray up ----


@pytest.mark.parametrize("name", ["demo", "imagenet256", "imagenet512"])
def test_ray_accepts_the_cluster_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(render(target(name), "ray-up")["ray-up.yaml"])
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["available_node_types"]["worker"]["min_workers"] == 0
    for key in config:
        wrong = copy.deepcopy(prepared)
        wrong[f"{key}x"] = wrong.pop(key)
        with pytest.raises(Exception, match=rf"{key}x|{key}"):
            validate_config(wrong)


def test_ray_up_is_closed_but_for_ssh() -> None:
    config = ray_up(target())
    [head] = [line for line in config["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in head
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "security_group" not in config["provider"]
    worker = config["available_node_types"]["worker"]["node_config"]
    assert worker["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum("--require-hashes" in line for line in config["setup_commands"]) == 2
    sources = [path for path in config["file_mounts"].values() if not path.startswith("~")]
    assert all((CLUSTER.parent / path).exists() for path in sources)


# ---- Monitoring ----


def test_the_dashboard_shows_gauges_that_training_reports() -> None:
    shown = set(re.findall(rf"{PREFIX}(\w+)", json.dumps(dashboard())))
    assert shown <= {"step", *TRAINING, CHECKPOINT_AGE, RANK_PHASE}
    assert {"loss", "images_per_s", "data_wait_fraction", "mfu", "step_s"} <= shown
    assert {CHECKPOINT_AGE, RANK_PHASE} <= shown


# ---- Hooks ----


@pytest.mark.parametrize("hook", [drain_worker(210), stop_driver(210)])
def test_hooks_are_sound_shell(hook: str) -> None:
    subprocess.run(["bash", "-n", "-c", hook], check=True)
    if shutil.which("shellcheck"):
        check = ["shellcheck", "--shell=bash", "--exclude=SC2086", "-"]
        result = subprocess.run(check, input=hook, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


def test_a_hook_does_not_find_itself() -> None:
    for hook in (drain_worker(1), stop_driver(1)):
        for pattern in re.findall(r"grep -\w+ '([^']+)'", hook):
            assert not re.search(pattern, f"bash\0-c\0{hook}".replace("\0", " "))
    [pattern] = re.findall(r"grep -\w+ '([^']+)'", stop_driver(1))
    assert re.search(pattern, "/opt/diffit/bin/python\0/opt/diffit/bin/diffit\0train\0demo")


def test_ray_knows_the_drain_command() -> None:
    from ray.scripts.scripts import cli

    words = drain_worker(9).partition(";")[0].replace("'the pod ends'", "ends").split()
    context = cli.commands[words[1]].make_context(words[1], words[2:])
    assert context.params["deadline_remaining_seconds"] == 9


def test_slurm_scripts_are_rendered_for_a_site() -> None:
    site = ("partition=gpu", "venv=/shared/venv", "modules=cuda,nccl", "stop_s=600")
    files = render(target(site=site), "slurm")
    script = files["slurm/train.sh"]
    assert "#SBATCH --partition=gpu\n" in script
    assert "--signal=B:TERM@600" in script
    assert "/shared/venv" in script
    assert "export MLFLOW_TRACKING_URI=" in files["README.md"]
    for wrong, words in (("colour=red", "must be KEY=VALUE with one of"), ("stop_s=x", "a number")):
        with pytest.raises(UserError, match=words):
            render(target(site=(wrong,)), "slurm")


def test_the_mlflow_server_names_the_driver_of_the_image() -> None:
    from sqlalchemy.engine import make_url

    text = render(target(), "kuberay")["kuberay/mlflow.yaml"]
    url = re.search(r"value: (postgresql\S+)", text)
    assert url is not None
    assert make_url(url[1]).get_driver_name() == "psycopg2"
    lock = (CLUSTER / "requirements-cpu.lock").read_text()
    assert "psycopg2-binary==" in lock


def test_prometheus_gets_the_discovery_of_its_provider_only() -> None:
    jobs = {
        provider: [
            job["job_name"]
            for job in yaml.safe_load(render(target(), provider)["monitoring/prometheus.yml"])[
                "scrape_configs"
            ]
        ]
        for provider in (*PROVIDERS, "all")
    }
    assert jobs == {
        "kuberay": ["diffit-kuberay"],
        "ray-up": ["diffit-ray-up"],
        "slurm": ["diffit-slurm"],
        "all": ["diffit-kuberay", "diffit-ray-up", "diffit-slurm"],
    }
