"""Build the model of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffit_train.config import Recipe
from diffit_train.config.model import ARCHITECTURES, CustomModel, ImageModel, UNetModel
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


# Keys of `model` that are no sizes.
_NO_SIZES = {"architecture", "conditional", "attention", "preset", "tmsa"}


def latent_shape(recipe: Recipe) -> Shape:
    """Sizes of the recipe's latent transformer."""
    channels = recipe.autoencoder.latent_channels
    return Shape(
        latent_size=recipe.latent_size,
        latent_channels=channels,
        out_channels=2 * channels if recipe.diffusion.learned_variance else channels,
        num_classes=recipe.data.num_classes if recipe.model.conditional else None,
        **recipe.model.model_dump(exclude=_NO_SIZES),
    )


def image_shape(recipe: Recipe) -> ImageShape:
    """Sizes of the recipe's image-space DiffiT."""
    return ImageShape(**_image_sizes(recipe), **recipe.model.model_dump(exclude=_NO_SIZES))


def unet_shape(recipe: Recipe, model: UNetModel) -> UNetShape:
    """Sizes of the recipe's U-Net."""
    return UNetShape(
        kind=model.architecture,
        attention="tmsa" if model.tmsa else "plain",
        **_image_sizes(recipe),
        **model.model_dump(exclude=_NO_SIZES),
    )


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


def _custom_model(recipe: Recipe, section: CustomModel) -> Backbone:
    """The network of another package.

    Raises:
        UserError: its class cannot be imported, is no `Backbone`, or does not fit the recipe.
    """
    name, shape = section.architecture, network_shape(recipe)
    cls = ARCHITECTURES.load(name)
    if not issubclass(cls, Backbone):
        raise UserError(
            f"model.architecture is {name!r}, but {cls.__name__} does not derive from "
            "diffit_train.Backbone; docs/extend.md shows one that does"
        )
    model = ARCHITECTURES.make(name, section.options, shape)
    if getattr(model, "blocks", None) is None or tuple(model.input_shape) != shape.input_shape:
        raise UserError(
            f"model.architecture is {name!r}, but its {cls.__name__} has "
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
    section = recipe.model
    if isinstance(section, CustomModel):
        return _custom_model(recipe, section)
    if isinstance(section, UNetModel):
        return UNet(unet_shape(recipe, section))
    if isinstance(section, ImageModel):
        return ImageDiffiT(image_shape(recipe))
    return LATENT[section.architecture](latent_shape(recipe))
