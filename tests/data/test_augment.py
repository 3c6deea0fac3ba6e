"""The augmentation against resampling by formula, and its labels against what it does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffit_train.data.augment import (
    SYM6,
    Augmentation,
    Resampling,
    augment,
    draw_augmentation,
    joined_augmentation,
    transform,
)

SIDE = 32


def _waves(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A smooth image, defined everywhere; x, y in pixels from the center."""
    return 0.5 * np.sin(0.25 * x + 0.1 * y) + 0.3 * np.cos(0.2 * y - 0.05 * x)


def _image(inverse: np.ndarray | None = None) -> Tensor:
    """The waves, or seen through `inverse`."""
    place = np.arange(SIDE) - (SIDE - 1) / 2
    x, y = np.meshgrid(place, place, indexing="xy")
    if inverse is not None:
        points = np.stack([x, y, np.full_like(x, SIDE)])
        x, y = np.einsum("ij,jhw->ihw", inverse, points)
    return torch.from_numpy(_waves(x, y)).view(1, 1, SIDE, SIDE)


def test_the_filter_is_an_orthogonal_wavelet_of_six_moments() -> None:
    h = np.array(SYM6)
    for shift in range(6):
        assert h[: 12 - 2 * shift] @ h[2 * shift :] == pytest.approx(float(shift == 0), abs=1e-12)
    high = h[::-1] * (-1.0) ** np.arange(12)
    position = np.arange(12) - 5.5
    assert np.abs([high @ position**k for k in range(6)]).max() < 1e-6


def _transform(images: Tensor, inverse: np.ndarray) -> Tensor:
    """Images transformed by `inverse`, translations relative to the image's side."""
    count, side = len(inverse), images.shape[-1]
    all_moved = Augmentation(np.zeros((count, 2), bool), inverse, np.ones((count, 9)))
    what = Resampling.of(all_moved, side)
    return transform(images, what.inverse, what.pad)


def _inverse(matrix: list[list[float]], shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    return np.concatenate([np.array(matrix), np.array(shift)[:, None]], axis=1)


def test_whole_pixels_are_moved_exactly() -> None:
    images = torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64)
    still = np.stack([np.eye(2, 3)] * 2)
    torch.testing.assert_close(_transform(images, still), images, rtol=0, atol=1e-9)
    # The result's pixel (x, y) is the image's (x + 3, y - 2).
    moved = still + _inverse([[0, 0], [0, 0]], (3 / SIDE, -2 / SIDE))
    got = _transform(images, moved)
    expected = images[:, :, : SIDE - 2, 3:]
    torch.testing.assert_close(got[:, :, 2:, :-3], expected, rtol=0, atol=1e-9)
    # What comes in is the reflection.
    torch.testing.assert_close(got[:, :, 2:, -1], images[:, :, :-2, -4], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "inverse",
    [
        _inverse([[0.8, 0], [0, 0.8]]),
        _inverse([[math.cos(0.6), -math.sin(0.6)], [math.sin(0.6), math.cos(0.6)]]),
        _inverse([[1.2, 0.1], [0.1, 0.85]], (0.05, -0.08)),
    ],
    ids=["scale", "rotate", "shear"],
)
def test_smooth_images_are_resampled_by_the_formula(inverse: np.ndarray) -> None:
    got = _transform(_image(), inverse[None])
    inside = slice(10, -10)
    error = (got - _image(inverse))[..., inside, inside].abs().max()
    # The filter is not quite symmetric. Half a pixel of misplacement would be 0.1.
    assert error < 0.03


def test_labels_describe_the_transformation() -> None:
    what = draw_augmentation(np.random.default_rng(0), 4000, 1.0)
    flip, labels = what.flip, what.labels.astype(np.float64)
    assert labels.shape == (4000, 9)
    assert np.array_equal(labels[:, :2], flip)
    scale = 2.0 ** (0.2 * labels[:, 2])
    angle = np.arctan2(labels[:, 4], labels[:, 3] + 1.0)
    stretch = np.hypot(labels[:, 5], labels[:, 6])
    axis = np.arctan2(labels[:, 6], labels[:, 5])
    ratio = 2.0 ** (0.2 * stretch)

    def rotation(a: float) -> np.ndarray:
        return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])

    for i in range(20):
        # Scaled, rotated, stretched along the axis, translated. As in EDM, the labels of a stretch
        # and of its inverse along the opposite direction are the same.
        options = []
        for factor in (ratio[i], 1 / ratio[i]):
            stretched = rotation(-axis[i]) @ np.diag([factor, 1 / factor]) @ rotation(axis[i])
            options.append(stretched @ rotation(-angle[i]) * scale[i])
        got = np.linalg.inv(what.inverse[i, :, :2])
        assert min(np.abs(got - forward).max() for forward in options) < 1e-5
        shift = -got @ what.inverse[i, :, 2]
        np.testing.assert_allclose(shift, 0.125 * labels[i, 7:], atol=1e-5)
    for column in (2, 7, 8):
        assert stats.kstest(labels[:, column], "norm").pvalue > 1e-3
    assert stats.kstest(angle, "uniform", (-np.pi, 2 * np.pi)).pvalue > 1e-3


def test_probabilities() -> None:
    what = draw_augmentation(np.random.default_rng(1), 20_000, 0.12)
    rates = (what.labels != 0).mean(0)
    expected = [0.5, 0.06, *[0.12] * 5, 0.12, 0.12]
    expected[6] = 0.06  # the axes of half of the stretched images are not rotated
    np.testing.assert_allclose(rates, expected, atol=0.01)
    # Images that were only flipped are exact.
    images = torch.rand(200, 3, 8, 8)
    what = draw_augmentation(np.random.default_rng(2), 200, 0.12)
    got = augment(images, Resampling.of(what, 8))
    still = (what.labels[:, 1:] == 0).all(1)
    assert 60 < still.sum() < 180
    flip = torch.from_numpy(what.flip[:, 0]).view(-1, 1, 1, 1)
    flipped = torch.where(flip, images.flip(3), images)
    assert torch.equal(got[still], flipped[still])
    assert not torch.allclose(got[~still], flipped[~still])


def test_an_image_is_augmented_alike_in_any_batch() -> None:
    images = torch.rand(12, 3, 16, 16)
    parts = [draw_augmentation(np.random.default_rng(stream), 4, 0.7) for stream in range(3)]
    whole = augment(images, Resampling.of(joined_augmentation(parts), 16))
    for stream, part in enumerate(parts):
        alone = augment(images[4 * stream : 4 * stream + 4], Resampling.of(part, 16))
        torch.testing.assert_close(whole[4 * stream : 4 * stream + 4], alone, rtol=0, atol=1e-5)
    none = Augmentation(np.zeros((12, 2), bool), np.stack([np.eye(2, 3)] * 12), np.zeros((12, 9)))
    assert torch.equal(augment(images, Resampling.of(none, 16)), images)
