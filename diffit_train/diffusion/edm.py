"""EDM: preconditioned denoising with continuous noise levels (Karras et al. 2022, table 1).

A noise level t is sigma, the standard deviation of the noise that is added to x_0. The network F is
trained through D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), which predicts x_0. VP and VE are
the preconditioning and the noise levels of Song et al. 2021 in the same terms.

Shapes: x (B, C, h, w); sigma (B,), or one number on the host; network output (B, C, h, w).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffit_train.config.diffusion import Edm, Song
from diffit_train.config.evaluate import EdmSampler, Sampler
from diffit_train.diffusion.guidance import Denoiser
from diffit_train.diffusion.samplers import Noise, SamplerFunction, edm_heun

Sigma = TypeVar("Sigma", float, Tensor)

# VP: slope and start of beta(t), last training step t = 1, first one, and timesteps of the network.
BETA_SLOPE, BETA_MIN, VP_FIRST, VP_TIMESTEPS = 19.9, 0.1, 1e-5, 1000
# VE: lowest and highest sigma.
VE_RANGE = (0.02, 100.0)


def _functions(value: float | Tensor) -> Any:
    """The module whose log, exp, sqrt and erf take `value`."""
    return torch if isinstance(value, Tensor) else math


def _unit(value: Sigma) -> Sigma:
    """Clamped to [0, 1]."""
    return value.clamp(0.0, 1.0) if isinstance(value, Tensor) else min(1.0, max(0.0, value))


def vp_sigma(t: Sigma) -> Sigma:
    """VP's noise level at time t in (0, 1]: sigma^2 = exp(beta_d t^2 / 2 + beta_min t) - 1."""
    # expm1, as sigma is tiny near t = 0.
    module = _functions(t)
    return module.sqrt(module.expm1(0.5 * BETA_SLOPE * t**2 + BETA_MIN * t))


def vp_time(sigma: Sigma) -> Sigma:
    """The inverse of `vp_sigma`."""
    module = _functions(sigma)
    inner = BETA_MIN**2 + 2.0 * BETA_SLOPE * module.log1p(sigma**2)
    return (module.sqrt(inner) - BETA_MIN) / BETA_SLOPE


