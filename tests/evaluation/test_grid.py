"""Pictures of samples."""

from __future__ import annotations

import numpy as np
import pytest

from diffit_train.evaluation.grid import cell_side, page, resized

IMAGE = np.full((8, 8, 3), 100, np.uint8)


@pytest.mark.parametrize("letter", ["ä", "ł", "ß", "я", "ж", "ř"])
def test_names_may_have_letters_of_other_languages(letter: str) -> None:
    missing, drawn = (np.asarray(page([[IMAGE]], [name], "")) for name in ("\uffff", letter))
    assert missing.shape != drawn.shape or (missing != drawn).any()


def test_every_image_has_its_place() -> None:
    rows = [
        [np.full((8, 8, 3), (40 * row, column, 200), np.uint8) for column in range(2)]
        for row in (1, 2)
    ]
    drawn = np.asarray(page(rows, ["a", "b"], "two\nlines"))
    for row in rows:
        for image in row:
            ys, xs = np.where((drawn == image[0, 0]).all(-1))
            inside = drawn[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
            assert inside.shape == (8, 8, 3)
            assert (inside == image[0, 0]).all()


def test_small_images_are_enlarged_by_whole_numbers() -> None:
    assert cell_side(16, 4, 2048) == 48
    assert cell_side(64, 4, 2048) == 64
    assert cell_side(512, 16, 2048) == 128  # shrunk
    assert resized(IMAGE, 24).shape == (24, 24, 3)
    assert (resized(IMAGE, 4) == 100).all()
