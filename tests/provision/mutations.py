"""Every manifest with one field renamed, or one field of another type."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

Path = tuple[str | int, ...]
# Numbers and texts are both right there, so a list stands for the wrong type.
EITHER = {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu", "sizeLimit", "storage", "port"}
EITHER |= {"targetPort"}


def fields(value: Any, path: Path = ()) -> Iterator[Path]:
    """The path of every field, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from fields(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from fields(item, (*path, number))


def renamed(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """A copy in which the field has another name."""
    changed = copy.deepcopy(manifest)
    holder = _holder(changed, path)
    holder[f"{path[-1]}x"] = holder.pop(path[-1])
    return changed


def mistyped(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """A copy in which the field's value is of another type."""
    changed = copy.deepcopy(manifest)
    holder = _holder(changed, path)
    holder[path[-1]] = _wrong(holder[path[-1]], str(path[-1]))
    return changed


def _holder(manifest: Any, path: Path) -> Any:
    for step in path[:-1]:
        manifest = manifest[step]
    return manifest


def _wrong(value: Any, name: str) -> Any:
    if name in EITHER or isinstance(value, bool):
        return [value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return 7
    return "text"
