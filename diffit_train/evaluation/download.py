"""Files from the web."""

from __future__ import annotations

import math
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from diffit_train import storage
from diffit_train.progress import Progress

_DOWNLOAD_BYTES = 1 << 20


def download(url: str, target: Path, title: str, expected_bytes: int | None = None) -> None:
    """Download `url` to `target`, showing rate and time left.

    The caller commits the target; after an error it is incomplete.

    Args:
        title: title of the progress display.
        expected_bytes: total for the progress display if the server does not announce it.

    Raises:
        OSError, http.client.HTTPException: `url` cannot be reached, or the transfer broke off.
    """

    def is_silence(error: BaseException) -> bool:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return isinstance(reason, TimeoutError)

    request = urllib.request.Request(url, headers={"User-Agent": "diffit"})
    seconds = storage.attempt_s()
    with (
        storage.retry(str(urlsplit(url).hostname), is_silence)(
            lambda: urllib.request.urlopen(request, timeout=seconds)
        ) as answer,
        target.open("wb") as file,
    ):
        announced = answer.headers.get("Content-Length")
        total = int(announced) if announced else expected_bytes or 0
        with Progress(title, math.ceil(total / 1e6), "MB") as progress:
            while data := answer.read(_DOWNLOAD_BYTES):
                file.write(data)
                progress.update(math.ceil(file.tell() / 1e6))
        # A connection closed early ends the stream without an error.
        if announced and file.tell() != total:
            raise OSError(f"the transfer broke off after {file.tell():,} of {total:,} bytes")
