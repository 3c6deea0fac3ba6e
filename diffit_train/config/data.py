"""Section `data`: the images, and the latent shards made of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffit_train.config.base import Fraction, Name, PositiveInt, Section


class Data(Section):
    """The images, and the latent shards made of them."""

    name: Name = Field(description="name of the latents under ROOT/latents")
    source: str = Field(description="folder, tar or parquet; `root:` means under ROOT")
    format: Literal["auto", "folder", "tar", "ilsvrc", "webdataset", "parquet"] = Field(
        default="auto", description="what the source is; auto: what its name and contents say"
    )
    resolution: PositiveInt = Field(description="side of the square images, in pixels")
    num_classes: PositiveInt = Field(description="number of classes")
    flip: bool = Field(default=False, description="also encode each image mirrored (F = 2)")
    images_per_shard: PositiveInt = Field(default=512, description="images in a shard")
    max_rejected_fraction: Fraction = Field(
        default=0.01, description="stop when more of the images than this cannot be read"
    )
    expected_images: PositiveInt | None = Field(
        default=None, description="number of images, for `diffit plan` before they are encoded"
    )
    lanes: PositiveInt = Field(
        default=64, description="parallel streams of samples; a world size must divide them"
    )
    shuffle_window: PositiveInt = Field(
        default=1024, description="samples of a lane that are shuffled together"
    )
