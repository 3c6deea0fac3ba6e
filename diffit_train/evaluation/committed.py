"""Files that a record commits: it is written last, next to them, and holds the SHA-256 of each.

Arrays are safetensors files, images .npy files. Without its record a file counts as not written.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from pydantic import ValidationError

from diffit_train import storage
from diffit_train.errors import DiffitError


class Committed(storage.Record):
    """A record.

    Attributes:
        files: SHA-256 of the files next to it, by name.
        about: what their writer notes of them.
    """

    files: dict[str, str]
    about: dict[str, str]


class DamagedFile(DiffitError):
    """A file is missing, or is not what its record says."""

    def __init__(self, url: str, what: str) -> None:
        super().__init__(
            f"{url} is damaged: {what}; `diffit verify {storage.parent(url)} --remove` removes it, "
            "then run the same command again"
        )
        self.what = what


def commit(record: str, files: Mapping[str, bytes], about: Mapping[str, str]) -> None:
    """Write files by name, and last the record that commits them, next to it."""
    for name, data in files.items():
        storage.write_bytes(storage.join(storage.parent(record), name), data)
    hashes = {name: storage.sha256_bytes(data) for name, data in files.items()}
    write_record(record, Committed(files=hashes, about=dict(about)))


def write_record(url: str, record: Committed) -> None:
    """Write the record of files that are there."""
    storage.write_text(url, record.model_dump_json(indent=1))


def find_record(url: str) -> Committed | None:
    """A record; None if there is none.

    Raises:
        DamagedFile: it is not a record.
    """
    try:
        return Committed.model_validate_json(storage.read_bytes(url))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DamagedFile(url, "it is not a record") from error


def read_record(url: str) -> Committed:
    """A record.

    Raises:
        DamagedFile: it is missing, or not a record.
    """
    record = find_record(url)
    if record is None:
        raise DamagedFile(url, "it is missing")
    return record


def read_committed(url: str, record: Committed) -> bytes:
    """A file that a record commits.

    Raises:
        DamagedFile: it is missing, or differs from its checksum.
    """
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise DamagedFile(url, "it is missing") from error
    if storage.sha256_bytes(data) != record.files.get(url.rsplit("/", 1)[-1]):
        raise DamagedFile(url, "it differs from its recorded sha256")
    return data


def images_bytes(pixels: np.ndarray) -> bytes:
    """A .npy file of images, (n, R, R, 3) uint8."""
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(pixels))
    return out.getvalue()


def read_images(url: str, record: Committed) -> np.ndarray:
    """The images of a .npy file; errors as `read_committed`."""
    images: np.ndarray = np.load(io.BytesIO(read_committed(url, record)), allow_pickle=False)
    return images
