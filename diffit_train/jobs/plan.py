"""What a run needs, estimated before renting any GPU: memory, storage, hours, cost and nodes.

Parameters and multiply-adds are counted on the model itself, on the meta device. Memory is the sum
of the states that DeepSpeed ZeRO keeps at each stage and the activations that autograd saves. Not
counted: the framework's own memory, NCCL buffers, fragmentation. Times are ranges, best first, from
data sheets and from the allowances named below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.model import LatentModel
from diffit_train.config.presets import PAPER_COSTS, PRESETS
from diffit_train.config.train import BUCKET_ELEMENTS
from diffit_train.data.loader import READERS
from diffit_train.data.manifest import MANIFEST, latents_url, load_manifest
from diffit_train.errors import UserError
from diffit_train.storage import GIB

# Bytes per value. Master weights, Adam's two moments and the EMAs are fp32.
FP32, BF16 = 4, 2


class Gpu(NamedTuple):
    """What vendors' data sheets say of a GPU."""

    memory_gib: float
    tflops_bf16: float  # dense matrix products
    tflops_fp32: float  # without tensor cores; TF32 is half the rate of bf16
    memory_gb_per_s: float
    link_gb_per_s: float  # NVLink or, where there is none, PCIe 4.0 x16; one direction


GPUS = {
    "A10G": Gpu(24, 70, 31.2, 600, 32),
    "L40S": Gpu(48, 362, 91.6, 864, 32),
    "A100-40": Gpu(40, 312, 19.5, 1555, 300),
    "A100-80": Gpu(80, 312, 19.5, 2039, 300),
    "H100": Gpu(80, 989, 67, 3350, 450),
    "H200": Gpu(141, 989, 67, 4800, 450),
    "B200": Gpu(180, 2250, 80, 8000, 900),
}

# Activations of the autoencoder in fp32, per pixel: 64 images at 512x512 hold 48 GiB.
DECODE_BYTES = 48 * GIB // (64 * 512**2)
# One 400 Gb/s adapter for each GPU, as in NVIDIA's DGX H100.
NODE_LINK_GB_PER_S = 50.0
GPUS_PER_NODE = 8

# Allowances, not measurements, best first. `python -m tests.gpu` measures some of them.
MATRIX_EFFICIENCY = (0.75, 0.5)  # share of the peak that matrix products reach
CONVOLUTION_EFFICIENCY = (0.5, 0.25)  # likewise, those of an autoencoder
BANDWIDTH_EFFICIENCY = (0.9, 0.6)  # share of a memory's or a link's bandwidth
LAUNCH_S = (5e-6, 12e-6)  # host time per kernel
HOP_S = (5e-6, 20e-6)  # latency of a collective's step from rank to rank
COMPILED_LAUNCHES = 0.4  # kernels of compiled blocks, relative to eager ones

# Of the autoencoder of Stable Diffusion, per pixel of an image: counted by torch's FlopCounterMode
# on diffusers' AutoencoderKL at 256x256. At 512x512 its attention makes it 2% more.
ENCODE_MULTIPLY_ADDS = 136_361_082_880 // 256**2
DECODE_MULTIPLY_ADDS = 311_093_641_216 // 256**2
# Of Inception at 299x299, likewise.
INCEPTION_MULTIPLY_ADDS = 5_713_232_480

# Allowances for nodes.
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


class Machine(NamedTuple):
    """The GPUs that the estimate assumes."""

    gpu: str
    mfu: float | None = None  # while a GPU computes; None to estimate it
    price_per_hour: float | None = None  # of one GPU
    link_gb_per_s: float | None = None  # within a node, one direction; None for the data sheet
    node_link_gb_per_s: float = NODE_LINK_GB_PER_S  # between nodes, per GPU, one direction
    gpus_per_node: int = GPUS_PER_NODE

    def seconds_per_byte(self, world: int, end: int) -> float:
        """Time for a rank to send a byte over the slowest link of a ring through all ranks."""
        within = self.link_gb_per_s or GPUS[self.gpu].link_gb_per_s
        rate = within if world <= self.gpus_per_node else min(within, self.node_link_gb_per_s)
        return 1.0 / (rate * 1e9 * BANDWIDTH_EFFICIENCY[end])


