"""Sizes of nodes follow from the recipe and from what `diffit plan` computes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from diffit_train.commands.plan import plan_command
from diffit_train.config import Recipe, load_recipe
from diffit_train.node_sizes import MARGIN_S, PROCESS_BYTES, NodeSize, node_sizes
from diffit_train.planning import Machine, plan
from diffit_train.storage import GIB


def recipe(*overrides: str, name: str = "imagenet256") -> Recipe:
    return load_recipe(name, overrides, "s3://bucket/project")


def planned(of: Recipe) -> dict[str, Any]:
    return plan(of, Machine("H100", 0.4), measured=False)


def sizes(of: Recipe, workers_per_node: int = 8) -> dict[str, NodeSize]:
    return node_sizes(of, planned(of), workers_per_node)


def test_nodes_follow_from_workers_and_gpus() -> None:
    two = sizes(recipe("scaling.workers=16"))["train"]
    assert (two.nodes, two.gpus, two.cpus) == (2, 8, 65)
    four = sizes(recipe("scaling.workers=16"), workers_per_node=4)["train"]
    assert (four.nodes, four.gpus) == (4, 4)
    assert sizes(recipe(name="demo"))["train"].gpus == 0
    shared = sizes(recipe("scaling.gpus_per_actor=0.5"))["evaluate"]
    assert (shared.nodes, shared.gpus) == (1, 4)


def test_states_on_the_host_need_memory() -> None:
    offloading = recipe("train.offload=optimizer")
    states = planned(offloading)["memory"]["zero_stage"]["2"]["of_them_on_host"]
    more = sizes(offloading)["train"].memory - sizes(recipe())["train"].memory
    assert more == pytest.approx(8 * states, abs=GIB)
    on_cpu = recipe("scaling.gpus_per_worker=0", "scaling.workers=2")
    total = planned(on_cpu)["memory"]["zero_stage"]["2"]["total"]
    assert sizes(on_cpu)["train"].memory > 2 * (total + PROCESS_BYTES)


def test_the_cache_holds_the_latents_and_the_grace_a_checkpoint() -> None:
    storage, size = planned(recipe())["storage"], sizes(recipe())["train"]
    assert storage["latents"] <= size.shard_cache < storage["latents"] + GIB
    assert size.grace_s > storage["checkpoint"] / 100e6 + MARGIN_S


@pytest.mark.parametrize("name", ["demo", "imagenet256", "imagenet512"])
def test_parts_fit_into_each_other(name: str) -> None:
    found = sizes(recipe(name=name))
    for size in found.values():
        assert size.object_store < size.shm < size.memory
        assert size.shard_cache < size.disk
        assert name == "demo" or size.memory <= max(found["workers"].memory, found["head"].memory)


def test_plan_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    plan_command("imagenet256", nodes=True, as_json=True)
    train = json.loads(capsys.readouterr().out)["train"]
    assert (train["gpus"], train["memory"] // GIB) == (8, 80)
    plan_command("imagenet256", nodes=True)
    shown = capsys.readouterr().out
    assert "scaling.shard_cache_gib=42" in shown
    assert any(line.split()[1:2] == ["workers"] for line in shown.splitlines())
