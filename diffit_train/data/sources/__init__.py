"""Image sources, local or remote: listing their images. `reading` gets the bytes.

    folder       one subfolder for each class
    tar, zip     such a folder, packed
    ilsvrc       ImageNet's own tar, containing one tar for each class
    webdataset   a tar, or a folder of tars, with KEY.jpg (png, webp) and KEY.cls or KEY.json
    parquet      a file, or a folder of files, with a column of images and one of labels
    cifar10      CIFAR-10's own archive, binary version

Of the first two, labels may stand in a file instead: `data.labels`, or EDM's `dataset.json` in the
source; and for a recipe of one class, images may be at any depth. Of a folder of tars or parquet
files, `FOLDER/train-*.parquet` names some.

The order of the images is fixed: folders and archives of folders by name; webdataset and parquet
by file name, then in file order. An image with a problem in the listing (a label out of range, a
duplicate name) keeps its index and carries the problem.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from pathlib import PurePosixPath

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.data import FORMATS
from diffit_train.data import plugged
from diffit_train.data.sources import cifar10
from diffit_train.data.sources.folder import list_folder
from diffit_train.data.sources.labels import (
    DATASET_JSON,
    labeled,
    read_dataset_json,
    read_label_file,
)
from diffit_train.data.sources.listing import (
    IMAGE_COLUMN,
    SUFFIXES,
    Files,
    Found,
    ImageList,
    Item,
    Location,
    Source,
    SourceKind,
    by_folder,
    cleaned,
    items_digest,
    unique,
    usable_label,
)
from diffit_train.data.sources.parquet import list_parquet
from diffit_train.data.sources.tar import list_ilsvrc, list_tar, open_archive, tar_members
from diffit_train.data.sources.webdataset import list_webdataset
from diffit_train.data.sources.zips import list_zip
from diffit_train.errors import UserError
from diffit_train.progress import say

__all__ = [
    "IMAGE_COLUMN",
    "ImageList",
    "Item",
    "Location",
    "Source",
    "SourceKind",
    "items_digest",
    "list_images",
    "source_kind",
]

# Formats that hold files, which a folder or a list labels.
_FILES: dict[SourceKind, Callable[[str], Files]] = {
    "folder": list_folder,
    "tar": list_tar,
    "zip": list_zip,
    "ilsvrc": list_ilsvrc,
}
_LABELED_BY_FILE = ("folder", "tar", "zip")


def list_images(recipe: Recipe) -> ImageList:
    """The images of `data.source`.

    Raises:
        UserError: the source is missing, empty or in an unknown format, its number of classes is
            not the recipe's, or its labels are not those of its images.
    """
    data = recipe.data
    url = storage.resolve(recipe.storage.root, data.source)
    own = FORMATS.is_plugged(data.format)
    kind: SourceKind = FORMATS.reference(data.format) if own else source_kind(url, data.format)  # type: ignore[assignment]
    if data.labels is not None and kind not in _LABELED_BY_FILE:
        raise UserError(
            f"data.labels is set, but data.source {url} was read as {kind}, which has its own "
            f"labels; set data.format if it is one of {', '.join(_LABELED_BY_FILE)}, else "
            "data.labels=null"
        )
    found = _found(recipe, url, kind)
    if not found.items:
        raise UserError(
            f"data.source {url} holds no images (read as {kind}); expected one folder per class "
            f"with {', '.join(sorted(SUFFIXES))} files; for another format set data.format"
        )
    if len(found.classes) != data.num_classes:
        raise UserError(
            f"data.source {url} has {len(found.classes)} classes, but data.num_classes is "
            f"{data.num_classes}; set data.num_classes={len(found.classes)} or fix the source"
        )
    column = {"image_column": data.columns.image} if kind == "parquet" else {}
    source = Source(_split_pattern(url)[0], kind, **column)
    return ImageList(source, tuple(found.classes), list(unique(found.items)))


def _found(recipe: Recipe, url: str, kind: SourceKind) -> Found:
    classes = recipe.data.num_classes
    if FORMATS.is_plugged(kind):
        return _list_plugged(kind, url, classes)
    if kind == "cifar10":
        return cifar10.list_images(url)
    if kind == "parquet":
        folder, files = _files_of(url, ".parquet")
        return list_parquet(folder, files, recipe.data.columns, classes)
    if kind == "webdataset":
        return list_webdataset(*_files_of(url, ".tar"), classes)
    rows, dataset_json = _FILES[kind](url)
    if recipe.data.labels is not None:
        file = storage.resolve(recipe.storage.root, recipe.data.labels)
        return labeled(rows, read_label_file(file, recipe.data.columns), url, classes)
    if dataset_json is not None and classes > 1 and rows:
        labels = read_dataset_json(dataset_json(), f"{DATASET_JSON} in {url}")
        if labels is not None:
            say(f"Labels from {labels.origin}")
            return labeled(rows, labels, url, classes)
    return by_folder(rows, classes)


def _list_plugged(name: str, url: str, num_classes: int) -> Found:
    """The images of another package's source."""
    source = plugged.open_source(name, url)
    items = [
        Item(image, *usable_label(label, num_classes, Location("", index)))
        for index, (image, label) in enumerate(plugged.listed(name, source))
    ]
    return Found(list(source.classes), items)