class States(NamedTuple):
    """Bytes that persist on one rank from step to step."""

    weights: int
    gradients: int
    master: int
    moments: int
    ema: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self)

    def offloaded(self, stage: int, offload: str) -> int:
        """Those that `train.offload` keeps in host memory."""
        if stage == 0 or offload == "none":
            return 0
        weights = self.weights if offload == "parameters" and stage == 3 else 0
        return weights + self.master + self.moments + self.ema


def state_bytes(parameters: int, stage: int, world: int, emas: int, bf16: bool) -> States:
    """States that each rank keeps under ZeRO.

    Args:
        parameters: number of trainable parameters.
        stage: 0 to 3. Stage 1 shards master weights, moments and EMAs over the ranks; 2 also
            gradients; 3 also the weights. Stages 1 and up keep separate master weights even if
            the weights are fp32.
        world: world size.
        emas: number of EMAs.
        bf16: whether the weights of the model are bf16.
    """

    def share(level: int) -> int:
        return math.ceil(parameters / world) if stage >= level else parameters

    size = BF16 if bf16 else FP32
    return States(
        weights=size * share(3),
        gradients=size * share(2),
        master=FP32 * share(1) if stage > 0 or bf16 else 0,
        moments=2 * FP32 * share(1),
        ema=emas * FP32 * share(1),
    )


class Work(NamedTuple):
    """A model's size, and what one rank does in a step."""

    parameters: int
    parts: dict[str, int]
    forward: int  # multiply-adds of an image
    products: int  # those in attention products
    training: int  # multiply-adds of an image, with the backward pass and recomputation
    share: int  # images of a rank in a step
    batch: int  # of them in a pass of forward and backward
    passes: int
    activations: int  # bytes that are kept for the backward pass
    launches: int  # kernels of a pass in eager mode
    moved: int  # bytes of a pass besides matrix products
    nfe: float  # model evaluations for an image of an evaluation
    model: dict[str, Any]


def count(recipe: Recipe) -> Work:
    """Count a recipe's model on the meta device.

    Raises:
        UserError: the model is another package's, and cannot be built.
    """
    import torch

    from diffit_train.diffusion.objective import nfe_per_image
    from diffit_train.models import cost
    from diffit_train.models.backbone import trainable_parameters
    from diffit_train.models.build import build_model

    train = recipe.train
    share = math.ceil(train.batch_size / recipe.scaling.max_workers)
    batch = min(share, train.micro_batch_size or share)
    with torch.device("meta"):
        model = build_model(recipe)
    forward, products = cost.multiply_adds(model)
    dtype = torch.bfloat16 if "bf16" in train.precision else torch.float32
    launches, moved = cost.kernel_launches(model, batch, dtype)
    if recipe.model.attention in ("auto", "sdpa"):
        moved += cost.bias_bytes(model, batch, dtype.itemsize)
    mode, nth = train.activation_checkpointing, train.activation_checkpoint_every
    return Work(
        parameters=trainable_parameters(model),
        parts=cost.parameters_by_part(model),
        forward=forward,
        products=products,
        training=round(3 * forward + (forward / nth if mode == "blocks" else 0)),
        share=share,
        batch=batch,
        passes=math.ceil(share / batch),
        activations=cost.activation_bytes(model, batch, mode, nth, dtype),
        launches=launches,
        moved=moved,
        nfe=nfe_per_image(recipe),
        model={"summary": model.summary, **model.sizes},
    )


