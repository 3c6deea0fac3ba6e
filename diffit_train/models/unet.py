"""DDPM++ and NCSN++ (Song et al. 2021) in the shape that EDM trained, with TMSA as an option.

The convolutional U-Nets of table 5: residual blocks whose embedding of noise level, label and
augmentation is added between two convolutions, and self-attention at some resolutions, which TMSA
replaces.

Shapes: B images, C channels, h x w pixels, E size of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffit_train.models.attention import TMSA, SelfAttention
from diffit_train.models.backbone import Backbone
from diffit_train.models.image import fourier_frequencies, group_norm, to_image, to_tokens
from diffit_train.models.layers import (
    FullPrecisionConv2d,
    LabelEmbedder,
    keyed_dropout,
    layer_seeds,
)

Attention = Literal["plain", "tmsa"]

# Both terms of a residual sum have unit variance, and so has the scaled sum.
SKIP_SCALE = math.sqrt(0.5)
# Standard deviation of last layers relative to others, which begin close to zero.
NEAR_ZERO = 1e-5
ATTENTION_GAIN = math.sqrt(0.2)


@dataclass(frozen=True)
class UNetShape:
    """Sizes of a DDPM++ or NCSN++.

    Attributes:
        kind: `ddpmpp`, with positional embedding of the noise level and 2x2 resampling; or
            `ncsnpp`, with Fourier features, a smoother filter, and the image fed to every
            resolution of the encoder.
        num_classes: number of classes, label `num_classes` being the null class; None for an
            unconditional model.
        augment_labels: number of labels of the augmentation; 0 for none.
        channels: base of the channels; of a stage, it times its multiplier.
        blocks: residual blocks of each stage of the encoder; the decoder has one more.
        attention_resolutions: sides of the images at which there is attention.
    """

    kind: Literal["ddpmpp", "ncsnpp"] = "ddpmpp"
    resolution: int = 32
    image_channels: int = 3
    out_channels: int = 3
    num_classes: int | None = None
    augment_labels: int = 0
    channels: int = 128
    multipliers: tuple[int, ...] = (2, 2, 2)
    blocks: int = 4
    attention_resolutions: tuple[int, ...] = (16,)
    attention: Attention = "plain"
    dropout: float = 0.0

    @property
    def taps(self) -> tuple[int, ...]:
        """The filter of up- and downsampling."""
        return (1, 3, 3, 1) if self.kind == "ncsnpp" else (1, 1)

    @property
    def embedding(self) -> int:
        """E."""
        return 4 * self.channels


class Resample(nn.Module):
    """Up- or downsampling by two with a fixed filter."""

    taps: Tensor  # (1, 1, n, n)

    def __init__(self, taps: tuple[int, ...], up: bool, pad: int | None = None) -> None:
        super().__init__()
        line = torch.tensor(taps, dtype=torch.float32)
        plane = line.outer(line) / line.sum() ** 2 * (4.0 if up else 1.0)
        self.register_buffer("taps", plane[None, None], persistent=False)
        self.up, self.pad = up, (len(taps) - 1) // 2 if pad is None else pad

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to twice or half the side."""
        taps = self.taps.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        resample = F.conv_transpose2d if self.up else F.conv2d
        return resample(x, taps, stride=2, padding=self.pad, groups=x.shape[1])


