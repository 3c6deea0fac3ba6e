"""Section `data`: the images, and the latent shards encoded from them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from diffit_train.config.base import Fraction, Name, PositiveInt, Section, without_credentials
from diffit_train.plugins import Plugged

FORMATS = Plugged(
    "data.format",
    "diffit_train.sources",
    ("auto", "folder", "tar", "ilsvrc", "webdataset", "parquet", "cifar10"),
)


class Data(Section):
    """The images, and the latent shards encoded from them."""

    name: Name = Field(description="name of the latents under ROOT/latents")
    source: str = Field(
        description="images: folder, tar or parquet files, or CIFAR-10's archive (`root:` means "
        "under ROOT)"
    )
    format: Annotated[str, FORMATS] = Field(
        default="auto",
        description="format of the source; auto: detect from its name and contents; or a class of "
        "your own, to which data.source means what it likes",
    )
    resolution: PositiveInt = Field(description="side of the square images, in pixels")
    num_classes: PositiveInt = Field(description="number of classes")
    flip: bool = Field(
        default=False, description="also encode each image flipped horizontally (F = 2)"
    )
    images_per_shard: PositiveInt = Field(default=512, description="images per shard")
    max_rejected_fraction: Fraction = Field(
        default=0.01, description="fail if a larger fraction of the images cannot be read"
    )
    expected_images: PositiveInt | None = Field(
        default=None,
        description="number of images, used by `diffit plan` before they are encoded",
    )
    lanes: PositiveInt = Field(
        default=64,
        description="parallel streams of samples, independent of the number of workers: any number "
        "of workers up to this works, if there are as many shards",
    )
    shuffle_window: PositiveInt = Field(
        default=1024, description="consecutive samples of a lane that are shuffled together"
    )

    _source = field_validator("source")(without_credentials)

    def image_keys(self) -> set[str]:
        """Keys that determine the images and their labels."""
        # Ours read the same images whether the format is named or detected.
        named = {"format"} if FORMATS.is_plugged(self.format) else set()
        return {"source", "resolution", "num_classes", *named}
