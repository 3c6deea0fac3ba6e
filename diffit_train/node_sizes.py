"""What each stage needs of its nodes, for the files in `cluster/`: `diffit plan RECIPE --nodes`.

Bytes of states, latents and checkpoints are those of `diffit plan`. The constants below are
allowances, not measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from diffit_train.config import Recipe
from diffit_train.planning import autoencoder_bytes
from diffit_train.storage import GIB

PROCESS_BYTES = 6 * GIB  # a process that has imported torch and Ray, with its CUDA context
NODE_BYTES = 2 * GIB  # raylet, agents and the system's own
OBJECT_STORE_BYTES = 2 * GIB
SHARED_BYTES = 1 * GIB  # shared memory of NCCL and torch, for each worker
SCRATCH_BYTES = 20 * GIB  # logs, compiled kernels and downloaded weights
# Of the latents, a node keeps at most so much, and so much where their size is not known.
CACHE_BYTES, UNKNOWN_CACHE_BYTES = 200 * GIB, 20 * GIB
# Features of an evaluation that its driver holds: float64 values per image.
FEATURE_VALUES = 2048 + 2023 + 1008
HEAD_CPUS, HEAD_BYTES = 4, 8 * GIB
# A checkpoint goes to a local file first, then to the root.
WRITE_BYTES_PER_S, UPLOAD_BYTES_PER_S = 200e6, 100e6
MARGIN_S = 60


@dataclass(frozen=True)
class NodeSize:
    """Nodes of one kind, at most `nodes`; bytes unless named otherwise.

    Attributes:
        shm: size of /dev/shm, which holds the object store; part of `memory`.
        shard_cache: part of `disk` for copies of latent shards.
        grace_s: between the request to end and the kill; a checkpoint fits in.
    """

    nodes: int
    cpus: int
    gpus: int
    memory: int
    shm: int
    object_store: int
    disk: int
    shard_cache: int = 0
    grace_s: int = 120


def node_sizes(
    recipe: Recipe, planned: dict[str, Any], workers_per_node: int = 8
) -> dict[str, NodeSize]:
    """The head's node, the worker nodes of each stage, and `workers`: enough for every stage.

    Args:
        planned: result of `planning.plan`.
        workers_per_node: training workers on a node, which is its number of GPUs.
    """
    stages = {
        "encode": _encode(recipe, workers_per_node),
        "train": _train(recipe, planned, workers_per_node),
        "evaluate": _evaluate(recipe, planned, workers_per_node),
    }
    largest = {
        field.name: max(getattr(size, field.name) for size in stages.values())
        for field in fields(NodeSize)
    }
    return {"head": _head(recipe), **stages, "workers": NodeSize(**largest)}


def _head(recipe: Recipe) -> NodeSize:
    """The node of the driver, which computes metrics but neither trains nor generates."""
    features = recipe.evaluate.samples * FEATURE_VALUES * 8
    shm = OBJECT_STORE_BYTES + SHARED_BYTES
    memory = _whole_gib(HEAD_BYTES + features + shm)
    return NodeSize(1, HEAD_CPUS, 0, memory, shm, OBJECT_STORE_BYTES, SCRATCH_BYTES)


def _encode(recipe: Recipe, workers_per_node: int) -> NodeSize:
    scaling = recipe.scaling
    here, nodes, gpus = _actors(scaling.encode_actors, scaling.gpus_per_actor, workers_per_node)
    # Each actor next to tasks that read and decode for it.
    threads = 1 if gpus else scaling.encode_threads
    return _worker(
        here,
        nodes=nodes,
        cpus=here * max(scaling.cpus_per_worker, threads + 1) + 1,
        gpus=gpus,
        bytes_each=0 if gpus else autoencoder_bytes(recipe, recipe.autoencoder.batch_size),
        object_store=here * OBJECT_STORE_BYTES,
    )


def _train(recipe: Recipe, planned: dict[str, Any], workers_per_node: int) -> NodeSize:
    scaling = recipe.scaling
    here = min(workers_per_node, scaling.most_workers)
    nodes = math.ceil(scaling.most_workers / here)
    memory = planned["memory"]["zero_stage"][str(recipe.train.zero_stage)]
    states = memory["of_them_on_host"] if scaling.gpus_per_worker else memory["total"]
    share = planned["storage"]["checkpoint"] / nodes
    save_s = share / WRITE_BYTES_PER_S + share / UPLOAD_BYTES_PER_S
    return _worker(
        here,
        nodes=nodes,
        cpus=here * scaling.cpus_per_worker + 1,
        gpus=here * scaling.gpus_per_worker,
        bytes_each=states + planned["memory"]["latents_on_host"],
        # The part of a checkpoint being uploaded, and that of the next one.
        disk=math.ceil(2 * share),
        shard_cache=min(CACHE_BYTES, planned["storage"]["latents"] or UNKNOWN_CACHE_BYTES),
        end_s=max(planned["time"]["step_s"]) + save_s + MARGIN_S,
    )


def _evaluate(recipe: Recipe, planned: dict[str, Any], workers_per_node: int) -> NodeSize:
    scaling = recipe.scaling
    here, nodes, gpus = _actors(scaling.evaluate_actors, scaling.gpus_per_actor, workers_per_node)
    weights = planned["storage"]["export"]
    decoding = 0 if gpus else autoencoder_bytes(recipe, recipe.evaluate.batch_size)
    return _worker(
        here,
        nodes=nodes,
        cpus=here * scaling.cpus_per_worker + 1,
        gpus=gpus,
        bytes_each=weights + decoding,  # weights pass through the host on their way to a GPU
        disk=weights,
    )


def _actors(actors: int, gpus_each: float, workers_per_node: int) -> tuple[int, int, int]:
    """Actors on a node, nodes, and GPUs of a node."""
    room = math.floor(workers_per_node / gpus_each) if gpus_each else workers_per_node
    here = max(1, min(room, actors))
    return here, math.ceil(actors / here), math.ceil(here * gpus_each)


def _worker(
    workers: int,
    *,
    nodes: int,
    cpus: int,
    gpus: int,
    bytes_each: int,
    object_store: int = OBJECT_STORE_BYTES,
    disk: int = 0,
    shard_cache: int = 0,
    end_s: float = 0.0,
) -> NodeSize:
    """A node that holds so many training workers or actors."""
    shm = _whole_gib(object_store + workers * SHARED_BYTES)
    cache = _whole_gib(shard_cache)
    return NodeSize(
        nodes=nodes,
        cpus=cpus,
        gpus=gpus,
        memory=_whole_gib(NODE_BYTES + workers * (PROCESS_BYTES + bytes_each) + shm),
        shm=shm,
        object_store=object_store,
        disk=_whole_gib(SCRATCH_BYTES + disk) + cache,
        shard_cache=cache,
        grace_s=max(120, math.ceil(end_s / 30) * 30),
    )


def _whole_gib(size: int) -> int:
    return math.ceil(size / GIB) * GIB