def plan(
    recipe: Recipe, machine: Machine, emas: int | None = None, *, measured: bool = True
) -> dict[str, Any]:
    """The estimate of `diffit plan` as plain values, in bytes and seconds unless named otherwise.

    Args:
        emas: number of EMAs; None for the recipe's.
        measured: whether latents that exist are measured, which reads their manifest; else all
            numbers follow from the recipe alone.

    Raises:
        UserError: the GPU is not known.
    """
    if machine.gpu not in GPUS:
        raise UserError(f"--gpu is {machine.gpu!r}, but must be one of: {', '.join(GPUS)}")
    train, world = recipe.train, recipe.scaling.max_workers
    emas = len(train.ema) if emas is None else emas
    work, bf16 = count(recipe), train.precision == "bf16"
    states = [state_bytes(work.parameters, stage, world, emas, bf16) for stage in range(4)]
    latents = _latents(recipe, measured)
    time = _time(recipe, machine, work, states[train.zero_stage], latents["images"])
    return {
        "recipe": recipe.name,
        "on_gpus": recipe.scaling.gpus_per_worker > 0,
        "zero_stage": train.zero_stage,
        "model": {"architecture": recipe.model.architecture, **work.model},
        "parameters": {"total": work.parameters, **work.parts},
        "multiply_adds": {
            "forward": work.forward,
            "forward_without_attention_products": work.forward - work.products,
            "training_image": work.training,
            "training_step": work.training * train.batch_size,
        },
        "memory": {
            "world_size": world,
            "batch_per_gpu": work.batch,
            "emas": emas,
            "precision": train.precision,
            "activation_checkpointing": train.activation_checkpointing,
            "latents_on_host": loader_bytes(recipe, latents["images"]),
            "zero_stage": {
                str(stage): _memory(recipe, machine, work, stage, kept)
                for stage, kept in enumerate(states)
            },
        },
        "storage": {
            "checkpoint": work.parameters * FP32 * (3 + emas),
            "export": work.parameters * FP32,
            **latents,
        },
        "time": time,
        "stages": _stages(recipe, machine, work, time, latents["images"]),
    }


def compare(
    recipe: Recipe, preset: str, machine: Machine, emas: int | None = None
) -> dict[str, Any]:
    """The plan of the same recipe with another model: `model.preset`.

    Raises:
        UserError: there is no such preset, or the recipe is not on latents.
    """
    if preset not in PRESETS:
        raise UserError(f"--compare is {preset!r}, but must be one of: {', '.join(PRESETS)}")
    if not isinstance(recipe.model, LatentModel):
        raise UserError(
            f"--compare is {preset!r}, a model on latents, but recipe {recipe.name!r} trains "
            f"{recipe.model.architecture}"
        )
    model = recipe.model.model_copy(update={**PRESETS[preset], "preset": preset})
    return plan(recipe.model_copy(update={"model": model}), machine, emas)


# ---- Memory and storage ----


def _memory(
    recipe: Recipe, machine: Machine, work: Work, stage: int, states: States
) -> dict[str, Any]:
    """Bytes on each GPU at a ZeRO stage."""
    host = states.offloaded(stage, recipe.train.offload)
    size = BF16 if recipe.train.precision == "bf16" else FP32
    bucket = size * BUCKET_ELEMENTS if stage else 0
    total = states.total - host + bucket + work.activations
    return {
        **states._asdict(),
        "states": states.total,
        "of_them_on_host": host,
        "bucket": bucket,
        "activations": work.activations,
        "total": total,
        "fits": total < GPUS[machine.gpu].memory_gib * GIB,
    }


def _latents(recipe: Recipe, measured: bool) -> dict[str, Any]:
    """Number of images and bytes of the latents; None where unknown."""
    url, images = latents_url(recipe), recipe.data.expected_images
    if measured and storage.exists(storage.join(url, MANIFEST)):
        manifest = load_manifest(url)
        size = sum(shard.bytes for shard in manifest.shards)
        return {"images": manifest.totals.written, "latents": size}
    if images is None:
        return {"images": None, "latents": None}
    # A tar member is a 512-byte header plus contents padded to 512; a .npy header is 128 bytes.
    member = 512 + math.ceil((128 + latent_bytes(recipe)) / 512) * 512
    return {"images": images, "latents": images * (member + 1024)}


def latent_bytes(recipe: Recipe) -> int:
    """Bytes of one image's latents: mean and log-variance in float16, or pixels; for each flip."""
    frames = 2 if recipe.data.flip else 1
    if recipe.autoencoder.kind == "identity":
        return frames * recipe.autoencoder.latent_channels * recipe.latent_size**2
    return 2 * frames * 2 * recipe.autoencoder.latent_channels * recipe.latent_size**2


