"""Images that are files of a folder or an archive, labeled by their folders or by a list."""

from __future__ import annotations

import os
import stat
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from diffit_train import storage
from diffit_train.data.preprocess import UnreadableImage
from diffit_train.data.sources.base import (
    ImageList,
    Item,
    Location,
    Source,
    cleaned,
    is_image,
    name_problem,
    require_size,
)
from diffit_train.data.sources.labels import (
    DATASET_JSON,
    Labels,
    read_dataset_json,
    read_label_file,
)
from diffit_train.errors import UserError
from diffit_train.progress import say

# Name of the only class, where the images of several folders are one class.
ALL = "all"


class File(NamedTuple):
    """A file of a source: its path there, not yet labeled, and what is wrong with it."""

    path: str
    location: Location
    problem: str = ""


class FileSource(Source):
    """Images by path. `data.labels`, EDM's `dataset.json` among them or folders label them."""

    holds_files = True

    @abstractmethod
    def files(self) -> Iterable[File]:
        """List all files, in any order; `list_images` picks the images."""

    def read_labels(self, location: Location) -> bytes:
        """Return the contents of `dataset.json`."""
        return self.read(location)

    def list_images(self) -> ImageList:
        """List the images by path; see `Source.list_images`."""
        images, dataset_json = [], None
        for file in self.files():
            path = cleaned(file.path)
            if is_image(path):
                images.append(file._replace(path=path, problem=file.problem or name_problem(path)))
            elif path == DATASET_JSON and not file.problem:
                dataset_json = file.location
        files = _named_once(images)
        if self.data.labels is not None:
            return self._labeled(files, read_label_file(self.data.labels, self.data.columns))
        if dataset_json is not None and self.data.num_classes > 1 and files:
            try:
                text = self.read_labels(dataset_json)
            except UnreadableImage as error:
                raise UserError(f"{DATASET_JSON} in {self.url} cannot be read: {error}") from error
            labels = read_dataset_json(text, f"{DATASET_JSON} in {self.url}")
            if labels is not None:
                say(f"Labels from {labels.origin}")
                return self._labeled(files, labels)
        return self._by_folder(files)

    def _by_folder(self, files: Sequence[File]) -> ImageList:
        """The first folder of a path is its class.

        Images that lie in no folder are left out, unless there is one class only. A folder around
        all folders, as archives often have, is no class. A name with a problem creates no class.
        """
        single = self.data.num_classes == 1
        kept = [file for file in files if single or "/" in file.path]
        good = [file.path for file in kept if not file.problem]
        outer = "" if single else _outer_folder(good)

        def class_of(path: str) -> str:
            folder, slash, _ = path.removeprefix(outer).partition("/")
            return folder if slash else ALL

        classes = sorted({class_of(path) for path in good})
        if single and len(classes) > 1:
            classes = [ALL]
        number = {name: label for label, name in enumerate(classes)}
        items = [Item(f.path, number.get(class_of(f.path), 0), f.location, f.problem) for f in kept]
        return ImageList(self, tuple(classes), items)

    def _labeled(self, files: Sequence[File], labels: Labels) -> ImageList:
        """Every image has one label, and every label an image.

        Raises:
            UserError: they do not; names the first of them.
        """
        origin, by_path = labels
        missing = [f.path for f in files if f.path not in by_path and not f.problem]
        if missing:
            raise UserError(
                f"{origin} has no label for {len(missing):,} of the {len(files):,} images in "
                f"{self.url}, such as {missing[0]}; add the labels, or move the images away"
            )
        unknown = list(by_path.keys() - {file.path for file in files})
        if unknown:
            raise UserError(
                f"{origin} labels {len(unknown):,} images that {self.url} does not hold, such as "
                f"{min(unknown)}; paths are relative to the source: fix or remove them"
            )
        names = sorted({name for name in by_path.values() if isinstance(name, str)})
        classes = names or [str(number) for number in range(self.data.num_classes)]
        index = {name: number for number, name in enumerate(names)}
        items = []
        for path, location, problem in files:
            value = by_path.get(path, 0)
            label = index[value] if isinstance(value, str) else value
            if not 0 <= label < len(classes):
                raise UserError(
                    f"{origin}: label {label} of {path} is not between 0 and "
                    f"{self.data.num_classes - 1}; fix it, or raise data.num_classes"
                )
            items.append(Item(path, label, location, problem))
        return ImageList(self, tuple(classes), items)


class Folder(FileSource):
    """A folder, local or remote."""

    kind = "folder"

    def files(self) -> Iterator[File]:
        """List the files below the folder.

        Raises:
            UserError: a folder is not readable.
        """
        if storage.is_local(self.url):
            base = str(storage.local_path(self.url).absolute())
            for path in _local_files(base):
                name = path[len(base) + 1 :]
                yield File(name, Location(name))
        else:
            for name, size in storage.sizes(self.url).items():
                yield File(name, Location(name, size=size))

    def read(self, location: Location) -> bytes:
        """Return a file; see `Source.read`."""
        url = self.path(location.file)
        if location.size >= 0:
            require_size(location.size)
            return storage.read_sized(url, location.size)
        # Without O_NONBLOCK, opening a FIFO waits for a writer; a device may have no end.
        opened = os.open(storage.local_path(url), os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(opened, "rb") as file:
            status = os.fstat(opened)
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage("not a regular file")
            require_size(status.st_size)
            return file.read(status.st_size)


def _local_files(folder: str) -> Iterator[str]:
    """Every file below a folder. Unlike fsspec, follows symbolic links, but not in cycles.

    Raises:
        UserError: a folder is not readable; its images would be missing silently.
    """
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while waiting:
        here, above = waiting.pop()
        try:
            status = Path(here).stat()
            identity = (status.st_dev, status.st_ino)
            entries = [] if identity in above else list(os.scandir(here))
        except OSError as error:
            raise UserError(
                f"folder {here} is not readable ({error.strerror}); fix its permissions, or move "
                "it away"
            ) from error
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself; reading it is an error
                is_folder = False
            if is_folder:
                waiting.append((entry.path, above | {identity}))
            else:
                yield entry.path


def _named_once(files: Iterable[File]) -> list[File]:
    """Sort files by path; that a path occurs twice is a problem."""
    out: list[File] = []
    for file in sorted(files):
        twice = "the name occurs twice" if out and out[-1].path == file.path else ""
        out.append(file._replace(problem=file.problem or twice))
    return out


def _outer_folder(paths: Sequence[str]) -> str:
    """The folder, with its slash, that holds nothing but folders of images and all of them."""
    first = {path.split("/", 1)[0] for path in paths}
    if len(first) != 1 or any(path.count("/") < 2 for path in paths):
        return ""
    return f"{first.pop()}/"
