"""Labels of generated images: uniform, each a function of seed and index only."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2, chisquare

from diffit_train.config import load_recipe
from diffit_train.evaluation.generate import ImageNoise, choose_labels


@pytest.mark.parametrize("seed", [0, 1])
def test_random_labels_are_uniform_and_independent(seed: int) -> None:
    classes, count = 10, 20_000
    labels = choose_labels("random", seed, range(count), classes)
    assert labels.dtype == np.int64
    assert chisquare(np.bincount(labels, minlength=classes)).pvalue > 0.01
    # Consecutive labels are independent: all pairs of classes are equally frequent.
    pairs = np.bincount(labels[:-1] * classes + labels[1:], minlength=classes**2)
    assert chisquare(pairs).pvalue > 0.01
    # Balanced labels would also pass as uniform, but with hardly any spread.
    spread = chisquare(np.bincount(labels, minlength=classes)).statistic
    assert spread > chi2(classes - 1).ppf(0.01)


def test_a_label_depends_on_seed_and_index_alone() -> None:
    whole = choose_labels("random", 3, range(50), 1000)
    parts = [choose_labels("random", 3, part, 1000) for part in (range(7), range(7, 50))]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(choose_labels("random", 3, [40, 2], 1000), whole[[40, 2]])
    assert not np.array_equal(choose_labels("random", 4, range(50), 1000), whole)


def test_labels_and_noise_use_different_random_streams() -> None:
    """A label drawn from the noise's generator is different."""
    noise = ImageNoise([(0, i) for i in range(200)], (1, 1, 1))
    of_noise = [generator.integers(1000) for generator in noise.generators]
    labels = choose_labels("random", 0, range(200), 1000)
    assert (labels == of_noise).sum() < 5


def test_balanced_labels_count_through_the_classes() -> None:
    assert choose_labels("balanced", 5, range(4, 9), 3).tolist() == [1, 2, 0, 1, 2]


def test_the_packaged_recipes_choose_labels() -> None:
    found = {}
    for name in ("demo", "imagenet256", "imagenet512"):
        evaluate = load_recipe(name).evaluate
        found[name] = (evaluate.labels, evaluate.pixels)
    assert found == {
        "demo": ("balanced", "round"),
        "imagenet256": ("random", "truncate"),
        "imagenet512": ("random", "truncate"),
    }
