"""Samplers on a mixture of two normal distributions, with exact noise and velocity.

In one dimension the probability-flow ODE maps quantiles to quantiles, so the exact result of every
deterministic sampler is also known.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from pydantic import TypeAdapter
from scipy import optimize, stats
from torch import Tensor

from diffit_train.config.diffusion import Diffusion, Epsilon, Flow
from diffit_train.config.evaluate import Ddim, Sampler, Sde
from diffit_train.diffusion import samplers
from diffit_train.diffusion.edm import EdmObjective
from diffit_train.diffusion.flow import flow_loss, interpolate, score
from diffit_train.diffusion.objective import build_objective, sampler_sigmas
from diffit_train.diffusion.schedule import evenly_spaced, linear_schedule, respace

ADM = linear_schedule(1000, 1e-4, 0.02)
DIFFUSION, SAMPLER = TypeAdapter(Diffusion), TypeAdapter(Sampler)
WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([-1.0, 0.6]), np.array([0.2, 0.3])


def _mixture_cdf(x: np.ndarray, signal: float, sigma: float) -> np.ndarray:
    """Distribution of signal * x_0 + sigma * noise."""
    scale = np.sqrt((signal * STDS) ** 2 + sigma**2)
    return (WEIGHTS * stats.norm.cdf(np.asarray(x)[..., None], signal * MEANS, scale)).sum(-1)


def _expected_x0(x: Tensor, signal: float, sigma: float) -> Tensor:
    """E[x_0 | signal * x_0 + sigma * noise = x], exactly."""
    weights, means, stds = (torch.from_numpy(v) for v in (WEIGHTS, MEANS, STDS))
    variance = (signal * stds) ** 2 + sigma**2
    wide = x.unsqueeze(-1)
    log = torch.log(weights) - 0.5 * torch.log(variance)
    share = torch.softmax(log - (wide - signal * means) ** 2 / (2 * variance), -1)
    each = means + signal * stds**2 / variance * (wide - signal * means)
    return (share * each).sum(-1)


def _noise_and_variance(x: Tensor, t: float) -> Tensor:
    """The exact denoiser, with the posterior's own variance."""
    bar = float(ADM.alpha_bar[int(t)])
    signal, sigma = math.sqrt(bar), math.sqrt(1 - bar)
    noise = (x - signal * _expected_x0(x, signal, sigma)) / sigma
    return torch.cat([noise, torch.full_like(noise, -1.0)], 1)


def _velocity(x: Tensor, time: float) -> Tensor:
    expected = _expected_x0(x, 1 - time, time)
    # At t = 0 the noise is independent of x, so its mean is zero.
    noise = (x - (1 - time) * expected) / time if time > 0 else torch.zeros_like(x)
    return noise - expected


def _quantiles(x: np.ndarray, signal: float, sigma: float) -> np.ndarray:
    """The endpoint of the probability flow from x."""
    levels = _mixture_cdf(x, signal, sigma)
    ends = [optimize.brentq(lambda v, p=p: _mixture_cdf(v, 1.0, 0.0) - p, -6, 6) for p in levels]
    return np.array(ends)


def _no_noise(step: int) -> Tensor:
    raise AssertionError("a deterministic sampler called noise")


START = np.linspace(-1.8, 1.8, 13)


def _times(steps: int) -> list[float]:
    return np.linspace(1.0, 0.0, steps + 1).tolist()


def _error(name: str, steps: int) -> float:
    """Largest error at the end, over starting points away from the boundary between modes."""
    x = torch.from_numpy(START).view(-1, 1, 1, 1)
    if name.startswith("flow"):
        exact = _quantiles(START, 0.0, 1.0)
        out = getattr(samplers, name)(_times(steps), _velocity, x, _no_noise)
    else:
        bar = float(ADM.alpha_bar[-1])
        exact = _quantiles(START, math.sqrt(bar), math.sqrt(1 - bar))
        schedule = respace(ADM, evenly_spaced(1000, steps))
        out = getattr(samplers, name)(schedule, _noise_and_variance, x, _no_noise)
    return float(np.abs(out.flatten().numpy() - exact).max())


@pytest.mark.parametrize(
    ("name", "steps", "order"),
    [
        ("ddim", 100, 1),
        ("dpmpp_2m", 50, 2),
        ("heun", 50, 2),
        ("flow_euler", 100, 1),
        ("flow_heun", 50, 2),
    ],
)
def test_deterministic_samplers_converge_at_their_order(name: str, steps: int, order: int) -> None:
    coarse, fine = _error(name, steps), _error(name, 2 * steps)
    assert fine < 0.02
    assert coarse / fine > 0.8 * 2**order