class UNetBlock(nn.Module):
    """Two convolutions with the embedding between them, and attention if wanted."""

    def __init__(
        self,
        shape: UNetShape,
        into: int,
        out: int,
        side: int,
        resample: Literal["up", "down"] | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.resample = Resample(shape.taps, up=resample == "up") if resample else nn.Identity()
        self.norm0, self.norm1 = group_norm(into), group_norm(out)
        self.conv0 = nn.Conv2d(into, out, 3, padding=1)
        self.affine = nn.Linear(shape.embedding, out)
        self.conv1 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(into, out, 1) if resample or into != out else nn.Identity()
        self.norm2: nn.GroupNorm | None = None
        self.attn: SelfAttention | TMSA | None = None
        if attention:
            self.norm2 = group_norm(out)
            self.attn = (
                TMSA(out, 1, side, None, shape.embedding)
                if shape.attention == "tmsa"
                else SelfAttention(out, 1)
            )

    def forward(self, x: Tensor, c: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Features (B, C, h, w) and embedding c (B, E) to (B, C', h', w').

        Args:
            seeds: (B,) of `layer_seeds`, of the dropout of each image; None for no dropout.
        """
        inner = self.conv0(self.resample(F.silu(self.norm0(x))))
        inner = F.silu(self.norm1(inner + self.affine(c)[:, :, None, None]))
        if seeds is not None and self.dropout:
            inner = keyed_dropout(inner, self.dropout, seeds)
        x = (self.conv1(inner) + self.skip(self.resample(x))) * SKIP_SCALE
        if self.attn is None or self.norm2 is None:
            return x
        tokens = to_tokens(self.norm2(x))
        out = self.attn(tokens, c) if isinstance(self.attn, TMSA) else self.attn(tokens)
        return (x + to_image(out, x.shape[-1])) * SKIP_SCALE


class UNet(Backbone):
    """DDPM++ or NCSN++."""

    frequencies: Tensor

    def __init__(self, shape: UNetShape) -> None:
        super().__init__()
        self.shape = shape
        fourier = shape.kind == "ncsnpp"
        features = shape.channels * (2 if fourier else 1)
        if fourier:
            frequencies = fourier_frequencies(features // 2)
        else:
            exponent = torch.arange(features // 2) / (features // 2 - 1)
            frequencies = 10_000.0**-exponent
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.y_embedder = (
            None if shape.num_classes is None else LabelEmbedder(shape.num_classes, features, 1.0)
        )
        self.a_embedder = (
            nn.Linear(shape.augment_labels, features, bias=False) if shape.augment_labels else None
        )
        self.mapping = nn.Sequential(
            nn.Linear(features, shape.embedding),
            nn.SiLU(),
            nn.Linear(shape.embedding, shape.embedding),
            nn.SiLU(),
        )
        self.stem = FullPrecisionConv2d(shape.image_channels, shape.channels, 3, padding=1)
        self.image_path = nn.ModuleList()
        self.blocks = nn.ModuleList()
        self._encoder_blocks = 0
        width = self._build_decoder(*self._build_encoder())
        self.norm = group_norm(width)
        self.head = nn.Conv2d(width, shape.out_channels, 3, padding=1)
        self._initialize()

    def _add(self, into: int, out: int, side: int, **options: Any) -> int:
        self.blocks.append(UNetBlock(self.shape, into, out, side, **options))
        return out

    def _build_encoder(self) -> tuple[int, list[int]]:
        """Channels of the last features, and of every skip."""
        shape = self.shape
        width, skips, image = shape.channels, [shape.channels], shape.image_channels
        for stage, multiplier in enumerate(shape.multipliers):
            side = shape.resolution >> stage
            attention = side in shape.attention_resolutions
            if stage:
                self._add(width, width, side, resample="down")
                skips.append(width)
                if shape.kind == "ncsnpp":
                    # Convolved before it is filtered, so that padding is done once.
                    self.image_path.append(
                        nn.Sequential(
                            nn.Conv2d(image, width, 3, padding=2),
                            Resample(shape.taps, up=False, pad=0),
                        )
                    )
                    image = width
            for _ in range(shape.blocks):
                width = self._add(width, shape.channels * multiplier, side, attention=attention)
                skips.append(width)
        self._encoder_blocks = len(self.blocks)
        return width, skips

    def _build_decoder(self, width: int, skips: list[int]) -> int:
        """Channels of the result."""
        shape = self.shape
        last = len(shape.multipliers) - 1
        for stage in reversed(range(last + 1)):
            side = shape.resolution >> stage
            if stage == last:
                self._add(width, width, side, attention=True)
                self._add(width, width, side)
            else:
                self._add(width, width, side, resample="up")
            for number in range(shape.blocks + 1):
                attention = number == shape.blocks and side in shape.attention_resolutions
                out = shape.channels * shape.multipliers[stage]
                width = self._add(width + skips.pop(), out, side, attention=attention)
        return width

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for block in self.blocks:
                assert isinstance(block, UNetBlock)
                block.conv1.weight.mul_(NEAR_ZERO)
                if block.attn is not None:
                    block.attn.qkv.weight.mul_(ATTENTION_GAIN)
                    block.attn.proj.weight.mul_(NEAR_ZERO)
            self.head.weight.mul_(NEAR_ZERO)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of an image."""
        return self.shape.image_channels, self.shape.resolution, self.shape.resolution

    @property
    def sizes(self) -> dict[str, Any]:
        """The fields of `UNetShape`."""
        return asdict(self.shape)

    @property
    def summary(self) -> str:
        """Channels, blocks and attention."""
        shape = self.shape
        channels = "-".join(str(shape.channels * m) for m in shape.multipliers)
        places = ", ".join(map(str, shape.attention_resolutions)) or "the coarsest resolution"
        return (
            f"{shape.resolution}x{shape.resolution} pixels, channels {channels}, {shape.blocks} "
            f"blocks a stage, {shape.attention} attention at {places}"
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        augment: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor:
        """As `ImageDiffiT.forward`."""
        dtype = self.norm.weight.dtype
        angle = t.float()[:, None] * self.frequencies.float()
        c = torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)
        if self.y_embedder is not None:
            c = c + self.y_embedder(y)
        if self.a_embedder is not None and augment is not None:
            c = c + self.a_embedder(augment.to(dtype))
        c = self.mapping(c)
        # What each block takes after x and c.
        rest: Sequence[tuple[Tensor, ...]] = [()] * len(self.blocks)
        if dropout_seeds is not None:
            rest = [(seeds,) for seeds in layer_seeds(dropout_seeds, len(self.blocks))]
        image = x.to(dtype)
        x = self.stem(x).to(dtype)
        skips, joins = [x], iter(self.image_path)
        for number in range(self._encoder_blocks):
            block = self.blocks[number]
            x = block(x, c, *rest[number])
            if self.shape.kind == "ncsnpp" and isinstance(block.resample, Resample):
                x = image = (x + next(joins)(image)) * SKIP_SCALE
            skips.append(x)
        for number in range(self._encoder_blocks, len(self.blocks)):
            block = self.blocks[number]
            assert isinstance(block, UNetBlock)
            if block.norm0.num_channels != x.shape[1]:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, c, *rest[number])
        return self.head(F.silu(self.norm(x)))
