"""Lock files, `ray up`, the container, monitoring."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffit_train.tracking import CHECKPOINT_AGE, RANK_PHASE, TRAINING

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
RAY_UP: dict[str, Any] = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())


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
        assert ("\nnvidia-nccl" in text) == (device == "gpu")
        assert "psycopg2-binary==" in text  # as the MLflow server's database URL has it


def test_ray_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(RAY_UP))
    validate_config(prepared)
    for key in RAY_UP:
        wrong = copy.deepcopy(prepared)
        wrong[f"{key}x"] = wrong.pop(key)
        with pytest.raises(Exception, match=rf"{key}x|{key}"):
            validate_config(wrong)


def test_ray_up_is_closed_but_for_ssh() -> None:
    [head] = [line for line in RAY_UP["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in head
    starts = RAY_UP["head_start_ray_commands"] + RAY_UP["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "security_group" not in RAY_UP["provider"]
    assert sum("--require-hashes" in line for line in RAY_UP["setup_commands"]) == 2
    sources = [path for path in RAY_UP["file_mounts"].values() if not path.startswith("~")]
    assert all((CLUSTER.parent / path).exists() for path in sources)
    worker = RAY_UP["available_node_types"]["worker"]
    assert worker["min_workers"] == 0
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_the_container_copies_what_is_there() -> None:
    text = (CLUSTER / "Containerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in line.split():
            assert list(CLUSTER.parent.glob(source.replace("$DEVICE", "*"))), source
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["1000:1000"]


def test_the_dashboard_shows_gauges_that_training_reports() -> None:
    text = (CLUSTER / "monitoring/grafana-dashboard.json").read_text()
    json.loads(text)
    shown = set(re.findall(r"ray_diffit_train_(\w+)", text))
    assert shown <= {"step", *TRAINING, CHECKPOINT_AGE, RANK_PHASE}
    assert {"loss", "images_per_s", "mfu", "step_s", CHECKPOINT_AGE, RANK_PHASE} <= shown