class EdmObjective(ABC):
    """What the three variants share; they differ in their noise levels and coefficients."""

    @abstractmethod
    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Noise levels sigma, (count,) float32."""

    @abstractmethod
    def level(self, t: Sigma) -> Sigma:
        """Fraction of training images with a lower sigma."""

    @abstractmethod
    def coefficients(self, sigma: Sigma) -> tuple[Sigma | float, Sigma, Sigma | float, Sigma]:
        """c_skip, c_out, c_in and c_noise."""

    @abstractmethod
    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared error of x_0."""

    def noisy(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 + sigma noise."""
        return x0 + _per_image(t, x0) * noise

    def precondition(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_in x and c_noise, computed in the dtype of x."""
        *_, c_in, c_noise = self.coefficients(t.to(x.dtype))
        return (_per_image(c_in, x) * x).float(), c_noise.float()

    def denoised(self, output: Tensor, x: Tensor, sigma: Sigma) -> Tensor:
        """D(x; sigma) from the network's output."""
        c_skip, c_out, *_ = self.coefficients(sigma)
        return _per_image(c_skip, x) * x + _per_image(c_out, x) * output.to(x.dtype)

    def loss(self, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Weighted mean squared error of x_0 per image, (B,) (Karras et al. 2022, equation 2)."""
        error = self.denoised(output, self.noisy(x0, t, noise), t) - x0
        return self.weight(t) * (error**2).flatten(1).mean(1)

    def sample(self, sampler: Sampler, denoise: Denoiser, x: Tensor, noise: Noise) -> Tensor:
        """Heun's method in float64 (Karras et al. 2022, algorithm 2), from standard normal x."""
        assert sampler.name == "edm"
        low, high = sampler.churn_range
        run: SamplerFunction[list[float]] = functools.partial(
            edm_heun,
            churn=sampler.churn,
            churn_range=(low, high or math.inf),
            churn_noise=sampler.churn_noise,
        )

        def denoised(x: Tensor, sigma: float) -> Tensor:
            return self.denoised(denoise(x, sigma), x, sigma)

        return run(sampling_levels(sampler), denoised, x.double(), noise).float()

    def predicted_x0(self, output: Tensor, x: Tensor, t: float) -> Tensor:
        """D(x; sigma)."""
        return self.denoised(output, x, t).float()


@dataclass(frozen=True)
class KarrasObjective(EdmObjective):
    """EDM's own: ln sigma is normal, and the network's input and target have unit variance."""

    p_mean: float
    p_std: float
    sigma_data: float

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """exp(p_mean + p_std normal)."""
        normal = random.standard_normal(count, dtype=np.float32)
        return np.exp(np.float32(self.p_mean) + np.float32(self.p_std) * normal)

    def level(self, t: Sigma) -> Sigma:
        """The normal distribution's cumulative probability of ln sigma."""
        module = _functions(t)
        scaled = (module.log(t) - self.p_mean) / (self.p_std * math.sqrt(2.0))
        return 0.5 * (1.0 + module.erf(scaled))

    def coefficients(self, sigma: Sigma) -> tuple[Sigma, Sigma, Sigma, Sigma]:
        """Table 1, column EDM."""
        module, data = _functions(sigma), self.sigma_data
        total = module.sqrt(sigma**2 + data**2)
        return (data / total) ** 2, sigma * data / total, 1.0 / total, module.log(sigma) / 4.0

    def weight(self, sigma: Tensor) -> Tensor:
        """1 / c_out^2."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class VPObjective(EdmObjective):
    """Variance preserving: F predicts the noise, t is uniform."""

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """sigma of a uniform t."""
        t = VP_FIRST + (1.0 - VP_FIRST) * random.random(count)
        return np.sqrt(np.expm1(0.5 * BETA_SLOPE * t**2 + BETA_MIN * t)).astype(np.float32)

    def level(self, t: Sigma) -> Sigma:
        """t of sigma."""
        return _unit((vp_time(t) - VP_FIRST) / (1.0 - VP_FIRST))

    def coefficients(self, sigma: Sigma) -> tuple[float, Sigma, Sigma, Sigma]:
        """Table 1, column VP."""
        c_in = 1.0 / _functions(sigma).sqrt(1.0 + sigma**2)
        return 1.0, -sigma, c_in, (VP_TIMESTEPS - 1) * vp_time(sigma)

    def weight(self, sigma: Tensor) -> Tensor:
        """1 / sigma^2."""
        return 1.0 / sigma**2


class VEObjective(EdmObjective):
    """Variance exploding: F predicts the negative noise, ln sigma is uniform."""

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Log-uniform between 0.02 and 100."""
        low, high = VE_RANGE
        return (low * (high / low) ** random.random(count)).astype(np.float32)

    def level(self, t: Sigma) -> Sigma:
        """Position of ln sigma in its range."""
        low, high = VE_RANGE
        return _unit(_functions(t).log(t / low) / math.log(high / low))

    def coefficients(self, sigma: Sigma) -> tuple[float, Sigma, float, Sigma]:
        """Table 1, column VE."""
        return 1.0, sigma, 1.0, _functions(sigma).log(0.5 * sigma)

    def weight(self, sigma: Tensor) -> Tensor:
        """1 / sigma^2."""
        return 1.0 / sigma**2


def build_edm(section: Edm | Song) -> EdmObjective:
    """The recipe's objective."""
    if section.objective == "edm":
        return KarrasObjective(section.p_mean, section.p_std, section.sigma_data)
    return VPObjective() if section.objective == "vp" else VEObjective()


def sampling_levels(sampler: EdmSampler) -> list[float]:
    """The sigmas that the sampler visits, decreasing, and 0 at the end (table 1, "time steps")."""
    fraction, root = np.linspace(0.0, 1.0, sampler.steps), 1.0 / sampler.rho
    high, low = sampler.sigma_max**root, sampler.sigma_min**root
    return [*((high + fraction * (low - high)) ** sampler.rho).tolist(), 0.0]


def _per_image(value: float | Tensor, like: Tensor) -> float | Tensor:
    """Shaped to multiply (B, C, h, w)."""
    return value.view(-1, *[1] * (like.dim() - 1)) if isinstance(value, Tensor) else value
