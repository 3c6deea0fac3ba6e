"""`diffit fit autoencoder`: train your own AutoencoderKL where no published VAE fits."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.autoencoder import Kl
from diffit_train.data.reading import read_items
from diffit_train.data.sources import list_images
from diffit_train.errors import UserError
from diffit_train.progress import say

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FITTED = "diffit.json"
AUTOENCODER_STATE = "fit-state.safetensors"


def fit_autoencoder(recipe: Recipe) -> dict[str, Any]:
    """Fit the recipe's autoencoder on its images; returns the report stored in its marker.

    Saved in diffusers' format at `autoencoder.source`, the marker last. A finished one is left
    unchanged; an interrupted fit resumes.

    Raises:
        UserError: the recipe has no autoencoder to fit, the folder holds another one, or the sizes
            are inconsistent.
    """
    section, url = _target(recipe)
    identity = storage.digest(
        [
            recipe.image_identity(),
            section.model_dump(mode="json", include={"fit", "latent_channels", "downsample"}),
        ]
    )
    marker = storage.join(url, FITTED)
    if storage.exists(marker):
        report: dict[str, Any] = storage.read_json(marker)
        if report["identity"] != identity:
            raise UserError(
                f"{url} holds the autoencoder of another recipe; set autoencoder.source to "
                "another folder, or delete that one"
            )
        storage.remove(storage.join(url, AUTOENCODER_STATE))  # of a killed command
        say(f"autoencoder {storage.display_path(url)} is already fitted")
        return report
    _check_target(section, url)
    storage.require_writable(recipe.storage.root)
    report = {"identity": identity, **_train_autoencoder(recipe, section, url, identity)}
    storage.write_json(marker, report)
    storage.remove(storage.join(url, AUTOENCODER_STATE))
    metrics = f"reconstruction mse {report['reconstruction_mse']:.5f}, scale {report['scale']:.4f}"
    say(f"autoencoder {storage.display_path(url)}: {metrics}")
    return report


def _target(recipe: Recipe) -> tuple[Kl, str]:
    """The recipe's autoencoder, and the folder to fit it into."""
    from diffit_train.data.autoencoder import autoencoder_url, is_path

    section = recipe.autoencoder
    if section.kind == "identity":
        raise UserError(
            "autoencoder.kind is 'identity': the recipe trains on pixels and has no autoencoder to "
            "fit; go on with `diffit encode`"
        )
    if section.kind != "kl":
        raise UserError(
            f"autoencoder.kind is {section.kind!r}, but only an AutoencoderKL is fitted; set "
            "autoencoder.kind=kl"
        )
    url = autoencoder_url(recipe)
    if url == section.source and not is_path(url):
        raise UserError(
            f"autoencoder.source is {url!r}, a model of the Hugging Face Hub; name a folder to fit "
            "one into, such as autoencoder.source=root:autoencoders/mine"
        )
    return section, url


def _check_target(section: Kl, url: str) -> None:
    if section.downsample.bit_count() != 1:
        raise UserError(
            f"autoencoder.downsample is {section.downsample}, but must be a power of two to fit an "
            "autoencoder"
        )
    if storage.exists(storage.join(url, "config.json")) and not storage.exists(
        storage.join(url, AUTOENCODER_STATE)
    ):
        raise UserError(
            f"{url} holds an autoencoder that was not fitted here, and will not be overwritten; "
            "set autoencoder.source to another folder"
        )


def _train_autoencoder(recipe: Recipe, section: Kl, url: str, identity: str) -> dict[str, Any]:
    import torch
    from diffusers import AutoencoderKL

    from diffit_train.data.fit import SEED, fit

    fitted, pixels = section.fit, _all_pixels(recipe)
    channels = fitted.block_out_channels(section.downsample)
    torch.manual_seed(SEED)
    model: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=section.latent_channels,
        norm_num_groups=8,
        sample_size=recipe.data.resolution,
    )

    def loss(step: int, random: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = random.integers(len(pixels), size=fitted.batch_size)
        x = torch.from_numpy(pixels[rows])
        posterior = model.encode(x).latent_dist
        noise = random.standard_normal(posterior.mean.shape, dtype="float32")
        decoded = model.decode(posterior.mean + posterior.std * torch.from_numpy(noise)).sample
        mse = ((decoded - x) ** 2).mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return mse + fitted.kl_weight * kl, {"mse": mse.item(), "kl": kl.item()}

    fit(
        model,
        loss,
        steps=fitted.steps,
        lr=fitted.lr,
        state_url=storage.join(url, AUTOENCODER_STATE),
        identity=identity,
        title="autoencoder",
    )
    return {"steps": fitted.steps, **_save_autoencoder(url, model, pixels)}


def _all_pixels(recipe: Recipe) -> np.ndarray:
    """Every readable image, (n, 3, R, R) float32 in [-1, 1]; unreadable ones are counted."""
    from diffit_train.data.preprocess import to_model_range

    listing = list_images(recipe)
    images = read_items(listing.source, listing.items, recipe.data.resolution)
    if images.rejected:
        say(f"Skipped {len(images.rejected):,} unreadable images")
    if not images.kept:
        raise UserError(f"no image in {listing.url} can be read: {images.rejected[0][1]}")
    return to_model_range(images.pixels)


def _save_autoencoder(url: str, model: Any, pixels: np.ndarray) -> dict[str, Any]:
    """Measure scale and reconstruction error, and write everything but the marker."""
    import torch

    means, decoded = [], []
    with torch.no_grad():
        for start in range(0, len(pixels), 256):
            mean = model.encode(torch.from_numpy(pixels[start : start + 256])).latent_dist.mean
            means.append(mean)
            decoded.append(model.decode(mean).sample)
    reconstruction = torch.cat(decoded).clamp(-1, 1).numpy()
    scale = 1.0 / float(torch.cat(means).double().std())
    model.register_to_config(scaling_factor=scale)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            storage.write_bytes(storage.join(url, path.name), path.read_bytes())
    # Images are sorted by class, so evenly spaced ones cover the classes.
    shown = [round(i * (len(pixels) - 1) / 15) for i in range(16)]
    image = _image(pixels[shown], reconstruction[shown])
    storage.write_bytes(storage.join(url, "reconstructions.png"), image)
    return {
        "scale": scale,
        "reconstruction_mse": float(((reconstruction - pixels) ** 2).mean()),
    }


def _image(originals: np.ndarray, reconstructions: np.ndarray) -> bytes:
    """A PNG of originals above their reconstructions; small images are enlarged."""
    import io

    import numpy as np
    from PIL import Image

    rows = [np.concatenate(list(row), axis=2) for row in (originals, reconstructions)]
    pixels = np.concatenate(rows, axis=1).transpose(1, 2, 0)
    image = Image.fromarray(((pixels + 1) * 127.5).round().clip(0, 255).astype(np.uint8))
    factor = max(1, 64 // originals.shape[-1])
    out = io.BytesIO()
    size = (image.width * factor, image.height * factor)
    image.resize(size, Image.Resampling.NEAREST).save(out, format="PNG")
    return out.getvalue()
