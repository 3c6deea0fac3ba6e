"""A listing: the images of a source in a fixed order, each with its label and location."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal, NamedTuple, TypeVar

from diffit_train import storage
from diffit_train.config.data import Columns

T = TypeVar("T")
# Files of a source that are listed at once; each holds what its file system reads ahead.
LISTERS = 8
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
# No label, or name, needs more.
MAX_TEXT_BYTES = 2**20
SourceKind = Literal["folder", "tar", "zip", "ilsvrc", "webdataset", "parquet", "cifar10"]
# Name of the only class, where the images of several folders are one class.
ALL = "all"
# Column of parquet that holds the images, unless the recipe names another.
IMAGE_COLUMN: str = Columns().image


class Location(NamedTuple):
    """Location of an image's bytes.

    `file` is a path relative to the source's URL, empty if the source is that file. In a tar,
    `start` and `size` are bytes; in a zip, the position of the member's header and the bytes of its
    compressed contents; in parquet, the row and the row group; -1 for a whole file, whose size is
    given where the listing says it, as on S3.
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


class Source(NamedTuple):
    """What a reader needs besides locations; it is sent to tasks on other nodes."""

    url: str
    kind: SourceKind
    image_column: str = IMAGE_COLUMN


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
    def kind(self) -> SourceKind:
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

    def digest(self) -> str:
        """SHA-256 of the listing; changes when images are added or removed."""
        column = self.source.image_column
        return items_digest(self.items, () if column == IMAGE_COLUMN else (column,))


def items_digest(items: Iterable[Item], more: Sequence[str] = ()) -> str:
    """SHA-256 of names and labels, in order, and of what else tells the images."""
    pairs = [(item.name, item.label) for item in items]
    return storage.digest([[name for name, _ in pairs], [label for _, label in pairs], *more])


class Found(NamedTuple):
    """Class names and images of a source."""

    classes: list[str]
    items: list[Item]


class Row(NamedTuple):
    """An image of a source that holds files: its path there, not yet labeled."""

    path: str
    location: Location
    problem: str = ""


class Files(NamedTuple):
    """The images of a source that holds files.

    `dataset_json` reads EDM's list of labels that lies among them; None if there is none.
    """

    rows: list[Row]
    dataset_json: Callable[[], bytes] | None = None


def is_image(path: str) -> bool:
    """Whether a file's name says that it is an image."""
    return PurePosixPath(path).suffix.lower() in SUFFIXES


def cleaned(name: str) -> str:
    """A path without the `./` that some tools put before it."""
    return name.removeprefix("./")


def name_problem(name: str) -> str:
    """What is wrong with a member's name, or "". (No file is ever written under it.)"""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts:
        return "the name points outside the archive"
    return ""


def named_once(rows: Iterable[Row]) -> list[Row]:
    """The rows sorted by path; that a path occurs twice is a problem."""
    out: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.path, row.location)):
        twice = "the name occurs twice" if out and out[-1].path == row.path else ""
        out.append(row._replace(problem=row.problem or twice))
    return out


def by_folder(rows: Sequence[Row], num_classes: int) -> Found:
    """Classes and items of sorted rows; the first folder of a path is its class.

    Images that lie in no folder are left out, unless there is one class only. A folder around all
    folders, as archives often have, is no class. A name with a problem creates no class.
    """
    kept = [row for row in rows if "/" in row.path or num_classes == 1]
    good = [row.path for row in kept if not row.problem]
    outer = _outer_folder(good) if num_classes > 1 else ""
    folder = {row.path: _first_folder(row.path.removeprefix(outer)) for row in kept}
    classes = sorted({folder[path] for path in good})
    if num_classes == 1 and len(classes) > 1:
        classes = [ALL]
    number = {name: label for label, name in enumerate(classes)}
    return Found(
        classes,
        [Item(row.path, number.get(folder[row.path], 0), *row[1:]) for row in kept],
    )


def _first_folder(path: str) -> str:
    return path.split("/", 1)[0] if "/" in path else ALL


def _outer_folder(paths: Sequence[str]) -> str:
    """The folder, with its slash, that holds nothing but folders of images and all of them."""
    first = {path.split("/", 1)[0] for path in paths}
    if len(first) != 1 or any(path.count("/") < 2 for path in paths):
        return ""
    return f"{first.pop()}/"


def usable_label(
    label: int, num_classes: int, location: Location, problem: str = ""
) -> tuple[int, Location, str]:
    """Label, location and problem of an item; a label out of range is a problem."""
    if 0 <= label < num_classes:
        return label, location, problem
    return 0, location, problem or f"label {label} is not between 0 and {num_classes - 1}"


def unique(items: Iterable[Item]) -> Iterator[Item]:
    """Items with unique names: repeated names get a suffix."""
    seen: Counter[str] = Counter()
    for item in items:
        seen[item.name] += 1
        again = seen[item.name] - 1
        yield item._replace(name=f"{item.name} (again {again})") if again else item


def each(files: Sequence[str], listed: Callable[[str], T]) -> Iterator[T]:
    """The listings of several files, in order; some are read at the same time."""
    with ThreadPoolExecutor(LISTERS, thread_name_prefix="list") as pool:
        yield from pool.map(listed, files)
