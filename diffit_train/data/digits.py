"""scikit-learn's handwritten digits as an image folder: real data that needs no download."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from diffit_train import storage
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import Progress, say

SIZES = (16, 32)
DIGITS_MARKER = "dataset.json"


def write_digits(folder: str, size: int = 16) -> int:
    """Write the 1,797 8x8 digits, enlarged to `size`, as FOLDER/CLASS/NUMBER.png.

    A complete folder is left unchanged; an incomplete one is completed.

    Raises:
        UserError: a size other than 16 or 32, a folder with other files, no scikit-learn.
    """
    if size not in SIZES:
        raise UserError(f"--size is {size}, but must be one of {SIZES}")
    marker = storage.join(folder, DIGITS_MARKER)
    if storage.exists(marker):
        written = storage.read_json(marker)
        if written.get("name") != "digits" or written.get("size") != size:
            raise UserError(
                f"{folder} holds {written.get('name')!r} of size {written.get('size')}, not digits "
                f"of size {size}; choose another folder"
            )
        say(f"digits are already in {folder}")
        return int(written["images"])
    digits, labels = _load_digits()
    images = {
        f"{label}/{number:04d}.png": _png(image, size)
        for number, (image, label) in enumerate(zip(digits, labels, strict=True))
    }
    there = storage.sizes(folder) if storage.exists(folder) else {}
    for path, length in there.items():
        if path not in images or len(images[path]) != length:
            raise UserError(f"{folder} holds other files ({path!r}); choose an empty folder")
    missing = sorted(images.keys() - there.keys())
    with Progress("digits", len(images), "images", done=len(there)) as progress:
        for number, path in enumerate(missing, len(there) + 1):
            storage.write_bytes(storage.join(folder, path), images[path])
            progress.update(number)
    storage.write_json(marker, {"name": "digits", "images": len(images), "size": size})
    say(f"wrote {len(images):,} digits of {size}x{size} pixels to {folder}")
    return len(images)


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
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
