"""Compiled blocks: as many graphs as kinds of blocks, no graph break, and no other graph later."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from diffit_train.config import load_recipe
from diffit_train.config.train import AUGMENT_LABELS
from diffit_train.models.backbone import Backbone
from diffit_train.models.build import build_model
from diffit_train.models.wrap import checkpoint_activations, compile_blocks

LATENT = ["data.resolution=64", "model.hidden_size=32", "model.num_heads=2", "model.depth=3"]
IMAGE = ["model.head_size=8", "model.time_size=32"]
# All stages with fewer channels and blocks; kinds of blocks differ in width or side.
RECIPES = {
    "imagenet256": (LATENT, 1),
    "cifar10": (
        [*IMAGE, "model.channels=[16,32,32]", "model.blocks=[1,1,1]"],
        3,
    ),
    "ffhq64": (
        [*IMAGE, "model.channels=[16,32,32,32]", "model.blocks=[1,2,1,1]"],
        4,
    ),
}
TRACED_FOR_LONG = [
    pytest.param(name, marks=[] if name == "imagenet256" else [pytest.mark.slow])
    for name in RECIPES
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing has been compiled before, nor is after."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def _compiled(name: str, mode: str = "none", dynamic: bool | None = None) -> Backbone:
    recipe = load_recipe(name, RECIPES[name][0])
    model = build_model(recipe)
    checkpoint_activations(model, mode)  # type: ignore[arg-type]
    # The graphs as such: code that runs them takes longer to make.
    compile_blocks(model, dynamic=dynamic, backend="eager")
    return model


def _pass(model: Backbone, images: int, train: bool) -> None:
    x = torch.randn(images, *model.input_shape)
    t, y = torch.rand(images), torch.zeros(images, dtype=torch.long)
    extras: dict[str, Tensor] = {}
    if train and hasattr(model, "a_embedder"):
        labels = torch.zeros(images, AUGMENT_LABELS)
        extras = {"augment": labels, "dropout_seeds": torch.arange(images)}
    with torch.set_grad_enabled(train):
        out = model(x, t, y, **extras)
        if train:
            out.square().sum().backward()


def _graphs() -> int:
    assert not counters["graph_break"], counters["graph_break"]
    assert not counters["recompile_limit"]
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", ["imagenet256", "cifar10", *TRACED_FOR_LONG[-1:]])
def test_training_compiles_each_kind_of_block_once(name: str) -> None:
    model = _compiled(name)
    for _ in range(2):
        _pass(model, 4, train=True)
    assert _graphs() == RECIPES[name][1]


@pytest.mark.parametrize("name", TRACED_FOR_LONG)
def test_batches_of_other_sizes_share_one_more_graph_of_each_kind(name: str) -> None:
    model = _compiled(name)
    for images in (4, 3, 2, 4):
        _pass(model, images, train=True)
    assert _graphs() == 2 * RECIPES[name][1]


@pytest.mark.parametrize("name", TRACED_FOR_LONG)
def test_evaluation_compiles_each_kind_of_block_once(name: str) -> None:
    model = _compiled(name, dynamic=False)
    model.eval().requires_grad_(False)
    for _ in range(2):
        _pass(model, 4, train=False)
    assert _graphs() == RECIPES[name][1]


@pytest.mark.parametrize("mode", ["selective", "blocks"])
def test_checkpointed_blocks_are_compiled_whole(mode: str) -> None:
    model = _compiled("imagenet256", mode)
    for _ in range(2):
        _pass(model, 4, True)
    assert _graphs() == 1
