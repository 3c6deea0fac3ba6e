"""Build the model of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffit_train.config import Recipe
from diffit_train.config.model import ARCHITECTURES, UNET_ARCHITECTURES
from diffit_train.config.train import AUGMENT_LABELS
from diffit_train.errors import UserError
from diffit_train.models.backbone import Backbone, NetworkShape
from diffit_train.models.dit import DiT, DiTWithTMSA
from diffit_train.models.image import ImageDiffiT, ImageShape
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.models.unet import UNet, UNetShape

LATENT: dict[str, Callable[[Shape], Backbone]] = {
    "diffit": LatentDiffiT,
    "dit": DiT,
    "dit_tmsa": DiTWithTMSA,
}


def latent_shape(recipe: Recipe) -> Shape:
    """Sizes of the recipe's latent transformer."""
    model, channels = recipe.model, recipe.autoencoder.latent_channels
    return Shape(
        latent_size=recipe.latent_size,
        latent_channels=channels,
        out_channels=2 * channels if recipe.diffusion.learned_variance else channels,
        num_classes=recipe.data.num_classes if model.conditional else None,
        patch_size=model.patch_size,
        hidden_size=model.hidden_size,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
        label_init_std=model.label_init_std,
        position_side=model.position_side,
    )


def image_shape(recipe: Recipe) -> ImageShape:
    """Sizes of the recipe's image-space DiffiT."""
    model = recipe.model
    return ImageShape(mlp_ratio=model.mlp_ratio, **_image_sizes(recipe), **model.image.model_dump())


def unet_shape(recipe: Recipe) -> UNetShape:
    """Sizes of the recipe's U-Net."""
    model = recipe.model
    kind: Any = model.architecture
    return UNetShape(kind=kind, **_image_sizes(recipe), **model.unet.model_dump())


def _image_sizes(recipe: Recipe) -> dict[str, Any]:
    """What all networks on pixels have."""
    channels = recipe.autoencoder.latent_channels
    return {
        "resolution": recipe.data.resolution,
        "image_channels": channels,
        "out_channels": 2 * channels if recipe.diffusion.learned_variance else channels,
        "num_classes": recipe.data.num_classes if recipe.model.conditional else None,
        "augment_labels": AUGMENT_LABELS if recipe.train.augment else 0,
    }


def network_shape(recipe: Recipe) -> NetworkShape:
    """What the recipe's network gets and returns."""
    channels, size = recipe.autoencoder.latent_channels, recipe.latent_size
    return NetworkShape(
        input_shape=(channels, size, size),
        out_channels=2 * channels if recipe.diffusion.learned_variance else channels,
        num_classes=recipe.data.num_classes if recipe.model.conditional else None,
    )


def _plugged_model(recipe: Recipe) -> Backbone:
    """The network of another package.

    Raises:
        UserError: its class cannot be imported, is no `Backbone`, or does not fit the recipe.
    """
    name, shape = recipe.model.architecture, network_shape(recipe)
    found = ARCHITECTURES.load(name)
    if not issubclass(found, Backbone):
        raise UserError(
            f"model.architecture is {name!r}, but {found.__name__} does not derive from "
            "diffit_train.Backbone; docs/extend.md shows one that does"
        )
    model = ARCHITECTURES.make(name, recipe.model.options, shape)
    if getattr(model, "blocks", None) is None or tuple(model.input_shape) != shape.input_shape:
        raise UserError(
            f"model.architecture is {name!r}, but its {found.__name__} has "
            f"input_shape {getattr(model, 'input_shape', None)} and "
            f"{'no' if getattr(model, 'blocks', None) is None else 'its'} blocks; it must set "
            f"`blocks`, a ModuleList, and have input_shape {shape.input_shape}"
        )
    stored = model.state_dict().keys() - dict(model.named_parameters()).keys()
    if stored:
        raise UserError(
            f"model.architecture is {name!r}, but checkpoints hold parameters only, and its buffer "
            f"{min(stored)} would have to be stored; register it with persistent=False"
        )
    return model


def build_model(recipe: Recipe) -> Backbone:
    """The recipe's model, initialized from torch's current random state.

    Raises:
        UserError: it is another package's, and cannot be made.
    """
    if recipe.model.plugged:
        return _plugged_model(recipe)
    if recipe.model.architecture in UNET_ARCHITECTURES:
        return UNet(unet_shape(recipe))
    if recipe.model.on_pixels:
        return ImageDiffiT(image_shape(recipe))
    return LATENT[recipe.model.architecture](latent_shape(recipe))
