"""Feature networks and generation: what their results depend on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffit_train.config import Recipe, load_recipe
from diffit_train.config.evaluate import SAMPLERS
from diffit_train.data.autoencoder import LoadedAutoencoder, load_autoencoder
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.chunks import FEATURES, PREDICTIONS
from diffit_train.evaluation.feature_networks import fit_features, load_features
from diffit_train.evaluation.features import features_info
from diffit_train.evaluation.generate import Generator, ImageNoise, guidance_saving
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


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True)])
def test_the_model_runs_in_the_recipes_precision(
    project: Path, precision: str, allowed: bool
) -> None:
    recipe = tiny_recipe(project, f"evaluate.precision={precision}")
    generator = Generator(recipe, _weights(recipe), load_autoencoder(recipe, CPU))
    seen = set()
    generator.model.register_forward_pre_hook(
        lambda *_: seen.add(
            (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        )
    )
    generator([(0, 0)], [0])
    assert seen == {(allowed, allowed)}
    assert torch.backends.cudnn.allow_tf32


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
    with pytest.raises(UserError, match=r"evaluate\.features"):
        fit_features(tiny_recipe(project, "evaluate.features.fit.steps=11"))
    with pytest.raises(UserError, match="'inception'"):
        fit_features(load_recipe("imagenet256"))
    with pytest.raises(UserError, match="diffit fit features"):
        load_features(tiny_recipe(tmp_path), CPU)
    with pytest.raises(UserError, match=r"data\.resolution is 32, .* is for 16"):
        load_features(tiny_recipe(project, "data.resolution=32"), CPU)


class _Transfers(TorchDispatchMode):
    """Counts what makes the host wait for a device; the meta device stands for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = op(*args, **(kwargs or {}))
        tensors = [v for v in (*args, out) if isinstance(v, torch.Tensor) and v.dim()]
        reads = op is torch.ops.aten._local_scalar_dense.default
        copies = op in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if reads or (copies and len({v.device for v in tensors}) > 1):
            self.found.append(str(op))
        return out


class _OnMeta:
    """An autoencoder on the meta device that leaves latents as they are."""

    device = torch.device("meta")

    def decode(self, latents: torch.Tensor, how: str) -> torch.Tensor:
        return latents


def _transfers(generator: Generator) -> list[str]:
    with _Transfers() as transfers:
        assert generator([(0, 0), (0, 1)], [1, 2]).device.type == "meta"
    return transfers.found


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        *[("epsilon", name) for name in SAMPLERS["epsilon"]],
        *[("flow", name) for name in SAMPLERS["flow"]],
        *[("edm", name) for name in SAMPLERS["edm"]],
    ],
)
def test_sampling_neither_reads_from_the_device_nor_copies_to_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, objective: str, name: str
) -> None:
    options = ", eta: 0.5" if name == "ddim" else ""
    counts = {}
    for steps in (4, 8):
        recipe = tiny_recipe(
            project,
            f"diffusion.objective={objective}",
            f"evaluate.sampler={{name: {name}, steps: {steps}{options}}}",
            "evaluate.guidance={kind: power_cosine, scale: 4}",
            "model.attention=sdpa",
        )
        generator = Generator(recipe, _weights(recipe), _OnMeta())  # type: ignore[arg-type]
        # Noise comes from the host, by asynchronous copies on a GPU.
        fresh = torch.empty(2, 4, 4, 4, device="meta")
        monkeypatch.setattr(ImageNoise, "__call__", lambda _, device, fresh=fresh: fresh)
        first, counts[steps] = _transfers(generator), _transfers(generator)
        assert len(first) < 12
    # The labels and the null label's, once a batch, whatever the number of steps.
    assert counts[4] == counts[8]
    assert len(counts[4]) <= 2


def test_transfers_are_counted() -> None:
    with _Transfers() as transfers:
        float(torch.zeros(1)[0])
        torch.zeros(2).to("meta")
        torch.zeros(2, device="meta").add_(1)
    assert transfers.found == ["aten._local_scalar_dense.default", "aten._to_copy.default"]


def test_a_compiled_generator_compiles_once_for_each_batch_size(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle unconditional passes are skipped, so that batches are single or double."""
    plain, dynamic = torch.nn.Module.compile, []

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        dynamic.append(any(isinstance(value, torch.SymInt) for value in inputs))
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda block, **options: plain(block, backend=backend, **options),
    )
    recipe = tiny_recipe(
        project,
        "evaluate.sampler={name: ddim, steps: 6}",
        "evaluate.guidance={kind: power_cosine, scale: 4, skip_within: 0.01}",
        "evaluate.compile=true",
    )
    assert "skipping unconditional passes" in guidance_saving(recipe)
    generator = Generator(recipe, _weights(recipe), load_autoencoder(recipe, CPU))
    sizes = set()
    generator.model.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
    keys = [(0, i) for i in range(3)]
    made = [generator(keys, [0, 1, 2]) for _ in range(2)]
    assert sizes == {3, 6}
    # A kernel for sizes that are not known at compilation would be slower.
    assert dynamic == [False, False]
    assert np.array_equal(*made)
