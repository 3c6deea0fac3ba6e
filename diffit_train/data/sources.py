"""Where images come from, and how the bytes of each are reached; local or remote.

    folder       one subfolder for each class
    tar          a tar of such a folder, uncompressed
    ilsvrc       ImageNet's own tar of one tar for each class
    webdataset   a tar, or a folder of tars, with KEY.jpg (png, webp) and KEY.cls or KEY.json
    parquet      a file, or a folder of files, with columns `image` (bytes, path) and `label`

The order of the images is fixed: folders and tars of folders by name; webdataset and parquet by
the name of the file, then as they lie in it. An image that is wrong already in the listing (a
label out of range, a name twice) keeps its place and carries its problem.
"""

from __future__ import annotations

import functools
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any, Literal, NamedTuple, cast

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data import preprocess
from diffit_train.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
SourceKind = Literal["folder", "tar", "ilsvrc", "webdataset", "parquet"]


class Place(NamedTuple):
    """Where the bytes of an image lie.

    `file` is a path below the source's URL, empty for that file itself. In a tar, `start` and
    `size` are bytes; in parquet, the row and the row group; both are -1 for a whole file.
    """

    file: str
    start: int = -1
    size: int = -1


class Item(NamedTuple):
    """An image: its name for people, label, place, and what is wrong with it, if anything."""

    name: str
    label: int
    place: Place
    problem: str = ""


@dataclass(frozen=True)
class ImageList:
    """All images of a source, in order; labels are indices into `classes`."""

    url: str
    kind: SourceKind
    classes: tuple[str, ...]
    items: list[Item] = field(repr=False)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def paths(self) -> tuple[str, ...]:
        """Names of the images."""
        return tuple(item.name for item in self.items)

    @property
    def labels(self) -> tuple[int, ...]:
        """Labels of the images."""
        return tuple(item.label for item in self.items)

    def digest(self) -> str:
        """SHA-256 of the listing: it tells whether images came or went."""
        return items_digest(self.items)


def items_digest(items: Iterable[Item]) -> str:
    """SHA-256 of names and labels in their order."""
    pairs = [(item.name, item.label) for item in items]
    return storage.digest([[name for name, _ in pairs], [label for _, label in pairs]])


def list_images(recipe: Recipe) -> ImageList:
    """The images of `data.source`.

    Raises:
        UserError: the source is missing, empty or of no known kind, or its classes are not the
            recipe's in number.
    """
    url = storage.resolve(recipe.storage.root, recipe.data.source)
    kind = source_kind(url, recipe.data.format)
    classes, items = _LISTERS[kind](url, recipe.data.num_classes)
    if not items:
        raise UserError(
            f"data.source {url} holds no images (read as {kind}); they are looked for with "
            f"endings {', '.join(sorted(SUFFIXES))}, a folder for each class; data.format says "
            "what else it may be"
        )
    if len(classes) != recipe.data.num_classes:
        raise UserError(
            f"data.source {url} has {len(classes)} classes, but data.num_classes is "
            f"{recipe.data.num_classes}; set data.num_classes={len(classes)} or mend the source"
        )
    return ImageList(url, kind, tuple(classes), list(_unique(items)))


def _unique(items: Iterable[Item]) -> Iterator[Item]:
    """Items by names that tell them apart: a name that occurs again says so."""
    seen: Counter[str] = Counter()
    for item in items:
        seen[item.name] += 1
        again = seen[item.name] - 1
        yield item._replace(name=f"{item.name} (again {again})") if again else item


def source_kind(url: str, wanted: str) -> SourceKind:
    """What a source is: `wanted`, or for `auto` what its name and its first members say.

    Raises:
        UserError: it is missing or cannot be told.
    """
    if not storage.exists(url):
        former = url.replace("/images/", "/pictures/")
        hint = f"; earlier versions kept images in {former}: rename that folder" * (
            former != url and storage.exists(former)
        )
        raise UserError(
            f"data.source {url} does not exist; give a folder with a subfolder for each class, a "
            f"tar or parquet files{hint}"
        )
    folder = storage.is_folder(url)
    if wanted != "auto":
        if folder and wanted in ("tar", "ilsvrc"):
            raise UserError(f"data.source {url} is a folder, but data.format is {wanted!r}")
        if not folder and wanted == "folder":
            raise UserError(f"data.source {url} is not a folder, but data.format is 'folder'")
        return wanted  # type: ignore[return-value]
    if folder:
        names = storage.list_names(url)
        if any(name.endswith(".parquet") for name in names):
            return "parquet"
        return "webdataset" if any(name.endswith(".tar") for name in names) else "folder"
    if url.endswith(".parquet"):
        return "parquet"
    if not url.endswith(".tar"):
        raise UserError(
            f"data.source {url} is neither a folder nor a .tar or .parquet file; unpack it, or "
            "give one of those"
        )
    return _kind_of_tar(url)


