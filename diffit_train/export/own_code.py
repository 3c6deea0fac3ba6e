"""Whether exported code of another package runs on its own, and computes the same.

Its modules may do what one file cannot hold, such as statements that have an effect on import.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diffit_train.config import Recipe
from diffit_train.diffusion.generation import ImageNoise, generate_latents, weight_of_noise
from diffit_train.diffusion.objective import Objective
from diffit_train.errors import UserError
from diffit_train.models.backbone import Backbone

_NAME = "diffit_exported_code"
_SEEDS = [0, 1]


class DifferentCodeError(Exception):
    """The exported code computes something else."""


@contextmanager
def own_code(key: str, name: str, file: Path) -> Iterator[ModuleType]:
    """The module of an exported file, to be tried in the block.

    Raises:
        UserError: it cannot be imported, or what is done in the block fails.
    """
    spec = spec_from_file_location(_NAME, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[_NAME] = module  # where dataclasses look
    try:
        spec.loader.exec_module(module)
        yield module
    except Exception as error:  # code of another package may raise anything
        raise UserError(
            f"{key} is {name!r}, whose code does not work in a file of its own: "
            f"{type(error).__name__}: {error}; its modules may hold imports, definitions and "
            "constants only, or export it without --format diffusers"
        ) from error
    finally:
        del sys.modules[_NAME]


@torch.no_grad()
def require_same_network(exported: Any, model: Backbone) -> None:
    """Compare the outputs for one input.

    Raises:
        DifferentCodeError: they differ.
    """
    exported.network.load_state_dict(model.state_dict())
    random = torch.Generator().manual_seed(0)
    x = torch.randn(len(_SEEDS), *model.input_shape, generator=random)
    t, y = torch.rand(len(_SEEDS), generator=random), torch.zeros(len(_SEEDS), dtype=torch.long)
    if not torch.equal(exported.eval()(x, t, y), model.eval()(x, t, y)):
        raise DifferentCodeError("its outputs differ from those of the package")


def require_same_samples(exported: Any, recipe: Recipe, objective: Objective) -> None:
    """Compare what the sampler makes of a network that returns a tenth of its input.

    Raises:
        DifferentCodeError: it differs.
    """
    section, size = recipe.evaluate, recipe.latent_size
    shape = (recipe.autoencoder.latent_channels, size, size)
    labels, null = torch.zeros(len(_SEEDS), dtype=torch.long), recipe.data.num_classes

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * x

    mine = generate_latents(
        objective,
        section.sampler,
        section.guidance,
        weight_of_noise(objective, section.guidance),
        network,
        ImageNoise([(seed, 0) for seed in _SEEDS], shape),
        labels,
        null,
    )
    if not torch.equal(exported.generate(network, shape, _SEEDS, labels, null), mine):
        raise DifferentCodeError("its samples differ from those of the package")