def loader_bytes(recipe: Recipe, images: int | None) -> int:
    """Host memory of the latents that a rank holds: the shards of its streams' windows.

    With those that its threads are reading, once as a file and once as values.

    Args:
        images: images of the latents; None if unknown.
    """
    data, world = recipe.data, recipe.scaling.max_workers
    shards = math.ceil(data.shuffle_streams / world) * (
        data.shuffle_window // data.images_per_shard + 2
    )
    if images is not None:
        shards = min(shards, math.ceil(images / data.images_per_shard))
    return (shards + 2 * min(READERS, shards)) * data.images_per_shard * latent_bytes(recipe)


def autoencoder_bytes(recipe: Recipe, batch: int) -> int:
    """Activations of an autoencoder on a CPU, which works on slices of a batch."""
    from diffit_train.data.autoencoder import CPU_BUDGET

    image = DECODE_BYTES * recipe.data.resolution**2
    return max(image, min(batch * image, CPU_BUDGET))


# ---- Time and cost ----


def _communicated(recipe: Recipe, work: Work, end: int) -> float:
    """Bytes that a rank sends in a step; ring collectives (W - 1) / W of their size each.

    Stages 1 and 2 reduce-scatter gradients or, as DeepSpeed's buckets for several ranks do,
    all-reduce them; both gather the new weights. Stage 3 gathers weights for the forward and for
    the backward pass of each micro-batch. Stages 2 and 3 reduce after every micro-batch.
    """
    train, world = recipe.train, recipe.scaling.max_workers
    size = BF16 if train.precision == "bf16" else FP32
    ring = (world - 1) / world * work.parameters * size
    if train.zero_stage == 0:
        return 2 * ring
    if train.zero_stage == 3:
        return 3 * ring * work.passes
    reductions = work.passes if train.zero_stage == 2 else 1
    return ring * (reductions * (1, 2)[end] + 1)


def _step_seconds(
    recipe: Recipe, machine: Machine, work: Work, states: States, end: int
) -> dict[str, float]:
    """Seconds of the parts of a step, and of the whole, at an end of the range: best 0, worst 1.

    At best the host runs ahead of the GPU and gradients are exchanged during the backward pass; at
    worst communication follows computation.
    """
    train, world, gpu = recipe.train, recipe.scaling.max_workers, GPUS[machine.gpu]
    peak = 1e12 * (gpu.tflops_fp32 if train.precision == "fp32" else gpu.tflops_bf16)
    bandwidth = 1e9 * gpu.memory_gb_per_s * BANDWIDTH_EFFICIENCY[end]
    again = work.training / (3 * work.forward)  # recomputation does not count toward MFU
    if machine.mfu is not None:
        compute = again * 6 * work.forward * work.share / (peak * machine.mfu)
        memory = 0.0
    else:
        compute = 2 * work.training * work.share / (peak * MATRIX_EFFICIENCY[end])
        # What compilation fuses moves once; at best all of it but reading and writing.
        fused = 0.5 if train.compile and end == 0 else 1.0
        memory = again * fused * work.moved * work.passes / bandwidth
    optimizer = (2 * (states.master + states.moments + states.ema) + states.gradients) / bandwidth
    kernels = again * work.launches * work.passes
    launch = LAUNCH_S[end] * kernels * (COMPILED_LAUNCHES if train.compile else 1.0)
    buckets = math.ceil(work.parameters / BUCKET_ELEMENTS)
    hops = 2 * math.ceil(math.log2(world)) * buckets * HOP_S[end] if world > 1 else 0.0
    exchange = _communicated(recipe, work, end) * machine.seconds_per_byte(world, end) + hops
    passes = max(compute + memory, launch)
    exposed = exchange if end else max(0.0, exchange - passes * 2 / 3)
    return {
        "compute": compute,
        "memory": memory,
        "launch": launch,
        "optimizer": optimizer,
        "exchange": exchange,
        "total": passes + optimizer + exposed,
    }


