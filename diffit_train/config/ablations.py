"""The paper's ablations: what each row changes, and what the paper reports for it.

A row is named as in the paper. At a smaller scale the same keys change on a smaller network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffit_train.config.load import load_recipe
from diffit_train.config.recipe import Recipe
from diffit_train.errors import UserError

Scale = Literal["tiny", "small", "full"]
SCALES: tuple[Scale, ...] = ("tiny", "small", "full")


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        title: what the row is, in the paper's words.
        overrides: of the recipe.
        fid: the paper's; None where it gives none.
        width, time: factors of the channels after the first stage, and of the time token.
    """

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    fid: float | None = None
    width: float = 1.0
    time: float = 1.0

    @property
    def changes(self) -> bool:
        """Whether it differs from the recipe as it is."""
        return bool(self.overrides) or (self.width, self.time) != (1.0, 1.0)


@dataclass(frozen=True)
class Ablation:
    """A table or figure of the paper.

    Attributes:
        recipe: at full scale.
        rows: as in the paper.
        trains: whether rows differ in training; else one run is evaluated in several ways.
        best_first: names of the rows from the lowest FID, where the paper gives no numbers.
    """

    name: str
    title: str
    recipe: str
    rows: tuple[Row, ...]
    trains: bool = True
    best_first: tuple[str, ...] = ()

    def order(self) -> list[str]:
        """Names of the rows from the paper's lowest FID."""
        if self.best_first:
            return list(self.best_first)
        known = [row for row in self.rows if row.fid is not None]
        return [row.name for row in sorted(known, key=lambda row: row.fid or 0.0)]


_VIT, _MULTI, _MLA = "vit", "multi_resolution", "setr_mla"


def _parts(encoder: str, decoder: str) -> tuple[str, ...]:
    # Together, as some pairs are refused.
    return (f"model.image.encoder={encoder}", f"model.image.decoder={decoder}")


def _unet(architecture: str, variant: str, attention: str) -> tuple[str, ...]:
    """EDM's U-Nets with VP or VE."""
    return (
        f"model.architecture={architecture}",
        f"model.unet.attention={attention}",
        f"diffusion.edm.variant={variant}",
    )


ABLATIONS = {
    ablation.name: ablation
    for ablation in (
        Ablation(
            "table3",
            "time and feature dimension",
            "cifar10",
            (
                Row("time512-dim512", "time 512, features 512", fid=1.99, width=2.0),
                Row("time256-dim256", "time 256, features 256", fid=2.13, time=0.5),
                Row("time512-dim256", "time 512, features 256", fid=1.95),
            ),
        ),
        Ablation(
            "table4",
            "encoder and decoder",
            "cifar10",
            (
                Row("A", "ViT, SETR-MLA", _parts(_VIT, _MLA), 5.34),
                Row("B", "multi-resolution, SETR-MLA", _parts(_MULTI, _MLA), 4.64),
                Row("C", "multi-resolution, multi-resolution", _parts(_MULTI, _MULTI), 3.71),
                Row("D", "DiffiT, multi-resolution", _parts("diffit", _MULTI), 2.27),
                Row("E", "DiffiT, DiffiT", (), 1.95),
            ),
        ),
        Ablation(
            "table5",
            "TMSA instead of self-attention in U-Nets",
            "cifar10",
            (
                Row("ve", "VE, self-attention", _unet("ncsnpp", "ve", "plain"), 3.77),
                Row("ve-tmsa", "VE, TMSA", _unet("ncsnpp", "ve", "tmsa"), 3.49),
                Row("vp", "VP, self-attention", _unet("ddpmpp", "vp", "plain"), 3.01),
                Row("vp-tmsa", "VP, TMSA", _unet("ddpmpp", "vp", "tmsa"), 2.76),
            ),
        ),
        Ablation(
            "table6",
            "where time enters",
            "cifar10",
            (
                Row("F", "relative-position bias", ("model.image.time=bias",), 3.97),
                Row("G", "MLP", ("model.image.time=mlp",), 3.81),
                Row("H", "TMSA", (), 1.95),
            ),
        ),
        Ablation(
            "table7",
            "time token in TMSA",
            "cifar10",
            (
                Row("separate", "separate", ("model.image.time=separate",), 2.28),
                Row("mixed", "mixed", (), 1.95),
            ),
        ),
        Ablation(
            "table8",
            "time embedding",
            "cifar10",
            (
                Row("fourier", "Fourier", ("model.image.time_embedding=fourier",), 2.02),
                Row("positional", "positional", (), 1.95),
            ),
        ),
        Ablation(
            "figure7a",
            "guidance scale, ImageNet 256",
            "imagenet256",
            tuple(
                Row(f"{scale:g}", f"scale {scale:g}", (f"evaluate.guidance.scale={scale}",), fid)
                for scale, fid in ((3.8, None), (4.2, None), (4.6, 1.73), (5.0, None))
            ),
            trains=False,
        ),
        Ablation(
            "figure7b",
            "TMSA and the modulation of DiT-XL, ImageNet 256",
            "imagenet256",
            (
                Row("modulation", "adaLN-Zero", ("model.architecture=dit",)),
                Row("tmsa", "TMSA", ("model.architecture=dit_tmsa",)),
            ),
            best_first=("tmsa", "modulation"),
        ),
        Ablation(
            "figure8",
            "window of TMSA",
            "cifar10",
            (
                # The paper gives the changes: 23.23% from 2 to 4, 1.53% from 4 to 8.
                Row("2", "window 2", ("model.image.window=2",), 2.54),
                Row("4", "window 4", (), 1.95),
                Row("8", "window 8", ("model.image.window=8",), 1.92),
            ),
        ),
    )
}

