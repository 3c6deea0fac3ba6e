"""Where a recipe's autoencoder is, and by which name its latents know it. Imports no torch."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data.manifest import MANIFEST, latents_url, load_manifest
from diffit_train.errors import UserError
from diffit_train.progress import say

CONNECT_TIMEOUT_S = 5.0


def autoencoder_url(recipe: Recipe) -> str:
    """The recipe's autoencoder: a folder or a hub id."""
    return storage.resolve(recipe.storage.root, recipe.autoencoder.source)


def is_hub_id(source: str) -> bool:
    """Whether a source is a hub id, NAME/NAME, and not a path or an existing folder."""
    return not (
        "://" in source
        or source.startswith(("/", ".", "~", storage.ROOT_PREFIX))
        or Path(source).exists()
    )


def require_autoencoder(recipe: Recipe) -> None:
    """Refuse an autoencoder that is not fitted yet, or on a hub that cannot be reached.

    Downloading would otherwise fail only on the workers, after many retries.

    Raises:
        UserError: with the way to go on.
    """
    section, url = recipe.autoencoder, autoencoder_url(recipe)
    if section.kind == "identity":
        return
    if is_hub_id(section.source):
        require_from_hub(section.source)
    elif not storage.exists(storage.join(url, "config.json")):
        raise UserError(
            f"autoencoder {url} does not exist; run `diffit fit autoencoder`, or set "
            "autoencoder.source to a folder in diffusers' format or a hub id"
        )


def require_from_hub(name: str) -> None:
    """Refuse a hub id whose files are neither in the cache nor reachable.

    Raises:
        UserError: with the way to go on without network.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    reason = ""
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    elif not any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        url = urlsplit(constants.ENDPOINT)
        try:
            address = (url.hostname or "", url.port or (80 if url.scheme == "http" else 443))
            socket.create_connection(address, CONNECT_TIMEOUT_S).close()
        except OSError as error:
            reason = f"{constants.ENDPOINT} cannot be reached ({error.strerror or error})"
    if reason:
        raise UserError(
            f"autoencoder.source {name} is not in the cache {constants.HF_HUB_CACHE}, and cannot "
            f"be downloaded: {reason}; copy it from a machine with network, and set "
            f"autoencoder.source to that folder or s3:// prefix with autoencoder.alias={name}"
        )


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
