"""Names, order and direction of metrics."""

from __future__ import annotations

import pytest

from diffit_train.tracking import TRAINING, distance_name, lower_is_better, sort_key


def test_only_the_published_network_gives_a_fid() -> None:
    assert distance_name("fd", "inception", True) == "fid"
    assert distance_name("sfd", "inception", True) == "sfid"
    assert distance_name("kd", "inception", True) == "kid"
    assert distance_name("fd", "digits", False) == "fd_digits"


@pytest.mark.parametrize(
    ("name", "lower"),
    [
        *(("fid", True), ("fd_digits", True), ("sfd_own", True), ("kid", True)),
        *(("precision", False), ("classifier_accuracy", False), ("inception_score", False)),
        *(("fidelity", None), ("loss", None), ("fd", None)),
    ],
)
def test_the_better_direction_is_known_or_nothing(name: str, lower: bool | None) -> None:
    assert lower_is_better(name) is lower


def test_distances_come_first_and_unknown_names_last() -> None:
    names = ["zeta", "recall", "fd_b", "precision", "fd_a", "kid", "fid", "alpha"]
    ordered = ["fid", "fd_a", "fd_b", "kid", "precision", "recall", "alpha", "zeta"]
    assert sorted(names, key=sort_key) == ordered


def test_training_metrics_have_one_name_each() -> None:
    assert len(set(TRAINING.values())) == len(TRAINING)
    assert {name.split("/")[0] for name in TRAINING.values()} == {"train", "perf"}
