"""Images in parquet files: a column of images, and one of labels.

An image is a struct of `bytes` and `path`, as the Hugging Face datasets library writes it, or plain
bytes.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffit_train import storage
from diffit_train.config.data import Columns, Data
from diffit_train.data.preprocess import UnreadableImage
from diffit_train.data.sources.base import (
    ImageList,
    Item,
    Location,
    RecordSource,
    labeled_item,
    numbered,
    open_archive,
)
from diffit_train.errors import UserError

# Row groups that are in memory at once, whole.
WHOLE_ROW_GROUPS = 4


class Parquet(RecordSource):
    """Parquet files, or one; a location is a row in a row group of a file."""

    kind, ending, grouped = "parquet", ".parquet", True

    def __init__(self, url: str, data: Data) -> None:
        super().__init__(url, data)
        self.columns = data.columns

    def list_images(self) -> ImageList:
        """List the rows in the order of the files; see `Source.list_images`."""
        items: list[Item] = []
        classes: list[str] | None = None
        for names, rows in self.each(self._rows):
            classes = names or classes
            items += rows
        return ImageList(self, tuple(classes or numbered(self.data.num_classes)), items)

    def read(self, location: Location) -> bytes:
        """Return an image; `open` is faster for several."""
        group = _RowGroup(self, location, [location.start], threading.Semaphore())
        return group.pop(location.start)

    def open(self, items: Sequence[Item]) -> Callable[[Location], bytes]:
        """Read each row group once, when the first of its images is wanted; see `Source.open`."""
        rows = defaultdict(set)
        for item in items:
            rows[item.location._replace(start=-1)].add(item.location.start)
        gate = threading.Semaphore(WHOLE_ROW_GROUPS)
        groups = {where: _RowGroup(self, where, sorted(rows[where]), gate) for where in rows}
        return lambda location: groups[location._replace(start=-1)].pop(location.start)

    def _rows(self, file: str) -> tuple[list[str] | None, list[Item]]:
        """Class names, if the file has them, and items of a file."""
        url = self.path(file)
        items: list[Item] = []
        with open_parquet(url) as table:
            schema = table.schema_arrow
            wanted = _columns_to_list(url, schema, self.columns, self.data.num_classes)
            for group in range(table.num_row_groups):
                with parquet_errors(url, group):
                    count = table.metadata.row_group(group).num_rows
                    read = table.read_row_group(group, columns=wanted) if wanted else None
                    items += self._items(read, count, file, group)
            return _class_names(schema.metadata or {}, self.columns.label), items

    def _items(self, read: Any, count: int, file: str, group: int) -> Iterator[Item]:
        labels, paths = [0] * count, [None] * count
        if self.columns.label is not None:
            labels = read[self.columns.label].to_pylist()
        if read is not None and self.columns.image in read.schema.names:
            paths = read[self.columns.image].combine_chunks().field("path").to_pylist()
        for row, (label, path) in enumerate(zip(labels, paths, strict=True)):
            name = path or f"{file or 'file'}:{group}:{row}"
            where = Location(file, row, group)
            if label is None:
                yield Item(name, 0, where, "the label is null")
            else:
                yield labeled_item(name, int(label), self.data.num_classes, where)


class _RowGroup:
    """Some rows of a row group, read when the first of them is wanted, and kept until then."""

    def __init__(
        self, source: Parquet, where: Location, rows: list[int], gate: threading.Semaphore
    ) -> None:
        self.url, self.group = source.path(where.file), where.size
        self.column, self.rows, self.gate = source.columns.image, rows, gate
        self._lock = threading.Lock()
        self._values: dict[int, bytes] | None = None
        self._problem = ""

    def pop(self, row: int) -> bytes:
        """Return the bytes of a row, and forget them.

        Raises:
            UnreadableImage: the row group is damaged.
        """
        with self._lock:
            if self._values is None and not self._problem:
                try:
                    with self.gate:
                        self._values = storage.with_retries(self.url, self._read)
                except UserError as error:
                    self._problem = str(error)
            if self._values is None:
                raise UnreadableImage(self._problem)
            return self._values.pop(row)

    def _read(self) -> dict[int, bytes]:
        with open_parquet(self.url) as table, parquet_errors(self.url, self.group):
            plain = not _image_fields(self.url, table.schema_arrow, self.column)
            read = table.read_row_group(
                self.group, columns=[self.column if plain else f"{self.column}.bytes"]
            )
            values = read[self.column].take(self.rows).combine_chunks()
            images = (values if plain else values.field("bytes")).to_pylist()
        return {row: image or b"" for row, image in zip(self.rows, images, strict=True)}


def _columns_to_list(url: str, schema: Any, columns: Columns, num_classes: int) -> list[str]:
    """The columns that a listing reads; the images are not among them.

    Raises:
        UserError: the file lacks a column, or one has another type.
    """
    import pyarrow as pa

    fields = _image_fields(url, schema, columns.image)
    wanted = [f"{columns.image}.path"] if "path" in fields else []
    if columns.label is not None:
        kind = _column_type(url, schema, "label", columns.label)
        if not pa.types.is_integer(kind):
            raise UserError(
                f"{url}: column `{columns.label}` does not have an integer type, but {kind}"
            )
        wanted.append(columns.label)
    elif num_classes != 1:
        raise UserError(
            f"data.columns.label is null, so that all images are one class, but data.num_classes "
            f"is {num_classes}; name the column: {url} has {', '.join(schema.names)}"
        )
    return wanted


def _column_type(url: str, schema: Any, key: str, name: str) -> Any:
    if schema.names.count(name) > 1:
        raise UserError(f"{url} has {schema.names.count(name)} columns {name!r}; keep one of them")
    if name not in schema.names:
        hint = "; for images of one class, to null" if key == "label" else ""
        raise UserError(
            f"{url} has no column {name!r}; it has {', '.join(schema.names)}: set "
            f"data.columns.{key} to one of them{hint}"
        )
    return schema.field(name).type


def _image_fields(url: str, schema: Any, name: str) -> dict[str, Any]:
    """Types of the fields of the column of images; of plain bytes, none.

    Raises:
        UserError: there is no such column, or it does not hold images.
    """
    import pyarrow as pa

    kind = _column_type(url, schema, "image", name)
    binary = (pa.binary(), pa.large_binary())
    if kind in binary:
        return {}
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    if "bytes" not in fields:
        raise UserError(
            f"{url}: column `{name}` has the type {kind}; it needs binary, or a struct of `bytes` "
            f"and `path`; the columns are {', '.join(schema.names)}"
        )
    text = (pa.string(), pa.large_string(), pa.null())
    for part, allowed in (("bytes", binary), ("path", text)):
        if part in fields and fields[part] not in allowed:
            raise UserError(
                f"{url}: column `{name}.{part}` has the type {fields[part]}; it needs {allowed[0]}"
            )
    return fields


@contextmanager
def open_parquet(url: str) -> Iterator[Any]:
    """Open a parquet file.

    Raises:
        UserError: it is not one.
    """
    import pyarrow.parquet as pq

    # Its parts are far apart; reading ahead would fetch most of the file.
    with open_archive(url, read_ahead=False) as file:
        with parquet_errors(url):
            table = pq.ParquetFile(file, pre_buffer=True)
        yield table


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
        # Arrow also raises OSError for damaged data, but without a number.
        if storage.is_transient(error) or (isinstance(error, OSError) and error.errno):
            raise
        where = "" if group is None else f"row group {group}: "
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{url} is not a complete parquet file: {where}{reason}; download it again"
        ) from error


def _class_names(metadata: dict[bytes, bytes], label: str | None) -> list[str] | None:
    """Class names, if the Hugging Face datasets library stored them in the schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None