def _time(
    recipe: Recipe, machine: Machine, work: Work, states: States, images: int | None
) -> dict[str, Any]:
    """Speed and cost of training, as ranges [best, worst]."""
    train, world = recipe.train, recipe.scaling.max_workers
    parts = [_step_seconds(recipe, machine, work, states, end) for end in (0, 1)]
    steps = [part["total"] for part in parts]
    rates = [train.batch_size / s for s in steps]
    peak = GPUS[machine.gpu].tflops_bf16 * 1e12 * world
    waiting = max(part["launch"] / (part["compute"] + part["memory"]) for part in parts)
    return {
        "gpu": machine.gpu,
        "assumed_mfu": machine.mfu,
        "step_s": steps,
        "step_parts_s": {name: [part[name] for part in parts] for name in parts[0]},
        "images_per_s": rates,
        "images_per_s_per_gpu": [rate / world for rate in rates],
        "mfu": [6 * work.forward * rate / peak for rate in rates],
        "images_per_gpu": work.share,
        "images_to_keep_a_gpu_busy": max(1, math.ceil(waiting * work.share)),
        "steps": train.steps,
        "epochs": train.steps * train.batch_size / images if images else None,
        "price_per_gpu_hour": machine.price_per_hour,
        **_costs([train.steps * s / 3600 for s in steps], world, machine),
    }


def _costs(hours: list[float], gpus: float, machine: Machine) -> dict[str, Any]:
    spent = [gpus * h for h in hours]
    price = machine.price_per_hour
    cost = None if price is None else [price * h for h in spent]
    return {"gpus": gpus, "hours": hours, "gpu_hours": spent, "cost": cost}


def _stages(
    recipe: Recipe, machine: Machine, work: Work, time: dict[str, Any], images: int | None
) -> list[dict[str, Any]]:
    """Hours, GPU-hours and cost of each stage of the project; None where the size is unknown."""
    gpu, scaling, train = GPUS[machine.gpu], recipe.scaling, recipe.train
    rates = {"fp32": 1e12 * gpu.tflops_fp32, "tf32": 1e12 * gpu.tflops_bf16 / 2}
    convolutions = rates.get(recipe.autoencoder.precision, 1e12 * gpu.tflops_bf16)
    products = rates.get(recipe.evaluate.precision, 1e12 * gpu.tflops_bf16)

    def stage(name: str, actors: int, count: int | None, seconds: list[float]) -> dict[str, Any]:
        gpus = actors * (scaling.gpus_per_actor or 1.0)
        if not seconds or count is None:
            return {"stage": name, "gpus": gpus, "hours": None, "gpu_hours": None, "cost": None}
        hours = [count * s / (gpus * 3600) for s in seconds]
        return {"stage": name, **_costs(hours, gpus, machine)}

    section = recipe.autoencoder
    known = (section.kind, section.latent_channels, section.downsample) == ("kl", 4, 8)
    encode_s, evaluate_s = [], []
    if known or section.kind == "identity":  # the work of other autoencoders is not known
        pixels = recipe.data.resolution**2 if known else 0
        encode = 2 * (2 if recipe.data.flip else 1) * ENCODE_MULTIPLY_ADDS * pixels / convolutions
        encode_s = [encode / share for share in CONVOLUTION_EFFICIENCY]
        inception = INCEPTION_MULTIPLY_ADDS if recipe.evaluate.features.kind == "inception" else 0
        network = 2 * work.forward * work.nfe / products
        rest = 2 * (DECODE_MULTIPLY_ADDS * pixels / convolutions + inception / rates["fp32"])
        shares = zip(MATRIX_EFFICIENCY, CONVOLUTION_EFFICIENCY, strict=True)
        evaluate_s = [network / matrix + rest / convolution for matrix, convolution in shares]
    training = {key: time[key] for key in ("gpus", "hours", "gpu_hours", "cost")}
    rows = [
        stage("encode", scaling.encode_actors, images, encode_s),
        {"stage": "train", **training},
    ]
    if train.validate_every:
        validated = train.steps // train.validate_every * train.validate_samples
        actors = scaling.evaluate_actors
        rows.append(stage("evaluate while training", actors, validated, evaluate_s))
    rows.append(stage("evaluate", scaling.evaluate_actors, recipe.evaluate.samples, evaluate_s))
    return rows


# ---- Nodes ----


class NodeSize(NamedTuple):
    """Nodes of one kind, at most `nodes`; bytes unless named otherwise."""

    nodes: int
    cpus: int
    gpus: int
    memory: int
    shm: int  # size of /dev/shm, which holds the object store; part of `memory`
    object_store: int
    disk: int
    shard_cache: int = 0  # part of `disk` for copies of latent shards
    grace_s: int = 120  # between the request to end and the kill; a checkpoint fits in


