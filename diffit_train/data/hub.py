"""Whether an autoencoder on the Hugging Face Hub can be had, without downloading it."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from diffit_train.errors import UserError

CONNECT_TIMEOUT_S = 5.0


def require_from_hub(name: str) -> None:
    """Refuse a hub id whose files are neither in the cache nor reachable.

    Downloading would otherwise fail only on the workers, after many retries.

    Raises:
        UserError: says how to go on without network.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    elif any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return  # only the download can tell
    else:
        reason = _unreachable(constants.ENDPOINT)
    if reason:
        raise UserError(
            f"autoencoder.source {name} is not in the cache {constants.HF_HUB_CACHE}, and cannot "
            f"be downloaded: {reason}; copy it from a machine with network, and set "
            f"autoencoder.source to that folder or s3:// prefix with autoencoder.alias={name}"
        )


def _unreachable(endpoint: str) -> str:
    """Why the hub cannot be reached; "" if it can."""
    url = urlsplit(endpoint)
    try:
        address = (url.hostname or "", url.port or (80 if url.scheme == "http" else 443))
        socket.create_connection(address, CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return f"{endpoint} cannot be reached ({error.strerror or error})"
    return ""