# Changes of cifar10 for the smaller scales, which are measured on features of the images' own.
_SMALLER = (
    "data.lanes=16",
    "train.precision=fp32",
    "train.augment=0",
    "train.keep_every=null",
    "train.validate_every=null",
    "model.image.dropout=0",
    "evaluate.precision=fp32",
    "evaluate.compile=false",
    "evaluate.batch_size=100",
    "evaluate.features={name: cifar10, source: 'root:features/cifar10', fit: {steps: 2000}}",
    "scaling={workers: 1, encode_actors: 1, evaluate_actors: 1}",
)
_IMAGE_SCALES: dict[Scale, tuple[str, ...]] = {
    "tiny": (
        *_SMALLER,
        "model.image={channels: [16, 32, 32], blocks: [1, 1, 1], head_size: 16, time_size: 64}",
        "train.steps=600",
        "train.batch_size=32",
        "train.warmup_steps=50",
        "train.ema={ema: {half_life_images: 2000, ramp_ratio: 0.05}}",
        "train.checkpoint_every=300",
        "evaluate.samples=1000",
    ),
    "small": (
        *_SMALLER,
        "model.image={channels: [32, 64, 64], blocks: [2, 2, 2], head_size: 16, time_size: 128}",
        "train.steps=20000",
        "train.batch_size=64",
        "train.warmup_steps=500",
        "train.ema={ema: {half_life_images: 50000, ramp_ratio: 0.05}}",
        "train.checkpoint_every=1000",
        "evaluate.samples=10000",
    ),
    "full": (),
}
_UNET_CHANNELS: dict[Scale, int] = {"tiny": 16, "small": 32, "full": 128}
_UNET_BLOCKS: dict[Scale, int] = {"tiny": 1, "small": 2, "full": 4}
# For the figures on ImageNet: the digits of the demo, which need no download.
_LATENT_SCALES: dict[Scale, tuple[str, ...]] = {
    "tiny": ("train.steps=200", "evaluate.samples=200"),
    "small": ("train.steps=4800",),
    "full": (),
}


def find_ablation(name: str) -> Ablation:
    """An ablation by name.

    Raises:
        UserError: there is none.
    """
    if name not in ABLATIONS:
        raise UserError(f"ablation {name!r} does not exist; known: {', '.join(ABLATIONS)}")
    return ABLATIONS[name]


def row_recipe(
    ablation: Ablation,
    row: Row,
    scale: Scale,
    seed: int,
    overrides: Sequence[str] = (),
    root: str | None = None,
) -> Recipe:
    """The recipe of a row.

    Args:
        overrides: applied before the row's own, to every row alike.
    """
    on_pixels = ablation.recipe == "cifar10"
    name = ablation.recipe if on_pixels or scale == "full" else "demo"
    scaled = (_IMAGE_SCALES if on_pixels else _LATENT_SCALES)[scale]
    common = [*scaled, f"train.seed={seed}", *overrides]
    changes = list(row.overrides)
    if any("unet" in change for change in changes):
        changes += ["model.image={}", f"model.unet.channels={_UNET_CHANNELS[scale]}"]
        changes += [f"model.unet.blocks={_UNET_BLOCKS[scale]}"]
        if scale == "full":
            changes.append("model.unet.dropout=0.13")
    if row.width != 1.0 or row.time != 1.0:
        image = load_recipe(name, common, root).model.image
        first, *rest = image.channels
        channels = [first, *(int(row.width * width) for width in rest)]
        changes.append(f"model.image.channels={channels}")
        changes.append(f"model.image.time_size={int(row.time * image.time_size)}")
    return load_recipe(name, [*common, *changes], root)
