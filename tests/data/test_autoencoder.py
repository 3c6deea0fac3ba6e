"""The resumable fit, and the autoencoder in diffusers' format."""

from __future__ import annotations

import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data.alias import resolve_alias
from diffit_train.data.autoencoder import (
    LoadedAutoencoder,
    Part,
    activation_values,
    load_autoencoder,
    sample_latent,
    slice_size,
)
from diffit_train.data.fit import fit, fit_autoencoder
from diffit_train.data.manifest import MANIFEST, finished_manifest, latents_url
from diffit_train.errors import UserError
from tests.conftest import tiny_recipe, write_images
from tests.made import make_manifest


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
    fit(model, loss, steps=30, lr=0.1, state_url=state, identity=identity, title="t")
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
    torch.testing.assert_close(sample_latent(moments, noise, 0.5), expected)


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
    assert Image.open(folder / "reconstructions.png").width > 1000


def test_a_finished_fit_is_left_unchanged_and_another_refused(project: Path) -> None:
    weights = project / "autoencoders" / "digits" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    fit_autoencoder(tiny_recipe(project))
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"autoencoder\."):
        fit_autoencoder(tiny_recipe(project, "autoencoder.fit.steps=7"))
    assert weights.stat().st_mtime_ns == before


def test_impossible_and_foreign_autoencoders_are_refused(project: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "digits")
    with pytest.raises(UserError, match=r"autoencoder\.downsample is 3"):
        fit_autoencoder(tiny_recipe(tmp_path, "data.resolution=48", "autoencoder.downsample=3"))
    assert not (tmp_path / "autoencoders").exists()
    shutil.copytree(project / "autoencoders", tmp_path / "autoencoders")
    (tmp_path / "autoencoders" / "digits" / "diffit.json").unlink()
    with pytest.raises(UserError, match="diffit fit|source"):
        fit_autoencoder(tiny_recipe(tmp_path))


