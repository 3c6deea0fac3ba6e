"""EMA profiles chosen after training: EDM2's post-hoc EMA (section 3, appendix C).

A run keeps a few EMAs with power-function profiles, and stores snapshots of them. Any other
profile is approximated, in the least-squares sense, by a linear combination of the snapshots'
profiles; the same combination of the snapshots is then the EMA with that profile. As in EDM2's
code, the coefficients are divided by their sum, so that constant weights are reproduced exactly.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from diffit_train import storage
from diffit_train.errors import UserError
from diffit_train.models.build import build_model
from diffit_train.models.published import write_published
from diffit_train.progress import Progress, say
from diffit_train.runs.checkpoints import NEWEST, Slice, reconstructed_url
from diffit_train.runs.import_export import export_metadata
from diffit_train.runs.run import Run

# sigma_rel of the plain mean over training, gamma = 0.
WIDEST_PROFILE = 12**-0.5
# Warn if the relative error of a reconstructed profile is larger than this.
POOR_PROFILE = 0.1
# Training steps per chunk when comparing profiles; bounds memory.
_CHUNK_STEPS = 1 << 16


@functools.cache
def power_exponent(sigma_rel: float) -> float:
    """gamma of the profile t^gamma with a standard deviation of `sigma_rel` of training.

    Solves sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (EDM2, section 3.1).

    Raises:
        ValueError: sigma_rel is not between 0 and 12^-0.5, that of the plain mean.
    """

    def excess(gamma: float) -> float:
        return (gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0)) - sigma_rel**2

    if not 0.0 < sigma_rel < WIDEST_PROFILE:
        raise ValueError(f"sigma_rel is {sigma_rel}, but must be between 0 and 0.2886")
    from scipy.optimize import brentq  # here, because training without such an EMA needs no scipy

    return float(brentq(excess, 0.0, 2.0 / sigma_rel, xtol=1e-14, rtol=1e-15))


@dataclass(frozen=True)
class Profile:
    """The EMA with exponent `gamma` after `steps` training steps."""

    steps: int
    gamma: float

    def weights(self, first: int, last: int) -> np.ndarray:
        """Contribution of the weights after each of steps first..last (from 1), float64.

        The product of the decays (1 - 1/t)^(gamma + 1) telescopes: the weights after step s
        contribute (s^(gamma+1) - (s-1)^(gamma+1)) / steps^(gamma+1); the initial weights, nothing.
        """
        t = np.arange(first - 1, last + 1, dtype=np.float64) / self.steps
        return np.where(t[1:] <= 1.0, np.diff(t ** (self.gamma + 1.0)), 0.0)


@dataclass(frozen=True)
class Solution:
    """Snapshot coefficients and the error of the resulting profile.

    Attributes:
        coefficients: one per snapshot; they sum to 1.
        error: L2 distance to the wanted profile, relative to its norm.
    """

    coefficients: np.ndarray
    error: float


def reconstruct(snapshots: list[Profile], wanted: Profile) -> Solution:
    """Coefficients of the snapshots that best approximate a wanted profile (EDM2, algorithm 3).

    Least-squares coefficients divided by their sum (EDM2, solve_posthoc_coefficients). Profiles
    are those of the discrete updates, not EDM2's continuous limit, so a snapshot that already has
    the wanted profile is reproduced exactly.

    Raises:
        ValueError: there are no snapshots.
    """
    if not snapshots:
        raise ValueError("no snapshots to reconstruct an EMA from")
    everything, last = [*snapshots, wanted], max(p.steps for p in [*snapshots, wanted])
    triangle = np.zeros((0, len(everything)))
    for first in range(1, last + 1, _CHUNK_STEPS):
        end = min(first + _CHUNK_STEPS - 1, last)
        rows = np.stack([p.weights(first, end) for p in everything], axis=1)
        # Incremental QR: inner products of profiles would lose half the digits, and neighboring
        # snapshots are nearly identical.
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, rows]), mode="r"))
    matrix, target = triangle[:, :-1], triangle[:, -1]
    coefficients = np.linalg.lstsq(matrix, target, rcond=1e-12)[0]
    coefficients = coefficients / coefficients.sum()
    error = np.linalg.norm(matrix @ coefficients - target) / np.linalg.norm(target)
    return Solution(coefficients, float(error))


@dataclass(frozen=True)
class Reconstruction:
    """An EMA reconstructed from snapshots.

    Attributes:
        error: L2 distance to the wanted profile, relative to its norm.
        snapshots: number of snapshots combined.
    """

    file: str
    step: int
    error: float
    snapshots: int


def reconstruct_ema(
    run: Run, sigma_rel: float, step: int | str = NEWEST, out: str | None = None
) -> Reconstruction:
    """Reconstruct the EMA with another power profile from a run's snapshots (EDM2, section 3).

    Args:
        sigma_rel: width of the profile, relative to the training up to `step`.
        step: step of the EMA, or `newest` for that of the newest snapshot.
        out: output file; None for `checkpoints.reconstructed_url`.

    Raises:
        UserError: there are no snapshots, or none that late.
    """
    if not 0.0 < sigma_rel < WIDEST_PROFILE:
        raise UserError(
            f"--sigma-rel is {sigma_rel}, but must be above 0 and below {WIDEST_PROFILE:.4f}, "
            "the width of the plain mean"
        )
    recipe, steps = run.recipe, run.snapshots.steps
    profiles = recipe.train.power_profiles()
    if not profiles or not steps:
        raise UserError(
            f"run {run.name!r} has no EMA snapshots; train with power-function EMAs in train.ema "
            "(for example sigma_rel 0.05 and 0.1) and set train.ema_snapshot_every"
        )
    at = steps[-1] if step == NEWEST else int(step) if str(step).isdigit() else 0
    if not 0 < at <= steps[-1]:
        raise UserError(
            f"--step is {step}, but the snapshots of {run.name!r} end at step {steps[-1]}"
        )
    gammas = {name: power_exponent(width) for name, width in profiles.items()}
    taken = [s for s in steps if s > 0]
    sources = [(s, name) for s in taken for name in profiles]
    solution = reconstruct(
        [Profile(s, gammas[name]) for s, name in sources], Profile(at, power_exponent(sigma_rel))
    )
    coefficients = dict(zip(sources, solution.coefficients.tolist(), strict=True))
    parameters = run.snapshots[taken[0]].index.parameters
    shapes = {name: torch.Size(parameter.shape) for name, parameter in parameters.items()}
    wanted = [Slice(name, 0, shape.numel()) for name, shape in shapes.items()]
    sums = [torch.zeros(s.length, dtype=torch.float64) for s in wanted]
    with Progress("reconstruct", len(taken), "snapshots") as progress:
        for number, s in enumerate(taken, start=1):
            for kind, values in run.snapshots[s].read(wanted, tuple(profiles)).items():
                for total, value in zip(sums, values, strict=True):
                    total.add_(value, alpha=coefficients[s, kind])
            progress.update(number)
    weights = {s.name: t.float().view(shapes[s.name]) for s, t in zip(wanted, sums, strict=True)}
    out = out or reconstructed_url(run.url, sigma_rel, at)
    metadata = export_metadata(run, at, f"sigma_rel {sigma_rel:g}")
    write_published(build_model(recipe), weights, out, metadata)
    say(
        f"wrote {storage.display_path(out)}: sigma_rel {sigma_rel:g} of {run.name}, step {at:,}, "
        f"from {len(sources)} snapshots; profile error {solution.error:.2%}"
    )
    if solution.error > POOR_PROFILE:
        say(
            "warning: the profile is far from the requested one; choose a sigma_rel closer to "
            "those in train.ema, or take more snapshots"
        )
    return Reconstruction(out, at, solution.error, len(sources))
