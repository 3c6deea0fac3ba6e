"""Arrays in safetensors files, and images in .npy files, each with a SHA-256 of its contents.

A safetensors file holds it in its metadata; a .npy file behind the array, where NumPy does not
look.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffit_train import storage

SHA256 = "sha256"
_MARK = b"\nsha256 "
_TRAILER_BYTES = len(_MARK) + 64 + 1


class DamagedArrays(Exception):
    """A file does not hold what was written; the message gives the reason."""


def write_arrays(url: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Commit a safetensors file."""
    rows = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    with storage.atomic_file(url, sum(values.nbytes for values in rows.values())) as path:
        save_file(rows, str(path), metadata={**metadata, SHA256: _digest(rows, metadata)})


def read_arrays(url: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: there is none.
        DamagedArrays: it is damaged.
    """
    try:
        with storage.local_copy(url) as path, safe_open(str(path), framework="np") as file:
            rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except FileNotFoundError:
        raise
    # For types that NumPy lacks, safetensors raises more than its own error.
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArrays(str(error).partition("\n")[0] or type(error).__name__) from error
    recorded = metadata.pop(SHA256, None)
    if recorded is not None and recorded != _digest(rows, metadata):
        raise DamagedArrays("its contents differ from their sha256")
    return rows, metadata


def _digest(rows: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    layout = [[name, str(rows[name].dtype), rows[name].shape] for name in sorted(rows)]
    contents = [storage.sha256_bytes(rows[name].tobytes()) for name in sorted(rows)]
    return storage.digest([dict(metadata), layout, contents])


def write_images(url: str, pixels: np.ndarray) -> None:
    """Commit a .npy file of images, (n, R, R, 3) uint8."""
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(pixels))
    data = out.getvalue()
    trailer = _MARK + storage.sha256_bytes(data).encode() + b"\n"
    storage.write_bytes(url, data + trailer)


def read_images(url: str) -> np.ndarray:
    """The images of a .npy file, (n, R, R, 3) uint8.

    Raises:
        FileNotFoundError: there is none.
        DamagedArrays: it is damaged.
    """
    data = storage.read_bytes(url)
    body, trailer = data[:-_TRAILER_BYTES], data[-_TRAILER_BYTES:]
    if trailer.startswith(_MARK):
        if trailer != _MARK + storage.sha256_bytes(body).encode() + b"\n":
            raise DamagedArrays("its contents differ from their sha256")
    else:
        body = data
    try:
        file = io.BytesIO(body)
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"it has version {version} of NumPy's format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    # The header is a Python literal, whose parser raises many types.
    except Exception as error:
        raise DamagedArrays(f"{type(error).__name__}: {error}".partition("\n")[0]) from error
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
        raise DamagedArrays(f"it is {dtype} of shape {shape}, not images")
    held = len(body) - file.tell()
    if held != int(np.prod(shape, dtype=object)):
        raise DamagedArrays(f"it holds {held:,} bytes, which are not those of shape {shape}")
    return np.frombuffer(body, np.uint8, offset=file.tell()).reshape(shape)
