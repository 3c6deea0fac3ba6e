"""ADM's noise schedule and its respacing. T timesteps; all tables are float64 of shape (T,)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables of a discrete diffusion; step i is the original timestep `timesteps[i]`.

    alpha_bar is the cumulative product of 1 - beta (Ho et al. 2020, equation 4).
    """

    timesteps: np.ndarray
    betas: np.ndarray
    _copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if len(self.timesteps) != len(self.betas):
            raise ValueError(f"{len(self.timesteps)} timesteps for {len(self.betas)} betas")
        if not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ValueError("every beta must be in (0, 1]")

    def __len__(self) -> int:
        return len(self.betas)

    def at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """Entries t (B,) of a table, shaped to multiply `like` (B, …), in its dtype.

        Each table is copied to a device once: a copy from the host's memory waits for the device.

        Args:
            table: name of one of the properties.
        """
        key = (table, like.device, like.dtype)
        if key not in self._copies:
            values = torch.from_numpy(getattr(self, table))
            self._copies[key] = values.to(device=like.device, dtype=like.dtype)
        return self._copies[key][t].view(-1, *[1] * (like.dim() - 1))

    @property
    def alpha_bar(self) -> np.ndarray:
        """Fraction of the signal's variance left after each step."""
        return np.cumprod(1.0 - self.betas)

    @property
    def alpha_bar_previous(self) -> np.ndarray:
        """alpha_bar one step earlier, 1 before the first."""
        return np.append(1.0, self.alpha_bar[:-1])

    @property
    def signal(self) -> np.ndarray:
        """Weight of x_0 in x_t."""
        return np.sqrt(self.alpha_bar)

    @property
    def sigma(self) -> np.ndarray:
        """Weight of the noise in x_t."""
        return np.sqrt(1.0 - self.alpha_bar)

    @property
    def inverse_signal(self) -> np.ndarray:
        """Weight of x_t in x_0."""
        return np.sqrt(1.0 / self.alpha_bar)

    @property
    def noise_ratio(self) -> np.ndarray:
        """Weight of the noise, subtracted, in x_0."""
        return np.sqrt(1.0 / self.alpha_bar - 1.0)

    @property
    def log_beta(self) -> np.ndarray:
        """Log of the betas, the upper bound of the learned log-variance."""
        return np.log(self.betas)

    @property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0), Ho et al. 2020, equation 7."""
        return self.betas * (1.0 - self.alpha_bar_previous) / (1.0 - self.alpha_bar)

    @property
    def posterior_log_variance(self) -> np.ndarray:
        """Log posterior variance; the first entry, log 0, is replaced by the second (ADM)."""
        variance = self.posterior_variance
        first = variance[1] if len(variance) > 1 else self.betas[0]
        return np.log(np.append(first, variance[1:]))

    @property
    def posterior_mean_x0(self) -> np.ndarray:
        """Weight of x_0 in the posterior mean."""
        return self.betas * np.sqrt(self.alpha_bar_previous) / (1.0 - self.alpha_bar)

    @property
    def posterior_mean_xt(self) -> np.ndarray:
        """Weight of x_t in the posterior mean."""
        rest = 1.0 - self.alpha_bar_previous
        return rest * np.sqrt(1.0 - self.betas) / (1.0 - self.alpha_bar)


def linear_schedule(timesteps: int, beta_start: float, beta_end: float) -> Schedule:
    """Linearly spaced betas; ADM uses T = 1000, 1e-4 to 0.02."""
    return Schedule(np.arange(timesteps), np.linspace(beta_start, beta_end, timesteps))


def evenly_spaced(timesteps: int, steps: int) -> np.ndarray:
    """`steps` of `timesteps` timesteps at equal strides, including the first and the last.

    ADM's space_timesteps with one section: it accumulates the stride in float64 and rounds each
    sum, which for 278 of 1,000 step counts differs from rounding multiples of the stride.

    Raises:
        ValueError: more steps than timesteps, or none.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"sampling steps must be between 1 and {timesteps}, not {steps}")
    stride = (timesteps - 1) / (steps - 1) if steps > 1 else 1.0
    sums = itertools.accumulate(itertools.repeat(stride, steps - 1), initial=0.0)
    return np.array([round(value) for value in sums])


def ddim_spaced(timesteps: int, steps: int) -> np.ndarray:
    """Every n-th of `timesteps` timesteps from 0, `steps` in total (ADM's ddimN).

    Unlike `evenly_spaced`, does not include the last one.

    Raises:
        ValueError: no integer stride gives this many.
    """
    kept = np.arange(0, timesteps, -(-timesteps // steps))
    if steps == 1 or len(kept) != steps:
        raise ValueError(f"no integer stride gives {steps} of {timesteps} timesteps")
    return kept


def respace(schedule: Schedule, kept: np.ndarray) -> Schedule:
    """The diffusion restricted to the steps `kept` (ascending) of `schedule`."""
    alpha_bar = schedule.alpha_bar[kept]
    previous = np.append(1.0, alpha_bar[:-1])
    return Schedule(schedule.timesteps[kept], 1.0 - alpha_bar / previous)
