"""Images in parquet files: a column of images, and one of labels.

An image is a struct of `bytes` and `path`, as the Hugging Face datasets library writes it, or plain
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffit_train import storage
from diffit_train.config.data import Columns
from diffit_train.data.sources.listing import Found, Item, Location, each, usable_label
from diffit_train.data.sources.tar import open_archive
from diffit_train.errors import UserError


def list_parquet(url: str, files: Sequence[str], columns: Columns, num_classes: int) -> Found:
    """The rows of parquet files, in the order of the files.

    Args:
        files: names in the folder `url`; "" for `url` itself.

    Raises:
        UserError: a file is not parquet, is damaged, or lacks a column.
    """

    def listed(file: str) -> tuple[list[str] | None, list[Item]]:
        rows: list[Item] = []
        name = storage.join(url, file) if file else url
        with open_parquet(name) as table:
            wanted = _columns_to_list(name, table.schema_arrow, columns, num_classes)
            for group in range(table.num_row_groups):
                with parquet_errors(name, group):
                    count = table.metadata.row_group(group).num_rows
                    read = table.read_row_group(group, columns=wanted) if wanted else None
                    rows += _items(read, count, file, group, columns, num_classes)
            return _class_names(table.schema_arrow.metadata or {}, columns.label), rows

    items: list[Item] = []
    classes: list[str] | None = None
    for names, rows in each(files, listed):
        classes = names or classes
        items += rows
    return Found(classes or [str(number) for number in range(num_classes)], items)


def _columns_to_list(url: str, schema: Any, columns: Columns, num_classes: int) -> list[str]:
    """The columns that a listing reads; the images are not among them.

    Raises:
        UserError: the file lacks a column, or one has another type.
    """
    fields = _image_fields(url, schema, columns.image)
    wanted = [f"{columns.image}.path"] if "path" in fields else []
    if columns.label is not None:
        _require_column(url, schema, "label", columns.label)
        _require_label_type(url, schema, columns.label)
        wanted.append(columns.label)
    elif num_classes != 1:
        raise UserError(
            f"data.columns.label is null, so that all images are one class, but data.num_classes "
            f"is {num_classes}; name the column: {url} has {', '.join(schema.names)}"
        )
    return wanted


def _require_column(url: str, schema: Any, key: str, name: str) -> None:
    if schema.names.count(name) > 1:
        raise UserError(f"{url} has {schema.names.count(name)} columns {name!r}; keep one of them")
    if name not in schema.names:
        hint = "; for images of one class, to null" if key == "label" else ""
        raise UserError(
            f"{url} has no column {name!r}; it has {', '.join(schema.names)}: set "
            f"data.columns.{key} to one of them{hint}"
        )


def _require_label_type(url: str, schema: Any, name: str) -> None:
    import pyarrow as pa

    found = schema.field(name).type
    if not pa.types.is_integer(found):
        raise UserError(f"{url}: column `{name}` does not have an integer type, but {found}")


def _image_fields(url: str, schema: Any, name: str) -> dict[str, Any]:
    """Types of the fields of the column of images; of plain bytes, none.

    Raises:
        UserError: there is no such column, or it does not hold images.
    """
    import pyarrow as pa

    _require_column(url, schema, "image", name)
    column = schema.field(name).type
    binary = (pa.types.is_binary, pa.types.is_large_binary)
    if any(kind(column) for kind in binary):
        return {}
    fields = {field.name: field.type for field in column} if pa.types.is_struct(column) else {}
    if "bytes" not in fields:
        raise UserError(
            f"{url}: column `{name}` has the type {column}; it needs binary, or a struct of "
            f"`bytes` and `path`; the columns are {', '.join(schema.names)}"
        )
    allowed = {
        "bytes": binary,
        "path": (pa.types.is_string, pa.types.is_large_string, pa.types.is_null),
    }
    for field in fields.keys() & allowed:
        if not any(kind(fields[field]) for kind in allowed[field]):
            raise UserError(
                f"{url}: column `{name}.{field}` has the type {fields[field]}; it needs "
                f"{'binary' if field == 'bytes' else 'string'}"
            )
    return fields


def _items(
    read: Any, count: int, file: str, group: int, columns: Columns, num_classes: int
) -> Iterator[Item]:
    names = read.schema.names if read is not None else []
    labels, paths = [0] * count, [None] * count
    if columns.label is not None:
        labels = read[columns.label].to_pylist()
    if columns.image in names:
        paths = read[columns.image].combine_chunks().field("path").to_pylist()
    for row, (label, path) in enumerate(zip(labels, paths, strict=True)):
        name = path or f"{file or 'file'}:{group}:{row}"
        location = Location(file, row, group)
        if label is None:
            yield Item(name, 0, location, "the label is null")
        else:
            yield Item(name, *usable_label(int(label), num_classes, location))


def read_rows(url: str, group: int, rows: Sequence[int], column: str) -> dict[int, bytes]:
    """The bytes of the images in some rows of a row group.

    Raises:
        UserError: the file is damaged.
    """
    with open_parquet(url) as table, parquet_errors(url, group):
        plain = not _image_fields(url, table.schema_arrow, column)
        wanted = column if plain else f"{column}.bytes"
        values = table.read_row_group(group, columns=[wanted])[column].take(rows).combine_chunks()
        found = (values if plain else values.field("bytes")).to_pylist()
    return {row: value or b"" for row, value in zip(rows, found, strict=True)}


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
