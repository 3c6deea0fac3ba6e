"""Non-leaking augmentation of images in training (Karras et al. 2022, appendix F.2).

Every image is flipped horizontally in half of the cases; a vertical flip, scaling, rotation,
anisotropic scaling and translation are each applied with the recipe's probability. The network is
told what was done by nine labels, all zero for an image as it is, so that it never generates
augmented ones.

Shapes: n images, C channels, H x H pixels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffit_train.config.train import AUGMENT_LABELS

# Standard deviations: of log2 of both scalings, and of the translation relative to the image.
SCALE_STD, ANISOTROPY_STD, TRANSLATION_STD = 0.2, 0.2, 0.125
# Fraction of the anisotropic scalings whose axes are rotated.
ROTATED_AXES = 0.5
# Low-pass filter of the orthogonal wavelet sym6, by which images are resampled without aliasing.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
# Pixels beyond an image's edge that the filter reaches.
REACH = len(SYM6) // 4


@dataclass(frozen=True)
class Augmentation:
    """What is done to n images.

    Attributes:
        flip: (n, 2) bool, horizontally and vertically.
        inverse: (n, 2, 3) float64, from a pixel's position in the result to that in the image,
            (x, y) from the center; translations relative to the image's side.
        labels: (n, 9) float32.
    """

    flip: np.ndarray
    inverse: np.ndarray
    labels: np.ndarray


def draw_augmentation(random: np.random.Generator, count: int, probability: float) -> Augmentation:
    """Draw what is done to `count` images."""

    def applied(values: np.ndarray) -> np.ndarray:
        """Zero where the transformation is not applied."""
        return values * (random.random(count) < probability)

    flip = random.integers(2, size=(2, count)).astype(np.float64)
    flip[1] = applied(flip[1])
    scale = applied(random.standard_normal(count))
    angle = applied(random.uniform(-np.pi, np.pi, count))
    stretch = applied(random.standard_normal(count))
    axis = random.uniform(-np.pi, np.pi, count) * (random.random(count) < ROTATED_AXES)
    shift = random.standard_normal((2, count)) * (random.random(count) < probability)
    labels = np.stack(
        [
            flip[0],
            flip[1],
            scale,
            np.cos(angle) - 1.0,
            np.sin(angle),
            stretch * np.cos(axis),
            stretch * np.sin(axis),
            shift[0],
            shift[1],
        ],
        axis=1,
    )
    assert labels.shape[1] == AUGMENT_LABELS
    factor, ratio = np.exp2(SCALE_STD * scale), np.exp2(ANISOTROPY_STD * stretch)
    inverse = np.zeros((count, 2, 3))
    linear = (
        _diagonal(1.0 / factor, 1.0 / factor)
        @ _rotation(angle)
        @ _rotation(-axis)
        @ _diagonal(1.0 / ratio, ratio)
        @ _rotation(axis)
    )
    inverse[:, :, :2] = linear
    inverse[:, :, 2] = -np.einsum("nij,jn->ni", linear, TRANSLATION_STD * shift)
    return Augmentation(flip.T.astype(bool), inverse, labels.astype(np.float32))


def joined_augmentation(parts: list[Augmentation]) -> Augmentation:
    """Concatenate the augmentations of several streams' images."""
    names = ("flip", "inverse", "labels")
    return Augmentation(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


@dataclass(frozen=True)
class Resampling:
    """An `Augmentation` as the device needs it.

    Attributes:
        flip: (n, 2) bool, horizontally and vertically.
        moved: (m,) int64, images that are not only flipped.
        inverse: (m, 2, 3) float64, theirs as in `Augmentation`, translations in pixels.
        pad: pixels of padding that any of them needs.
    """

    flip: Tensor
    moved: Tensor
    inverse: Tensor
    pad: int

    @classmethod
    def of(cls, what: Augmentation, side: int) -> Resampling:
        """On the host, for images of `side` pixels."""
        moved = np.flatnonzero(what.labels[:, 2:].any(1))
        inverse = what.inverse[moved] * np.array([1.0, 1.0, side])
        pad = _margin(inverse, side) if len(moved) else 0
        flip, rows, matrices = map(torch.from_numpy, (what.flip, moved, inverse))
        return cls(flip, rows, matrices, pad)

    def pin_memory(self) -> Resampling:
        """In pinned memory, from which a copy to a GPU does not wait for the GPU."""
        flip, moved, inverse = (p.pin_memory() for p in (self.flip, self.moved, self.inverse))
        return Resampling(flip, moved, inverse, self.pad)


def augment(images: Tensor, what: Resampling) -> Tensor:
    """Images (n, C, H, H) as described by `what`, on their device."""
    parts = (what.flip, what.moved, what.inverse)
    flip, moved, inverse = (part.to(images.device, non_blocking=True) for part in parts)
    for column, axis in ((0, 3), (1, 2)):
        images = torch.where(flip[:, column].view(-1, 1, 1, 1), images.flip(axis), images)
    if len(moved):
        result = transform(images.index_select(0, moved), inverse, what.pad)
        images = images.index_copy(0, moved, result)
    return images


def transform(images: Tensor, inverse: Tensor, pad: int) -> Tensor:
    """Resample images (n, C, H, H) affinely: upsampled, transformed and downsampled by sym6.

    Beyond their edges images are reflected, up to their own size, and then black.

    Args:
        inverse, pad: as in `Resampling`.
    """
    side = images.shape[-1]
    fine = _upsample(F.pad(images, [pad] * 4, mode="reflect"))
    # Fine sample k lies at pixel (k - 0.5) / 2: the filter is even, so it delays by half a sample.
    center, count = (side - 1) / 2.0, 2 * (side + 2 * REACH)
    position = torch.arange(count, dtype=torch.float64, device=images.device) - 0.5
    position = position / 2.0 - REACH - center
    x, y = torch.meshgrid(position, position, indexing="xy")
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    places = torch.einsum("nij,hwj->nhwi", inverse, points)
    index = 2.0 * (places + center + pad) + 0.5
    grid = (2.0 * index / (fine.shape[-1] - 1) - 1.0).to(images.dtype)
    moved = F.grid_sample(fine, grid, "bilinear", "zeros", align_corners=True)
    return _downsample(moved)[..., REACH:-REACH, REACH:-REACH]


def _margin(inverse: np.ndarray, side: int) -> int:
    """Pixels of padding that the furthest corner of any result needs, at most side - 1."""
    center = (side - 1) / 2.0
    corners = np.array([[x, y, 1.0] for x in (-center, center) for y in (-center, center)])
    furthest = np.abs(np.einsum("nij,kj->nki", inverse, corners)).max() - center
    return int(np.clip(np.ceil(furthest + 2 * REACH), 0, side - 1))


def _upsample(images: Tensor) -> Tensor:
    """(n, C, h, w) to (n, C, 2h, 2w): zeros inserted, then filtered in both directions."""
    for axis in (2, 3):
        kernel = _kernel(images, axis, reverse=True)
        pairs = torch.stack([images, torch.zeros_like(images)], dim=axis + 1)
        spaced = pairs.flatten(axis, axis + 1)
        spaced = spaced.narrow(axis, 0, spaced.shape[axis] - 1)
        padding = (6, 0) if axis == 2 else (0, 6)
        images = F.conv2d(spaced, kernel, groups=images.shape[1], padding=padding)
    return images


def _downsample(images: Tensor) -> Tensor:
    """(n, C, 2h, 2w) to (n, C, h, w), the adjoint of `_upsample`."""
    for axis in (2, 3):
        kernel = _kernel(images, axis, reverse=False)
        padding, stride = ((5, 0), (2, 1)) if axis == 2 else ((0, 5), (1, 2))
        images = F.conv2d(images, kernel, groups=images.shape[1], padding=padding, stride=stride)
    return images


def _kernel(images: Tensor, axis: int, reverse: bool) -> Tensor:
    """The filter along an axis, for each channel: (C, 1, 12, 1) or (C, 1, 1, 12)."""
    taps = _taps(reverse, images.dtype, images.device)
    shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
    return taps.view(shape).expand(images.shape[1], -1, -1, -1)


@functools.cache
def _taps(reverse: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The filter's taps, copied to the device once: the host waits for such a copy."""
    return torch.tensor(SYM6[::-1] if reverse else SYM6, dtype=dtype, device=device)


def _rotation(angle: np.ndarray) -> np.ndarray:
    """Counterclockwise in (x, y), (n, 2, 2)."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def _diagonal(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Scaling of each axis, (n, 2, 2)."""
    zero = np.zeros_like(x)
    return np.stack([np.stack([x, zero], -1), np.stack([zero, y], -1)], -2)
