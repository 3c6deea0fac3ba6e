"""The image-space DiffiT: a U-shaped network on pixels (paper section 3.2.2, appendices H.1, I.1).

Shapes: B images, C channels, h x w pixels of a stage, N = h w tokens, D channels of a stage, T size
of the time token.

Where the paper is silent or contradicts itself: attention heads are `head_size` wide; the channels
of a stage are matched by a convolution at its beginning, after the skip connection has been
concatenated in the decoder; a downsampler keeps its input's channels (table S.2 prints 16x16x128
once, which appendix I.1, "constant in the rest of the stages", contradicts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffit_train.models.attention import TMSA, NoTimeConditioning, SeparateTime, TimeInBias
from diffit_train.models.backbone import Backbone
from diffit_train.models.layers import (
    FullPrecisionConv2d,
    LabelEmbedder,
    Mlp,
    TimedMlp,
    TimestepEmbedder,
    keyed_dropout,
    layer_norm,
    layer_seeds,
)

Time = Literal["tmsa", "separate", "bias", "mlp", "none"]

ATTENTION: dict[str, type[TMSA]] = {
    "tmsa": TMSA,
    "separate": SeparateTime,
    "bias": TimeInBias,
    "mlp": NoTimeConditioning,
    "none": NoTimeConditioning,
}
# Scale of the random frequencies of Fourier time embeddings (Song et al. 2021, NCSN++).
FOURIER_SCALE = 16.0


@dataclass(frozen=True)
class ImageShape:
    """Sizes of an image-space DiffiT; stages from the finest resolution to the coarsest.

    Attributes:
        resolution: side of the image.
        out_channels: 2 * `image_channels` if the variance is learned.
        num_classes: number of classes, label `num_classes` being the null class; None for an
            unconditional model.
        augment_labels: number of labels of the augmentation; 0 for none.
        channels, blocks: of each stage; every stage but the first halves the resolution.
        window: side of the attention windows, in pixels of the stage.
        head_size: channels of an attention head.
        time_size: T.
        resample: by strided convolution and by nearest neighbors with a convolution, or bilinear.
        time: what the time token enters: queries, keys and values (`tmsa`); nothing but its own
            value (`separate`, table 7); the relative-position bias (`bias`, F of table 6); or the
            MLP (`mlp`, G of table 6).
        encoder, decoder: table 4; `diffit`, or plain transformer blocks with the time token added
            once a stage (`multi_resolution`), or `vit` and `setr_mla`.

    Raises:
        ValueError: sizes that do not divide each other.
    """

    resolution: int = 32
    image_channels: int = 3
    out_channels: int = 3
    num_classes: int | None = None
    augment_labels: int = 0
    channels: tuple[int, ...] = (128, 256, 256)
    blocks: tuple[int, ...] = (4, 4, 4)
    window: int = 4
    head_size: int = 32
    mlp_ratio: float = 4.0
    time_size: int = 512
    dropout: float = 0.0
    resample: Literal["convolution", "bilinear"] = "convolution"
    time: Time = "tmsa"
    time_embedding: Literal["positional", "fourier"] = "positional"
    encoder: Literal["diffit", "multi_resolution", "vit"] = "diffit"
    decoder: Literal["diffit", "multi_resolution", "setr_mla"] = "diffit"

    def __post_init__(self) -> None:
        if self.resolution % 2 ** (len(self.channels) - 1):
            raise ValueError(
                f"{len(self.channels)} stages do not divide resolution {self.resolution}"
            )

    def side(self, stage: int) -> int:
        """Side of a stage's images."""
        return self.resolution >> stage