@pytest.mark.parametrize("name", ["ddpm", "ddim", "flow_sde"])
def test_stochastic_samplers_reach_the_distribution(name: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def fresh(_: int) -> Tensor:
        return torch.randn(3000, 1, 1, 1, generator=generator, dtype=torch.float64)

    if name == "flow_sde":
        x = samplers.flow_sde([*np.linspace(1.0, 0.04, 500), 0.0], _velocity, fresh(0), fresh)
    elif name == "ddpm":
        x = samplers.ddpm(ADM, _noise_and_variance, fresh(0), fresh)
    else:
        schedule = respace(ADM, evenly_spaced(1000, 250))
        x = samplers.ddim(schedule, _noise_and_variance, fresh(0), fresh, eta=0.5)
    found = stats.kstest(x.flatten().numpy(), lambda v: _mixture_cdf(v, 1.0, 0.0))
    # 1.95 / sqrt(n) is exceeded once in a thousand; some room for the discretization.
    assert found.statistic < 1.95 / math.sqrt(3000) + 0.01


MEAN, STD = 0.5, 0.3


def _velocity_of_one_normal(x: Tensor, time: float) -> Tensor:
    away = (x - (1 - time) * MEAN) / ((1 - time) ** 2 * STD**2 + time**2)
    return time * away - (MEAN + (1 - time) * STD**2 * away)


def _moments(steps: int, diffusion: str, last_step: str, size: float) -> tuple[float, float]:
    """Mean and standard deviation of SiT's algorithm on a single normal distribution.

    In SiT's time, 1 at the data, with its D(t): drift u + D * score, noise sqrt(2 D). Everything
    is linear in x, so the moments follow exactly.
    """
    grid = np.linspace(0.0, 1.0 - size, steps)
    mean, variance = 0.0, 1.0
    for number, t in enumerate(grid):
        last = number == steps - 1
        dt = size if last else grid[1] - grid[0]
        d = {"2sigma": 1.0, "sigma": 0.5}[diffusion] * (1.0 - t)
        spread = t**2 * STD**2 + (1.0 - t) ** 2
        # u = MEAN + slope * (x - t MEAN), score = -(x - t MEAN) / spread.
        slope = (t * STD**2 - (1.0 - t)) / spread
        if not last or last_step == "mean":
            slope -= d / spread
        mean = mean + dt * (MEAN + slope * (mean - t * MEAN))
        variance = (1.0 + dt * slope) ** 2 * variance + (0.0 if last else 2.0 * d * dt)
    return mean, math.sqrt(variance)


def _sampled(steps: int, size: float, **options: str) -> tuple[float, float]:
    """As `_moments`, of 200,000 samples."""
    generator = torch.Generator().manual_seed(0)

    def fresh(_: int) -> Tensor:
        return torch.randn(200_000, 1, 1, 1, generator=generator, dtype=torch.float64)

    sampler = Sde(steps=steps, last_step_size=size, **options)
    objective = build_objective(Flow())

    def denoise(x: Tensor, t: float) -> Tensor:
        return _velocity_of_one_normal(x, t / 1000)

    x = objective.sample(sampler, denoise, fresh(0), fresh)
    return float(x.mean()), float(x.std())


@pytest.mark.parametrize("diffusion", ["2sigma", "sigma"])
@pytest.mark.parametrize("last_step", ["mean", "euler"])
def test_the_flow_sde_matches_sit(diffusion: str, last_step: str) -> None:
    mean, std = _sampled(8, 0.04, diffusion=diffusion, last_step=last_step)
    exact = _moments(8, diffusion, last_step, 0.04)
    # Five standard errors; every other combination of the two options is further away.
    tolerance = 5 * exact[1] / math.sqrt(2 * 200_000)
    assert mean == pytest.approx(exact[0], abs=1.5 * tolerance)
    assert std == pytest.approx(exact[1], abs=tolerance)
    for other in [(d, e) for d in ("2sigma", "sigma") for e in ("mean", "euler")]:
        if other != (diffusion, last_step):
            assert abs(_moments(8, *other, 0.04)[1] - std) > tolerance, other


@pytest.mark.parametrize("diffusion", ["2sigma", "sigma"])
@pytest.mark.parametrize("last_step", ["mean", "euler"])
def test_the_flow_sde_reaches_the_exact_moments(diffusion: str, last_step: str) -> None:
    options = {"diffusion": diffusion, "last_step": last_step}
    errors = []
    for steps in (25, 50, 100, 200):
        mean, std = _moments(steps, diffusion, last_step, 1 / steps)
        errors.append(math.hypot(mean - MEAN, std - STD))
    assert all(fine < 0.65 * coarse for coarse, fine in itertools.pairwise(errors))
    mean, std = _sampled(200, 1 / 200, **options)
    assert mean == pytest.approx(MEAN, abs=errors[-1] + 5 * STD / math.sqrt(200_000))
    assert std == pytest.approx(STD, abs=errors[-1] + 5 * STD / math.sqrt(400_000))


def test_sits_defaults() -> None:
    """From train_utils.py in willisma/SiT: sigma (2 sigma here), Mean, 0.04."""
    sampler = Sde()
    assert (sampler.diffusion, sampler.last_step, sampler.last_step_size) == (
        "2sigma",
        "mean",
        0.04,
    )


def test_dpm_solver_agrees_with_diffusers() -> None:
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        final_sigmas_type="zero",
        lower_order_final=False,
    )
    kept = evenly_spaced(1000, 20)
    # diffusers always ends at timestep 0, regardless of the requested ones.
    scheduler.set_timesteps(timesteps=kept[::-1].tolist())
    x = start = torch.from_numpy(START).view(-1, 1, 1, 1)
    for t in scheduler.timesteps:
        noise = _noise_and_variance(x, int(t)).chunk(2, dim=1)[0]
        x = scheduler.step(noise, t, x).prev_sample
    mine = samplers.dpmpp_2m(respace(ADM, kept), _noise_and_variance, start, _no_noise)
    torch.testing.assert_close(mine, x.double(), atol=2e-4, rtol=1e-4)


