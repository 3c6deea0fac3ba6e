"""`diffit fit autoencoder`, and the resumable training loop of small models.

A fit depends only on its steps. Killed at any time and rerun, it resumes from its last
saved state and ends with the same weights.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.autoencoder import Kl
from diffit_train.data.autoencoder import to_uint8
from diffit_train.data.autoencoder_source import autoencoder_url, is_hub_id
from diffit_train.data.preprocess import to_model_range
from diffit_train.data.randomness import generator
from diffit_train.data.reading import read_items
from diffit_train.data.reconstructions import draw_rows
from diffit_train.data.sources import list_images
from diffit_train.errors import UserError
from diffit_train.progress import Progress, say

FITTED = "diffit.json"
AUTOENCODER_STATE = "fit-state.safetensors"
SAVE_EVERY_S = 10.0
# Reconstructions to draw.
SHOWN = 16
# Seed of initial weights and batches, and of the images that are held out.
SEED = 0
# Images of a step.
BATCH_SIZE = 64

LossOfStep = Callable[[int, np.random.Generator], tuple[Tensor, dict[str, float]]]


def fit(
    model: nn.Module,
    loss: LossOfStep,
    *,
    steps: int,
    lr: float,
    state_url: str,
    identity: str,
    title: str,
) -> None:
    """Train `model` in place with AdamW and cosine decay of the learning rate to 0.

    Args:
        loss: from a step and its generator, the loss to minimize and metrics to show.
        state_url: file for the resumable state; the caller removes it after committing the
            result.
        identity: hash of everything that determines the fit; a state with another is discarded.
        title: shown with the progress.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    first = _load_state(model, optimizer, state_url, identity)
    saved_s = time.monotonic()
    model.train()
    with Progress(title, steps, "steps", done=first) as progress:
        for step in range(first, steps):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            value, shown = loss(step, generator(SEED, step))
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress.update(step + 1, "  ".join(f"{k} {v:.4f}" for k, v in shown.items()))
            if time.monotonic() - saved_s > SAVE_EVERY_S:
                _save_state(model, optimizer, state_url, identity, step + 1)
                saved_s = time.monotonic()
    _save_state(model, optimizer, state_url, identity, steps)
    model.eval()


def _save_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, url: str, identity: str, step: int
) -> None:
    tensors = {f"model/{name}": value.contiguous() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            tensors[f"{kind}/{name}"] = value
    with storage.atomic_file(url) as path:
        save_file(tensors, str(path), metadata={"fit": json.dumps([identity, step])})


def _load_state(model: nn.Module, optimizer: torch.optim.Optimizer, url: str, identity: str) -> int:
    """Restore model and optimizer from a saved state; returns its step, or 0 without one."""
    if not storage.exists(url):
        return 0
    try:
        with storage.local_copy(url) as path, safe_open(str(path), framework="pt") as tensors:
            theirs, step = json.loads(tensors.metadata()["fit"])
            if theirs != identity:
                return 0
            model.load_state_dict({n: tensors.get_tensor(f"model/{n}") for n in model.state_dict()})
            for name, parameter in model.named_parameters():
                kinds = ("step", "exp_avg", "exp_avg_sq")
                state = {kind: tensors.get_tensor(f"{kind}/{name}") for kind in kinds}
                optimizer.state[parameter].update(state)
    except SafetensorError:
        return 0
    return int(step)


def fit_autoencoder(recipe: Recipe) -> dict[str, Any]:
    """Fit the recipe's autoencoder on its images; returns the report stored in its marker.

    Saved in diffusers' format at `autoencoder.source`, the marker last. A finished one is left
    unchanged; an interrupted fit resumes.

    Raises:
        UserError: the recipe has no autoencoder to fit, the folder holds another one, or the sizes
            are inconsistent.
    """
    section, url = recipe.autoencoder, autoencoder_url(recipe)
    if section.kind != "kl":
        raise UserError(
            f"autoencoder.kind is {section.kind!r}, but only an AutoencoderKL is fitted; set "
            "autoencoder.kind=kl, or go on with `diffit encode`"
        )
    if is_hub_id(section.source):
        raise UserError(
            f"autoencoder.source is {url!r}, a model of the Hugging Face Hub; name a folder to fit "
            "one into, such as autoencoder.source=root:autoencoders/mine"
        )
    if section.downsample.bit_count() != 1:
        raise UserError(
            f"autoencoder.downsample is {section.downsample}, but must be a power of two to fit an "
            "autoencoder"
        )
    keys = {"fit", "latent_channels", "downsample"}
    identity = storage.digest(
        [recipe.image_identity(), section.model_dump(mode="json", include=keys)]
    )
    marker, state = storage.join(url, FITTED), storage.join(url, AUTOENCODER_STATE)
    if storage.exists(marker):
        report: dict[str, Any] = storage.read_json(marker)
        if report["identity"] != identity:
            raise UserError(
                f"{url} holds the autoencoder of another recipe; set autoencoder.source to "
                "another folder, or delete that one"
            )
        storage.remove(state)  # of a killed command
        say(f"autoencoder {storage.display_path(url)} is already fitted")
        return report
    if storage.exists(storage.join(url, "config.json")) and not storage.exists(state):
        raise UserError(
            f"{url} holds an autoencoder that was not fitted here, and will not be overwritten; "
            "set autoencoder.source to another folder"
        )
    storage.require_writable(recipe.storage.root)
    report = {"identity": identity, **_train_autoencoder(recipe, section, url, identity)}
    storage.write_json(marker, report)
    storage.remove(state)
    metrics = f"reconstruction mse {report['reconstruction_mse']:.5f}, scale {report['scale']:.4f}"
    say(f"autoencoder {storage.display_path(url)}: {metrics}")
    return report


def _train_autoencoder(recipe: Recipe, section: Kl, url: str, identity: str) -> dict[str, Any]:
    """Fit the model and write everything but the marker; returns scale and reconstruction error."""
    from diffusers import AutoencoderKL

    fitted, listing = section.fit, list_images(recipe)
    images = read_items(listing.source, listing.items, recipe.data.resolution)
    if images.rejected:
        say(f"Skipped {len(images.rejected):,} unreadable images")
    if not images.kept:
        raise UserError(f"no image in {listing.url} can be read: {images.rejected[0][1]}")
    pixels = to_model_range(images.pixels)
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
        rows = random.integers(len(pixels), size=BATCH_SIZE)
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
    means, decoded = [], []
    with torch.no_grad():
        for start in range(0, len(pixels), 256):
            mean = model.encode(torch.from_numpy(pixels[start : start + 256])).latent_dist.mean
            means.append(mean)
            decoded.append(model.decode(mean).sample)
    reconstruction = torch.cat(decoded).clamp(-1, 1)
    scale = 1.0 / float(torch.cat(means).double().std())
    error = float(((reconstruction.numpy() - pixels) ** 2).mean())
    model.register_to_config(scaling_factor=scale)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            storage.write_bytes(storage.join(url, path.name), path.read_bytes())
    # Images are sorted by class, so evenly spaced ones cover the classes.
    shown = [round(i * (len(pixels) - 1) / (SHOWN - 1)) for i in range(SHOWN)]
    draw_rows(
        images.pixels[shown],
        to_uint8(reconstruction[shown], "round").numpy(),
        [listing.classes[listing.labels[images.kept[number]]] for number in shown],
        f"{storage.display_path(url)}: mse {error:.4g}",
        storage.join(url, "reconstructions.png"),
    )
    return {"steps": fitted.steps, "scale": scale, "reconstruction_mse": error}