PIXELS = ["autoencoder={kind: identity}", "evaluate.guidance.channels=3"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (PIXELS, r"autoencoder\.kind is 'identity'"),
        (["autoencoder={kind: tiny, source: a, downsample: 4}"], r"autoencoder\.kind is 'tiny'"),
        (["autoencoder.source=stabilityai/sd-vae-ft-ema"], "a model of the Hugging Face Hub; name"),
    ],
)
def test_only_a_kl_autoencoder_of_ones_own_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], words: str
) -> None:
    write_images(tmp_path / "images" / "digits")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        fit_autoencoder(tiny_recipe(tmp_path, *overrides))
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("autoencoder.source=root:autoencoders/none", "diffit fit autoencoder"),
        ("autoencoder.source=nobody/no-such-vae", "nobody/no-such-vae cannot be loaded"),
        ("autoencoder.latent_channels=5", r"latent_channels is 5, but .* has 4"),
    ],
)
def test_unusable_autoencoders_are_refused(project: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_autoencoder(tiny_recipe(project, override), torch.device("cpu"))


# ---- Slices ----


class _Live(TorchDispatchMode):
    """Bytes of the tensors that live at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.views: Counter[int] = Counter()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage.data_ptr(), storage.nbytes()
                self.live += 0 if self.views[key] else size
                self.views[key] += 1
                weakref.finalize(tensor, self._ended, key, size)
        self.peak = max(self.peak, self.live)
        return out

    def _ended(self, key: int, size: int) -> None:
        self.views[key] -= 1
        self.live -= 0 if self.views[key] else size


def _kl(channels: tuple[int, ...], layers: int = 2) -> LoadedAutoencoder:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        norm_num_groups=8,
    )
    return LoadedAutoencoder(model.eval(), "random", 1.0, torch.device("cpu"), torch.float32)


def _tiny() -> LoadedAutoencoder:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    channels = (16, 16, 16, 16)
    model = AutoencoderTiny(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels
    )
    return LoadedAutoencoder(model.eval(), "random", 1.0, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("part", ["encode", "decode"])
@pytest.mark.parametrize("channels", [(16, 32), (16, 32, 64, 64), (32, 32), (8, 24, 24), ()])
def test_activations_are_those_that_live_at_once(channels: tuple[int, ...], part: Part) -> None:
    loaded, side = (_kl(channels) if channels else _tiny()), 64
    kind = "kl" if channels else "tiny"
    factor = 2 ** (len(channels or range(4)) - 1)
    shape = (1, 3, side, side) if part == "encode" else (1, 4, side // factor, side // factor)
    x = torch.randn(shape)
    with torch.no_grad(), _Live() as live:
        getattr(loaded.model, part)(x)
    expected = 4 * side**2 * activation_values(loaded.model.config, kind, part)
    assert 0.9 * expected < live.peak < 1.05 * expected


def test_the_decode_of_stable_diffusion_holds_what_was_seen() -> None:
    config = SimpleNamespace(block_out_channels=(128, 256, 512, 512))
    values = activation_values(config, "kl", "decode")
    assert 64 * 512**2 * 4 * values == 48 * 2**30


@pytest.mark.parametrize(
    ("images", "budget", "expected"),
    [(64, 6400, 64), (64, 6399, 32), (64, 100, 1), (64, 99, 1), (64, 0, 1), (5, 450, 4), (0, 9, 1)],
)
def test_slices_fit_the_budget(images: int, budget: int, expected: int) -> None:
    assert slice_size(images, 100.0, budget) == expected


@pytest.mark.parametrize("make", [lambda: _kl((16, 32)), _tiny])
def test_any_slicing_gives_the_same_results(make: Callable[[], LoadedAutoencoder]) -> None:
    loaded = make()
    random = np.random.default_rng(0)
    pixels = random.uniform(-1, 1, (7, 3, 32, 32)).astype(np.float32)
    factor = 2 if hasattr(loaded.model.config, "block_out_channels") else 8
    latents = torch.from_numpy(random.normal(size=(7, 4, 32 // factor, 32 // factor))).float()
    sizes: list[int] = []
    real = loaded.model.encode
    loaded.model.encode = lambda x: sizes.append(len(x)) or real(x)
    whole = loaded.encode_moments(pixels), loaded.decode(latents)
    for at_once, slices in ((7, [7]), (4, [4, 3]), (2, [2, 2, 2, 1]), (1, [1] * 7)):
        kind = "kl" if factor == 2 else "tiny"
        each = 4 * 32**2 * activation_values(loaded.model.config, kind, "encode")
        loaded.budget = int(each * at_once)
        sizes.clear()
        moments = loaded.encode_moments(pixels)
        assert sizes == slices
        # Equal but for the rounding of the kernel that is chosen for a size.
        np.testing.assert_allclose(moments, whole[0], atol=1e-5)
        levels = np.abs(loaded.decode(latents).astype(int) - whole[1])
        assert levels.max() <= 1
        assert (levels > 0).mean() < 1e-3
    alone = np.concatenate([loaded.encode_moments(pixels[n : n + 1]) for n in range(7)])
    assert np.array_equal(alone, moments)  # in slices of one image


def test_one_image_is_always_worked_on() -> None:
    loaded = _kl((8, 8), layers=1)
    loaded.budget = 0
    assert loaded.decode(torch.zeros(3, 4, 8, 8)).shape == (3, 16, 16, 3)


# ---- Precision ----


def test_only_tf32_runs_in_tf32(project: Path) -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32, convolutions.benchmark
    x = np.zeros((1, 3, 16, 16), np.float32)
    for precision in ("fp32", "tf32"):
        loaded = load_autoencoder(
            tiny_recipe(project, f"autoencoder.precision={precision}"), torch.device("cpu")
        )
        seen: list[tuple[str, bool, bool, bool]] = []

        def watch(part: str, real: Any, seen: list[Any] = seen) -> Callable[[Any], Any]:
            def watched(x: Any) -> Any:
                flags = products.allow_tf32, convolutions.allow_tf32, convolutions.benchmark
                seen.append((part, *flags))
                return real(x)

            return watched

        for part in ("encode", "decode"):
            setattr(loaded.model, part, watch(part, getattr(loaded.model, part)))
        moments = loaded.encode_moments(x)
        loaded.decode(torch.from_numpy(moments[:, :4]))
        rounded = precision == "tf32"
        # Shards must have the same bytes each time, so encoding does not search for algorithms.
        assert seen == [("encode", rounded, rounded, False), ("decode", rounded, rounded, True)]
    assert (products.allow_tf32, convolutions.allow_tf32, convolutions.benchmark) == before


def test_tf32_is_what_fp32_was_on_a_gpu(project: Path) -> None:
    plain, rounded = tiny_recipe(project), tiny_recipe(project, "autoencoder.precision=tf32")
    assert plain.encode_hash() == rounded.encode_hash()
    assert plain.encode_hash() != tiny_recipe(project, "autoencoder.precision=bf16").encode_hash()


# ---- The same weights elsewhere ----


@pytest.fixture
def encoded_recipe(project: Path, tmp_path: Path) -> Recipe:
    """The recipe of a root with latents of no images."""
    shutil.copytree(project / "autoencoders", tmp_path / "autoencoders")
    recipe = tiny_recipe(tmp_path)
    manifest = make_manifest(
        [],
        channels=4,
        side=4,
        recipe_hash=recipe.encode_hash(),
        autoencoder=recipe.autoencoder.name,
        autoencoder_sha256=load_autoencoder(recipe, torch.device("cpu")).weight_hash(),
    )
    storage.write_text(storage.join(latents_url(recipe), MANIFEST), manifest.model_dump_json())
    return recipe


def test_a_copy_of_the_weights_is_the_same_recipe(encoded_recipe: Recipe, tmp_path: Path) -> None:
    recipe, copy = encoded_recipe, tmp_path / "mirror"
    shutil.copytree(tmp_path / "autoencoders" / "digits", copy)
    mirrored = tiny_recipe(tmp_path, f"autoencoder.source={copy}")
    assert resolve_alias(recipe) is recipe
    assert mirrored.encode_hash() != recipe.encode_hash()
    known = resolve_alias(mirrored)
    assert known.autoencoder.source == str(copy)
    assert known.autoencoder.alias == recipe.autoencoder.source
    assert (known.encode_hash(), known.train_hash()) == (recipe.encode_hash(), recipe.train_hash())
    assert finished_manifest(known) == finished_manifest(recipe)
    assert load_autoencoder(known, torch.device("cpu")).id == recipe.autoencoder.source
    with pytest.raises(UserError, match="latents"):
        finished_manifest(mirrored)


@pytest.mark.usefixtures("encoded_recipe")
def test_other_weights_are_not_taken_for_a_copy(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    copy = tmp_path / "other"
    model = AutoencoderKL.from_pretrained(tmp_path / "autoencoders" / "digits")
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(copy)
    other = tiny_recipe(tmp_path, f"autoencoder.source={copy}")
    assert resolve_alias(other) is other
    named = tiny_recipe(
        tmp_path, f"autoencoder.source={copy}", "autoencoder.alias=root:autoencoders/digits"
    )
    with pytest.raises(UserError, match="are not those that .* was encoded with"):
        load_autoencoder(named, torch.device("cpu"))
