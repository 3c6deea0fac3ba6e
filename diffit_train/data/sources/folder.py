"""Images in a folder, at any depth."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from diffit_train import storage
from diffit_train.data.sources.labels import DATASET_JSON
from diffit_train.data.sources.listing import Files, Location, Row, is_image
from diffit_train.errors import UserError


def list_folder(url: str) -> Files:
    """The images below a folder, sorted by path.

    Raises:
        UserError: a folder is not readable.
    """
    if storage.is_local(url):
        base = str(storage.local_path(url).absolute())
        sizes = {path[len(base) + 1 :]: -1 for path in _local_files(base)}
    else:
        sizes = storage.sizes(url)
    rows = [Row(path, Location(path, size=sizes[path])) for path in sorted(sizes) if is_image(path)]
    if DATASET_JSON not in sizes:
        return Files(rows)
    return Files(rows, functools.partial(storage.read_bytes, storage.join(url, DATASET_JSON)))


def _local_files(folder: str) -> Iterator[str]:
    """Every file below a folder. Unlike fsspec, follows symbolic links, but not in cycles.

    Raises:
        UserError: a folder is not readable; its images would be missing silently.
    """
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while waiting:
        here, above = waiting.pop()
        try:
            found = Path(here).stat()
            identity = (found.st_dev, found.st_ino)
            entries = [] if identity in above else list(os.scandir(here))
        except OSError as error:
            raise UserError(
                f"folder {here} is not readable ({error.strerror}); fix its permissions, or move "
                "it away"
            ) from error
        above |= {identity}
        for entry in entries:
            if _is_folder(entry):
                waiting.append((entry.path, above))
            else:
                yield entry.path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; reading it says so
        return False
