"""What a stage needs of each node: processors, memory, shared memory, disk, GPUs, time to end.

Bytes of states and activations, seconds of a step and bytes of a checkpoint are those of
`diffit plan`. The constants below are allowances, not measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.planning import Machine, autoencoder_bytes, plan

ClusterStage = Literal["encode", "train", "evaluate", "pipeline"]
CLUSTER_STAGES: tuple[ClusterStage, ...] = get_args(ClusterStage)

GIB = storage.GIB
# A process that has imported torch and Ray, with its CUDA context.
PROCESS_BYTES = 6 * GIB
# Raylet, agents and the system's own.
NODE_BYTES = 2 * GIB
OBJECT_STORE_BYTES = 2 * GIB
# NCCL's and torch's shared-memory segments, for each worker of a node.
SHARED_BYTES = 1 * GIB
# Logs, compiled kernels and downloaded weights.
SCRATCH_BYTES = 20 * GIB
# The most of the latents that a node keeps, and what it may keep where their size is unknown.
CACHE_BYTES, UNKNOWN_CACHE_BYTES = 200 * GIB, 20 * GIB
# Features of an evaluation that its driver holds: float64 values per image.
FEATURE_VALUES = 2048 + 2023 + 1008
HEAD_CPUS = 4
HEAD_BYTES = 8 * GIB
# A checkpoint goes to a local file first, then to the root.
WRITE_BYTES_PER_S = 200e6
UPLOAD_BYTES_PER_S = 100e6
# Time to agree, commit and leave, beyond what the bytes take.
MARGIN_S = 60


@dataclass(frozen=True)
class NodeSize:
    """What one node has to offer; bytes unless named otherwise.

    Attributes:
        shm: size of /dev/shm, which holds the object store; part of `memory`.
        cache: part of `disk` that keeps copies of latent shards.
    """

    cpus: int
    gpus: int
    memory: int
    shm: int
    object_store: int
    disk: int
    cache: int = 0


@dataclass(frozen=True)
class StageSize:
    """The nodes of a stage.

    Attributes:
        nodes: most worker nodes that the stage takes.
        grace_s: between the request to end and the kill; a checkpoint fits in.
    """

    head: NodeSize
    worker: NodeSize
    nodes: int
    grace_s: int


def estimate(recipe: Recipe, gpu: str = "H100") -> dict[str, Any]:
    """`diffit plan` of a recipe, from the recipe alone: nothing under its root is read."""
    return plan(recipe, Machine(gpu, 0.4), measured=False)


def stage_size(
    stage: ClusterStage,
    recipe: Recipe,
    workers_per_node: int = 8,
    planned: dict[str, Any] | None = None,
) -> StageSize:
    """Size of a stage's nodes; of a pipeline, the largest of its stages.

    Args:
        workers_per_node: training workers on a node, which is its number of GPUs.
        planned: result of `estimate`, if it is known already.
    """
    planned = planned or estimate(recipe)
    if stage == "encode":
        return _encode(recipe, workers_per_node)
    if stage == "train":
        return _train(recipe, planned, workers_per_node)
    if stage == "evaluate":
        return _evaluate(recipe, planned, workers_per_node)
    stages: tuple[ClusterStage, ...] = ("encode", "train", "evaluate")
    return largest([stage_size(each, recipe, workers_per_node, planned) for each in stages])


def largest(sizes: list[StageSize]) -> StageSize:
    """What is enough for each of several stages, one at a time."""
    return StageSize(
        head=_largest_node([size.head for size in sizes]),
        worker=_largest_node([size.worker for size in sizes]),
        nodes=max(size.nodes for size in sizes),
        grace_s=max(size.grace_s for size in sizes),
    )


def _largest_node(nodes: list[NodeSize]) -> NodeSize:
    names = [field.name for field in fields(NodeSize)]
    return NodeSize(**{name: max(getattr(node, name) for node in nodes) for name in names})


def _train(recipe: Recipe, planned: dict[str, Any], workers_per_node: int) -> StageSize:
    scaling, world = recipe.scaling, recipe.scaling.most_workers
    here = min(workers_per_node, world)
    nodes = math.ceil(world / here)
    memory = planned["memory"]["zero_stage"][str(recipe.train.zero_stage)]
    host = memory["of_them_on_host"] if scaling.gpus_per_worker else memory["total"]
    checkpoint = planned["storage"]["checkpoint"]
    cache = min(CACHE_BYTES, planned["storage"]["latents"] or UNKNOWN_CACHE_BYTES)
    worker = _node(
        workers=here,
        cpus=here * scaling.cpus_per_worker + 1,
        gpus=here * scaling.gpus_per_worker,
        bytes_each=host + planned["memory"]["latents_on_host"],
        # The part of a checkpoint being uploaded, and that of the next one.
        disk=2 * checkpoint // nodes,
        cache=cache,
    )
    step_s = max(planned["time"]["step_s"])
    return StageSize(_head_size(recipe), worker, nodes, grace_s(checkpoint, nodes, step_s))


def grace_s(checkpoint_bytes: int, nodes: int, step_s: float) -> int:
    """Seconds in which a step ends and its checkpoint is written, uploaded and committed."""
    each = checkpoint_bytes / nodes
    seconds = step_s + each / WRITE_BYTES_PER_S + each / UPLOAD_BYTES_PER_S + MARGIN_S
    return max(120, math.ceil(seconds / 30) * 30)


def _encode(recipe: Recipe, workers_per_node: int) -> StageSize:
    scaling, autoencoder = recipe.scaling, recipe.autoencoder
    here, nodes, gpus = _actors(scaling.encode_actors, scaling.gpus_per_actor, workers_per_node)
    # Each actor next to tasks that read and decode for it.
    threads = 1 if gpus else scaling.encode_threads
    worker = _node(
        workers=here,
        cpus=here * max(scaling.cpus_per_worker, threads + 1) + 1,
        gpus=gpus,
        bytes_each=0 if gpus else autoencoder_bytes(recipe, autoencoder.batch_size),
        object_store=here * OBJECT_STORE_BYTES,
    )
    return StageSize(_head_size(recipe), worker, nodes, grace_s(0, 1, 0.0))


def _evaluate(recipe: Recipe, planned: dict[str, Any], workers_per_node: int) -> StageSize:
    scaling, evaluate = recipe.scaling, recipe.evaluate
    here, nodes, gpus = _actors(scaling.evaluate_actors, scaling.gpus_per_actor, workers_per_node)
    weights = planned["storage"]["export"]
    worker = _node(
        workers=here,
        cpus=here * max(scaling.cpus_per_worker, 1) + 1,
        gpus=gpus,
        # Weights pass through the host on their way to a GPU.
        bytes_each=weights + (0 if gpus else autoencoder_bytes(recipe, evaluate.batch_size)),
        disk=weights,
    )
    return StageSize(_head_size(recipe), worker, nodes, grace_s(0, 1, 0.0))


def _actors(actors: int, gpus_each: float, workers_per_node: int) -> tuple[int, int, int]:
    """Actors on a node, nodes, and GPUs of a node."""
    room = math.floor(workers_per_node / gpus_each) if gpus_each else workers_per_node
    here = max(1, min(room, actors))
    return here, math.ceil(actors / here), math.ceil(here * gpus_each)


def _node(
    *,
    workers: int,
    cpus: int,
    gpus: int,
    bytes_each: int,
    object_store: int = OBJECT_STORE_BYTES,
    disk: int = 0,
    cache: int = 0,
) -> NodeSize:
    """A node that holds so many processes of ours."""
    shm = _whole_gib(object_store + workers * SHARED_BYTES)
    memory = _whole_gib(NODE_BYTES + workers * (PROCESS_BYTES + bytes_each) + shm)
    cache = _whole_gib(cache)
    disk = _whole_gib(SCRATCH_BYTES + disk) + cache
    return NodeSize(cpus, gpus, memory, shm, object_store, disk, cache)


def _head_size(recipe: Recipe) -> NodeSize:
    """The node of the driver, which computes metrics but neither trains nor generates."""
    features = recipe.evaluate.samples * FEATURE_VALUES * 8
    shm = _whole_gib(OBJECT_STORE_BYTES + SHARED_BYTES)
    memory = _whole_gib(HEAD_BYTES + features + shm)
    return NodeSize(HEAD_CPUS, 0, memory, shm, OBJECT_STORE_BYTES, SCRATCH_BYTES)


def _whole_gib(size: int) -> int:
    return math.ceil(size / GIB) * GIB