def node_sizes(
    recipe: Recipe, planned: dict[str, Any], workers_per_node: int = GPUS_PER_NODE
) -> dict[str, NodeSize]:
    """The head's node, the worker nodes of each stage, and `workers`: enough for every stage.

    Args:
        planned: result of `plan`.
        workers_per_node: training workers on a node, which is its number of GPUs.
    """
    # The head's driver computes metrics but neither trains nor generates.
    features = recipe.evaluate.samples * FEATURE_VALUES * 8
    shm = OBJECT_STORE_BYTES + SHARED_BYTES
    memory = _whole_gib(HEAD_BYTES + features + shm)
    head = NodeSize(1, HEAD_CPUS, 0, memory, shm, OBJECT_STORE_BYTES, SCRATCH_BYTES)
    stages = {
        "encode": _encode_node(recipe, workers_per_node),
        "train": _train_node(recipe, planned, workers_per_node),
        "evaluate": _evaluate_node(recipe, planned, workers_per_node),
    }
    largest = NodeSize(*(max(sizes) for sizes in zip(*stages.values(), strict=True)))
    return {"head": head, **stages, "workers": largest}


def _encode_node(recipe: Recipe, workers_per_node: int) -> NodeSize:
    scaling = recipe.scaling
    here, nodes, gpus = _actors(scaling.encode_actors, scaling.gpus_per_actor, workers_per_node)
    # Each actor next to tasks that read and decode for it.
    cpus = here * max(scaling.cpus_per_worker, 2 if gpus else scaling.encode_threads + 1) + 1
    each = 0 if gpus else autoencoder_bytes(recipe, recipe.autoencoder.batch_size)
    return _node(here, nodes, cpus, gpus, each, object_store=here * OBJECT_STORE_BYTES)


def _train_node(recipe: Recipe, planned: dict[str, Any], workers_per_node: int) -> NodeSize:
    scaling, disk = recipe.scaling, planned["storage"]
    here = min(workers_per_node, scaling.max_workers)
    nodes = math.ceil(scaling.max_workers / here)
    memory = planned["memory"]["zero_stage"][str(recipe.train.zero_stage)]
    states = memory["of_them_on_host"] if scaling.gpus_per_worker else memory["total"]
    share = disk["checkpoint"] / nodes
    save_s = share / WRITE_BYTES_PER_S + share / UPLOAD_BYTES_PER_S
    end_s = max(planned["time"]["step_s"]) + save_s + MARGIN_S
    size = _node(
        here,
        nodes,
        cpus=here * scaling.cpus_per_worker + 1,
        gpus=here * scaling.gpus_per_worker,
        bytes_each=states + planned["memory"]["latents_on_host"],
        disk=math.ceil(2 * share),  # a part of a checkpoint being uploaded, and of the next one
    )
    cache = _whole_gib(min(CACHE_BYTES, disk["latents"] or UNKNOWN_CACHE_BYTES))
    grace_s = max(size.grace_s, math.ceil(end_s / 30) * 30)
    return size._replace(disk=size.disk + cache, shard_cache=cache, grace_s=grace_s)


def _evaluate_node(recipe: Recipe, planned: dict[str, Any], workers_per_node: int) -> NodeSize:
    scaling = recipe.scaling
    here, nodes, gpus = _actors(scaling.evaluate_actors, scaling.gpus_per_actor, workers_per_node)
    weights = planned["storage"]["export"]  # they pass through the host on their way to a GPU
    decoding = 0 if gpus else autoencoder_bytes(recipe, recipe.evaluate.batch_size)
    cpus = here * scaling.cpus_per_worker + 1
    return _node(here, nodes, cpus, gpus, weights + decoding, disk=weights)


def _actors(actors: int, gpus_each: float, workers_per_node: int) -> tuple[int, int, int]:
    """Actors on a node, nodes, and GPUs of a node."""
    room = math.floor(workers_per_node / gpus_each) if gpus_each else workers_per_node
    here = max(1, min(room, actors))
    return here, math.ceil(actors / here), math.ceil(here * gpus_each)


