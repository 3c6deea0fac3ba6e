"""A full disk is told by the file that did not fit, what it needs, and what is free."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffit_train.errors import DiffitError

_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
# safetensors raises its own error with this text.
_TEXT = re.compile(r"os error (?:28|122)\b|No space left on device|disk is full")
# NumPy says only this, in items.
_SHORT_WRITE = re.compile(r"(\d+) requested and \d+ written")
_LARGEST_ITEM = 16


class DiskFullError(DiffitError, OSError):
    """A file did not fit on its disk."""


@contextmanager
def told(path: Path, needed: int | None = None, name: str | None = None) -> Iterator[None]:
    """Name the file that the block writes if its disk is full.

    Args:
        path: of the file, which is removed if it does not fit.
        needed: its size in bytes, if that is known before it is written.
        name: for the message, if that is not the path.

    Raises:
        DiskFullError: the disk is full.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_full(error, path):
            raise
        written = held = 0
        if path.is_file():
            status = path.stat()
            written, held = status.st_size, 512 * status.st_blocks
        size = f"more than {written:,}" if needed is None else f"{needed:,}"
        raise full(name or path, f"it needs {size} bytes", _free(path) + held) from error


def is_full(error: BaseException, path: Path) -> bool:
    """Whether an error of writing a file says that its disk is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _ERRNOS
    if short := _SHORT_WRITE.search(str(error)):
        return _free(path) < int(short[1]) * _LARGEST_ITEM
    return _TEXT.search(str(error)) is not None


def full(name: Path | str, need: str, free: int) -> DiskFullError:
    """The error for a file that did not fit."""
    error = DiskFullError(
        f"the disk of {name} is full: {need}, and {free:,} are free; make room, and rerun the same "
        "command to resume"
    )
    error.errno = errno.ENOSPC
    return error


def growing(path: Path) -> DiskFullError:
    """The error for a file that was to grow, and stays as it is."""
    return full(path, "it needs more bytes", _free(path))


def _free(path: Path) -> int:
    """Bytes that may still be written to the disk of a file that may not exist."""
    folder = path if path.exists() else path.parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(os.fspath(folder)).free
