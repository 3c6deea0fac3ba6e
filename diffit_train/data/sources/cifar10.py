"""CIFAR-10's own archive, binary version: `cifar-10-binary.tar.gz`, or its unpacked folder.

A record is a byte with the label and 3,072 bytes of a 32x32 image: red, green, blue, row by row.
The 50,000 training images are read; the Python version of the archive holds pickles, which are not.
"""

from __future__ import annotations

import functools
import io
import tarfile
import threading
import zlib
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from diffit_train import storage
from diffit_train.data.sources.base import ImageList, Location, Source, labeled_item
from diffit_train.errors import UserError

SIDE, RECORD = 32, 1 + 3 * 32 * 32
BATCHES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
CLASS_NAMES = "batches.meta.txt"
# Of an archive and of a file in it; five times theirs.
MAX_ARCHIVE_BYTES, MAX_FILE_BYTES = 2**30, 2**27


class Cifar10(Source):
    """The archive or its folder; a location is a file and a row."""

    kind = "cifar10"

    def list_images(self) -> ImageList:
        """List the training images in the order of the files; see `Source.list_images`."""
        files = _files(self.url)
        classes = files[CLASS_NAMES].decode("ascii", "replace").split()
        items = []
        for name in BATCHES:
            labels = np.frombuffer(files[name], np.uint8).reshape(-1, RECORD)[:, 0]
            for row, label in enumerate(labels.tolist()):
                where = Location(name, row)
                items.append(labeled_item(f"{name}:{row}", label, len(classes), where))
        return ImageList(self, tuple(classes), items)

    def read(self, location: Location) -> bytes:
        """Return an image in the BMP format, which decoders know."""
        file, row, _ = location
        with _reading:
            planes = np.frombuffer(_files(self.url)[file], np.uint8, RECORD - 1, row * RECORD + 1)
        pixels = planes.reshape(3, SIDE, SIDE).transpose(1, 2, 0)
        out = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(out, "BMP")
        return out.getvalue()


def is_archive(url: str) -> bool:
    """Whether a source looks like it: a .tar.gz, or a folder with the first batch."""
    if storage.is_folder(url):
        return bool({BATCHES[0], "data_batch_1"} & set(storage.list_names(url)))
    return url.endswith((".tar.gz", ".tgz"))


# So that threads do not all read the archive at once.
_reading = threading.Lock()


# One archive of 180 MB; the images of a shard lie all over it.
@functools.lru_cache(maxsize=1)
def _files(url: str) -> dict[str, bytes]:
    """The files of the archive that are read, by name.

    Raises:
        UserError: it is not the binary version, or damaged.
    """
    wanted = (*BATCHES, CLASS_NAMES)
    if storage.is_folder(url):
        names = storage.list_names(url)
        files = {n: _read_limited(storage.join(url, n)) for n in names if n in wanted}
    else:
        names, files = [], {}
        try:
            with tarfile.open(fileobj=io.BytesIO(_read_limited(url)), mode="r:*") as tar:
                for member in tar:
                    name = PurePosixPath(member.name).name
                    names.append(name)
                    if not 0 <= member.size <= MAX_FILE_BYTES:
                        raise tarfile.ReadError(f"{name} has {member.size:,} bytes")
                    content = tar.extractfile(member) if name in wanted else None
                    if content is not None:
                        files[name] = content.read()
        except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
            raise UserError(f"{url} is not a complete tar ({error}); download it again") from error
    if "data_batch_1" in names:
        raise UserError(
            f"{url} is the Python version of CIFAR-10, whose pickles could run code; download "
            "cifar-10-binary.tar.gz instead"
        )
    missing = [name for name in wanted if name not in files]
    if missing:
        raise UserError(
            f"{url} lacks {missing[0]}; it must be cifar-10-binary.tar.gz, or its unpacked folder"
        )
    for name in BATCHES:
        if not files[name] or len(files[name]) % RECORD:
            raise UserError(
                f"{name} in {url} has {len(files[name]):,} bytes, not a multiple of {RECORD:,}; "
                "download it again"
            )
    return files


def _read_limited(url: str) -> bytes:
    storage.require_regular(url)
    size = storage.size_bytes(url)
    if size > MAX_ARCHIVE_BYTES:
        raise UserError(f"{url} has {size:,} bytes; it cannot be CIFAR-10's archive")
    return storage.read_bytes(url)
