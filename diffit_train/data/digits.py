"""scikit-learn's handwritten digits as a picture folder: real data that needs no download."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from diffit_train import storage
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import Progress, say

SIZES = (16, 32)
MARKER = "dataset.json"


def write_digits(folder: str, size: int = 16) -> int:
    """Write the 1,797 digits, 8x8 enlarged to `size`, as FOLDER/CLASS/NUMBER.png.

    A complete folder is left alone, a half-written one completed.

    Raises:
        UserError: another size than 16 or 32, a folder of other pictures, no scikit-learn.
    """
    if size not in SIZES:
        raise UserError(f"--size is {size}, but must be one of {SIZES}")
    marker = storage.join(folder, MARKER)
    if storage.exists(marker):
        return _check(folder, storage.read_json(marker), size)
    foreign = set(storage.list_names(folder)) - {str(digit) for digit in range(10)}
    if foreign:
        raise UserError(
            f"{folder} holds other things ({sorted(foreign)[0]!r}); give an empty folder"
        )
    images, labels = _load()
    with Progress("digits", len(images), "pictures") as progress:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            url = storage.join(folder, str(label), f"{number:04d}.png")
            storage.write_bytes(url, _png(image, size))
            progress.update(number + 1)
    storage.write_json(marker, {"name": "digits", "pictures": len(images), "size": size})
    say(f"wrote {len(images):,} digits of {size}x{size} pixels to {folder}")
    return len(images)


def _check(folder: str, marker: dict[str, Any], size: int) -> int:
    if marker.get("name") != "digits" or marker.get("size") != size:
        raise UserError(
            f"{folder} holds {marker.get('name')!r} of size {marker.get('size')}, not digits of "
            f"size {size}; give another folder"
        )
    say(f"digits are in {folder} already")
    return int(marker["pictures"])


def _load() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the digits come from scikit-learn, which is not installed; "
            "run `pip install 'diffit-train[demo]'`"
        ) from error
    digits: Any = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    if images.shape != (1797, 8, 8):
        raise DiffitError(f"scikit-learn's digits have shape {images.shape}, not (1797, 8, 8)")
    return images, digits.target


def _png(image: np.ndarray, size: int) -> bytes:
    out = io.BytesIO()
    enlarged = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    enlarged.convert("RGB").save(out, format="PNG")
    return out.getvalue()
