"""Labels in a file: a CSV, or a JSON as EDM's `dataset.json`; paths are relative to the source.

Source of the JSON's layout, `{"labels": [[PATH, LABEL], …]}`: EDM's `dataset_tool.py`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from diffit_train import storage
from diffit_train.config.data import Columns
from diffit_train.data.sources.base import cleaned
from diffit_train.errors import UserError

# EDM's list of labels, at the top of a data set.
DATASET_JSON = "dataset.json"
# Ten times those of ImageNet.
MAX_FILE_BYTES = 2**29
# Names of a CSV's column of paths, besides the one that the recipe gives; Hugging Face's is
# `file_name`.
_PATH_COLUMNS = ("path", "file_name")


class Labels(NamedTuple):
    """Labels by path: class indices, or class names. `origin` is named in messages."""

    origin: str
    by_path: dict[str, int] | dict[str, str]


def read_label_file(url: str, columns: Columns) -> Labels:
    """The labels of a CSV or JSON file.

    Raises:
        UserError: it is missing, too large, in another format, or has a line that cannot be used.
    """
    try:
        storage.require_regular(url)
        size = storage.size_bytes(url)
        if size > MAX_FILE_BYTES:
            raise UserError(f"data.labels {url} has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
        data = storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(
            f"data.labels {url} is not a file; set it to a CSV, or a JSON as EDM's dataset.json"
        ) from error
    if url.endswith(".json"):
        labels = read_dataset_json(data, url)
        if labels is None:
            raise UserError(f'{url} has no labels; it needs {{"labels": [["PATH", LABEL], …]}}')
        return labels
    if url.endswith(".csv"):
        return _read_csv(data, url, columns)
    raise UserError(f"data.labels {url} is neither a .csv nor a .json file")


def read_dataset_json(data: bytes, origin: str) -> Labels | None:
    """The labels of EDM's `dataset.json`; None if it holds none, as of an unlabeled data set.

    Raises:
        UserError: it is not JSON, or an entry is not a path with an integer.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{origin} is not valid JSON ({reason}); fix it, or move it away"
        ) from error
    entries = value.get("labels") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        return None
    pairs = []
    for number, entry in enumerate(entries):
        match entry:
            case [str(path), int(label)] if not isinstance(label, bool):
                pairs.append((path, label))
            case _:
                raise UserError(
                    f"{origin}: entry {number} of `labels` is {_short(entry)}, but must be a path "
                    "and a class index"
                )
    return Labels(origin, _by_path(pairs, origin))


def _read_csv(data: bytes, origin: str, columns: Columns) -> Labels:
    try:
        # Spreadsheets begin with a byte order mark.
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{origin} is not a CSV in UTF-8 ({error})") from error
    header = [cell.strip() for cell in rows[0]] if rows else []
    path_at = _column(header, (columns.image, *_PATH_COLUMNS), "image", origin)
    label_at = _column(header, (columns.label or "label",), "label", origin)
    pairs = []
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) != len(header) or not row[path_at] or not row[label_at].strip():
            raise UserError(
                f"{origin}: line {number} is {_short(','.join(row))}, but needs the columns "
                f"{', '.join(header)}"
            )
        pairs.append((row[path_at], row[label_at].strip()))
    indices = [_index(label) for _, label in pairs]
    if None not in indices:
        numbered = zip((path for path, _ in pairs), indices, strict=True)
        return Labels(origin, _by_path(numbered, origin))
    if any(index is not None for index in indices):
        path, odd = pairs[indices.index(None)]
        raise UserError(
            f"{origin}: the label of {path} is {_short(odd)}, but others are numbers; write class "
            "indices, or the names of classes"
        )
    return Labels(origin, _by_path(pairs, origin))


def _column(header: Sequence[str], names: Sequence[str], key: str, origin: str) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    raise UserError(
        f"{origin} has no column {names[0]!r}; its first line has {_short(', '.join(header))}: set "
        f"data.columns.{key} to one of them"
    )


def _index(text: str) -> int | None:
    # int() also takes underscores and other scripts' digits.
    return int(text) if re.fullmatch("-?[0-9]{1,19}", text) else None


def _by_path(pairs: Iterable[tuple[str, Any]], origin: str) -> dict[str, Any]:
    labels: dict[str, Any] = {}
    for path, label in pairs:
        name = cleaned(path)
        if name in labels:
            raise UserError(f"{origin} labels {name} twice; remove one of the two")
        labels[name] = label
    return labels


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