def _node(
    workers: int,
    nodes: int,
    cpus: int,
    gpus: int,
    bytes_each: int,
    object_store: int = OBJECT_STORE_BYTES,
    disk: int = 0,
) -> NodeSize:
    """A node that holds so many training workers or actors."""
    shm = _whole_gib(object_store + workers * SHARED_BYTES)
    memory = _whole_gib(NODE_BYTES + workers * (PROCESS_BYTES + bytes_each) + shm)
    return NodeSize(nodes, cpus, gpus, memory, shm, object_store, _whole_gib(SCRATCH_BYTES + disk))


def _whole_gib(size: int) -> int:
    return math.ceil(size / GIB) * GIB


# ---- Tables ----

# The parts of a step, as they are shown.
STEP_PARTS = {
    "compute": "matrix products",
    "memory": "memory traffic of the rest",
    "launch": "launching kernels, on the host",
    "optimizer": "optimizer and EMAs",
    "exchange": "communication",
}


def quantity(value: float) -> str:
    """A count with the prefix that leaves at least one digit before the point: 118.5 G."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:,.1f} {prefix}"
    return f"{value:,.0f}"


def significant(value: float) -> str:
    """A number with at least two significant digits."""
    if value >= 10 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{max(1, 1 - math.floor(math.log10(value)))}f}"


def gib(size: int) -> str:
    """Bytes in GiB: two decimals; below 0.1, two significant digits."""
    value = size / GIB
    return significant(value) if value < 0.1 else f"{value:,.2f}"


def between(values: Sequence[float] | None) -> str:
    """A range, best first."""
    if values is None:
        return "-"
    low, high = (significant(value) for value in sorted(values))
    return low if low == high else f"{low} to {high}"


def _print(text: str) -> None:
    from rich.console import Console

    Console(width=110).print(text, soft_wrap=True)


def _print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a title and a table: rich would wrap its own title to the table's width."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, show_header=len(columns) > 2)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(title, table)


def print_plan(result: dict[str, Any]) -> None:
    """Print the plan as tables to standard output."""
    _print_model(result)
    if not result["on_gpus"]:
        _print(
            "This recipe trains on CPUs, whose speed is not estimated. What follows is for "
            f"{result['time']['gpu']} GPUs in their place."
        )
    _print_memory(result)
    _print_training(result)
    _print_project(result)


def _print_model(result: dict[str, Any]) -> None:
    model, work, parameters = result["model"], result["multiply_adds"], result["parameters"]
    plain = work["forward_without_attention_products"]
    _print_table(
        f"{result['recipe']}: {model['architecture']}, {model['summary']}",
        ("", ""),
        [
            *(
                ("parameters" if name == "total" else f"  {name}", f"{value:,}")
                for name, value in parameters.items()
            ),
            ("multiply-adds per image, forward pass", quantity(work["forward"])),
            ("  without attention products", quantity(plain)),
            ("multiply-adds per training step", quantity(work["training_step"])),
        ],
    )


def _print_memory(result: dict[str, Any]) -> None:
    memory = result["memory"]
    parts = ("weights", "gradients", "master", "moments", "ema", "bucket", "activations", "total")
    _print_table(
        f"GiB per GPU, world size {memory['world_size']}, {memory['batch_per_gpu']} images per "
        f"GPU, {memory['precision']}, EMAs: {memory['emas']}, activation checkpointing: "
        f"{memory['activation_checkpointing']}",
        ("ZeRO stage", *parts, f"fits {result['time']['gpu']}"),
        [
            (stage, *(gib(values[part]) for part in parts), "yes" if values["fits"] else "no")
            for stage, values in memory["zero_stage"].items()
        ],
    )


def _print_training(result: dict[str, Any]) -> None:
    time, disk = result["time"], result["storage"]
    assumed = f", {time['assumed_mfu']:.0%} MFU while computing" if time["assumed_mfu"] else ""
    rows = [
        ("images/s", between(time["images_per_s"])),
        ("  per GPU", between(time["images_per_s_per_gpu"])),
        ("seconds per step", between(time["step_s"])),
        *((f"  {name}", between(time["step_parts_s"][part])) for part, name in STEP_PARTS.items()),
        ("MFU, %", between([100 * value for value in time["mfu"]])),
        ("checkpoint, GiB", gib(disk["checkpoint"])),
        (
            "latents in the host memory of a worker, GiB",
            gib(result["memory"]["latents_on_host"]),
        ),
    ]
    if disk["latents"] is not None:
        rows.append((f"latents of {disk['images']:,} images, GiB", gib(disk["latents"])))
    title = f"Training on {time['gpus']} {time['gpu']}{assumed}; estimated ranges"
    _print_table(title, ("", ""), rows)
    if result["on_gpus"] and time["images_per_gpu"] < time["images_to_keep_a_gpu_busy"]:
        _print(
            f"Warning: {time['images_per_gpu']} images per GPU and step leave it idle while the "
            f"host launches kernels; about {time['images_to_keep_a_gpu_busy']} keep it busy. Use "
            "fewer workers, a larger train.batch_size, or train.compile=true."
        )


def _print_project(result: dict[str, Any]) -> None:
    time = result["time"]
    epochs = "" if time["epochs"] is None else f", {time['epochs']:,.0f} epochs"
    price = time["price_per_gpu_hour"]
    costs = () if price is None else (f"cost at {price:g} per GPU-hour",)
    keys = ("hours", "gpu_hours", "cost") if costs else ("hours", "gpu_hours")
    _print_table(
        f"The whole project; training takes {time['steps']:,} steps{epochs}",
        ("stage", "GPUs", "hours", "GPU-hours", *costs),
        [
            (row["stage"], f"{row['gpus']:g}", *(between(row[key]) for key in keys))
            for row in result["stages"]
        ],
    )
    unknown = [row["stage"] for row in result["stages"] if row["hours"] is None]
    if unknown:
        _print(
            f"Not estimated: {', '.join(unknown)} (the size of the autoencoder, or the number of "
            "images, is not known)."
        )


def print_comparison(mine: dict[str, Any], others: Mapping[str, dict[str, Any]]) -> None:
    """Print plans side by side, with the paper's figures where it has them.

    Args:
        others: by the name of the preset.
    """
    columns = [_comparison(mine, None)]
    columns += [_comparison(other, PAPER_COSTS.get(name)) for name, other in others.items()]
    rows = [(title, *(column[title] for column in columns)) for title in columns[0]]
    title = f"{mine['recipe']} and the same recipe with model.preset={', '.join(others)}"
    shown = [row for row in rows if set(row[1:]) != {"-"}]
    _print_table(title, ("", mine["recipe"], *others), shown)


def _comparison(
    planned: dict[str, Any], paper: tuple[float, float, float] | None
) -> dict[str, str]:
    stage, time = str(planned["zero_stage"]), planned["time"]
    parameters, flops, fid = paper or (None, None, None)
    return {
        "parameters": f"{planned['parameters']['total']:,}",
        "multiply-adds per image": quantity(planned["multiply_adds"]["forward"]),
        f"GiB per GPU, ZeRO {stage}": gib(planned["memory"]["zero_stage"][stage]["total"]),
        "seconds per step": between(time["step_s"]),
        "images/s": between(time["images_per_s"]),
        "GPU-hours of training": between(time["gpu_hours"]),
        "paper: parameters, M": "-" if parameters is None else f"{parameters:g}",
        "paper: GFLOPs at 256x256": "-" if flops is None else f"{flops:g}",
        "paper: FID at 256x256": "-" if fid is None else f"{fid:.2f}",
    }


def print_nodes(sizes: Mapping[str, NodeSize]) -> None:
    """Print what each node needs to standard output."""
    columns = ["nodes", "CPUs", "GPUs", "memory", "/dev/shm", "object store", "disk", "shard cache"]
    rows = []
    for name, size in sizes.items():
        parts = (size.memory, size.shm, size.object_store, size.disk, size.shard_cache)
        cells = [size.nodes, size.cpus, size.gpus, *(part // GIB for part in parts), size.grace_s]
        rows.append([name, *map(str, cells)])
    title = "Nodes, and each one's GiB; `workers` suits every stage"
    _print_table(title, ["", *columns, "grace, s"], rows)
    cache = sizes["train"].shard_cache // GIB
    _print(f"Train with scaling.shard_cache_gib={cache} scaling.shard_cache_folder=FOLDER")