def _kind_of_tar(url: str) -> SourceKind:
    with storage.open_file(url) as file:
        for member in _tar_members(file, url):
            if member.name.endswith(".tar"):
                return "ilsvrc"
            if PurePosixPath(member.name).suffix.lower() in (*SUFFIXES, ".cls", ".json"):
                return "tar" if "/" in _clean(member.name) else "webdataset"
    return "tar"


# ---- Folders ----


def _list_folder(url: str, num_classes: int) -> tuple[list[str], list[Item]]:
    if storage.is_local(url):
        base = str(storage.local_path(url).absolute())
        found: Iterable[str] = (path[len(base) + 1 :] for path in _local_files(base))
    else:
        found = storage.find_files(url)
    paths = sorted(p for p in found if "/" in p and _is_image(p))
    return _by_folder((path, Place(path), "") for path in paths)


def _local_files(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Every file below a folder. Links are followed, which fsspec does not; circles are not.

    Raises:
        UserError: a folder may not be read; images would be missing silently.
    """
    above |= {os.path.realpath(folder)}
    try:
        entries = list(os.scandir(folder))
    except PermissionError as error:
        raise UserError(f"folder {folder} may not be read; mend its permissions") from error
    for entry in entries:
        if not entry.is_dir():
            yield entry.path
        elif os.path.realpath(entry.path) not in above:
            yield from _local_files(entry.path, above)


def _is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in SUFFIXES


def _by_folder(found: Iterable[tuple[str, Place, str]]) -> tuple[list[str], list[Item]]:
    """Classes and items of sorted (path, place, problem); the first folder is the class."""
    rows = list(found)
    classes = sorted({path.split("/", 1)[0] for path, _, _ in rows})
    number = {name: label for label, name in enumerate(classes)}
    items = [Item(p, number[p.split("/", 1)[0]], place, problem) for p, place, problem in rows]
    return classes, items


# ---- Tars ----


def _tar_members(file: IO[bytes] | FileWindow, url: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of an uncompressed tar, one after the other.

    Raises:
        UserError: it is no tar, compressed or cut off.
    """
    try:
        with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it would keep all of them
                if member.isfile():
                    yield member
            end = tar.offset
    except tarfile.TarError as error:
        raise UserError(
            f"{url} is not a whole uncompressed tar ({error}); unpack it if it is compressed, or "
            "fetch it again"
        ) from error
    file.seek(0, os.SEEK_END)
    if file.tell() < end:
        raise UserError(f"{url} is cut off: its last member ends at byte {end:,}; fetch it again")


def _clean(name: str) -> str:
    return name.removeprefix("./")


def _name_problem(name: str) -> str:
    """What is wrong with the name of a member; nothing is ever written under it."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts:
        return "the name leads out of the archive"
    return ""


def _list_tar(url: str, num_classes: int) -> tuple[list[str], list[Item]]:
    rows: list[tuple[str, Place, str]] = []
    with storage.open_file(url) as file:
        for member in _tar_members(file, url):
            name = _clean(member.name)
            if "/" in name and _is_image(name):
                place = Place("", member.offset_data, member.size)
                rows.append((name, place, _name_problem(name)))
    return _named_once(rows)


def _named_once(rows: list[tuple[str, Place, str]]) -> tuple[list[str], list[Item]]:
    """Classes and items by name; a member that bears another's name is a problem.

    A name that leads out of the archive makes no class.
    """
    rows.sort(key=lambda row: (row[0], row[1]))
    good = [row for row in rows if not row[2]]
    classes = sorted({name.split("/", 1)[0] for name, _, _ in good})
    number = {name: label for label, name in enumerate(classes)}
    items, before = [], None
    for name, place, problem in rows:
        again = "the name occurs twice" if name == before else ""
        items.append(Item(name, number.get(name.split("/", 1)[0], 0), place, problem or again))
        before = name
    return classes, items


def _list_ilsvrc(url: str, num_classes: int) -> tuple[list[str], list[Item]]:
    rows: list[tuple[str, Place, str]] = []
    with storage.open_file(url) as file:
        for outer in list(_tar_members(file, url)):
            if not outer.name.endswith(".tar"):
                continue
            name = PurePosixPath(outer.name).name.removesuffix(".tar")
            inside = FileWindow(file, outer.offset_data, outer.size)
            for member in _tar_members(inside, f"{outer.name} in {url}"):
                if _is_image(member.name):
                    start = outer.offset_data + member.offset_data
                    path = f"{name}/{_clean(member.name)}"
                    rows.append((path, Place("", start, member.size), _name_problem(path)))
    return _named_once(rows)


class FileWindow(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move within the stretch."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        """Position within the stretch."""
        return self.position

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        left = max(0, self.size - self.position)
        self.file.seek(self.start + self.position)
        data = self.file.read(left if size < 0 else min(size, left))
        self.position += len(data)
        return data


# ---- WebDataset ----


def _list_webdataset(url: str, num_classes: int) -> tuple[list[str], list[Item]]:
    files = [""]
    if storage.is_folder(url):
        files = [name for name in storage.list_names(url) if name.endswith(".tar")]
    items: list[Item] = []
    seen: set[str] = set()
    for file in files:
        for item in _webdataset_items(url, file, num_classes):
            twice = item.name in seen and not item.problem
            items.append(item._replace(problem="the key occurs twice") if twice else item)
            seen.add(item.name)
    return [str(number) for number in range(num_classes)], items


def _webdataset_items(url: str, file: str, num_classes: int) -> Iterator[Item]:
    """Samples of a tar: members of one key lie together."""
    name = storage.join(url, file) if file else url
    with storage.open_file(name) as opened:
        key, parts = None, {}  # type: ignore[var-annotated]
        for member in _tar_members(opened, name):
            stem, _, ending = PurePosixPath(_clean(member.name)).name.partition(".")
            folder = _clean(member.name).rpartition("/")[0]
            this = f"{folder}/{stem}" if folder else stem
            if key is not None and this != key:
                yield _webdataset_item(file, key, parts, num_classes)
                parts = {}
            key = this
            place = Place(file, member.offset_data, member.size)
            ending = ending.lower()
            text = b""
            if ending in ("cls", "json"):
                position = opened.tell()
                opened.seek(member.offset_data)
                text = opened.read(member.size)
                opened.seek(position)
            parts.setdefault(ending, (place, text))
        if key is not None:
            yield _webdataset_item(file, key, parts, num_classes)


def _webdataset_item(
    file: str, key: str, parts: dict[str, tuple[Place, bytes]], num_classes: int
) -> Item:
    images = [e for e in parts if f".{e}" in SUFFIXES]
    if not images:
        return Item(key, 0, Place(file, 0, 0), "the sample has no image")
    place = parts[images[0]][0]
    try:
        label = int(parts["cls"][1]) if "cls" in parts else _json_label(parts["json"][1])
    except KeyError:
        return Item(key, 0, place, "the sample has no label (cls, or json with `label`)")
    except (ValueError, TypeError):
        return Item(key, 0, place, "the label is not a number")
    return Item(key, *_usable(label, num_classes, place, _name_problem(key)))


def _json_label(data: bytes) -> int:
    value = json.loads(data)
    for name in ("label", "cls", "class"):
        if isinstance(value, dict) and name in value:
            return int(value[name])
    raise KeyError("label")


def _usable(
    label: int, num_classes: int, place: Place, problem: str = ""
) -> tuple[int, Place, str]:
    if 0 <= label < num_classes:
        return label, place, problem
    return 0, place, problem or f"label {label} is not between 0 and {num_classes - 1}"


# ---- Parquet ----


def _list_parquet(url: str, num_classes: int) -> tuple[list[str], list[Item]]:
    files = [""]
    if storage.is_folder(url):
        files = [name for name in storage.list_names(url) if name.endswith(".parquet")]
    items: list[Item] = []
    classes: list[str] | None = None
    for file in files:
        name = storage.join(url, file) if file else url
        with _parquet(name) as table:
            found = _class_names(table.schema_arrow.metadata or {})
            if found is not None:
                classes = found
            for group in range(table.num_row_groups):
                columns = table.read_row_group(group, columns=["image.path", "label"])
                items += _parquet_items(columns, file, group, num_classes)
    return classes or [str(number) for number in range(num_classes)], items


def _parquet_items(columns: Any, file: str, group: int, num_classes: int) -> Iterator[Item]:
    labels = columns["label"].to_pylist()
    paths = columns["image"].combine_chunks().field("path").to_pylist()
    for row, (label, path) in enumerate(zip(labels, paths, strict=True)):
        shown = path or f"{file or 'file'}:{group}:{row}"
        place = Place(file, row, group)
        if label is None:
            yield Item(shown, 0, place, "the label is null")
        else:
            yield Item(shown, *_usable(int(label), num_classes, place))


@contextmanager
def _parquet(url: str) -> Iterator[Any]:
    """A parquet file with the columns that are needed.

    Raises:
        UserError: it is no parquet, or lacks them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with storage.open_file(url) as file:
        try:
            table = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise UserError(f"{url} is not a whole parquet file: {error}") from error
        schema = table.schema_arrow
        image = schema.field("image").type if "image" in schema.names else None
        fields = (
            {f.name for f in image} if image is not None and pa.types.is_struct(image) else set()
        )
        if not {"bytes", "path"} <= fields or "label" not in schema.names:
            raise UserError(
                f"{url} has columns {', '.join(schema.names)}; needed are `image`, a struct of "
                "`bytes` and `path`, and `label`"
            )
        if not pa.types.is_integer(schema.field("label").type):
            raise UserError(f"{url}: the column `label` is not of whole numbers")
        yield table


def _class_names(metadata: dict[bytes, bytes]) -> list[str] | None:
    """Names of the classes where the hub's library has left them in the schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]


_LISTERS: dict[SourceKind, Callable[[str, int], tuple[list[str], list[Item]]]] = {
    "folder": _list_folder,
    "tar": _list_tar,
    "ilsvrc": _list_ilsvrc,
    "webdataset": _list_webdataset,
    "parquet": _list_parquet,
}


# ---- Reading ----


class ImageReader(AbstractContextManager["ImageReader"]):
    """The bytes of images by their places; a file is kept open while the next lies in it."""

    def __init__(self, url: str, kind: SourceKind) -> None:
        self.url, self.kind = url, kind
        self._open: AbstractContextManager[Any] | None = None
        self._file: tuple[str, Any] | None = None
        self._group: tuple[str, int, list[bytes]] | None = None

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = self._file = None

    def _opened(self, name: str, opener: Callable[[str], AbstractContextManager[Any]]) -> Any:
        if self._file is None or self._file[0] != name:
            self._close()
            self._open = opener(storage.join(self.url, name) if name else self.url)
            self._file = (name, self._open.__enter__())
        return self._file[1]

    def read(self, place: Place) -> bytes:
        """The bytes of an image.

        Raises:
            OSError: as reading a file does.
        """
        return storage.retried(self.url, lambda: self._read(place))

    def _read(self, place: Place) -> bytes:
        if self.kind == "folder":
            return storage.read_bytes(storage.join(self.url, place.file))
        try:
            if self.kind == "parquet":
                return self._row(place)
            file = self._opened(place.file, storage.open_file)
            file.seek(place.start)
            return bytes(file.read(place.size))
        except OSError:
            self._close()  # what is tried again is opened again
            raise

    def _row(self, place: Place) -> bytes:
        key = (place.file, place.size)
        if self._group is None or self._group[:2] != key:
            table = self._opened(place.file, _parquet)
            column = table.read_row_group(place.size, columns=["image.bytes"])["image"]
            values = column.combine_chunks().field("bytes").to_pylist()
            self._group = (*key, values)
        return self._group[2][place.start] or b""


def read_items(
    url: str, kind: SourceKind, items: Sequence[Item], resolution: int
) -> preprocess.Images:
    """Read, decode and crop images of a source; see `preprocess.read_images`."""
    with ImageReader(url, kind) as reader:
        reads = [functools.partial(reader.read, item.place) for item in items]
        return preprocess.read_images(reads, resolution, [item.problem for item in items])