def _split_pattern(url: str) -> tuple[str, str | None]:
    """Folder and pattern of `FOLDER/train-*.parquet`; of a file or folder, itself and None."""
    name = url.rstrip("/").rpartition("/")[2]
    if not {"*", "?"} & set(name) or "/" not in url or storage.exists(url):
        return url, None
    return storage.parent(url), name


def _files_of(url: str, ending: str) -> tuple[str, list[str]]:
    """A folder and the names of its files that end so; of a file, itself and an empty name."""
    folder, pattern = _split_pattern(url)
    if pattern is None and not storage.is_folder(folder):
        return folder, [""]
    names = [name for name in storage.list_names(folder) if name.endswith(ending)]
    return folder, fnmatch.filter(names, pattern) if pattern is not None else names


def source_kind(url: str, wanted: str) -> SourceKind:
    """Format of a source: `wanted`, or for `auto` inferred from its name and first members.

    Raises:
        UserError: it is missing, or its format cannot be inferred.
    """
    folder, pattern = _split_pattern(url)
    if not storage.exists(folder):
        raise UserError(f"data.source {folder} does not exist; {_missing_hint(folder)}")
    if pattern is not None:
        return _kind_of_pattern(url, wanted)
    storage.require_regular(url)
    is_folder = storage.is_folder(url)
    if wanted != "auto":
        if is_folder and wanted in ("tar", "ilsvrc", "zip"):
            raise UserError(f"data.source {url} is a folder, but data.format is {wanted!r}")
        if not is_folder and wanted == "folder":
            raise UserError(f"data.source {url} is not a folder, but data.format is 'folder'")
        return wanted  # type: ignore[return-value]
    if cifar10.is_archive(url):
        return "cifar10"
    if is_folder:
        names = storage.list_names(url)
        if any(name.endswith(".parquet") for name in names):
            return "parquet"
        return "webdataset" if any(name.endswith(".tar") for name in names) else "folder"
    if url.endswith(".parquet"):
        return "parquet"
    if url.endswith(".zip"):
        return "zip"
    if not url.endswith(".tar"):
        raise UserError(
            f"data.source {url} is neither a folder nor a .tar, .zip or .parquet file; unpack or "
            "convert it"
        )
    return _kind_of_tar(url)


def _missing_hint(url: str) -> str:
    if url.startswith(storage.HUB):
        return (
            "set it to a folder or file of a data set, hf://datasets/OWNER/NAME/PATH; a private or "
            "gated one needs HF_TOKEN"
        )
    return "set it to a folder with one subfolder per class, a tar, zip or parquet files"


def _kind_of_pattern(url: str, wanted: str) -> SourceKind:
    kinds: dict[str, SourceKind] = {".parquet": "parquet", ".tar": "webdataset"}
    for ending, kind in kinds.items():
        if url.endswith(ending) and wanted in ("auto", kind):
            if not _files_of(url, ending)[1]:
                raise UserError(f"data.source {url} matches no file")
            return kind
    raise UserError(
        f"data.source {url} names several files, which must be .parquet or WebDataset .tar files"
        + (f", but data.format is {wanted!r}" if wanted != "auto" else "")
    )


def _kind_of_tar(url: str) -> SourceKind:
    with open_archive(url) as file:
        for member in tar_members(file, url):
            if member.name.endswith(".tar"):
                return "ilsvrc"
            name = cleaned(member.name)
            if PurePosixPath(name).suffix.lower() in (*SUFFIXES, ".cls", ".json"):
                if name == DATASET_JSON:
                    continue
                return "tar" if "/" in name else "webdataset"
    return "tar"
