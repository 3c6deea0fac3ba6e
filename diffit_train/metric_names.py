"""What metrics are called, in which order they stand, and which way each is better.

A distance on other features than those of the published Inception never takes the name of one on
Inception's: it is `fd_NAME`, `sfd_NAME` or `kd_NAME`, where that would be `fid`, `sfid` or `kid`.
"""

from __future__ import annotations

from typing import Literal

# Prefixes of metrics in MLflow.
EVALUATION, VALIDATION = "eval", "validation"
# Network evaluations an image, those for guidance included.
NFE = "cost/nfe"

_PUBLISHED = {"fd": "fid", "sfd": "sfid", "kd": "kid"}
# Names, or beginnings of names, in the order of tables. Lower is better for distances only.
_DISTANCES = ("fid", "fd_", "sfid", "sfd_", "kid", "kd_")
_SCORES = ("inception_score", "precision", "recall", "classifier_accuracy")
_ORDER = (*_DISTANCES, *_SCORES)

_PERFORMANCE = (
    *("images_per_s", "step_s", "data_wait_fraction", "mfu", "memory_gib"),
    *("data_s", "forward_s", "backward_s", "optimizer_s", "checkpoint_s"),
)
# Fields of a record of the training log to names in MLflow.
TRAINING = {
    **{name: f"train/{name}" for name in ("loss", "grad_norm", "lr", "skipped_steps")},
    **{f"loss_q{quarter}": f"train/loss_q{quarter}" for quarter in range(4)},
    **{name: f"perf/{name}" for name in _PERFORMANCE},
}


def distance_name(kind: Literal["fd", "sfd", "kd"], features: str, published: bool) -> str:
    """The name of a distance.

    Args:
        kind: Frechet, spatial Frechet or kernel distance.
        features: name of the feature network.
        published: whether it is the published Inception.
    """
    return _PUBLISHED[kind] if published else f"{kind}_{features}"


def lower_is_better(name: str) -> bool | None:
    """Which way a metric is better; None where that is not known."""
    family = _family(name)
    return family in _DISTANCES if family in _ORDER else None


def sort_key(name: str) -> tuple[int, str]:
    """A key that sorts distances first, then scores, then the rest by name."""
    family = _family(name)
    return _ORDER.index(family) if family in _ORDER else len(_ORDER), name


def _family(name: str) -> str:
    prefix = name[: name.find("_") + 1]
    return prefix if prefix in _DISTANCES else name
