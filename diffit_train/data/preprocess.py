"""From image bytes to pixels, with ADM's center crop; in this process, or in a child of it.

Shapes: H x W pixels, 3 channels, uint8; R the target resolution.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

Array = np.ndarray
Decoder = Callable[[bytes, int], Array]
_FILTERS = threading.Lock()
MAX_RESIZED_PIXELS = 64 * 1024 * 1024
# Pillow knows fifty formats; some of their decoders start programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# A larger file would fill memory before its header could be refused.
MAX_FILE_BYTES = 2**30
_REQUEST, _ANSWER = struct.Struct("<QQ"), struct.Struct("<?Q")
CHILD = (sys.executable, "-m", "diffit_train.data.preprocess")
# An image is given up after this many children.
CHILDREN = 2


class UnreadableImage(Exception):
    """The bytes are not a usable image; the message gives the reason."""


def decode(data: bytes) -> Image.Image:
    """Decode to RGB: the first frame of an animation; alpha is dropped.

    Raises:
        UnreadableImage: empty, truncated, not in one of `FORMATS`, or a decompression bomb.
    """
    if not data:
        raise UnreadableImage("empty file")
    try:
        # The filters of warnings are those of the process. Opening does not decode yet.
        with _FILTERS, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.mode.startswith("I"):
            # 16-bit grayscale: Pillow would clip to 8 bits instead of scaling.
            levels = np.clip(np.asarray(image, dtype=np.int64) >> 8, 0, 255)
            image = Image.fromarray(levels.astype(np.uint8))
        return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"not an image in {', '.join(FORMATS)}") from error
    # For malformed files, Pillow's decoders raise nearly everything.
    except Exception as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def center_crop(image: Image.Image, resolution: int) -> Array:
    """(R, R, 3): box-halved while twice too large, bicubic to the short side, cropped (ADM).

    Raises:
        UnreadableImage: an aspect ratio so extreme that resizing would exhaust memory.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    # A strip of 1 x 60,000 pixels passes the decompression-bomb check, but enlarged it is one.
    if size[0] * size[1] > MAX_RESIZED_PIXELS:
        raise UnreadableImage(f"{image.width}x{image.height} pixels are too narrow to resize")
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - resolution) // 2, (pixels.shape[1] - resolution) // 2
    return pixels[top : top + resolution, left : left + resolution]


def pixels_from(data: bytes, resolution: int) -> Array:
    """Decode and crop: (R, R, 3).

    Raises:
        UnreadableImage: the bytes are not a usable image.
    """
    image = decode(data)
    try:
        return center_crop(image, resolution)
    except (MemoryError, ValueError) as error:
        size = f"{image.width}x{image.height}"
        raise UnreadableImage(f"{size} pixels cannot be resized: {error!r}") from error


def to_model_range(pixels: Array) -> Array:
    """(B, R, R, 3) uint8 to (B, 3, R, R) float32 in [-1, 1]: x / 127.5 - 1."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / 127.5 - 1.0


class IsolatedDecoder:
    """`pixels_from` in a child process: an image that kills its decoder costs only itself.

    For one thread at a time. Slower than decoding in this process, as bytes and pixels are copied.

    Args:
        command: starts the child; see `serve`.
    """

    def __init__(self, command: Sequence[str] = CHILD) -> None:
        self.command = command
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self, data: bytes, resolution: int) -> Array:
        """See `pixels_from`; also raises UnreadableImage if every child died."""
        for _ in range(CHILDREN):
            try:
                return self._ask(data, resolution)
            except (EOFError, BrokenPipeError):
                self.close()
        raise UnreadableImage(f"the process that decoded it died, {CHILDREN} times")

    def _ask(self, data: bytes, resolution: int) -> Array:
        if self._child is None:
            # A task of Ray may have got its modules from a job's own folder.
            path = os.pathsep.join(entry for entry in sys.path if entry)
            self._child = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
            )
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(_REQUEST.pack(resolution, len(data)) + data)
        self._child.stdin.flush()
        usable, size = _ANSWER.unpack(_read(self._child.stdout, _ANSWER.size))
        body = _read(self._child.stdout, size)
        if not usable:
            raise UnreadableImage(body.decode())
        return np.frombuffer(body, np.uint8).reshape(resolution, resolution, 3)

    def close(self) -> None:
        """End the child."""
        if self._child is None:
            return
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            # What was left to be written went with the child.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        self._child = None


def _read(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Decode images until the input ends, as it does when the parent dies.

    A request is resolution, length and bytes of an image; an answer is a flag, a length, and the
    pixels or the reason why there are none.
    """
    while header := requests.read(_REQUEST.size):
        resolution, size = _REQUEST.unpack(header)
        try:
            usable, body = True, pixels_from(_read(requests, size), resolution).tobytes()
        except UnreadableImage as error:
            usable, body = False, str(error).encode(errors="backslashreplace")
        answers.write(_ANSWER.pack(usable, len(body)) + body)
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
