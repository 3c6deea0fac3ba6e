"""From a recipe to its model."""

from __future__ import annotations

from diffit_train.config import Recipe
from diffit_train.models.latent import LatentDiffiT


def build_model(recipe: Recipe) -> LatentDiffiT:
    """The recipe's model, initialised from torch's current random state."""
    model = recipe.model
    return LatentDiffiT(
        latent_size=recipe.latent_size,
        latent_channels=recipe.autoencoder.latent_channels,
        num_classes=recipe.data.num_classes,
        patch_size=model.patch_size,
        hidden_size=model.hidden_size,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
        label_init_std=model.label_init_std,
    )
