"""Images in WebDataset tars: members of one key, the image and its label, are a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

from diffit_train.data.sources.base import (
    MAX_TEXT_BYTES,
    SUFFIXES,
    ImageList,
    Item,
    Location,
    RecordSource,
    cleaned,
    labeled_item,
    name_problem,
    numbered,
    open_archive,
)
from diffit_train.data.sources.tar import read_member, sparse_problem, tar_members


class WebDataset(RecordSource):
    """Tars, or one tar, with KEY.jpg (png, webp) and KEY.cls or KEY.json."""

    kind, ending = "webdataset", ".tar"

    def list_images(self) -> ImageList:
        """List the samples in the order of the files; see `Source.list_images`."""
        items: list[Item] = []
        seen: set[str] = set()
        for samples in self.each(lambda file: list(self._samples(file))):
            for item in samples:
                twice = item.name in seen and not item.problem
                items.append(item._replace(problem="the key occurs twice") if twice else item)
                seen.add(item.name)
        return ImageList(self, numbered(self.data.num_classes), items)

    def read(self, location: Location) -> bytes:
        """Return an image; see `Source.read`."""
        return read_member(self.path(location.file), location)

    def _samples(self, file: str) -> Iterator[Item]:
        """Samples of a tar; members with the same key must be adjacent."""
        url, classes = self.path(file), self.data.num_classes
        with open_archive(url) as opened:
            key, parts = "", {}  # type: ignore[var-annotated]
            for member in tar_members(opened, url):
                folder, slash, name = cleaned(member.name).rpartition("/")
                stem, _, ending = name.partition(".")
                this = f"{folder}{slash}{stem}"
                if parts and this != key:
                    yield _sample(file, key, parts, classes)
                    parts = {}
                key, ending, text = this, ending.lower(), b""
                problem = sparse_problem(member) or name_problem(key)
                if ending in ("cls", "json") and not problem:
                    if member.size > MAX_TEXT_BYTES:
                        problem = f"its label has {member.size:,} bytes"
                    else:
                        position = opened.tell()
                        opened.seek(member.offset_data)
                        text = opened.read(member.size)
                        opened.seek(position)
                where = Location(file, member.offset_data, member.size)
                parts.setdefault(ending, _Part(where, text, problem))
            if parts:
                yield _sample(file, key, parts, classes)


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
    return labeled_item(key, label, num_classes, location)


def _json_label(data: bytes) -> int:
    value = json.loads(data)
    for name in ("label", "cls", "class"):
        if isinstance(value, dict) and name in value:
            label = value[name]
            if isinstance(label, float) and not label.is_integer():
                raise ValueError(label)
            return int(label)
    raise KeyError("label")
