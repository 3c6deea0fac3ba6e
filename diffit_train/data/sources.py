"""Image sources, local or remote: listing their images. `reading` gets the bytes.

    folder       one subfolder per class
    tar          an uncompressed tar of such a folder
    ilsvrc       ImageNet's own tar, containing one tar per class
    webdataset   a tar, or a folder of tars, with KEY.jpg (png, webp) and KEY.cls or KEY.json
    parquet      a file, or a folder of files, with columns `image` (bytes, path) and `label`
    cifar10      CIFAR-10's own archive, binary version

A folder or tar for a recipe of one class may hold images at any depth.

The order of the images is fixed: folders and tars of folders by name; webdataset and parquet by
file name, then in file order. An image with a problem in the listing (a label out of range, a
duplicate name) keeps its index and carries the problem.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple, TypeVar, cast

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.data import FORMATS
from diffit_train.data import cifar10, plugged
from diffit_train.errors import UserError

T = TypeVar("T")
# Files of a source that are listed at once; each holds what its file system reads ahead.
LISTERS = 8
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
# Sparse and plain members beyond it are not images; nor does a label, or a name, need more.
MAX_MEMBER_BYTES, MAX_TEXT_BYTES = 2**50, 2**20
# What is looked at behind the end of a tar. Tars laid end to end have other members there.
END_BYTES = 2**16
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
SourceKind = Literal["folder", "tar", "ilsvrc", "webdataset", "parquet", "cifar10"]
# Name of the only class, where the images of several folders are one class.
ALL = "all"


class Location(NamedTuple):
    """Location of an image's bytes.

    `file` is a path relative to the source's URL, empty if the source is that file. In a tar,
    `start` and `size` are bytes; in parquet, the row and the row group; -1 for a whole file, whose
    size is given where the listing says it, as on S3.
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
        """Image names."""
        return tuple(item.name for item in self.items)

    @property
    def labels(self) -> tuple[int, ...]:
        """Image labels."""
        return tuple(item.label for item in self.items)

    def digest(self) -> str:
        """SHA-256 of the listing; changes when images are added or removed."""
        return items_digest(self.items)


def items_digest(items: Iterable[Item]) -> str:
    """SHA-256 of names and labels, in order."""
    pairs = [(item.name, item.label) for item in items]
    return storage.digest([[name for name, _ in pairs], [label for _, label in pairs]])


def list_images(recipe: Recipe) -> ImageList:
    """The images of `data.source`.

    Raises:
        UserError: the source is missing, empty or in an unknown format, or its number of classes
            is not the recipe's.
    """
    url = storage.resolve(recipe.storage.root, recipe.data.source)
    if FORMATS.is_plugged(recipe.data.format):
        kind: SourceKind = FORMATS.reference(recipe.data.format)  # type: ignore[assignment]
        classes, items = _list_plugged(kind, url, recipe.data.num_classes)
    else:
        kind = source_kind(url, recipe.data.format)
        classes, items = _LISTERS[kind](url, recipe.data.num_classes)
    if not items:
        raise UserError(
            f"data.source {url} holds no images (read as {kind}); expected one folder per class "
            f"with {', '.join(sorted(SUFFIXES))} files; for another format set data.format"
        )
    if len(classes) != recipe.data.num_classes:
        raise UserError(
            f"data.source {url} has {len(classes)} classes, but data.num_classes is "
            f"{recipe.data.num_classes}; set data.num_classes={len(classes)} or fix the source"
        )
    return ImageList(url, kind, tuple(classes), list(_unique(items)))


def _unique(items: Iterable[Item]) -> Iterator[Item]:
    """Items with unique names: repeated names get a suffix."""
    seen: Counter[str] = Counter()
    for item in items:
        seen[item.name] += 1
        again = seen[item.name] - 1
        yield item._replace(name=f"{item.name} (again {again})") if again else item


