"""Where pictures come from: a folder with one subfolder for each class, local or remote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


@dataclass(frozen=True)
class PictureList:
    """Pictures in sorted order: paths below `url`, and their labels, indices into `classes`."""

    url: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> str:
        """SHA-256 of the listing: it tells whether pictures came or went."""
        return storage.digest([list(self.paths), list(self.labels)])


def list_pictures(recipe: Recipe) -> PictureList:
    """The pictures of `data.source`; the classes are its subfolders, sorted by name.

    Raises:
        UserError: the folder is missing or empty, or its classes are not the recipe's in number.
    """
    url = storage.resolve(recipe.storage.root, recipe.data.source)
    fs, base = storage.filesystem(url)
    if not fs.isdir(base):
        raise UserError(f"data.source {url} is not a folder; give one with a subfolder a class")
    base = base.rstrip("/")
    files = _local_files(base) if storage.is_local(url) else fs.find(base)
    found = (str(path)[len(base) + 1 :] for path in files)
    paths = sorted(p for p in found if "/" in p and PurePosixPath(p).suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(
            f"data.source {url} holds no pictures; they are looked for in subfolders, one a "
            f"class, with endings {', '.join(sorted(SUFFIXES))}"
        )
    names = [path.split("/", 1)[0] for path in paths]
    classes = tuple(sorted(set(names)))
    if len(classes) != recipe.data.num_classes:
        raise UserError(
            f"data.source {url} has {len(classes)} class folders, but data.num_classes is "
            f"{recipe.data.num_classes}; set data.num_classes={len(classes)} or mend the folder"
        )
    number = {name: label for label, name in enumerate(classes)}
    return PictureList(url, classes, tuple(paths), tuple(number[name] for name in names))


def _local_files(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Every file below a folder. Links are followed, which fsspec does not; circles are not."""
    above |= {os.path.realpath(folder)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry.path
            elif os.path.realpath(entry.path) not in above:
                yield from _local_files(entry.path, above)
