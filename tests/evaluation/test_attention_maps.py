"""Attention maps: the weights that the kernel uses, in the right place, at every step."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffit_train.cli.attention import parse_token
from diffit_train.config import Recipe, load_recipe
from diffit_train.data.autoencoder import LoadedAutoencoder
from diffit_train.errors import UserError
from diffit_train.evaluation.attention_maps import (
    attended_window,
    attention_of,
    draw_trajectories,
    recorded,
    trajectory,
)
from diffit_train.evaluation.generate import Generator
from diffit_train.models.attention import TMSA, SelfAttention
from diffit_train.models.attention_kernels import reference_attention
from diffit_train.models.build import build_model

CPU = torch.device("cpu")


def _weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.3 * torch.randn(p.shape, generator=generator)
        for name, p in build_model(recipe).named_parameters()
    }


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    image = "channels: [8, 16], blocks: [1, 1], window: 4, head_size: 8, time_size: 8"
    network = f"{{architecture: image_diffit, conditional: false, {image}}}"
    overrides = [f"model={network}", "data.resolution=8", "evaluate.sampler.steps=6"]
    overrides += ["evaluate.compile=false", "evaluate.precision=fp32", "train.augment=0"]
    return load_recipe("cifar10", overrides)


@pytest.fixture(scope="module")
def generator(recipe: Recipe) -> Generator:
    identity = LoadedAutoencoder(None, "identity", 1.0, CPU, torch.float32)
    return Generator(recipe, _weights(recipe), identity)


@pytest.mark.parametrize("kind", ["window", "whole", "plain"])
def test_the_recorded_weights_are_those_of_the_kernel(kind: str) -> None:
    """With the identity as values, attention returns its weights."""
    torch.manual_seed(0)
    layer: TMSA | SelfAttention = SelfAttention(16, 2)
    side, window = 4, 4
    if kind != "plain":
        side, window = (8, 4) if kind == "window" else (4, 4)
        layer = TMSA(16, 2, side, window)
        torch.nn.init.normal_(layer.relative_position_bias_table)
    seen = []

    def kernel(q, k, v, table, index):  # type: ignore[no-untyped-def]
        eye = torch.eye(q.shape[2]).expand(*q.shape[:2], -1, -1)
        seen.append(reference_attention(q, k, eye, table, index).mean(1))
        return reference_attention(q, k, v, table, index)

    layer.kernel = kernel
    x, c, token = torch.randn(2, side**2, 16), torch.randn(2, 16), (1, 2)
    if kind == "window":
        token = (6, 1)
    with recorded(layer, token) as maps, torch.no_grad():
        out = layer(x, c) if isinstance(layer, TMSA) else layer(x)
    (weights,), (found,) = seen, maps
    number = (token[0] // window) * (side // window) + token[1] // window
    place = token[0] % window * window + token[1] % window
    expected = np.zeros((side, side))
    top, left = token[0] // window * window, token[1] // window * window
    expected[top : top + window, left : left + window] = (
        weights[number, place].view(window, window).numpy()
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.sum() == pytest.approx(1.0)
    assert layer.kernel is kernel
    assert math.isfinite(float(out.sum()))


def test_the_whole_trajectory_is_recorded(generator: Generator, tmp_path: Path) -> None:
    plain = generator([(3, 0)], [0])[0]
    row = trajectory(generator, 0, 3, (5, 6), None, "a run")
    assert np.array_equal(row.image, plain)
    # Six steps of Heun are eleven evaluations, of which eight are shown.
    assert row.maps.shape == (8, 8, 8)
    assert row.levels[0] > 0.99 > 0.01 > row.levels[-1]
    assert row.levels == sorted(row.levels, reverse=True)
    np.testing.assert_allclose(row.maps.sum((1, 2)), 1.0, rtol=1e-5)
    assert (row.maps[:, :4] == 0).all()
    assert not np.allclose(row.maps[0], row.maps[-1])
    file = tmp_path / "attention.png"
    draw_trajectories([row, row], str(file))
    width, height = Image.open(file).size
    assert width > 2 * height > 400


def test_blocks_and_tokens_that_do_not_exist_are_refused(generator: Generator) -> None:
    assert attention_of(generator.model, None).side == 8
    assert attention_of(generator.model, 1).side == 4
    with pytest.raises(UserError, match=r"--block is 7, but the blocks with attention are 0, 1, 2"):
        attention_of(generator.model, 7)
    with pytest.raises(UserError, match=r"--token is 8,0, but rows and columns go from 0 to 7"):
        trajectory(generator, 0, 0, (8, 0), None, "a run")
    assert parse_token("3, 5") == (3, 5)
    for text in ("3", "a,b", "-1,2", ""):
        with pytest.raises(UserError, match="must be ROW,COL"):
            parse_token(text)


def test_a_picture_shows_the_window_only() -> None:
    maps = np.zeros((2, 8, 8))
    maps[0, 4:8, 0] = 0.25
    maps[1, 7, 0:4] = 0.25
    assert attended_window(maps) == (slice(4, 8), slice(0, 4))
    assert attended_window(np.full((1, 4, 4), 1 / 16)) == (slice(0, 4), slice(0, 4))
