"""What a run needs, estimated before renting any GPU: memory, storage, hours and cost.

Parameters and multiply-adds are counted on the model itself, on the meta device. Memory is the sum
of the states that DeepSpeed ZeRO keeps at each stage and the activations that autograd saves. Not
counted: the framework's own memory, NCCL buffers, fragmentation. Times are ranges, from data sheets
and from the allowances named below.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.presets import PEERS, PRESETS
from diffit_train.config.train import BUCKET_ELEMENTS, Train
from diffit_train.counts import Counts, counts
from diffit_train.data.loader import READERS
from diffit_train.data.shards import MANIFEST, latents_url, load_manifest
from diffit_train.errors import UserError

# Bytes per value. Master weights, Adam's two moments and the EMAs are fp32.
FP32, BF16 = 4, 2


# A low and a high estimate, best first.
Range = tuple[float, float]


@dataclass(frozen=True)
class Gpu:
    """What vendors' data sheets say of a GPU.

    Attributes:
        tflops_bf16: dense matrix products in bf16.
        tflops_fp32: fp32 without tensor cores; TF32 is half the rate of bf16.
        memory_gb_per_s: bandwidth of its memory.
        link_gb_per_s: NVLink or, where there is none, PCIe 4.0 x16; one direction.
    """

    memory_gib: float
    tflops_bf16: float
    tflops_fp32: float
    memory_gb_per_s: float
    link_gb_per_s: float


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
DECODE_BYTES = 48 * storage.GIB // (64 * 512**2)
# One 400 Gb/s adapter for each GPU, as in NVIDIA's DGX H100.
NODE_LINK_GB_PER_S = 50.0
GPUS_PER_NODE = 8

# Allowances, not measurements, best first. `python -m tests.gpu` measures some of them.
MATRIX_EFFICIENCY: Range = (0.75, 0.5)  # share of the peak that matrix products reach
CONVOLUTION_EFFICIENCY: Range = (0.5, 0.25)  # likewise, those of an autoencoder
BANDWIDTH_EFFICIENCY: Range = (0.9, 0.6)  # share of a memory's or a link's bandwidth
LAUNCH_S: Range = (5e-6, 12e-6)  # host time per kernel
HOP_S: Range = (5e-6, 20e-6)  # latency of a collective's step from rank to rank
COMPILED_LAUNCHES = 0.4  # kernels of compiled blocks, relative to eager ones

# Of the autoencoder of Stable Diffusion, per pixel of an image: counted by torch's FlopCounterMode
# on diffusers' AutoencoderKL at 256x256. At 512x512 its attention makes it 2% more.
ENCODE_MULTIPLY_ADDS = 136_361_082_880 // 256**2
DECODE_MULTIPLY_ADDS = 311_093_641_216 // 256**2
# Of Inception at 299x299, likewise.
INCEPTION_MULTIPLY_ADDS = 5_713_232_480


@dataclass(frozen=True)
class States:
    """Bytes that persist on one rank from step to step."""

    weights: int
    gradients: int
    master: int
    moments: int
    ema: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.gradients + self.master + self.moments + self.ema


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
    master = FP32 * share(1) if stage > 0 or bf16 else 0
    return States(
        weights=size * share(3),
        gradients=size * share(2),
        master=master,
        moments=2 * FP32 * share(1),
        ema=emas * FP32 * share(1),
    )


@dataclass(frozen=True)
class Machine:
    """The GPUs that the estimate assumes.

    Attributes:
        mfu: model FLOPs utilization assumed while a GPU computes; None to estimate it.
        price_per_hour: price of one GPU-hour; None if unknown.
        link_gb_per_s: between the GPUs of a node, one direction; None for the GPU's data sheet.
        node_link_gb_per_s: between nodes, per GPU, one direction.
        gpus_per_node: GPUs that share the faster links.
    """

    gpu: str
    mfu: float | None = None
    price_per_hour: float | None = None
    link_gb_per_s: float | None = None
    node_link_gb_per_s: float = NODE_LINK_GB_PER_S
    gpus_per_node: int = GPUS_PER_NODE

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError(f"--gpu is {self.gpu!r}, but must be one of: {', '.join(GPUS)}")
        if self.mfu is not None and not 0.0 < self.mfu <= 1.0:
            raise UserError(f"--mfu is {self.mfu}, but must be greater than 0 and at most 1")
        if self.price_per_hour is not None and not self.price_per_hour >= 0.0:
            raise UserError(f"--price is {self.price_per_hour}, but must be at least 0")
        for name, value in (
            ("--link", self.link_gb_per_s),
            ("--node-link", self.node_link_gb_per_s),
            ("--gpus-per-node", self.gpus_per_node),
        ):
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}, but must be greater than 0")

    def seconds_per_byte(self, world: int, best: bool) -> float:
        """Time for a rank to send a byte over the slowest link of a ring through all ranks."""
        within = self.link_gb_per_s or GPUS[self.gpu].link_gb_per_s
        rate = within if world <= self.gpus_per_node else min(within, self.node_link_gb_per_s)
        return 1.0 / (rate * 1e9 * BANDWIDTH_EFFICIENCY[0 if best else 1])


def plan(
    recipe: Recipe, machine: Machine, emas: int | None = None, *, measured: bool = True
) -> dict[str, Any]:
    """The estimate of `diffit plan` as plain values, in bytes and seconds unless named otherwise.

    Args:
        emas: number of EMAs; None for the recipe's.
        measured: whether latents that exist are measured, which reads their manifest; else all
            numbers follow from the recipe alone.
    """
    train, world = recipe.train, recipe.scaling.most_workers
    emas = len(train.ema) if emas is None else emas
    share = math.ceil(train.batch_size / world)
    batch = min(share, train.micro_batch_size or share)
    model = counts(recipe, batch)
    parameters, forward = model.parameters, model.forward
    blocks = train.activation_checkpointing == "blocks"
    again = forward / train.checkpoint_every_nth_block if blocks else 0
    of_image = round(3 * forward + again)
    bf16 = train.precision == "bf16"
    checkpoint = parameters * FP32 * (3 + emas)
    latents = (_measured_latents(recipe) if measured else None) or _expected_latents(recipe)
    work = StepWork(
        parameters=parameters,
        forward=forward,
        of_image=of_image,
        share=share,
        micro_batches=math.ceil(share / batch),
        launches=model.launches,
        moved=model.moved,
        states=state_bytes(parameters, train.zero_stage, world, emas, bf16),
    )
    time = _time(recipe, machine, work, latents["images"])
    return {
        "recipe": recipe.name,
        "on_gpus": recipe.scaling.gpus_per_worker > 0,
        "zero_stage": train.zero_stage,
        "model": {
            "architecture": recipe.model.architecture,
            "summary": model.summary,
            **model.sizes,
        },
        "parameters": {"total": parameters, **model.by_part},
        "multiply_adds": {
            "forward": forward,
            "forward_without_attention_products": forward - model.products,
            "training_image": of_image,
            "training_step": of_image * train.batch_size,
        },
        "memory": {
            "world_size": world,
            "batch_per_gpu": batch,
            "emas": emas,
            "precision": train.precision,
            "activation_checkpointing": train.activation_checkpointing,
            "latents_on_host": loader_bytes(recipe, latents["images"]),
            "zero_stage": _memory(recipe, machine, model, world, emas),
        },
        "storage": {
            "checkpoint": checkpoint,
            "export": parameters * FP32,
            **latents,
        },
        "time": time,
        "stages": _stages(recipe, machine, model, time, latents["images"]),
    }


def _memory(
    recipe: Recipe, machine: Machine, model: Counts, world: int, emas: int
) -> dict[str, dict[str, Any]]:
    """Bytes on each GPU, by ZeRO stage."""
    train, stages = recipe.train, {}
    bf16 = train.precision == "bf16"
    for stage in range(4):
        states = state_bytes(model.parameters, stage, world, emas, bf16)
        host = _offloaded(states, stage, train.offload)
        bucket = (BF16 if bf16 else FP32) * BUCKET_ELEMENTS if stage else 0
        total = states.total - host + bucket + model.activations
        stages[str(stage)] = {
            **asdict(states),
            "states": states.total,
            "of_them_on_host": host,
            "bucket": bucket,
            "activations": model.activations,
            "total": total,
            "fits": total < GPUS[machine.gpu].memory_gib * storage.GIB,
        }
    return stages


def compare(
    recipe: Recipe, preset: str, machine: Machine, emas: int | None = None
) -> dict[str, Any]:
    """The plan of the same recipe with another model: `model.preset`.

    Returns:
        As `plan`; of a model that cannot be trained here, parameters and multiply-adds only.

    Raises:
        UserError: there is no such preset, or the recipe is not on latents.
    """
    if preset not in (*PRESETS, *PEERS):
        known = ", ".join([*PRESETS, *PEERS])
        raise UserError(f"--compare is {preset!r}, but must be one of: {known}")
    if recipe.model.on_pixels:
        raise UserError(
            f"--compare is {preset!r}, a model on latents, but recipe {recipe.name!r} trains "
            f"{recipe.model.architecture} on pixels"
        )
    if preset in PEERS:
        return _peer_counts(recipe, preset)
    model = recipe.model.model_copy(update={**PRESETS[preset], "preset": preset})
    return plan(recipe.model_copy(update={"model": model}), machine, emas)


def _peer_counts(recipe: Recipe, preset: str) -> dict[str, Any]:
    """Parameters and multiply-adds of a peer, which has DiT's sizes."""
    import torch

    from diffit_train.models.backbone import trainable_parameters
    from diffit_train.models.build import latent_shape
    from diffit_train.models.cost import multiply_adds, parameters_by_part
    from diffit_train.models.dit import MDT

    sized = recipe.model.model_copy(update=PRESETS[preset.replace("mdt", "dit")])
    with torch.device("meta"):
        model = MDT(latent_shape(recipe.model_copy(update={"model": sized})))
    forward, products = multiply_adds(model)
    return {
        "parameters": {"total": trainable_parameters(model), **parameters_by_part(model)},
        "multiply_adds": {
            "forward": forward,
            "forward_without_attention_products": forward - products,
        },
    }


