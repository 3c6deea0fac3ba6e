"""Section `data`: the images, and the latent shards encoded from them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import field_validator

from diffit_train.config.base import Fraction, Name, PositiveInt, Section, without_credentials
from diffit_train.config.plugins import Plugged

FORMATS = Plugged(
    "data.format",
    "diffit_train.sources",
    ("auto", "folder", "tar", "zip", "ilsvrc", "webdataset", "parquet", "cifar10"),
)


class Columns(Section):
    """Names of columns: of parquet files, and of a CSV of labels."""

    image: str = "image"
    """images: bytes, or a struct of `bytes` and `path`; in a CSV of labels, their paths (there also
    `path` or `file_name`)"""
    label: str | None = "label"
    """class indices, in a CSV also class names; null: all images are one class"""


class Data(Section):
    """The images, and the latent shards encoded from them."""

    name: Name
    """name of the latents under ROOT/latents"""
    source: str
    """images: folder, tar, zip or parquet files, or CIFAR-10's archive; a path, s3://…,
    hf://datasets/OWNER/NAME/… (`root:` means under ROOT)"""
    format: Annotated[str, FORMATS] = "auto"
    """format of the source; auto: detect from its name and contents; or a custom class, to
    which data.source means what it likes"""
    columns: Columns = Columns()
    """names of the columns of parquet files and of a CSV of labels"""
    labels: str | None = None
    """labels of the images in a folder, tar or zip, by path: a CSV, or a JSON as EDM's
    dataset.json; null: by the source's own dataset.json, or else by its folders"""
    resolution: PositiveInt
    """side of the square images, in pixels"""
    num_classes: PositiveInt
    """number of classes"""
    flip: bool = False
    """also encode each image flipped horizontally (F = 2)"""
    images_per_shard: PositiveInt = 512
    """images per shard"""
    max_rejected_fraction: Fraction = 0.01
    """fail if a larger fraction of the images cannot be used"""
    expected_images: PositiveInt | None = None
    """number of images, used by `diffit plan` before they are encoded"""
    shuffle_streams: PositiveInt = 64
    """parallel streams of samples, independent of the number of workers: any number of workers up
    to this works, if there are as many shards"""
    shuffle_window: PositiveInt = 1024
    """consecutive samples of a stream that are shuffled together"""

    _source = field_validator("source")(without_credentials)

    @field_validator("labels")
    @classmethod
    def _labels(cls, url: str | None) -> str | None:
        return None if url is None else without_credentials(url)

    def image_identity(self) -> dict[str, Any]:
        """The keys that determine the images and their labels.

        Whether one of our formats is named or detected makes no difference.
        """
        keys = {"source", "resolution", "num_classes", "columns", "labels"}
        named = {"format"} if FORMATS.is_plugged(self.format) else set()
        return self.model_dump(mode="json", include=keys | named)