class FourierEmbedder(TimestepEmbedder):
    """Noise levels (B,) to (B, T): random Fourier features, then a two-layer MLP (table 8)."""

    frequencies: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        values = fourier_frequencies(self.features // 2)
        self.register_buffer("frequencies", values, persistent=False)

    def angles(self, t: Tensor) -> Tensor:
        """(B,) to (B, features / 2)."""
        return t.float()[:, None] * self.frequencies.float()


class TransformerBlock(nn.Module):
    """x + attention(LN(x), c), then x + MLP(LN(x)): equations 7 and 8, on windows."""

    def __init__(self, shape: ImageShape, width: int, side: int, window: int, time: Time) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        heads = width // shape.head_size
        self.attn = ATTENTION[time](width, heads, side, window, shape.time_size)
        self.norm2 = layer_norm(width)
        timed = time == "mlp"
        self.mlp = (
            TimedMlp(width, shape.mlp_ratio, shape.time_size)
            if timed
            else Mlp(width, shape.mlp_ratio)
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, D) and time token c (B, T) to (B, N, D)."""
        x = x + self.attn(self.norm1(x), c)
        normed = self.norm2(x)
        return x + (self.mlp(normed, c) if isinstance(self.mlp, TimedMlp) else self.mlp(normed))


class ResBlock(nn.Module):
    """The residual cell: x + DiffiT-Block(Conv3x3(Swish(GN(x))), c), equations 9 and 10."""

    def __init__(self, shape: ImageShape, width: int, side: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.block = TransformerBlock(shape, width, side, shape.window, shape.time)
        self.dropout = shape.dropout

    def forward(self, x: Tensor, c: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Features x (B, D, h, w), time token c (B, T) to (B, D, h, w).

        Args:
            seeds: (B,) of `layer_seeds`, of the dropout of each image; None for no dropout.
        """
        inner = F.silu(self.norm(x))
        if seeds is not None and self.dropout:
            inner = keyed_dropout(inner, self.dropout, seeds)
        inner = self.conv(inner)
        return x + to_image(self.block(to_tokens(inner), c), x.shape[-1])


class PlainBlock(nn.Module):
    """A transformer block without time on a feature map (table 4, A to D)."""

    def __init__(self, shape: ImageShape, width: int, side: int, window: int) -> None:
        super().__init__()
        self.block = TransformerBlock(shape, width, side, window, "none")

    def forward(self, x: Tensor, c: Tensor, seeds: Tensor | None = None) -> Tensor:
        """As `ResBlock`; without dropout."""
        return to_image(self.block(to_tokens(x), c), x.shape[-1])


class Stage(nn.Module):
    """What precedes the blocks of a stage: resampling, matching of channels, added time.

    Attributes:
        first, count: of its blocks in the network's `blocks`.
    """

    def __init__(
        self,
        shape: ImageShape,
        resample: nn.Module,
        channels: tuple[int, int],
        added_time: bool,
        first: int,
        count: int,
    ) -> None:
        super().__init__()
        into, out = channels
        self.resample = resample
        self.match = nn.Conv2d(into, out, 3, padding=1) if into != out else nn.Identity()
        self.time = AddedTime(shape.time_size, out) if added_time else None
        self.first, self.count = first, count

    def forward(self, x: Tensor, c: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, D, h, w) of the stage before to (B, D', h', w')."""
        x = self.resample(x)
        x = self.match(x if skip is None else torch.cat([x, skip], dim=1))
        return x if self.time is None else self.time(x, c)


class AddedTime(nn.Module):
    """x + scale * Linear(c): the time token, adaptively scaled and added (section 5.2)."""

    def __init__(self, time_size: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(time_size, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, D, h, w) to the same."""
        return x + (self.scale * self.linear(c))[:, :, None, None]


class Upsample(nn.Module):
    """Twice the side: nearest neighbors and a 3x3 convolution, or bilinear without weights."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1) if kind == "convolution" else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) to (B, D, 2h, 2w)."""
        if self.conv is None:
            return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """Half the side: a 3x3 convolution of stride 2, or bilinear without weights."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        convolution = kind == "convolution"
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1) if convolution else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) to (B, D, h / 2, w / 2)."""
        if self.conv is None:
            return F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        return self.conv(x)


class MultiLevelAggregation(nn.Module):
    """SETR-MLA's decoder (Zheng et al. 2021): features of several depths, summed from the last.

    Args:
        into: channels of each feature map, first to last.
        width: channels of the result.
        side: side of the result.
    """

    def __init__(self, into: Sequence[int], width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.project = nn.ModuleList([nn.Conv2d(channels, width, 1) for channels in into])
        self.smooth = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in into])
        self.fuse = nn.Conv2d(width * len(into), width, 3, padding=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Maps (B, D_i, h_i, w_i) to (B, width, side, side)."""
        total: Tensor | None = None
        out = []
        for x, project, smooth in reversed(
            list(zip(features, self.project, self.smooth, strict=True))
        ):
            x = project(x)
            total = x if total is None else x + _resized(total, x.shape[-1])
            out.append(_resized(smooth(total), self.side))
        return self.fuse(torch.cat(out, dim=1))


class ImageDiffiT(Backbone):
    """Convolutional tokenizer, encoder, decoder with skips at every resolution, and head."""

    def __init__(self, shape: ImageShape) -> None:
        super().__init__()
        self.shape = shape
        embedder = FourierEmbedder if shape.time_embedding == "fourier" else TimestepEmbedder
        self.t_embedder = embedder(shape.time_size)
        self.y_embedder = (
            None if shape.num_classes is None else LabelEmbedder(shape.num_classes, shape.time_size)
        )
        self.a_embedder = (
            nn.Linear(shape.augment_labels, shape.time_size, bias=False)
            if shape.augment_labels
            else None
        )
        self.tokenizer = FullPrecisionConv2d(shape.image_channels, shape.channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        self.encoder = nn.ModuleList(
            self._vit() if shape.encoder == "vit" else self._encoder_stages()
        )
        self.decoder = nn.ModuleList()
        self.aggregate: MultiLevelAggregation | None = None
        if shape.decoder == "setr_mla":
            into = [shape.channels[-1]] * len(self.encoder)
            into = into if shape.encoder == "vit" else list(shape.channels)
            self.aggregate = MultiLevelAggregation(into, shape.channels[0], shape.resolution)
        else:
            self.decoder.extend(self._decoder_stages())
        self.norm = group_norm(shape.channels[0])
        self.head = nn.Conv2d(shape.channels[0], shape.out_channels, 3, padding=1)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith("t_embedder"):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # So that the first prediction is zero.
        nn.init.zeros_(self.head.weight)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of an image."""
        return self.shape.image_channels, self.shape.resolution, self.shape.resolution

    @property
    def sizes(self) -> dict[str, Any]:
        """The fields of `ImageShape`."""
        return asdict(self.shape)

    @property
    def summary(self) -> str:
        """Channels and blocks of the stages, and the window."""
        channels, blocks = ("-".join(map(str, v)) for v in (self.shape.channels, self.shape.blocks))
        side = self.shape.resolution
        return (
            f"{side}x{side} pixels, channels {channels}, blocks {blocks}, "
            f"window {self.shape.window}"
        )

    def _stage(self, stage: int, side: str, resample: nn.Module, into: int) -> Stage:
        """Build a stage and append its blocks to `self.blocks`."""
        shape = self.shape
        width, first = shape.channels[stage], len(self.blocks)
        kind = shape.encoder if side == "encoder" else shape.decoder
        for _ in range(shape.blocks[stage]):
            self.blocks.append(
                ResBlock(shape, width, shape.side(stage))
                if kind == "diffit"
                else PlainBlock(shape, width, shape.side(stage), shape.window)
            )
        added = kind != "diffit"
        return Stage(shape, resample, (into, width), added, first, shape.blocks[stage])

    def _encoder_stages(self) -> list[Stage]:
        shape, stages = self.shape, []
        for stage, width in enumerate(shape.channels):
            above = shape.channels[max(0, stage - 1)]
            resample = Downsample(above, shape.resample) if stage else nn.Identity()
            stages.append(self._stage(stage, "encoder", resample, above if stage else width))
        return stages

    def _decoder_stages(self) -> list[Stage]:
        shape, stages = self.shape, []
        for stage in reversed(range(len(shape.channels) - 1)):
            below, width = shape.channels[stage + 1], shape.channels[stage]
            resample = Upsample(below, shape.resample)
            stages.append(self._stage(stage, "decoder", resample, below + width))
        return stages

    def _vit(self) -> list[Stage]:
        """A ViT on the coarsest grid, with as many blocks as the U has in its encoder.

        It is cut into as many parts as there are stages: the decoder reads the end of each.
        """
        shape = self.shape
        width, last = shape.channels[-1], len(shape.channels) - 1
        patch, side, stages = 2**last, shape.side(last), []
        for stage, count in enumerate(shape.blocks):
            first = len(self.blocks)
            embed = nn.Conv2d(shape.channels[0], width, patch, stride=patch)
            self.blocks.extend([PlainBlock(shape, width, side, side) for _ in range(count)])
            resample = nn.Identity() if stage else embed
            stages.append(Stage(shape, resample, (width, width), True, first, count))
        return stages

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        augment: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor:
        """Noisy images x (B, C, h, w), noise levels t (B,), labels y (B,) to (B, O, h, w).

        Args:
            augment: labels of the augmentation (B, A); None for images that are not augmented.
            dropout_seeds: (B,) int64; None for no dropout.
        """
        c = self.t_embedder(t)
        if self.y_embedder is not None:
            c = c + self.y_embedder(y)
        if self.a_embedder is not None and augment is not None:
            c = c + self.a_embedder(augment.to(c.dtype))
        x = self.tokenizer(x)
        # Tokenized in the input's precision: see PatchEmbed.
        x = x.to(self.norm.weight.dtype)
        features: list[Tensor] = []
        # What each block takes after x and c.
        rest: Sequence[tuple[Tensor, ...]] = [()] * len(self.blocks)
        if dropout_seeds is not None:
            rest = [(seeds,) for seeds in layer_seeds(dropout_seeds, len(self.blocks))]
        for stage in self.encoder:
            x = self._run(stage, x, c, None, rest)
            features.append(x)
        if self.aggregate is not None:
            x = self.aggregate(features)
        for stage, skip in zip(self.decoder, reversed(features[:-1]), strict=False):
            x = self._run(stage, x, c, skip, rest)
        return self.head(F.silu(self.norm(x)))

    def _run(
        self,
        stage: nn.Module,
        x: Tensor,
        c: Tensor,
        skip: Tensor | None,
        rest: Sequence[tuple[Tensor, ...]],
    ) -> Tensor:
        assert isinstance(stage, Stage)
        x = stage(x, c, skip)
        for number in range(stage.first, stage.first + stage.count):
            x = self.blocks[number](x, c, *rest[number])
        return x


def fourier_frequencies(count: int) -> Tensor:
    """Random angular frequencies (count,); not in checkpoints, so the same in every model."""
    random = np.random.default_rng(0).standard_normal(count)
    return torch.tensor(2.0 * np.pi * FOURIER_SCALE * random, dtype=torch.float32)


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, but at least four channels each (as EDM)."""
    return nn.GroupNorm(min(32, max(1, channels // 4)), channels, eps=1e-6)


def to_tokens(x: Tensor) -> Tensor:
    """(B, D, h, w) to (B, N, D), row-major."""
    return x.flatten(2).transpose(1, 2)


def to_image(tokens: Tensor, side: int) -> Tensor:
    """Undo `to_tokens`."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)


def _resized(x: Tensor, side: int) -> Tensor:
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
