"""Generate images from a model: image i depends on (seed, i) only, not on its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data.autoencoder import LoadedAutoencoder, load_autoencoder
from diffit_train.data.autoencoder_source import autoencoder_url
from diffit_train.data.manifest import MANIFEST, latents_url, load_manifest
from diffit_train.diffusion.generation import ImageNoise, generate_latents, weight_of_noise
from diffit_train.diffusion.guidance import build_weight, skipped_fraction
from diffit_train.diffusion.objective import load_objective, sampler_sigmas
from diffit_train.errors import DiffitError, UserError, redact
from diffit_train.evaluation.features import check_pinned_hash
from diffit_train.models.build import build_model
from diffit_train.models.precision import arithmetic
from diffit_train.models.published import FIXED, check_published, read_weights_file
from diffit_train.models.wrap import compile_blocks, use_kernel
from diffit_train.runs.checkpoints import Checkpoint, reconstructed_url

if TYPE_CHECKING:
    from diffit_train.evaluation.grid import Animation

# Spawn key that separates the random stream of labels from that of noise.
_LABELS = 1
# What decides how a decoder of diffusers computes; a later version may know more keys.
_AUTOENCODER_KEYS = (
    "act_fn",
    "block_out_channels",
    "decoder_block_out_channels",
    "force_upcast",
    "latent_channels",
    "latent_magnitude",
    "latent_shift",
    "latents_mean",
    "latents_std",
    "layers_per_block",
    "mid_block_add_attention",
    "norm_num_groups",
    "num_decoder_blocks",
    "scaling_factor",
    "shift_factor",
    "up_block_types",
    "upsample_fn",
    "upsampling_scaling_factor",
    "use_post_quant_conv",
)


class Generator:
    """A model with the recipe's sampler, guidance and autoencoder.

    Args:
        weights: every trainable parameter by name.

    Raises:
        DiffitError: the weights belong to another model.
    """

    def __init__(
        self, recipe: Recipe, weights: dict[str, Tensor], autoencoder: LoadedAutoencoder
    ) -> None:
        self.autoencoder = autoencoder
        self.device = autoencoder.device
        model = build_model(recipe)
        fill_model(model, weights)
        self.model = model.to(self.device).eval().requires_grad_(False)
        use_kernel(model, recipe.model.attention, self.device)
        if recipe.evaluate.compile:
            # Two batch sizes occur: with and without unconditional passes.
            compile_blocks(model, dynamic=False)
        self.objective = load_objective(recipe.diffusion)
        self.use(recipe)

    @classmethod
    def load(cls, recipe: Recipe, weights: dict[str, Tensor], device: str | None = None) -> Self:
        """A model with the recipe's autoencoder on a device, by default a GPU if there is one.

        Raises:
            UserError: the autoencoder is not available, or another one.
            DiffitError: the weights belong to another model.
        """
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(recipe, weights, load_decoder(recipe, place))

    def use(self, recipe: Recipe) -> None:
        """Take sampler, guidance and precision from a recipe of the same model."""
        self.recipe = recipe
        self.weight = weight_of_noise(self.objective, recipe.evaluate.guidance)

    @torch.no_grad()
    def __call__(
        self,
        keys: Sequence[tuple[int, int]],
        labels: Sequence[int],
        watch: Callable[[Tensor], None] | None = None,
    ) -> np.ndarray:
        """Images (B, R, R, 3) uint8.

        Args:
            keys: (seed, index) of each image's noise, (B,).
            labels: their classes, (B,).
            watch: given the predicted latents x_0 (B, C, h, w) at each call of the denoiser.
        """
        recipe, size = self.recipe, self.recipe.latent_size

        def predicted(output: Tensor, x: Tensor, t: float) -> None:
            if watch is not None:
                watch(self.objective.predicted_x0(output, x, t))

        latents = generate_latents(
            self.objective,
            recipe.evaluate.sampler,
            recipe.evaluate.guidance,
            self.weight,
            self._predict,
            ImageNoise(keys, (recipe.autoencoder.latent_channels, size, size)),
            torch.tensor(labels, device=self.device),
            recipe.data.num_classes,
            predicted,
        )
        return self.decode(latents)

    def images(
        self,
        wanted: Sequence[tuple[int, int]],
        batch_size: int,
        animation: Animation | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield the image (R, R, 3) uint8 of each label and seed.

        Args:
            animation: receives the denoising.
        """
        for start in range(0, len(wanted), batch_size):
            labels, seeds = zip(*wanted[start : start + batch_size], strict=True)
            watch = animation.watcher(self.decode) if animation else None
            pixels = self([(seed, 0) for seed in seeds], labels, watch)
            if animation:
                animation.finish(pixels)
            yield from pixels

    def decode(self, latents: Tensor) -> np.ndarray:
        """Images (B, R, R, 3) uint8 of latents (B, C, h, w)."""
        return self.autoencoder.decode(latents, self.recipe.evaluate.pixels)

    def _predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with arithmetic(self.recipe.evaluate.precision, self.device):
            return self.model(x, t, y).float()