@dataclass(frozen=True)
class StepWork:
    """What one rank does in a step.

    Attributes:
        forward, of_image: multiply-adds of an image, in a forward pass and in training.
        share: images of a step; in `micro_batches` passes of forward and backward.
        launches, moved: kernels, and bytes besides matrix products, of one such pass.
        states: what the optimizer reads and writes.
    """

    parameters: int
    forward: int
    of_image: int
    share: int
    micro_batches: int
    launches: int
    moved: int
    states: States


def _offloaded(states: States, stage: int, offload: str) -> int:
    """Bytes of the states that are kept in host memory."""
    if stage == 0 or offload == "none":
        return 0
    weights = states.weights if offload == "parameters" and stage == 3 else 0
    return weights + states.master + states.moments + states.ema


def _measured_latents(recipe: Recipe) -> dict[str, Any] | None:
    """Size of the latents under the root; None if there are none."""
    url = latents_url(recipe)
    if not storage.exists(storage.join(url, MANIFEST)):
        return None
    manifest = load_manifest(url)
    size = sum(shard.bytes for shard in manifest.shards)
    return {"images": manifest.totals.written, "latents": size}


def _expected_latents(recipe: Recipe) -> dict[str, Any]:
    """Size of the latents, estimated from the expected number of images."""
    images = recipe.data.expected_images
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
    """Host memory of the latents that a rank holds: the shards of its lanes' windows.

    With those that its threads are reading, once as a file and once as values.

    Args:
        images: images of the latents; None if unknown.
    """
    data, world = recipe.data, recipe.scaling.most_workers
    shards = math.ceil(data.lanes / world) * (data.shuffle_window // data.images_per_shard + 2)
    if images is not None:
        shards = min(shards, math.ceil(images / data.images_per_shard))
    return (shards + 2 * min(READERS, shards)) * data.images_per_shard * latent_bytes(recipe)


def autoencoder_bytes(recipe: Recipe, batch: int) -> int:
    """Activations of an autoencoder on a CPU, which works on slices of a batch."""
    from diffit_train.data.autoencoder_memory import CPU_BUDGET

    image = DECODE_BYTES * recipe.data.resolution**2
    return max(image, min(batch * image, CPU_BUDGET))


def _communicated(work: StepWork, train: Train, world: int, best: bool) -> float:
    """Bytes that a rank sends in a step; ring collectives (W - 1) / W of their size each.

    Stages 1 and 2 reduce-scatter gradients or, as DeepSpeed's buckets for several ranks do,
    all-reduce them; both gather the new weights. Stage 3 gathers weights for the forward and for
    the backward pass of each micro-batch. Stages 2 and 3 reduce after every micro-batch.
    """
    size = BF16 if train.precision == "bf16" else FP32
    ring = (world - 1) / world * work.parameters * size
    if train.zero_stage == 0:
        return 2 * ring
    if train.zero_stage == 3:
        return 3 * ring * work.micro_batches
    reductions = work.micro_batches if train.zero_stage == 2 else 1
    return ring * (reductions * (1 if best else 2) + 1)


def step_seconds(recipe: Recipe, machine: Machine, work: StepWork, best: bool) -> dict[str, float]:
    """Seconds of the parts of a step, and of the whole, at one end of the range.

    At best the host runs ahead of the GPU and gradients are exchanged during the backward pass; at
    worst communication follows computation.
    """
    train, world, gpu = recipe.train, recipe.scaling.most_workers, GPUS[machine.gpu]
    end = 0 if best else 1
    peak = 1e12 * (gpu.tflops_fp32 if train.precision == "fp32" else gpu.tflops_bf16)
    bandwidth = 1e9 * gpu.memory_gb_per_s * BANDWIDTH_EFFICIENCY[end]
    again = work.of_image / (3 * work.forward)  # recomputation does not count toward MFU
    if machine.mfu is not None:
        compute = again * 6 * work.forward * work.share / (peak * machine.mfu)
        memory = 0.0
    else:
        compute = 2 * work.of_image * work.share / (peak * MATRIX_EFFICIENCY[end])
        # What compilation fuses moves once; at best all of it but reading and writing.
        fused = 0.5 if train.compile and best else 1.0
        memory = again * fused * work.moved * work.micro_batches / bandwidth
    states = work.states
    optimizer = (2 * (states.master + states.moments + states.ema) + states.gradients) / bandwidth
    kernels = again * work.launches * work.micro_batches
    launch = LAUNCH_S[end] * kernels * (COMPILED_LAUNCHES if train.compile else 1.0)
    sent = _communicated(work, train, world, best)
    buckets = math.ceil(work.parameters / BUCKET_ELEMENTS)
    hops = 2 * math.ceil(math.log2(world)) * buckets * HOP_S[end] if world > 1 else 0.0
    exchange = sent * machine.seconds_per_byte(world, best) + hops
    passes = max(compute + memory, launch)
    exposed = max(0.0, exchange - passes * 2 / 3) if best else exchange
    return {
        "compute": compute,
        "memory": memory,
        "launch": launch,
        "optimizer": optimizer,
        "exchange": exchange,
        "total": passes + optimizer + exposed,
    }


def _time(recipe: Recipe, machine: Machine, work: StepWork, images: int | None) -> dict[str, Any]:
    """Speed and cost of training, as ranges [best, worst]."""
    train, world = recipe.train, recipe.scaling.most_workers
    parts = [step_seconds(recipe, machine, work, best) for best in (True, False)]
    steps = [part["total"] for part in parts]
    rates = [train.batch_size / s for s in steps]
    peak = GPUS[machine.gpu].tflops_bf16 * 1e12 * world
    hours = [train.steps * s / 3600 for s in steps]
    busy = max(
        1, math.ceil(max(p["launch"] / (p["compute"] + p["memory"]) for p in parts) * work.share)
    )
    return {
        "gpu": machine.gpu,
        "assumed_mfu": machine.mfu,
        "step_s": steps,
        "step_parts_s": {name: [part[name] for part in parts] for name in parts[0]},
        "images_per_s": rates,
        "images_per_s_per_gpu": [rate / world for rate in rates],
        "mfu": [6 * work.forward * rate / peak for rate in rates],
        "images_per_gpu": work.share,
        "images_to_keep_a_gpu_busy": busy,
        "steps": train.steps,
        "epochs": train.steps * train.batch_size / images if images else None,
        "price_per_gpu_hour": machine.price_per_hour,
        **_costs(hours, world, machine),
    }


def _costs(hours: list[float], gpus: float, machine: Machine) -> dict[str, Any]:
    spent = [gpus * h for h in hours]
    price = machine.price_per_hour
    cost = None if price is None else [price * h for h in spent]
    return {"gpus": gpus, "hours": hours, "gpu_hours": spent, "cost": cost}


def _autoencoder_work(recipe: Recipe, per_pixel: int) -> int | None:
    """Multiply-adds for one image; None for an autoencoder of unknown size."""
    section = recipe.autoencoder
    if section.kind == "identity":
        return 0
    if (section.kind, section.latent_channels, section.downsample) != ("kl", 4, 8):
        return None
    return per_pixel * recipe.data.resolution**2


def _stages(
    recipe: Recipe, machine: Machine, model: Counts, time: dict[str, Any], images: int | None
) -> list[dict[str, Any]]:
    """Hours, GPU-hours and cost of each stage of the project; None where the size is unknown."""
    gpu, scaling, train = GPUS[machine.gpu], recipe.scaling, recipe.train
    bf16 = 1e12 * gpu.tflops_bf16
    tf32, fp32 = bf16 / 2, 1e12 * gpu.tflops_fp32
    convolutions = {"fp32": fp32, "tf32": tf32}.get(recipe.autoencoder.precision, bf16)
    precision = recipe.evaluate.precision
    products = {"fp32": fp32, "tf32": tf32}.get(precision, bf16)
    encode = _autoencoder_work(recipe, ENCODE_MULTIPLY_ADDS)
    decode = _autoencoder_work(recipe, DECODE_MULTIPLY_ADDS)
    share = scaling.gpus_per_actor or 1.0

    def stage(name: str, actors: int, count: int | None, seconds: list[float] | None) -> Any:
        gpus = actors * share
        if seconds is None or count is None:
            return {"stage": name, "gpus": gpus, "hours": None, "gpu_hours": None, "cost": None}
        hours = [count * s / (gpus * 3600) for s in seconds]
        return {"stage": name, **_costs(hours, gpus, machine)}

    frames = 2 if recipe.data.flip else 1
    encode_s = (
        None
        if encode is None
        else [2 * frames * encode / (convolutions * e) for e in CONVOLUTION_EFFICIENCY]
    )
    evaluate_s = None
    if decode is not None:
        inception = INCEPTION_MULTIPLY_ADDS if recipe.evaluate.features.kind == "inception" else 0
        network = 2 * model.forward * model.nfe / products
        rest = 2 * (decode / convolutions + inception / fp32)
        evaluate_s = [
            network / e + rest / c
            for e, c in zip(MATRIX_EFFICIENCY, CONVOLUTION_EFFICIENCY, strict=True)
        ]
    actors = scaling.evaluate_actors
    rows = [stage("encode", scaling.encode_actors, images, encode_s)]
    rows.append(
        {"stage": "train", **{key: time[key] for key in ("gpus", "hours", "gpu_hours", "cost")}}
    )
    if train.validate_every:
        count = train.steps // train.validate_every * train.validate_samples
        rows.append(stage("evaluate while training", actors, count, evaluate_s))
    rows.append(stage("evaluate", actors, recipe.evaluate.samples, evaluate_s))
    return rows
