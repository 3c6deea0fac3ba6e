"""Averages of the weights chosen after training: EDM2's post-hoc EMA (section 3, appendix C).

A run keeps a few averages whose profiles are power functions of training time, and snapshots of
them. A sum of snapshots whose profiles add up to a wanted profile, in the sense of least squares,
is then the average with that profile. As in EDM2's code the coefficients are divided by their
sum, so that weights which stood still all through training come out as they are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.errors import UserError
from diffit_train.models.build import build_model
from diffit_train.models.published import (
    write_published,
)
from diffit_train.progress import Progress
from diffit_train.runs.checkpoints import (
    SNAPSHOTS,
    Slice,
    committed_steps,
    read_index,
    read_slices,
    reconstructed_url,
)
from diffit_train.runs.identity import run_url
from diffit_train.runs.import_export import _metadata

# sigma_rel of the mean over all of training, gamma = 0.
WIDEST_PROFILE = 12**-0.5
# Steps of training whose weights are held at once when profiles are multiplied.
_STRETCH = 1 << 16


@functools.cache
def power_exponent(sigma_rel: float) -> float:
    """gamma of the profile t^gamma whose standard deviation is `sigma_rel` of training.

    Solves sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (EDM2, section 3.1).

    Raises:
        ValueError: sigma_rel is not below that of the plain mean, 12^-0.5, and above 0.
    """

    def excess(gamma: float) -> float:
        return (gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0)) - sigma_rel**2

    if not 0.0 < sigma_rel < WIDEST_PROFILE:
        raise ValueError(f"sigma_rel is {sigma_rel}, but must lie between 0 and 0.2886")
    return float(brentq(excess, 0.0, 2.0 / sigma_rel, xtol=1e-14, rtol=1e-15))


@dataclass(frozen=True)
class Profile:
    """The average with exponent `gamma` as it stands after `steps` training steps."""

    steps: int
    gamma: float

    def weights(self, first: int, last: int) -> np.ndarray:
        """How much the weights after steps first..last (counted from 1) contribute, float64.

        The product of the update's decays (1 - 1/t)^(gamma + 1) telescopes, so the weights after
        step s count (s^(gamma+1) - (s-1)^(gamma+1)) / steps^(gamma+1), those before none.
        """
        t = np.arange(first - 1, last + 1, dtype=np.float64) / self.steps
        return np.where(t[1:] <= 1.0, np.diff(t ** (self.gamma + 1.0)), 0.0)


@dataclass(frozen=True)
class Solution:
    """Coefficients of the snapshots, and how far their sum is from the wanted profile.

    Attributes:
        coefficients: one of each snapshot; they add up to 1.
        error: L2 norm of the difference between the profiles, relative to the wanted one.
    """

    coefficients: np.ndarray
    error: float


def reconstruct(snapshots: list[Profile], wanted: Profile) -> Solution:
    """The weighted mean of snapshots that comes close to a wanted average (EDM2, algorithm 3).

    The coefficients of least squares, divided by their sum (EDM2, solve_posthoc_coefficients). The
    profiles are those of the discrete updates, where EDM2 has the continuous limit, so a snapshot
    that has the wanted profile is found exactly.

    Raises:
        ValueError: there are no snapshots.
    """
    if not snapshots:
        raise ValueError("there are no snapshots to reconstruct an average from")
    everything, last = [*snapshots, wanted], max(p.steps for p in [*snapshots, wanted])
    triangle = np.zeros((0, len(everything)))
    for first in range(1, last + 1, _STRETCH):
        end = min(first + _STRETCH - 1, last)
        rows = np.stack([p.weights(first, end) for p in everything], axis=1)
        # A QR of what was reduced so far and the new rows: products of profiles would lose half
        # of the digits, and neighboring snapshots are nearly alike.
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, rows]), mode="r"))
    matrix, target = triangle[:, :-1], triangle[:, -1]
    coefficients = np.linalg.lstsq(matrix, target, rcond=1e-12)[0]
    coefficients = coefficients / coefficients.sum()
    error = np.linalg.norm(matrix @ coefficients - target) / np.linalg.norm(target)
    return Solution(coefficients, float(error))


@dataclass(frozen=True)
class Reconstruction:
    """An average that was made of snapshots.

    Attributes:
        error: L2 distance of its profile from the wanted one, relative to the wanted one.
        snapshots: how many were summed.
    """

    file: str
    step: int
    error: float
    snapshots: int


def reconstruct_ema(
    recipe: Recipe, run: str, sigma_rel: float, step: int | None = None, out: str | None = None
) -> Reconstruction:
    """Make the average with another power profile from a run's snapshots (EDM2, section 3).

    Args:
        sigma_rel: width of the profile, relative to the training up to `step`.
        step: of the average; None for the newest snapshot's.
        out: where to; None for `checkpoints.reconstructed_url`.

    Raises:
        UserError: there are no snapshots, or none that late.
    """
    if not 0.0 < sigma_rel < WIDEST_PROFILE:
        raise UserError(
            f"--sigma-rel is {sigma_rel}, but must lie above 0 and below {WIDEST_PROFILE:.4f}, "
            "the width of the plain mean"
        )
    url = run_url(recipe, run)
    snapshots, profiles = storage.join(url, SNAPSHOTS), recipe.train.power_profiles()
    steps = committed_steps(snapshots)
    if not profiles or not steps:
        raise UserError(
            f"run {run!r} has no snapshots of averages; train with averages that have a sigma_rel "
            "(as 0.05 and 0.1) in train.ema, and with train.ema_snapshot_every"
        )
    step = steps[-1] if step is None else step
    if not 0 < step <= steps[-1]:
        raise UserError(f"--step is {step}, but the snapshots of {run!r} end at step {steps[-1]}")
    gammas = {name: power_exponent(width) for name, width in profiles.items()}
    taken = [s for s in steps if s > 0]
    sources = [(s, name) for s in taken for name in profiles]
    solution = reconstruct(
        [Profile(s, gammas[name]) for s, name in sources], Profile(step, power_exponent(sigma_rel))
    )
    coefficients = dict(zip(sources, solution.coefficients.tolist(), strict=True))
    shapes = {n: torch.Size(p.shape) for n, p in read_index(snapshots, taken[0]).parameters.items()}
    wanted = [Slice(name, 0, shape.numel()) for name, shape in shapes.items()]
    sums = [torch.zeros(s.length, dtype=torch.float64) for s in wanted]
    with Progress("reconstruct", len(taken), "snapshots") as progress:
        for number, at in enumerate(taken, start=1):
            for kind, values in read_slices(snapshots, at, wanted, tuple(profiles)).items():
                for total, value in zip(sums, values, strict=True):
                    total.add_(value, alpha=coefficients[at, kind])
            progress.update(number)
    weights = {s.name: t.float().view(shapes[s.name]) for s, t in zip(wanted, sums, strict=True)}
    out = out or reconstructed_url(url, sigma_rel, step)
    metadata = _metadata(recipe, run, step, f"sigma_rel {sigma_rel:g}")
    write_published(build_model(recipe), weights, out, metadata)
    return Reconstruction(out, step, solution.error, len(sources))
