"""From image bytes to pixels, with ADM's center crop.

Shapes: H x W pixels, 3 channels, uint8; R the target resolution.
"""

from __future__ import annotations

import errno
import functools
import io
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

Array = np.ndarray
_FILTERS = threading.Lock()
MAX_RESIZED_PIXELS = 64 * 1024 * 1024
# Pillow knows fifty formats; some of their decoders start programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# A larger file would fill memory before its header could be refused.
MAX_FILE_BYTES = 2**30
# A file's own errors when it is opened: a dangling link, a loop of links, a socket.
_OF_THE_FILE = frozenset(
    {
        errno.ENOENT,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.EACCES,
        errno.EPERM,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENXIO,
    }
)
Decoder = Callable[[bytes, int], Array]


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


@dataclass(frozen=True)
class Images:
    """Indices of readable images, their pixels (n, R, R, 3) uint8, and the rejected images."""

    kept: list[int]
    pixels: Array
    rejected: list[tuple[int, str]]


def read_images(
    reads: Sequence[Callable[[], bytes]],
    resolution: int,
    problems: Sequence[str] = (),
    pool: Executor | None = None,
    ahead: int = 1,
    decoders: int = 1,
    decoder: Decoder | None = None,
) -> Images:
    """Read, decode and crop; unreadable images are rejected with a reason.

    Args:
        reads: for each image, a function that returns its bytes.
        problems: known problem of each image, or ""; an image with a problem is not read.
        pool: threads that read; None: the caller's.
        ahead: number of images that they may be ahead.
        decoders: number of threads that decode at the same time.
        decoder: from bytes and resolution to pixels; None: `pixels_from`.

    Raises:
        OSError: reading failed for a reason unrelated to the image, such as a lost connection.
    """
    gate = threading.Semaphore(decoders)

    def pixels_of(read: Callable[[], bytes]) -> Array:
        data = read()
        with gate:
            return (decoder or pixels_from)(data, resolution)

    kept, pixels = [], []
    rejected = [(position, problem) for position, problem in enumerate(problems) if problem]
    known = {position for position, _ in rejected}
    wanted = [position for position in range(len(reads)) if position not in known]
    jobs = [functools.partial(pixels_of, reads[position]) for position in wanted]
    for position, result in zip(wanted, _in_order(jobs, pool, ahead), strict=True):
        try:
            pixels.append(result())
            kept.append(position)
        except UnreadableImage as error:
            rejected.append((position, str(error)))
        except OSError as error:
            if error.errno not in _OF_THE_FILE and not isinstance(error, FileNotFoundError):
                raise
            rejected.append((position, f"{type(error).__name__}: {error.strerror or error}"))
    shape = (0, resolution, resolution, 3)
    stacked = np.stack(pixels) if pixels else np.zeros(shape, np.uint8)
    return Images(kept, stacked, sorted(rejected))


def _in_order(
    jobs: Sequence[Callable[[], Array]], pool: Executor | None, ahead: int
) -> Iterator[Callable[[], Array]]:
    """For each job a function that returns its result; a pool works on the next `ahead` ones."""
    if pool is None:
        yield from jobs
        return
    waiting: deque[Future[Array]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > ahead:
                yield waiting.popleft().result
        while waiting:
            yield waiting.popleft().result
    finally:
        for future in waiting:
            future.cancel()