def source_kind(url: str, wanted: str) -> SourceKind:
    """Format of a source: `wanted`, or for `auto` inferred from its name and first members.

    Raises:
        UserError: it is missing, or its format cannot be inferred.
    """
    if not storage.exists(url):
        former = url.replace("/images/", "/pictures/")
        hint = f"; earlier versions kept images in {former}: rename that folder" * (
            former != url and storage.exists(former)
        )
        raise UserError(
            f"data.source {url} does not exist; set it to a folder with one subfolder per class, "
            f"a tar or parquet files{hint}"
        )
    storage.require_regular(url)
    folder = storage.is_folder(url)
    if wanted != "auto":
        if folder and wanted in ("tar", "ilsvrc"):
            raise UserError(f"data.source {url} is a folder, but data.format is {wanted!r}")
        if not folder and wanted == "folder":
            raise UserError(f"data.source {url} is not a folder, but data.format is 'folder'")
        return wanted  # type: ignore[return-value]
    if cifar10.is_archive(url):
        return "cifar10"
    if folder:
        names = storage.list_names(url)
        if any(name.endswith(".parquet") for name in names):
            return "parquet"
        return "webdataset" if any(name.endswith(".tar") for name in names) else "folder"
    if url.endswith(".parquet"):
        return "parquet"
    if not url.endswith(".tar"):
        raise UserError(
            f"data.source {url} is neither a folder nor a .tar or .parquet file; unpack or convert "
            "it"
        )
    return _kind_of_tar(url)


def _kind_of_tar(url: str) -> SourceKind:
    with _open_file(url) as file:
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
        sizes = {path[len(base) + 1 :]: -1 for path in _local_files(base)}
    else:
        sizes = {path: file.bytes for path, file in storage.walk(url).items()}
    paths = sorted(p for p in sizes if ("/" in p or num_classes == 1) and _is_image(p))
    rows = ((path, Location(path, size=sizes[path]), "") for path in paths)
    return _by_folder(rows, num_classes)


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


def _is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in SUFFIXES


def _by_folder(
    found: Iterable[tuple[str, Location, str]], num_classes: int
) -> tuple[list[str], list[Item]]:
    """Classes and items of sorted (path, location, problem); the first folder is the class."""
    rows = list(found)
    classes = _classes([path for path, _, _ in rows], num_classes)
    number = {name: label for label, name in enumerate(classes)}
    items = [Item(p, number.get(p.split("/", 1)[0], 0), where, pr) for p, where, pr in rows]
    return classes, items


def _classes(paths: Iterable[str], num_classes: int) -> list[str]:
    """The first folders of the paths; one class of all images if only one is wanted."""
    classes = sorted({path.split("/", 1)[0] if "/" in path else ALL for path in paths})
    return [ALL] if num_classes == 1 and len(classes) > 1 else classes


# ---- Tars ----


@contextmanager
def _open_file(url: str, read_ahead: bool = True) -> Iterator[IO[bytes]]:
    storage.require_regular(url)
    with storage.open_file(url, read_ahead) as file:
        yield file


