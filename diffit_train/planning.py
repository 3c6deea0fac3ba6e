"""What a run needs, estimated before renting any GPU: memory, storage, hours and cost.

Parameters and multiply-adds are counted on the model itself, on the meta device. Memory is the sum
of the states that DeepSpeed ZeRO keeps at each stage and the activations that autograd saves. Not
counted: the framework's own memory, NCCL buffers, fragmentation.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.train import BUCKET_ELEMENTS
from diffit_train.data.shards import MANIFEST, latents_url, load_manifest
from diffit_train.errors import UserError

# Bytes per value. Master weights, Adam's two moments and the EMAs are fp32.
FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Gpu:
    """A GPU's memory and its dense bf16 TFLOP/s (vendor data sheets)."""

    memory_gib: float
    tflops_bf16: float


GPUS = {
    "A10G": Gpu(24, 70),
    "L40S": Gpu(48, 362),
    "A100-40": Gpu(40, 312),
    "A100-80": Gpu(80, 312),
    "H100": Gpu(80, 989),
    "H200": Gpu(141, 989),
    "B200": Gpu(180, 2250),
}


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
        mfu: model FLOPs utilization assumed.
        price_per_hour: price of one GPU-hour; None if unknown.
    """

    gpu: str
    mfu: float
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError(f"--gpu is {self.gpu!r}, but must be one of: {', '.join(GPUS)}")
        if not 0.0 < self.mfu <= 1.0:
            raise UserError(f"--mfu is {self.mfu}, but must be greater than 0 and at most 1")
        if self.price_per_hour is not None and not self.price_per_hour >= 0.0:
            raise UserError(f"--price is {self.price_per_hour}, but must be at least 0")


def plan(
    recipe: Recipe, machine: Machine, emas: int | None = None, *, measured: bool = True
) -> dict[str, Any]:
    """The estimate of `diffit plan` as plain values, in bytes and seconds unless named otherwise.

    Args:
        emas: number of EMAs; None for the recipe's.
        measured: whether latents that exist are measured, which reads their manifest; else all
            numbers follow from the recipe alone.
    """
    import torch

    from diffit_train.models.backbone import trainable_parameters
    from diffit_train.models.build import ARCHITECTURES, model_shape
    from diffit_train.models.cost import activation_bytes, multiply_adds, parameters_by_part

    shape, train, world = model_shape(recipe), recipe.train, recipe.scaling.most_workers
    emas = len(train.ema) if emas is None else emas
    with torch.device("meta"):
        model = ARCHITECTURES[recipe.model.architecture](shape)
    parameters = trainable_parameters(model)
    forward, products = multiply_adds(model)
    blocks = train.activation_checkpointing == "blocks"
    again = forward / train.checkpoint_every_nth_block if blocks else 0
    of_image = round(3 * forward + again)
    bf16 = train.precision == "bf16"
    share = math.ceil(train.batch_size / world)
    batch = min(share, train.micro_batch_size or share)
    dtype = torch.bfloat16 if "bf16" in train.precision else torch.float32
    activations = activation_bytes(
        shape,
        recipe.model.architecture,
        batch,
        train.activation_checkpointing,
        train.checkpoint_every_nth_block,
        dtype,
    )
    stages = {}
    gpu = GPUS[machine.gpu]
    for stage in range(4):
        states = state_bytes(parameters, stage, world, emas, bf16)
        host = _offloaded(states, stage, train.offload)
        bucket = (BF16 if bf16 else FP32) * BUCKET_ELEMENTS if stage else 0
        total = states.total - host + bucket + activations
        stages[str(stage)] = {
            **asdict(states),
            "states": states.total,
            "of_them_on_host": host,
            "bucket": bucket,
            "activations": activations,
            "total": total,
            "fits": total < gpu.memory_gib * storage.GIB,
        }
    checkpoint = parameters * FP32 * (3 + emas)
    latents = (_measured_latents(recipe) if measured else None) or _expected_latents(recipe)
    return {
        "recipe": recipe.name,
        "model": {"architecture": recipe.model.architecture, **asdict(shape)},
        "parameters": {"total": parameters, **parameters_by_part(model)},
        "multiply_adds": {
            "forward": forward,
            "forward_without_attention_products": forward - products,
            "training_image": of_image,
            "training_step": of_image * train.batch_size,
        },
        "memory": {
            "world_size": world,
            "batch_per_gpu": batch,
            "emas": emas,
            "precision": train.precision,
            "activation_checkpointing": train.activation_checkpointing,
            "zero_stage": stages,
        },
        "storage": {
            "checkpoint": checkpoint,
            "export": parameters * FP32,
            **latents,
        },
        "time": _time(recipe, machine, 3 * forward, latents["images"]),
    }


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
    """Bytes of one image's latents: mean and log-variance in float16, for each flip."""
    frames = 2 if recipe.data.flip else 1
    return 2 * frames * 2 * recipe.autoencoder.latent_channels * recipe.latent_size**2


def _time(recipe: Recipe, machine: Machine, of_image: int, images: int | None) -> dict[str, Any]:
    """Speed and cost. MFU counts forward and backward once, so recomputation does not count."""
    train, world = recipe.train, recipe.scaling.most_workers
    rate = GPUS[machine.gpu].tflops_bf16 * 1e12 * machine.mfu / (2 * of_image)
    seconds = train.steps * train.batch_size / (rate * world)
    gpu_hours = seconds * world / 3600
    return {
        "gpu": machine.gpu,
        "mfu": machine.mfu,
        "images_per_s_per_gpu": rate,
        "images_per_s": rate * world,
        "step_s": train.batch_size / (rate * world),
        "steps": train.steps,
        "epochs": train.steps * train.batch_size / images if images else None,
        "hours": seconds / 3600,
        "gpu_hours": gpu_hours,
        "price_per_gpu_hour": machine.price_per_hour,
        "cost": None if machine.price_per_hour is None else gpu_hours * machine.price_per_hour,
    }
