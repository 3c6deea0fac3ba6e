"""Images in WebDataset tars: members of one key, the image and its label, are a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from diffit_train import storage
from diffit_train.data.sources.listing import (
    MAX_TEXT_BYTES,
    SUFFIXES,
    Found,
    Item,
    Location,
    cleaned,
    each,
    usable_label,
)
from diffit_train.data.sources.tar import member_problem, open_archive, tar_members


def list_webdataset(url: str, files: Sequence[str], num_classes: int) -> Found:
    """The samples of tars, in the order of the files.

    Args:
        files: names in the folder `url`; "" for `url` itself.
    """
    items: list[Item] = []
    seen: set[str] = set()
    for found in each(files, lambda file: list(_samples(url, file, num_classes))):
        for item in found:
            twice = item.name in seen and not item.problem
            items.append(item._replace(problem="the key occurs twice") if twice else item)
            seen.add(item.name)
    return Found([str(number) for number in range(num_classes)], items)


def _samples(url: str, file: str, num_classes: int) -> Iterator[Item]:
    """Samples of a tar; members with the same key must be adjacent."""
    name = storage.join(url, file) if file else url
    with open_archive(name) as opened:
        key, parts = None, {}  # type: ignore[var-annotated]
        for member in tar_members(opened, name):
            stem, _, ending = PurePosixPath(cleaned(member.name)).name.partition(".")
            folder = cleaned(member.name).rpartition("/")[0]
            this = f"{folder}/{stem}" if folder else stem
            if key is not None and this != key:
                yield _sample(file, key, parts, num_classes)
                parts = {}
            key = this
            location = Location(file, member.offset_data, member.size)
            ending = ending.lower()
            text, problem = b"", member_problem(member, key)
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
            yield _sample(file, key, parts, num_classes)


class _Part(NamedTuple):
    """A member of a sample; `text` of a label only."""

    location: Location
    text: bytes
    problem: str


def _sample(file: str, key: str, parts: dict[str, _Part], num_classes: int) -> Item:
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
    return Item(key, *usable_label(label, num_classes, location))


def _json_label(data: bytes) -> int:
    value = json.loads(data)
    for name in ("label", "cls", "class"):
        if isinstance(value, dict) and name in value:
            label = value[name]
            if isinstance(label, float) and not label.is_integer():
                raise ValueError(label)
            return int(label)
    raise KeyError("label")