class _TarInfo(tarfile.TarInfo):
    """A header whose size leads forward and whose extension fits into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _TarInfo:
        member = super().frombuf(buf, encoding, errors)
        extension = not member.isreg() and member.type in _EXTENSIONS
        if not 0 <= member.size <= (MAX_TEXT_BYTES if extension else MAX_MEMBER_BYTES):
            raise tarfile.ReadError(f"a header gives a size of {member.size:,} bytes")
        return member


def _tar_members(file: IO[bytes] | FileWindow, url: str) -> Iterator[tarfile.TarInfo]:
    """Iterate over the regular files of an uncompressed tar.

    Raises:
        UserError: it is not a tar, compressed, damaged or truncated.
    """
    tar_file = cast(IO[bytes], file)
    try:
        with tarfile.open(fileobj=tar_file, mode="r:", tarinfo=_TarInfo) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it would keep all of them
                # An extended header may replace the size, also by one that leads back.
                if not 0 <= member.size <= MAX_MEMBER_BYTES or tar.offset <= member.offset:
                    raise tarfile.ReadError(f"{member.name} has a size of {member.size:,} bytes")
                if member.isfile():
                    yield member
            end = tar.offset
    except OSError:
        raise
    # For malformed headers, tarfile raises more than its own errors.
    except Exception as error:
        raise UserError(
            f"{url} is not a complete uncompressed tar ({error}); decompress it, or download it "
            "again"
        ) from error
    file.seek(0, os.SEEK_END)
    size = file.tell()
    if size < end:
        raise UserError(
            f"{url} is truncated: its last member ends at byte {end:,}; download it again"
        )
    # tarfile takes a header that it cannot read, and a missing one, for the end.
    file.seek(end)
    rest = file.read(END_BYTES)
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise UserError(
            f"{url} is damaged at byte {end:,}, where its next member or its end should be; "
            "download it again, or pack it again with tar"
        )


def _clean(name: str) -> str:
    return name.removeprefix("./")


def _member_problem(member: tarfile.TarInfo, name: str) -> str:
    """What is wrong with a member under this name, or ""."""
    if member.issparse():
        return "a sparse member, which is not stored as a whole"
    return _name_problem(name)


def _name_problem(name: str) -> str:
    """What is wrong with a member's name. (No file is ever written under it.)"""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts:
        return "the name points outside the archive"
    return ""


def _list_tar(url: str, num_classes: int) -> tuple[list[str], list[Item]]:
    rows: list[tuple[str, Location, str]] = []
    with _open_file(url) as file:
        for member in _tar_members(file, url):
            name = _clean(member.name)
            if ("/" in name or num_classes == 1) and _is_image(name):
                location = Location("", member.offset_data, member.size)
                rows.append((name, location, _member_problem(member, name)))
    return _named_once(rows, num_classes)


def _named_once(
    rows: list[tuple[str, Location, str]], num_classes: int
) -> tuple[list[str], list[Item]]:
    """Classes and items sorted by name; duplicate names are a problem.

    A name that points outside the archive creates no class.
    """
    rows.sort(key=lambda row: (row[0], row[1]))
    classes = _classes([name for name, _, problem in rows if not problem], num_classes)
    number = {name: label for label, name in enumerate(classes)}
    items, before = [], None
    for name, location, problem in rows:
        twice = "the name occurs twice" if name == before else ""
        label = number.get(name.split("/", 1)[0], 0)
        items.append(Item(name, label, location, problem or twice))
        before = name
    return classes, items


def _list_ilsvrc(url: str, num_classes: int) -> tuple[list[str], list[Item]]:
    rows: list[tuple[str, Location, str]] = []
    with _open_file(url) as file:
        for outer in list(_tar_members(file, url)):
            if not outer.name.endswith(".tar"):
                continue
            if outer.issparse():
                raise UserError(f"{outer.name} in {url} is a sparse member; pack it again")
            name = PurePosixPath(outer.name).name.removesuffix(".tar")
            inside = FileWindow(file, outer.offset_data, outer.size)
            for member in _tar_members(inside, f"{outer.name} in {url}"):
                if _is_image(member.name):
                    start = outer.offset_data + member.offset_data
                    path = f"{name}/{_clean(member.name)}"
                    where = Location("", start, member.size)
                    rows.append((path, where, _member_problem(member, path)))
    return _named_once(rows, num_classes)


