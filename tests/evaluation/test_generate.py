"""Feature networks and generation: what their results depend on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffit_train.commands.data import fit_features
from diffit_train.config import Recipe
from diffit_train.data.autoencoder import LoadedAutoencoder, load_autoencoder
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.chunks import FEATURES, PREDICTIONS
from diffit_train.evaluation.feature_networks import load_features
from diffit_train.evaluation.features import features_info
from diffit_train.evaluation.generate import Generator, ImageNoise
from diffit_train.models.build import build_model
from tests.conftest import tiny_recipe

CPU = torch.device("cpu")


def _weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = build_model(recipe)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.2)
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def test_noise_belongs_to_the_image_not_to_its_batch() -> None:
    shape = (4, 2, 2)
    together, alone = ImageNoise([(7, 3), (7, 4), (7, 5)], shape), ImageNoise([(7, 4)], shape)
    for _ in range(3):
        assert torch.equal(together(CPU)[1], alone(CPU)[0])
    assert not torch.equal(ImageNoise([(8, 4)], shape)(CPU), ImageNoise([(7, 4)], shape)(CPU))


@pytest.mark.parametrize("sampler", ["{name: ddpm, steps: 4}", "{name: ddim, steps: 4, eta: 0.5}"])
@pytest.mark.parametrize("guidance", ["constant", "power_cosine"])
def test_an_image_is_the_same_in_any_batch(project: Path, sampler: str, guidance: str) -> None:
    overrides = [f"evaluate.sampler={sampler}", f"evaluate.guidance.kind={guidance}"]
    recipe = tiny_recipe(project, *overrides)
    generator = Generator(recipe, _weights(recipe), load_autoencoder(recipe, CPU))
    keys, labels = [(0, 4), (0, 5), (0, 6)], [1, 2, 0]
    pixels = generator(keys, labels)
    assert pixels.shape == (3, 16, 16, 3)
    alone = generator(keys[1:2], labels[1:2])
    # Matrix products of another shape round differently, so a pixel may differ by one level.
    assert np.abs(alone[0].astype(int) - pixels[1]).max() <= 1
    assert np.array_equal(pixels, generator(keys, labels))
    assert not np.array_equal(pixels[0], pixels[1])


@pytest.mark.parametrize("how", ["round", "truncate"])
def test_pixels_become_levels_by_the_formula(how: str) -> None:
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    found = LoadedAutoencoder(None, "identity", 1.0, CPU, torch.float32).decode(x, how)  # type: ignore[arg-type]
    exact = np.clip((x.numpy().astype(np.float32) + 1) * np.float32(127.5), 0, 255)
    expected = np.floor(exact) if how == "truncate" else np.rint(exact)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected.transpose(0, 2, 3, 1))


def test_a_generator_uses_the_recipes_pixel_rounding(project: Path) -> None:
    made = {}
    for how in ("round", "truncate"):
        recipe = tiny_recipe(project, f"evaluate.pixels={how}")
        generator = Generator(recipe, _weights(recipe), load_autoencoder(recipe, CPU))
        made[how] = generator([(0, i) for i in range(4)], [0, 1, 2, 0]).astype(int)
    above = made["round"] - made["truncate"]
    assert set(np.unique(above)) == {0, 1}
    assert 0.4 < above.mean() < 0.6


def test_weights_of_another_model_are_named(project: Path) -> None:
    recipe = tiny_recipe(project)
    autoencoder, weights = load_autoencoder(recipe, CPU), _weights(recipe)
    missing = {n: w for n, w in weights.items() if n != "x_embedder.proj.bias"}
    with pytest.raises(DiffitError, match=r"missing \['x_embedder\.proj\.bias'\]"):
        Generator(recipe, missing, autoencoder)
    with pytest.raises(DiffitError, match=r"unexpected \['extra'\]"):
        Generator(recipe, {**weights, "extra": torch.zeros(1)}, autoencoder)
    with pytest.raises(DiffitError, match=r"another model.*final_layer"):
        Generator(recipe, {**weights, "final_layer.linear.bias": torch.zeros(1)}, autoencoder)


def test_features_are_deterministic_and_guarded(project: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(project)
    network = load_features(recipe, CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    rows = network.extract(pixels)
    assert {name: values.shape for name, values in rows.items()} == {
        FEATURES: (4, 5),
        PREDICTIONS: (4,),
    }
    assert set(rows[PREDICTIONS].tolist()) <= {0, 1, 2}
    alone = network.extract(pixels[2:3])
    np.testing.assert_allclose(alone[FEATURES][0], rows[FEATURES][2], atol=1e-5)
    assert 0 <= features_info(recipe).held_out_accuracy <= 1
    with pytest.raises(UserError, match="feature network of another recipe"):
        fit_features(tiny_recipe(project, "evaluate.features.fit.steps=11"))
    with pytest.raises(UserError, match="diffit features fit"):
        load_features(tiny_recipe(tmp_path), CPU)
    with pytest.raises(UserError, match=r"data\.resolution is 32, .* is for 16"):
        load_features(tiny_recipe(project, "data.resolution=32"), CPU)