def load_decoder(recipe: Recipe, device: torch.device) -> LoadedAutoencoder:
    """The recipe's autoencoder, the same as that of its latents and of its first use.

    Raises:
        UserError: it is not available, or another one.
    """
    loaded = load_autoencoder(recipe, device)
    if loaded.model is None:
        return loaded
    weights, encoded = loaded.weight_hash(), ""
    url, source = latents_url(recipe), redact(recipe.autoencoder.name)
    if storage.exists(storage.join(url, MANIFEST)):
        manifest = load_manifest(url)
        if manifest.recipe_hash == recipe.encode_hash():
            encoded = manifest.autoencoder_sha256
            if (weights, loaded.scale) != (encoded, manifest.scale):
                raise UserError(
                    f"the autoencoder in {redact(autoencoder_url(recipe))} is not the one "
                    f"that {url} was encoded with: its weights or its scale differ; restore it"
                )
    config = {name: loaded.model.config.get(name) for name in _AUTOENCODER_KEYS}
    identity = storage.digest([weights, loaded.scale, config])
    also = f"{loaded.dtype} {encoded}"
    check_pinned_hash(recipe.storage.root, "autoencoder.source", source, identity, also)
    return loaded


def choose_labels(
    how: Literal["random", "balanced"], seed: int, indices: Sequence[int], classes: int
) -> np.ndarray:
    """Labels (n,) int64 of the images `indices` of an evaluation.

    random: uniform and independent, as in ADM, DiT and the published DiffiT; the label of image i
    depends on (seed, i) only. balanced: i mod classes.
    """
    if how == "balanced":
        return np.array(indices, dtype=np.int64) % classes
    streams = (np.random.SeedSequence((seed, i), spawn_key=(_LABELS,)) for i in indices)
    randoms = (np.random.Generator(np.random.Philox(stream)) for stream in streams)
    return np.array([random.integers(classes) for random in randoms], dtype=np.int64)


def guidance_saving(recipe: Recipe) -> str:
    """A message saying what skipping unconditional passes saves; empty if nothing."""
    guidance = recipe.evaluate.guidance
    if not recipe.model.conditional or guidance.kind == "none":
        return ""
    visited = sampler_sigmas(recipe.diffusion, recipe.evaluate.sampler)
    share = skipped_fraction(build_weight(guidance), visited, guidance.skip_within)
    if not share:
        return ""
    return (
        f"skipping unconditional passes where the guidance weight is within "
        f"{guidance.skip_within:g} of 1: saves {share:.1%} of the NFE"
    )


def fill_model(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights into a model, strictly: every learned tensor, and nothing else.

    Raises:
        DiffitError: the weights belong to another model.
    """
    try:
        answer = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DiffitError(f"the checkpoint belongs to another model: {reason}") from error
    missing = [name for name in answer.missing_keys if not name.endswith(FIXED)]
    if missing or answer.unexpected_keys:
        raise DiffitError(
            f"the checkpoint belongs to another model: missing {missing[:3]}, unexpected "
            f"{answer.unexpected_keys[:3]}"
        )


def class_names(recipe: Recipe) -> list[str]:
    """Class names from the latents if they exist, else class numbers."""
    url = latents_url(recipe)
    if storage.exists(storage.join(url, MANIFEST)):
        names = load_manifest(url).classes
        if len(names) == recipe.data.num_classes:
            return names
    return [str(number) for number in range(recipe.data.num_classes)]


def run_weights(recipe: Recipe, url: str, step: int) -> dict[str, Tensor]:
    """Weights of a run's checkpoint, as selected by `evaluate.weights`.

    Raises:
        UserError: they need a reconstructed EMA that does not exist.
    """
    width = recipe.evaluate.reconstructed
    if width is not None:
        file = reconstructed_url(url, width, step)
        if not storage.exists(file):
            raise UserError(
                f"{file} does not exist; run `diffit export` with --sigma-rel {width:g} "
                f"--step {step}"
            )
        return file_weights(recipe, file)
    return Checkpoint(url, step).load(recipe.evaluate.weights)


def file_weights(recipe: Recipe, file: str, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Weights from an exported or published file."""
    return check_published(build_model(recipe), read_weights_file(file, allow_pickle), file)