class FileWindow(io.RawIOBase):
    """A byte range of a file, as a file object."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Seek within the window."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        """Position within the window."""
        return self.position

    def read(self, size: int = -1) -> bytes:
        """Read the next bytes."""
        left = max(0, self.size - self.position)
        self.file.seek(self.start + self.position)
        data = self.file.read(left if size < 0 else min(size, left))
        self.position += len(data)
        return data


def _each(files: Sequence[str], listed: Callable[[str], T]) -> Iterator[T]:
    """The listings of several files, in order; some are read at the same time."""
    with ThreadPoolExecutor(LISTERS, thread_name_prefix="list") as pool:
        yield from pool.map(listed, files)


# ---- WebDataset ----


def _list_webdataset(url: str, num_classes: int) -> tuple[list[str], list[Item]]:
    files = [""]
    if storage.is_folder(url):
        files = [name for name in storage.list_names(url) if name.endswith(".tar")]
    items: list[Item] = []
    seen: set[str] = set()
    for found in _each(files, lambda file: list(_webdataset_items(url, file, num_classes))):
        for item in found:
            twice = item.name in seen and not item.problem
            items.append(item._replace(problem="the key occurs twice") if twice else item)
            seen.add(item.name)
    return [str(number) for number in range(num_classes)], items


def _webdataset_items(url: str, file: str, num_classes: int) -> Iterator[Item]:
    """Samples of a tar; members with the same key must be adjacent."""
    name = storage.join(url, file) if file else url
    with _open_file(name) as opened:
        key, parts = None, {}  # type: ignore[var-annotated]
        for member in _tar_members(opened, name):
            stem, _, ending = PurePosixPath(_clean(member.name)).name.partition(".")
            folder = _clean(member.name).rpartition("/")[0]
            this = f"{folder}/{stem}" if folder else stem
            if key is not None and this != key:
                yield _webdataset_item(file, key, parts, num_classes)
                parts = {}
            key = this
            location = Location(file, member.offset_data, member.size)
            ending = ending.lower()
            text, problem = b"", _member_problem(member, key)
            if ending in ("cls", "json") and not problem:
                if member.size > MAX_TEXT_BYTES:
                    problem = f"its label has {member.size:,} bytes"
                else:
                    position = opened.tell()
                    opened.seek(member.offset_data)
                    text = opened.read(member.size)
                    opened.seek(position)
            parts.setdefault(ending, _Part(location, text, problem))
        if key is not None:
            yield _webdataset_item(file, key, parts, num_classes)


class _Part(NamedTuple):
    """A member of a sample; `text` of a label only."""

    location: Location
    text: bytes
    problem: str


def _webdataset_item(file: str, key: str, parts: dict[str, _Part], num_classes: int) -> Item:
    images = [e for e in parts if f".{e}" in SUFFIXES]
    if not images:
        return Item(key, 0, Location(file, 0, 0), "the sample has no image")
    location = parts[images[0]].location
    read = [parts[name] for name in (images[0], "cls", "json") if name in parts]
    for problem in [part.problem for part in read if part.problem]:
        return Item(key, 0, location, problem)
    try:
        label = int(parts["cls"].text) if "cls" in parts else _json_label(parts["json"].text)
    except KeyError:
        return Item(key, 0, location, "the sample has no label (cls, or json with `label`)")
    # RecursionError: nested lists.
    except (ValueError, TypeError, RecursionError):
        return Item(key, 0, location, "the label is not an integer")
    return Item(key, *_usable(label, num_classes, location))


def _json_label(data: bytes) -> int:
    value = json.loads(data)
    for name in ("label", "cls", "class"):
        if isinstance(value, dict) and name in value:
            label = value[name]
            if isinstance(label, float) and not label.is_integer():
                raise ValueError(label)
            return int(label)
    raise KeyError("label")


def _usable(
    label: int, num_classes: int, location: Location, problem: str = ""
) -> tuple[int, Location, str]:
    if 0 <= label < num_classes:
        return label, location, problem
    return 0, location, problem or f"label {label} is not between 0 and {num_classes - 1}"


# ---- Parquet ----


def _list_parquet(url: str, num_classes: int) -> tuple[list[str], list[Item]]:
    files = [""]
    if storage.is_folder(url):
        files = [name for name in storage.list_names(url) if name.endswith(".parquet")]
    items: list[Item] = []
    classes: list[str] | None = None

    def listed(file: str) -> tuple[list[str] | None, list[Item]]:
        rows: list[Item] = []
        with open_parquet(storage.join(url, file) if file else url) as table:
            for group in range(table.num_row_groups):
                with parquet_errors(storage.join(url, file) if file else url, group):
                    columns = table.read_row_group(group, columns=["image.path", "label"])
                    rows += _parquet_items(columns, file, group, num_classes)
            return _class_names(table.schema_arrow.metadata or {}), rows

    for found, rows in _each(files, listed):
        classes = found or classes
        items += rows
    return classes or [str(number) for number in range(num_classes)], items


def _parquet_items(columns: Any, file: str, group: int, num_classes: int) -> Iterator[Item]:
    labels = columns["label"].to_pylist()
    paths = columns["image"].combine_chunks().field("path").to_pylist()
    for row, (label, path) in enumerate(zip(labels, paths, strict=True)):
        name = path or f"{file or 'file'}:{group}:{row}"
        location = Location(file, row, group)
        if label is None:
            yield Item(name, 0, location, "the label is null")
        else:
            yield Item(name, *_usable(int(label), num_classes, location))


@contextmanager
def open_parquet(url: str) -> Iterator[Any]:
    """Open a parquet file and check that it has the required columns.

    Raises:
        UserError: it is not a parquet file, or lacks them.
    """
    import pyarrow.parquet as pq

    # Its parts are far apart; reading ahead would fetch most of the file.
    with _open_file(url, read_ahead=False) as file:
        with parquet_errors(url):
            table = pq.ParquetFile(file, pre_buffer=True)
            _check_columns(url, table.schema_arrow)
        yield table


def _check_columns(url: str, schema: Any) -> None:
    import pyarrow as pa

    image = schema.field("image").type if "image" in schema.names else None
    fields = (
        {field.name: field.type for field in image}
        if image is not None and pa.types.is_struct(image)
        else {}
    )
    if not {"bytes", "path"} <= set(fields) or "label" not in schema.names:
        raise UserError(
            f"{url} has columns {', '.join(schema.names)}; it needs `image`, a struct of "
            "`bytes` and `path`, and `label`"
        )
    allowed = {
        "bytes": (pa.types.is_binary, pa.types.is_large_binary),
        "path": (pa.types.is_string, pa.types.is_large_string, pa.types.is_null),
    }
    for name, kinds in allowed.items():
        if not any(kind(fields[name]) for kind in kinds):
            raise UserError(
                f"{url}: column `image.{name}` has the type {fields[name]}; it needs "
                f"{'binary' if name == 'bytes' else 'string'}"
            )
    if not pa.types.is_integer(schema.field("label").type):
        raise UserError(f"{url}: column `label` does not have an integer type")


@contextmanager
def parquet_errors(url: str, group: int | None = None) -> Iterator[None]:
    """Errors of reading a parquet file in the block, named.

    Raises:
        UserError: the file, or this row group, is damaged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Arrow raises OSError for damaged data, too, but without a number.
        if storage.is_transient(error) or (isinstance(error, OSError) and error.errno):
            raise
        where = "" if group is None else f"row group {group}: "
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{url} is not a complete parquet file: {where}{reason}; download it again"
        ) from error


def _class_names(metadata: dict[bytes, bytes]) -> list[str] | None:
    """Class names, if the Hugging Face datasets library stored them in the schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


# ---- CIFAR-10 ----


def _list_cifar10(url: str, num_classes: int) -> tuple[list[str], list[Item]]:
    classes, rows = cifar10.list_records(url)
    items = [
        Item(f"{file}:{row}", *_usable(label, len(classes), Location(file, row)))
        for file, row, label in rows
    ]
    return classes, items


# ---- Another package's ----


def _list_plugged(name: str, url: str, num_classes: int) -> tuple[list[str], list[Item]]:
    source = plugged.open_source(name, url)
    items = [
        Item(image, *_usable(label, num_classes, Location("", index)))
        for index, (image, label) in enumerate(plugged.listed(name, source))
    ]
    return list(source.classes), items


_LISTERS: dict[SourceKind, Callable[[str, int], tuple[list[str], list[Item]]]] = {
    "folder": _list_folder,
    "tar": _list_tar,
    "ilsvrc": _list_ilsvrc,
    "webdataset": _list_webdataset,
    "parquet": _list_parquet,
    "cifar10": _list_cifar10,
}
