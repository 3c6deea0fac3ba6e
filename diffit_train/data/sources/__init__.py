"""Image sources, local or remote, by format.

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
by file name, then in file order.
"""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from pathlib import PurePosixPath

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.data import FORMATS
from diffit_train.data.sources.base import (
    SUFFIXES,
    ImageList,
    Item,
    Location,
    Source,
    cleaned,
    open_archive,
    split_pattern,
    unique,
)
from diffit_train.data.sources.cifar10 import Cifar10, is_archive
from diffit_train.data.sources.custom import CustomSource
from diffit_train.data.sources.files import Folder
from diffit_train.data.sources.labels import DATASET_JSON
from diffit_train.data.sources.parquet import Parquet
from diffit_train.data.sources.tar import Ilsvrc, Tar, tar_members
from diffit_train.data.sources.webdataset import WebDataset
from diffit_train.data.sources.zips import Zip
from diffit_train.errors import UserError

__all__ = [
    "ImageList",
    "Item",
    "Location",
    "Source",
    "list_images",
    "open_source",
    "source_kind",
]

SOURCES: dict[str, type[Source]] = {
    source.kind: source for source in (Folder, Tar, Zip, Ilsvrc, WebDataset, Parquet, Cifar10)
}


def open_source(recipe: Recipe) -> Source:
    """The recipe's `data.source`.

    Raises:
        UserError: it is missing, or its format cannot be inferred or has no use for the labels.
    """
    data, root = recipe.data, recipe.storage.root
    url = storage.resolve(root, data.source)
    custom = FORMATS.is_plugged(data.format)
    source_class = CustomSource if custom else SOURCES[source_kind(url, data.format)]
    if data.labels is not None:
        if not source_class.holds_files:
            kind = FORMATS.reference(data.format) if custom else source_class.kind
            raise UserError(
                f"data.labels is set, but data.source {url} was read as {kind}, which has its own "
                "labels; set data.format if it is a folder, tar or zip, else data.labels=null"
            )
        data = data.model_copy(update={"labels": storage.resolve(root, data.labels)})
    return source_class(url, data)


def list_images(recipe: Recipe) -> ImageList:
    """The images of `data.source`.

    Raises:
        UserError: the source is missing, empty or in an unknown format, its number of classes is
            not the recipe's, or its labels are not those of its images.
    """
    data, source = recipe.data, open_source(recipe)
    images = source.list_images()
    if not images.items:
        raise UserError(
            f"data.source {source.url} holds no images (read as {source.kind}); expected one "
            f"folder per class with {', '.join(sorted(SUFFIXES))} files; for another format set "
            "data.format"
        )
    if len(images.classes) != data.num_classes:
        raise UserError(
            f"data.source {source.url} has {len(images.classes)} classes, but data.num_classes is "
            f"{data.num_classes}; set data.num_classes={len(images.classes)} or fix the source"
        )
    return replace(images, items=list(unique(images.items)))


def source_kind(url: str, wanted: str) -> str:
    """Format of a source: `wanted`, or for `auto` inferred from its name and first members.

    Raises:
        UserError: it is missing, or its format cannot be inferred.
    """
    folder, pattern = split_pattern(url)
    if not storage.exists(folder):
        hint = "set it to a folder with one subfolder per class, a tar, zip or parquet files"
        if folder.startswith(storage.HUB):
            hint = (
                "set it to a folder or file of a data set, hf://datasets/OWNER/NAME/PATH; a "
                "private or gated one needs HF_TOKEN"
            )
        raise UserError(f"data.source {folder} does not exist; {hint}")
    if pattern is not None:
        return _kind_of_pattern(url, wanted)
    storage.require_regular(url)
    is_folder = storage.is_folder(url)
    if wanted != "auto":
        if is_folder and wanted in ("tar", "ilsvrc", "zip"):
            raise UserError(f"data.source {url} is a folder, but data.format is {wanted!r}")
        if not is_folder and wanted == "folder":
            raise UserError(f"data.source {url} is not a folder, but data.format is 'folder'")
        return wanted
    if is_archive(url):
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


def _kind_of_pattern(url: str, wanted: str) -> str:
    for kind, ending in (("parquet", Parquet.ending), ("webdataset", WebDataset.ending)):
        if url.endswith(ending) and wanted in ("auto", kind):
            folder, pattern = split_pattern(url)
            if not fnmatch.filter(storage.list_names(folder), pattern or ""):
                raise UserError(f"data.source {url} matches no file")
            return kind
    raise UserError(
        f"data.source {url} names several files, which must be .parquet or WebDataset .tar files"
        + (f", but data.format is {wanted!r}" if wanted != "auto" else "")
    )


def _kind_of_tar(url: str) -> str:
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
