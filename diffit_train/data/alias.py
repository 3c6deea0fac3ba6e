"""Copies of an autoencoder, which count as the one that latents were encoded with."""

from __future__ import annotations

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data.manifest import MANIFEST, latents_url, load_manifest
from diffit_train.progress import say


def resolve_alias(recipe: Recipe) -> Recipe:
    """Set `autoencoder.alias` if the recipe's weights are a copy of those of its latents.

    Latents, and with them runs and evaluations, are known by the source of their autoencoder. Where
    a recipe differs from that of the latents under its `data.name` in the source alone, and the
    weights there have the same hash, it is the same recipe.
    """
    url, section = latents_url(recipe), recipe.autoencoder
    known = section.kind == "identity" or section.alias
    if known or not storage.exists(storage.join(url, MANIFEST)):
        return recipe
    manifest = load_manifest(url)
    section = section.model_copy(update={"alias": manifest.autoencoder})
    same = recipe.model_copy(update={"autoencoder": section})
    if recipe.encode_hash() == manifest.recipe_hash or same.encode_hash() != manifest.recipe_hash:
        return recipe
    # Imported only where it is needed, as torch takes seconds.
    import torch

    from diffit_train.data.autoencoder import load_autoencoder

    loaded = load_autoencoder(recipe, torch.device("cpu"))
    if loaded.weight_hash() != manifest.autoencoder_sha256:
        return recipe
    say(f"{recipe.autoencoder.source} holds the weights of {manifest.autoencoder}")
    return same