def test_flow_path_and_loss() -> None:
    x0, noise = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    t = torch.tensor([0.0, 0.25])
    x = interpolate(x0, t, noise)
    torch.testing.assert_close(x[0], x0[0])
    torch.testing.assert_close(x[1], 0.75 * x0[1] + 0.25 * noise[1])
    assert torch.equal(flow_loss(noise - x0, x0, noise), torch.zeros(2))
    torch.testing.assert_close(
        flow_loss(torch.zeros_like(x0), x0, noise), ((noise - x0) ** 2).mean((1, 2, 3))
    )


def test_flow_score() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1).requires_grad_()
    t = torch.full((9,), 0.4, dtype=torch.float64)
    weights, means, stds = (torch.from_numpy(v) for v in (WEIGHTS, MEANS, STDS))
    scale = torch.sqrt((0.6 * stds) ** 2 + 0.16)
    density = (weights * torch.distributions.Normal(0.6 * means, scale).log_prob(x).exp()).sum(-1)
    (exact,) = torch.autograd.grad(density.log().sum(), x)
    torch.testing.assert_close(score(_velocity(x, 0.4), x, t), exact)


@pytest.mark.parametrize(
    ("objective", "name", "steps", "calls"),
    [
        ("epsilon", "ddpm", 5, 5),
        ("epsilon", "ddim", 5, 5),
        ("epsilon", "dpmpp_2m", 5, 5),
        ("epsilon", "heun", 5, 9),
        ("flow", "euler", 5, 5),
        ("flow", "heun", 5, 10),
        ("flow", "sde", 5, 5),
    ],
)
def test_number_of_denoiser_calls(objective: str, name: str, steps: int, calls: int) -> None:
    diffusion = DIFFUSION.validate_python({"objective": objective})
    sampler = SAMPLER.validate_python({"name": name, "steps": steps})
    visited = sampler_sigmas(diffusion, sampler)
    assert len(visited) == calls
    assert visited[0] == (0.999 if objective == "epsilon" else 1.0)
    assert all(0 <= level <= 1 for level in visited)


def test_ddim_visits_the_timesteps_of_the_wanted_spacing() -> None:
    visited = sampler_sigmas(Epsilon(), Ddim(steps=50, spacing="ddim"))
    assert visited == [t / 1000 for t in range(980, -1, -20)]
    even = sampler_sigmas(Epsilon(), Ddim(steps=50))
    assert (even[0], even[-1]) == (0.999, 0)


@pytest.mark.parametrize("objective", ["epsilon", "flow"])
def test_the_true_prediction_minimizes_the_objective(objective: str) -> None:
    made = build_objective(DIFFUSION.validate_python({"objective": objective}))
    random = np.random.default_rng(0)
    t = torch.from_numpy(made.draw(random, 64))
    assert 0 <= t.min() < 200 < 800 < t.max() < 1000
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(64, 2, 2, 2, generator=generator) for _ in range(2))
    x = made.noisy(x0, t, noise)
    truth = noise - x0 if objective == "flow" else torch.cat([noise, -torch.ones_like(noise)], 1)
    assert x.shape == x0.shape
    best = made.loss(truth, x0, t, noise)
    # Noise left in an image costs bits only in the last step of ADM's diffusion.
    assert (best[t >= 1] < 1e-4).all()
    assert (made.loss(truth + 0.5, x0, t, noise) > best + 0.1).all()


@pytest.mark.parametrize("name", ["epsilon", "flow", "edm", "vp", "ve"])
def test_x0_is_what_the_models_output_says(name: str) -> None:
    """The output of a model that knows x_0, at a noise level as the sampler gives it."""
    objective = build_objective(DIFFUSION.validate_python({"objective": name}))
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 3, 3, 4, 4).unbind()
    t = 300 if name in ("epsilon", "flow") else 1.7
    levels = torch.full((3,), t)
    x = objective.noisy(x0, levels, noise)
    if isinstance(objective, EdmObjective):
        c_skip, c_out, *_ = objective.coefficients(float(t))
        x = x.double()
        output = ((x0 - c_skip * x) / c_out).float()
    elif name == "flow":
        output = noise - x0
    else:
        output = torch.cat([noise, torch.randn_like(noise)], dim=1)
    found = objective.predicted_x0(output, x, t)
    assert found.dtype == torch.float32
    assert torch.allclose(found, x0, atol=1e-4)
