"""Names of metrics, their order in tables, and which direction is better.

Only distances on the published Inception's features are called `fid`, `sfid` and `kid`; on any
other feature network NAME they are `fd_NAME`, `sfd_NAME` and `kd_NAME`.
"""

from __future__ import annotations

from typing import Literal

# Prefixes of metric names in MLflow.
EVALUATION, VALIDATION = "eval", "validation"
# Number of network evaluations per image, including those for guidance.
NFE = "cost/nfe"

_PUBLISHED = {"fd": "fid", "sfd": "sfid", "kd": "kid"}
# Names or prefixes of names, in table order. Lower is better for distances only.
_DISTANCES = ("fid", "fd_", "sfid", "sfd_", "kid", "kd_")
_SCORES = ("inception_score", "precision", "recall", "classifier_accuracy")
_ORDER = (*_DISTANCES, *_SCORES)

_PERFORMANCE = (
    *("images_per_s", "step_s", "data_wait_fraction", "mfu", "memory_gib"),
    *("data_s", "forward_s", "backward_s", "optimizer_s", "slowest_rank", "checkpoint_s"),
)
# Fields of a training log record to names in MLflow.
TRAINING = {
    **{name: f"train/{name}" for name in ("loss", "grad_norm", "lr", "skipped_steps")},
    **{f"loss_q{quarter}": f"train/loss_q{quarter}" for quarter in range(4)},
    **{name: f"perf/{name}" for name in _PERFORMANCE},
}

# Gauges of Ray's metrics page that are in no log record: seconds of training since the last
# checkpoint, and seconds of a step by rank and phase.
CHECKPOINT_AGE = "checkpoint_age_s"
RANK_PHASE = "rank_phase_s"


def distance_name(kind: Literal["fd", "sfd", "kd"], features: str, published: bool) -> str:
    """The name of a distance.

    Args:
        kind: Frechet, spatial Frechet or kernel distance.
        features: name of the feature network.
        published: whether the network is the published Inception.
    """
    return _PUBLISHED[kind] if published else f"{kind}_{features}"


def lower_is_better(name: str) -> bool | None:
    """Whether a lower value of a metric is better; None if unknown."""
    family = _family(name)
    return family in _DISTANCES if family in _ORDER else None


def sort_key(name: str) -> tuple[int, str]:
    """Sort key: distances first, then scores, then the rest by name."""
    family = _family(name)
    return _ORDER.index(family) if family in _ORDER else len(_ORDER), name


def _family(name: str) -> str:
    prefix = name[: name.find("_") + 1]
    return prefix if prefix in _DISTANCES else name
