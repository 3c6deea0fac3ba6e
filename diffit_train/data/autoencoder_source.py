"""Where a recipe's autoencoder is. Imports no torch."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.errors import UserError

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
