"""What a format of images provides: a listing in a fixed order, and the bytes of an image.

A format is a class derived from `Source`; nothing else knows where it keeps images and labels.
"""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, ClassVar, NamedTuple, TypeVar

from diffit_train import storage
from diffit_train.config.data import Data
from diffit_train.data.preprocess import MAX_FILE_BYTES, UnreadableImage

T = TypeVar("T")
# Files of a source that are listed at once; each holds what its file system reads ahead.
LISTERS = 8
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
# No label, or name, needs more.
MAX_TEXT_BYTES = 2**20


class Location(NamedTuple):
    """Location of an image's bytes, as its source understands it.

    `file` is a path relative to the source's URL, empty if the source is that file. In a tar,
    `start` and `size` are bytes; in a zip, the position of the member's header and the bytes of its
    compressed contents; in parquet, the row and the row group; -1 for a whole file, whose size is
    given where the listing has it, as on S3.
    """

    file: str
    start: int = -1
    size: int = -1


class Item(NamedTuple):
    """An image: its display name, label and location, and what is wrong with it, if anything."""

    name: str
    label: int
    location: Location
    problem: str = ""


class Source(ABC):
    """Images of a format at a URL. It is pickled to the tasks that read them.

    Args:
        url: folder, file or pattern of files.
        data: the recipe's section, with `data.labels` resolved.

    Attributes:
        kind: the format, as in `data.format`.
        holds_files: whether folders or `data.labels` label its images.
        grouped: whether images with the same `file` and `size` of location are read at once.
    """

    kind: ClassVar[str]
    holds_files: ClassVar[bool] = False
    grouped: ClassVar[bool] = False

    def __init__(self, url: str, data: Data) -> None:
        self.url, self.data = url, data

    @abstractmethod
    def list_images(self) -> ImageList:
        """List the images.

        An image with a problem (a label out of range, a duplicate name) keeps its index.

        Raises:
            UserError: the source cannot be used.
        """

    @abstractmethod
    def read(self, location: Location) -> bytes:
        """Return the file of an image; threads call it at the same time.

        Raises:
            OSError: the storage cannot be read.
            UnreadableImage: the image is damaged, or too large.
        """

    def open(self, items: Sequence[Item]) -> Callable[[Location], bytes]:
        """Return `read` for these images, each of which is read once."""
        del items
        return self.read

    def exists(self) -> bool:
        """Whether this machine can see the source."""
        return storage.exists(self.url)

    def path(self, file: str) -> str:
        """URL of a location's `file`."""
        return storage.join(self.url, file) if file else self.url


class RecordSource(Source):
    """A file, or several files of a folder, that hold images with their labels."""

    ending: ClassVar[str]

    def __init__(self, url: str, data: Data) -> None:
        folder, self.pattern = split_pattern(url)
        super().__init__(folder, data)

    def files(self) -> Sequence[str]:
        """Names of the files in their order; "" for the source itself."""
        if self.pattern is None and not storage.is_folder(self.url):
            return [""]
        names = [name for name in storage.list_names(self.url) if name.endswith(self.ending)]
        return names if self.pattern is None else fnmatch.filter(names, self.pattern)

    def each(self, listed: Callable[[str], T]) -> Iterator[T]:
        """List several files at the same time; yields in their order."""
        with ThreadPoolExecutor(LISTERS, thread_name_prefix="list") as pool:
            yield from pool.map(listed, self.files())


@dataclass(frozen=True)
class ImageList:
    """All images of a source, in order; labels are indices into `classes`."""

    source: Source
    classes: tuple[str, ...]
    items: list[Item] = field(repr=False)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def url(self) -> str:
        """Folder or file of the images."""
        return self.source.url

    @property
    def kind(self) -> str:
        """Format of the source."""
        return self.source.kind

    @property
    def paths(self) -> tuple[str, ...]:
        """Image names."""
        return tuple(item.name for item in self.items)

    @property
    def labels(self) -> tuple[int, ...]:
        """Image labels."""
        return tuple(item.label for item in self.items)


def split_pattern(url: str) -> tuple[str, str | None]:
    """Split `FOLDER/train-*.parquet` into folder and pattern; None if it is no pattern."""
    name = url.rstrip("/").rpartition("/")[2]
    if not {"*", "?"} & set(name) or "/" not in url or storage.exists(url):
        return url, None
    return storage.parent(url), name


@contextmanager
def open_archive(url: str, read_ahead: bool = True) -> Iterator[IO[bytes]]:
    """Open a file of a source for listing; see `storage.open_file`."""
    storage.require_regular(url)
    with storage.open_file(url, read_ahead) as file:
        yield file


def is_image(path: str) -> bool:
    """Whether a file's name has the ending of an image."""
    return PurePosixPath(path).suffix.lower() in SUFFIXES


def cleaned(name: str) -> str:
    """Remove the `./` that some tools put before a path."""
    return name.removeprefix("./")


def name_problem(name: str) -> str:
    """What is wrong with a member's name, or "". (No file is ever written under it.)"""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts:
        return "the name points outside the archive"
    return ""


def labeled_item(
    name: str, label: int, classes: int, location: Location, problem: str = ""
) -> Item:
    """An item; a label out of range is a problem."""
    if 0 <= label < classes:
        return Item(name, label, location, problem)
    problem = problem or f"label {label} is not between 0 and {classes - 1}"
    return Item(name, 0, location, problem)


def numbered(classes: int) -> tuple[str, ...]:
    """Names of classes that have none."""
    return tuple(str(number) for number in range(classes))


def require_size(size: int) -> None:
    """Refuse a file that is too large for an image.

    Raises:
        UnreadableImage: it is.
    """
    if size > MAX_FILE_BYTES:
        raise UnreadableImage(
            f"{size:,} bytes are more than the {MAX_FILE_BYTES:,} of the largest image"
        )


def unique(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items with unique names: repeated names get a suffix."""
    seen: dict[str, int] = {}
    for item in items:
        again = seen[item.name] = seen.get(item.name, -1) + 1
        yield item._replace(name=f"{item.name} (again {again})") if again else item
