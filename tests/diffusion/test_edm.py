"""EDM against formulas from the papers, and its sampler on distributions with an exact denoiser."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffit_train.config import load_recipe
from diffit_train.config.diffusion import Edm, Song
from diffit_train.config.evaluate import EdmSampler
from diffit_train.diffusion import samplers
from diffit_train.diffusion.edm import build_edm, sampling_levels, vp_sigma, vp_time
from diffit_train.diffusion.objective import build_objective, sampler_sigmas
from diffit_train.errors import UserError

SECTIONS = {"edm": Edm(), "vp": Song(objective="vp"), "ve": Song(objective="ve")}
DATA = 0.5


def _normal(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 3.0, 80.0])
def test_preconditioning_keeps_unit_variance_and_the_least_amplification(sigma: float) -> None:
    """Karras et al. 2022, appendix B.6, on images of standard deviation 0.5."""
    made, count = build_edm(Edm()), 200_000
    x0, noise = DATA * _normal(count, 0), _normal(count, 1)
    t = torch.full((count,), sigma, dtype=torch.float64)
    x = made.noisy(x0, t, noise)
    inputs, c_noise = made.precondition(x, t)
    assert inputs.dtype == c_noise.dtype == torch.float32
    assert float(inputs.std()) == pytest.approx(1.0, abs=0.01)
    assert float(c_noise[0]) == pytest.approx(math.log(sigma) / 4.0)
    # The network's target: what it must return for D to be x_0.
    zero, one = (made.denoised(torch.full_like(x, v), x, t) for v in (0.0, 1.0))
    target = (x0 - zero) / (one - zero)
    assert float(target.std()) == pytest.approx(1.0, abs=0.01)
    # Least amplification: c_skip x is the best linear estimate of x_0.
    slope = float((x * x0).mean() / (x * x).mean())
    torch.testing.assert_close(zero, slope * x, rtol=0.03, atol=0.01)
    # Every noise level weighs the same in the loss of the network's own output.
    error = made.loss((target + 0.3).float(), x0, t, noise)
    torch.testing.assert_close(error, torch.full_like(error, 0.09), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("variant", "sign"), [("vp", 1.0), ("ve", -1.0)])
def test_vp_and_ve_predict_noise(variant: str, sign: float) -> None:
    made = build_edm(SECTIONS[variant])
    x0, noise = DATA * _normal(64, 0), _normal(64, 1)
    t = torch.from_numpy(made.draw(np.random.default_rng(0), 64)).double()
    x = made.noisy(x0, t, noise)
    torch.testing.assert_close(made.denoised(sign * noise, x, t), x0, rtol=0, atol=1e-12)
    loss = made.loss(sign * noise + 0.5, x0, t, noise)
    torch.testing.assert_close(loss, torch.full_like(loss, 0.25))


def test_vp_is_the_continuous_linear_schedule() -> None:
    """sigma(t) against the integral of beta(t), and the network's input against DDPM's x_t."""
    times = np.linspace(0.0, 1.0, 100_001)
    beta = 0.1 + 19.9 * times
    integral = np.concatenate([[0.0], np.cumsum((beta[1:] + beta[:-1]) / 2 * np.diff(times))])
    for index in (1_000, 30_000, 100_000):
        alpha_bar = math.exp(-integral[index])
        sigma = vp_sigma(float(times[index]))
        assert sigma == pytest.approx(math.sqrt((1 - alpha_bar) / alpha_bar), rel=1e-6)
        assert vp_time(sigma) == pytest.approx(times[index])
        made, x0, noise = build_edm(Song()), _normal(8, 0), _normal(8, 1)
        t = torch.full((8,), sigma, dtype=torch.float64)
        inputs, c_noise = made.precondition(made.noisy(x0, t, noise), t)
        expected = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * noise
        torch.testing.assert_close(inputs, expected.float())
        assert float(c_noise[0]) == pytest.approx(999 * times[index], rel=1e-5)


@pytest.mark.parametrize("variant", SECTIONS)
def test_levels_are_uniform_over_the_training_distribution(variant: str) -> None:
    made = build_edm(SECTIONS[variant])
    sigma = made.draw(np.random.default_rng(0), 20_000)
    assert sigma.dtype == np.float32
    level = made.level(torch.from_numpy(sigma).double())
    assert stats.kstest(level.numpy(), "uniform").pvalue > 1e-3
    assert made.level(float(sigma[0])) == pytest.approx(float(level[0]), abs=1e-6)
    if variant == "edm":
        found = stats.kstest(np.log(sigma), stats.norm(-1.2, 1.2).cdf)
        assert found.pvalue > 1e-3


MEAN, STD = 0.3, 0.4


def _exact(x: Tensor, sigma: float) -> Tensor:
    """E[x_0 | x] for normal images."""
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


def _no_noise(step: int) -> Tensor:
    raise AssertionError("a deterministic sampler called noise")


def _error(steps: int) -> float:
    sigmas = sampling_levels(EdmSampler(steps=steps))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    found = samplers.edm_heun(sigmas, _exact, x, _no_noise)
    # The flow keeps the number of standard deviations from the mean, up to the last sigma.
    start = (sigmas[0] * x - MEAN) / math.sqrt(STD**2 + sigmas[0] ** 2)
    return float((found - (MEAN + STD * start)).abs().max())


def test_heun_converges_at_order_two() -> None:
    errors = [_error(steps) for steps in (18, 36, 72, 144)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 1e-3
    assert all(1.9 < order < 2.3 for order in orders), (errors, orders)


def test_published_noise_levels() -> None:
    sigmas = sampling_levels(EdmSampler())
    assert (len(sigmas), sigmas[0], sigmas[-1]) == (19, pytest.approx(80.0), 0.0)
    assert sigmas[-2] == pytest.approx(0.002)
    roots = np.diff(np.array(sigmas[:-1]) ** (1 / 7))
    np.testing.assert_allclose(roots, roots[0])


def test_churn_keeps_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)

    def fresh(_: int) -> Tensor:
        return torch.randn(4000, 1, 1, 1, generator=generator)

    sigmas = sampling_levels(EdmSampler(steps=40))
    plain = samplers.edm_heun(sigmas, _exact, fresh(0).double(), fresh)
    noisy = samplers.edm_heun(
        sigmas, _exact, fresh(0).double(), fresh, churn=30.0, churn_range=(0.05, 50.0)
    )
    for x in (plain, noisy):
        found = stats.kstest(x.flatten().numpy(), stats.norm(MEAN, STD).cdf)
        assert found.statistic < 1.95 / math.sqrt(4000) + 0.01


@pytest.mark.parametrize(("steps", "nfe"), [(18, 35), (40, 79)])
def test_published_number_of_evaluations(steps: int, nfe: int) -> None:
    visited = sampler_sigmas(Edm(), EdmSampler(steps=steps))
    assert len(visited) == nfe
    assert 0.999 < visited[0] <= 1.0
    assert visited[-1] < 1e-4


@pytest.mark.parametrize("variant", SECTIONS)
def test_a_perfect_network_samples_the_images(variant: str) -> None:
    """Through preconditioning in both directions, in float64."""
    made = build_objective(SECTIONS[variant])
    seen = set()

    def network(x: Tensor, sigma: float) -> Tensor:
        seen.add(x.dtype)
        c_skip, c_out, *_ = made.coefficients(sigma)  # type: ignore[attr-defined]
        return ((_exact(x, sigma) - c_skip * x) / c_out).float()

    x = _normal(4000, 0).float()
    found = made.sample(EdmSampler(steps=72), network, x, _no_noise)
    assert seen == {torch.float64}
    assert float(found.mean()) == pytest.approx(float(MEAN + STD * x.mean()), abs=0.005)
    assert float(found.std()) == pytest.approx(float(STD * x.std()), rel=0.01)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("diffusion.p_std=2", r"diffusion\.p_std .*diffusion\.objective=edm.* 'epsilon'"),
        ("evaluate.sampler.churn=3", r"sampler\.churn .*evaluate\.sampler\.name=edm.* 'ddim'"),
        ("evaluate.sampler={name: edm, sigma_min: 90}", r"sigma_min is 90\.0.*sigma_max \(80"),
        ("diffusion={objective: vp, p_std: 2}", r"diffusion\.p_std .*objective=edm.* 'vp'"),
    ],
)
def test_options_of_edm_need_edm(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("demo", [override])
