"""What `diffit plan` counts on a recipe's model, kept in the user's cache once it has been counted.

Counting imports torch and its compiler: two seconds, for numbers that follow from the recipe.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.errors import DiffitError

# Keys of `train` that decide nothing here.
_OTHER_TRAINING = {"steps", "lr", "seed", "warmup_steps", "log_every", "checkpoint_every"}


@dataclass(frozen=True)
class Counts:
    """Sizes of a model, and what it does in training with batches of a rank.

    Attributes:
        summary, sizes: as the model's own.
        parameters: trainable ones; `by_part` in each child module.
        forward: multiply-adds of an image; `products` of them in attention.
        activations: bytes that are kept for the backward pass.
        launches, moved: kernels of a forward and backward pass, and bytes besides matrix products.
        nfe: model evaluations for an image of an evaluation.
    """

    summary: str
    sizes: dict[str, Any]
    parameters: int
    by_part: dict[str, int]
    forward: int
    products: int
    activations: int
    launches: int
    moved: int
    nfe: float


def counts(recipe: Recipe, batch: int) -> Counts:
    """The counts of a recipe's model for batches of `batch` images on a rank.

    Raises:
        UserError: the model is another package's, and cannot be made.
    """
    if recipe.model.plugged or recipe.diffusion.plugged:  # their code may have changed
        return count(recipe, batch)
    file = user_cache_path("diffit") / "counts" / f"{_key(recipe, batch)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # absent, or not ours: count again
        return Counts(**json.loads(file.read_text()))
    found = count(recipe, batch)
    with contextlib.suppress(OSError, DiffitError):  # then it takes its time again
        storage.write_text(str(file), json.dumps(asdict(found)))
    return found


def _key(recipe: Recipe, batch: int) -> str:
    """Hash of all that the counts may follow from: recipe, our code, and torch."""
    sections = {"model", "data", "autoencoder", "diffusion", "evaluate"}
    dumped = recipe.model_dump(mode="json", include=sections)
    train = recipe.train.model_dump(mode="json", exclude=_OTHER_TRAINING)
    package = Path(__file__).parent
    files = [
        file for part in ("models", "diffusion", "config") for file in (package / part).glob("*.py")
    ]
    code = [storage.sha256_file(file) for file in sorted([*files, Path(__file__)])]
    return storage.digest([dumped, train, batch, code, metadata.version("torch")])[:32]


def count(recipe: Recipe, batch: int) -> Counts:
    """As `counts`, counted on the model itself, on the meta device."""
    import torch

    from diffit_train.diffusion.objective import nfe_per_image
    from diffit_train.models.backbone import trainable_parameters
    from diffit_train.models.build import build_model
    from diffit_train.models.cost import (
        activation_bytes,
        bias_bytes,
        kernel_launches,
        multiply_adds,
        parameters_by_part,
    )

    train = recipe.train
    with torch.device("meta"):
        model = build_model(recipe)
    forward, products = multiply_adds(model)
    dtype = torch.bfloat16 if "bf16" in train.precision else torch.float32
    launches, moved = kernel_launches(model, batch, dtype)
    if recipe.model.attention in ("auto", "sdpa"):
        moved += bias_bytes(model, batch, dtype.itemsize)
    mode, nth = train.activation_checkpointing, train.checkpoint_every_nth_block
    return Counts(
        summary=model.summary,
        sizes=dict(model.sizes),
        parameters=trainable_parameters(model),
        by_part=parameters_by_part(model),
        forward=forward,
        products=products,
        activations=activation_bytes(model, batch, mode, nth, dtype),
        launches=launches,
        moved=moved,
        nfe=nfe_per_image(recipe),
    )
