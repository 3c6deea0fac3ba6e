"""Section `data`: the images, and the latent shards encoded from them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from diffit_train.config.base import Fraction, Name, PositiveInt, Section, without_credentials
from diffit_train.config.plugins import Plugged

FORMATS = Plugged(
    "data.format",
    "diffit_train.sources",
    ("auto", "folder", "tar", "zip", "ilsvrc", "webdataset", "parquet", "cifar10"),
)


class Columns(Section):
    """Names of columns: of parquet files, and of a CSV of labels."""

    image: str = Field(
        default="image",
        description="images: bytes, or a struct of `bytes` and `path`; in a CSV of labels, their "
        "paths (there also `path` or `file_name`)",
    )
    label: str | None = Field(
        default="label",
        description="class indices, in a CSV also class names; null: all images are one class",
    )


class Data(Section):
    """The images, and the latent shards encoded from them."""

    name: Name = Field(description="name of the latents under ROOT/latents")
    source: str = Field(
        description="images: folder, tar, zip or parquet files, or CIFAR-10's archive; a path, "
        "s3://…, hf://datasets/OWNER/NAME/… (`root:` means under ROOT)"
    )
    format: Annotated[str, FORMATS] = Field(
        default="auto",
        description="format of the source; auto: detect from its name and contents; or a class of "
        "your own, to which data.source means what it likes",
    )
    columns: Columns = Field(
        default=Columns(),
        description="names of the columns of parquet files and of a CSV of labels",
    )
    labels: str | None = Field(
        default=None,
        description="labels of the images in a folder, tar or zip, by path: a CSV, or a JSON as "
        "EDM's dataset.json; null: by the source's own dataset.json, or else by its folders",
    )
    resolution: PositiveInt = Field(description="side of the square images, in pixels")
    num_classes: PositiveInt = Field(description="number of classes")
    flip: bool = Field(
        default=False, description="also encode each image flipped horizontally (F = 2)"
    )
    images_per_shard: PositiveInt = Field(default=512, description="images per shard")
    max_rejected_fraction: Fraction = Field(
        default=0.01, description="fail if a larger fraction of the images cannot be used"
    )
    expected_images: PositiveInt | None = Field(
        default=None,
        description="number of images, used by `diffit plan` before they are encoded",
    )
    shuffle_streams: PositiveInt = Field(
        default=64,
        description="parallel streams of samples, independent of the number of workers: any number "
        "of workers up to this works, if there are as many shards",
    )
    shuffle_window: PositiveInt = Field(
        default=1024, description="consecutive samples of a stream that are shuffled together"
    )

    _source = field_validator("source")(without_credentials)

    @field_validator("labels")
    @classmethod
    def _labels(cls, url: str | None) -> str | None:
        return None if url is None else without_credentials(url)

    def image_identity(self) -> dict[str, Any]:
        """The keys that determine the images and their labels.

        Keys that came later belong to it only where they are set. Ours read the same images whether
        the format is named or detected.
        """
        always = {"source", "resolution", "num_classes"}
        given = {key for key in ("columns", "labels") if getattr(self, key) != _default(key)}
        named = {"format"} if FORMATS.is_plugged(self.format) else set()
        return self.model_dump(mode="json", include=always | given | named)


def _default(key: str) -> Any:
    return Data.model_fields[key].default
