"""The resumable fit, and the autoencoder in diffusers' format."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import nn

from diffit_train.data import autoencoder
from diffit_train.data.autoencoder import LoadedAutoencoder, load_autoencoder, scaled_sample
from diffit_train.data.autoencoder_fit import fit_autoencoder
from diffit_train.data.fit import fit
from diffit_train.errors import UserError
from tests.benchmarks.common import peak_bytes
from tests.conftest import tiny_recipe, write_images
from tests.gpu.autoencoder import stable_diffusion_autoencoder
from tests.gpu.kit import Machine


class _Killed(Exception):
    pass


def _fit(folder: Path, die_at: int | None = None, identity: str = "a") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss(step: int, random: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        if step == die_at:
            raise _Killed
        x = torch.from_numpy(random.standard_normal((8, 3), dtype=np.float32))
        value = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
        return value, {"mse": value.item()}

    state = str(folder / "state.safetensors")
    fit(model, loss, steps=30, lr=0.1, seed=0, state_url=state, identity=identity, title="t")
    return model


def test_a_killed_fit_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffit_train.data.fit.SAVE_EVERY_S", 0.0)
    whole = _fit(tmp_path / "whole")
    for die_at in (7, 19):
        with pytest.raises(_Killed):
            _fit(tmp_path / "killed", die_at)
    resumed = _fit(tmp_path / "killed")
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)
    # It did learn; a damaged state or one with another identity is not loaded.
    assert (whole.weight - 1).abs().max() < 0.5
    (tmp_path / "killed" / "state.safetensors").write_bytes(b"no safetensors at all")
    assert torch.equal(_fit(tmp_path / "killed").weight, whole.weight)
    assert torch.equal(_fit(tmp_path / "killed", identity="b").weight, whole.weight)


def test_scaled_sample_is_diffusers_posterior() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.randn(2, 8, 3, 3) * 5
    noise = torch.randn(2, 4, 3, 3)
    posterior = DiagonalGaussianDistribution(moments)
    expected = 0.5 * (posterior.mean + posterior.std * noise)
    torch.testing.assert_close(scaled_sample(moments, noise, 0.5), expected)


def test_a_fitted_autoencoder_is_diffusers(project: Path) -> None:
    from diffusers import AutoencoderKL

    recipe = tiny_recipe(project)
    mine = load_autoencoder(recipe, torch.device("cpu"))
    folder = project / "autoencoders" / "digits"
    theirs = AutoencoderKL.from_pretrained(folder)
    assert mine.scale == pytest.approx(theirs.config.scaling_factor)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    moments = mine.encode_moments(x)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(x)).latent_dist
        decoded = theirs.decode(posterior.mean).sample
    np.testing.assert_allclose(moments, posterior.parameters.numpy(), atol=1e-6)
    pixels = mine.decode(posterior.mean * mine.scale)
    expected = ((decoded + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels.astype(float) - expected).max() <= 1
    assert pixels.dtype == np.uint8
    assert mine.weight_hash() == load_autoencoder(recipe, torch.device("cpu")).weight_hash()
    assert not (folder / "fit-state.safetensors").exists()
    image = Image.open(folder / "reconstructions.png")
    assert image.size == (16 * 16 * 4, 2 * 16 * 4)


def test_a_finished_fit_is_left_unchanged_and_another_refused(project: Path) -> None:
    weights = project / "autoencoders" / "digits" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    fit_autoencoder(tiny_recipe(project))
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="autoencoder of another recipe"):
        fit_autoencoder(tiny_recipe(project, "autoencoder.fit.steps=7"))
    assert weights.stat().st_mtime_ns == before


def test_impossible_and_foreign_autoencoders_are_refused(project: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "digits")
    with pytest.raises(UserError, match="3 levels, which downsample by 4"):
        fit_autoencoder(tiny_recipe(tmp_path, "autoencoder.downsample=2"))
    assert not (tmp_path / "autoencoders").exists()
    shutil.copytree(project / "autoencoders", tmp_path / "autoencoders")
    (tmp_path / "autoencoders" / "digits" / "diffit.json").unlink()
    with pytest.raises(UserError, match="not fitted here"):
        fit_autoencoder(tiny_recipe(tmp_path))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("autoencoder.source=root:autoencoders/none", "diffit autoencoder fit"),
        ("autoencoder.source=nobody/no-such-vae", "nobody/no-such-vae cannot be loaded"),
        ("autoencoder.latent_channels=5", r"latent_channels is 5, but .* has 4"),
    ],
)
def test_unusable_autoencoders_are_refused(project: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_autoencoder(tiny_recipe(project, override), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_slices_of_a_batch_give_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if kind == "kl":
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
        )
    else:
        model = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    model.eval().requires_grad_(False)
    loaded = LoadedAutoencoder(model, kind, 0.5, torch.device("cpu"), torch.float32)
    pixels = np.random.default_rng(0).uniform(-1, 1, (5, 3, 16, 16)).astype(np.float32)
    whole = loaded.encode_moments(pixels)
    latents = torch.randn(5, 4, 8, 8)
    images = loaded.decode(latents)
    seen: list[int] = []
    for name in ("encode", "decode"):
        body = getattr(model, name)
        monkeypatch.setattr(model, name, lambda x, body=body: (seen.append(len(x)), body(x))[1])
    # An image takes three times the channels of a pixel, of 4 bytes.
    widest = {"kl": 16, "tiny": 8}[kind]
    monkeypatch.setattr(autoencoder, "SLICE_BYTES", 2 * 3 * widest * 16 * 16 * 4)
    np.testing.assert_allclose(loaded.encode_moments(pixels), whole, atol=1e-6)
    assert np.abs(loaded.decode(latents).astype(int) - images).max() <= 1
    assert seen == [2, 2, 1, 2, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("resolution", [64, 128])
def test_slices_are_as_large_as_estimated(resolution: int) -> None:
    machine = Machine(torch.device("cpu"), False, 0)
    loaded = LoadedAutoencoder(
        stable_diffusion_autoencoder(machine), "sd", 1.0, machine.device, torch.float32
    )
    latents = torch.randn(2, 4, resolution // 8, resolution // 8)
    pixels = np.zeros((2, 3, resolution, resolution), np.float32)
    estimate = 2 * 768 * 4 * resolution**2
    decoded = peak_bytes(lambda: loaded.decode(latents), machine.device)
    encoded = peak_bytes(lambda: loaded.encode_moments(pixels), machine.device)
    assert 0.95 * estimate < decoded < 1.25 * estimate
    assert 0.7 * estimate < encoded < decoded
