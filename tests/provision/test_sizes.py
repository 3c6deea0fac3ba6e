"""Sizes follow from the recipe and from what `diffit plan` computes."""

from __future__ import annotations

from typing import Any

import pytest

from diffit_train.config import Recipe, load_recipe
from diffit_train.provision.sizes import (
    CLUSTER_STAGES,
    MARGIN_S,
    PROCESS_BYTES,
    estimate,
    grace_s,
    stage_size,
)
from diffit_train.storage import GIB


def recipe(*overrides: str, name: str = "imagenet256") -> Recipe:
    return load_recipe(name, overrides, "s3://bucket/project")


def test_nodes_follow_from_workers_and_gpus() -> None:
    two = stage_size("train", recipe("scaling.workers=16"))
    assert (two.nodes, two.worker.gpus, two.worker.cpus) == (2, 8, 65)
    four = stage_size("train", recipe("scaling.workers=16"), workers_per_node=4)
    assert (four.nodes, four.worker.gpus) == (4, 4)
    assert stage_size("train", recipe(name="demo")).worker.gpus == 0
    shared = stage_size("evaluate", recipe("scaling.gpus_per_actor=0.5"))
    assert (shared.nodes, shared.worker.gpus) == (1, 4)


def test_what_is_offloaded_needs_memory_of_the_host() -> None:
    plain = stage_size("train", recipe()).worker
    offloaded = stage_size("train", recipe("train.offload=optimizer")).worker
    states = estimate(recipe("train.offload=optimizer"))["memory"]["zero_stage"]["2"]
    assert offloaded.memory - plain.memory == pytest.approx(8 * states["of_them_on_host"], abs=GIB)


def test_without_gpus_all_lies_in_memory() -> None:
    on_cpu = recipe("scaling.gpus_per_worker=0", "scaling.workers=2", "scaling.gpus_per_actor=0")
    size = stage_size("train", on_cpu).worker
    total = estimate(on_cpu)["memory"]["zero_stage"]["2"]["total"]
    assert size.memory > 2 * (total + PROCESS_BYTES)


def test_the_cache_holds_the_latents_if_it_can() -> None:
    size = stage_size("train", recipe()).worker
    latents = estimate(recipe())["storage"]["latents"]
    assert latents <= size.cache < latents + GIB
    assert size.disk > size.cache


def test_the_time_to_end_fits_a_checkpoint() -> None:
    checkpoint = estimate(recipe())["storage"]["checkpoint"]
    uploaded_s = checkpoint / 100e6
    assert stage_size("train", recipe()).grace_s > uploaded_s + MARGIN_S
    assert grace_s(10 * checkpoint, 1, 1.0) > 10 * uploaded_s
    assert grace_s(10 * checkpoint, 10, 1.0) == grace_s(checkpoint, 1, 1.0)


@pytest.mark.parametrize("name", ["demo", "imagenet256", "imagenet512"])
def test_parts_fit_into_each_other(name: str) -> None:
    sizes: dict[str, Any] = {
        stage: stage_size(stage, recipe(name=name)) for stage in CLUSTER_STAGES
    }
    for size in sizes.values():
        for node in (size.head, size.worker):
            assert node.object_store < node.shm < node.memory
            assert node.cache < node.disk
    for field in ("cpus", "gpus", "memory", "shm", "disk"):
        most = max(getattr(sizes[s].worker, field) for s in ("encode", "train", "evaluate"))
        assert getattr(sizes["pipeline"].worker, field) == most
