"""Schedule, losses and samplers against diffusers, scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from scipy.stats import norm

from diffit_train.config.diffusion import ddim_stride
from diffit_train.config.evaluate import ConstantGuidance, IntervalGuidance, NoGuidance
from diffit_train.diffusion import guidance, samplers
from diffit_train.diffusion.gaussian import (
    add_noise,
    discretized_log_likelihood,
    gaussian_kl,
    learned_log_variance,
    posterior_mean,
    predict_x0,
    training_loss,
)
from diffit_train.diffusion.schedule import (
    ddim_spaced,
    evenly_spaced,
    linear_schedule,
    respace,
)

ADM = linear_schedule(1000, 1e-4, 0.02)
# diffusers keeps its tables in float32.
DIFFUSERS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


def _latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed)).double()


def test_forward_process_and_its_inverse_agree_with_diffusers() -> None:
    x0, noise, t = _latents(0), _latents(1), torch.tensor([0, 10, 500, 999])
    xt = add_noise(ADM, x0, t, noise)
    expected = DDPMScheduler(**DIFFUSERS).add_noise(x0, noise, t)
    torch.testing.assert_close(xt, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predict_x0(ADM, xt, t, noise), x0, atol=1e-9, rtol=1e-9)


def test_learned_variance_agrees_with_diffusers() -> None:
    scheduler = DDPMScheduler(**DIFFUSERS, variance_type="learned_range")
    values = torch.tensor([-1.0, -0.3, 0.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
    for step in (1, 100, 999):
        mine = learned_log_variance(ADM, values, torch.full((4,), step))
        theirs = scheduler._get_variance(step, predicted_variance=values)
        torch.testing.assert_close(mine, theirs.double(), atol=1e-3, rtol=1e-3)


def test_posterior_is_bayes_rule() -> None:
    """q(x_{t-1} | x_t, x_0) from the product of two normal densities."""
    t = 400
    alpha, before = 1 - ADM.betas[t], ADM.alpha_bar_previous[t]
    precision = alpha / ADM.betas[t] + 1 / (1 - before)
    assert ADM.posterior_variance[t] == pytest.approx(1 / precision, rel=1e-10)
    x0, xt = 0.7, -0.2
    mean = (
        math.sqrt(alpha) * xt / ADM.betas[t] + math.sqrt(before) * x0 / (1 - before)
    ) / precision
    tensors = [torch.tensor([[v]], dtype=torch.float64) for v in (x0, xt)]
    assert posterior_mean(ADM, *tensors, torch.tensor([t])).item() == pytest.approx(mean, rel=1e-9)


def test_kl_agrees_with_torch_distributions() -> None:
    m1, l1, m2, l2 = (
        torch.randn(100, generator=torch.Generator().manual_seed(i)) for i in range(4)
    )
    p, q = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((m1, l1), (m2, l2)))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(gaussian_kl(m1, l1, m2, l2), expected, atol=1e-4, rtol=1e-4)


def test_decoder_likelihood_is_the_mass_of_a_bin() -> None:
    x = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=torch.float64)
    mean, log_scale = torch.full_like(x, 0.1), torch.full_like(x, math.log(0.4))
    edges = [(-np.inf, -1 + 1 / 255), *((v - 1 / 255, v + 1 / 255) for v in (-0.5, 0.0, 0.5))]
    edges.append((1 - 1 / 255, np.inf))
    mass = [norm.cdf(high, 0.1, 0.4) - norm.cdf(low, 0.1, 0.4) for low, high in edges]
    mine = discretized_log_likelihood(x, mean, log_scale)
    # The published code approximates the normal distribution's cdf by a tanh.
    np.testing.assert_allclose(mine.exp().numpy(), mass, rtol=0.02, atol=3e-4)


def test_loss_of_the_true_noise_is_only_the_variance_term() -> None:
    x0, noise, t = _latents(0), _latents(1), torch.tensor([0, 5, 500, 999])
    exact = torch.cat([noise, -torch.ones_like(noise)], dim=1)  # lowest variance: the posterior's
    loss = training_loss(ADM, exact, x0, t, noise)
    assert (loss.mse == 0).all()
    # With true mean and variance the KL vanishes; t = 0 has the decoder's likelihood instead.
    torch.testing.assert_close(loss.vb[1:], torch.zeros(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(loss.total, loss.mse + loss.vb)


def test_the_bound_does_not_move_the_noise_prediction() -> None:
    x0, noise, t = _latents(0), _latents(1), torch.tensor([1, 5, 500, 999])
    output = torch.zeros(4, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    training_loss(ADM, output, x0, t, noise).vb.sum().backward()
    assert (output.grad[:, :3] == 0).all()
    assert (output.grad[:, 3:] != 0).all()


def test_respacing_keeps_the_marginals_and_the_ends() -> None:
    kept = evenly_spaced(1000, 250)
    assert (kept[0], kept[-1], len(kept)) == (0, 999, 250)
    assert (np.diff(kept) > 0).all()
    spaced = respace(ADM, kept)
    np.testing.assert_allclose(spaced.alpha_bar, ADM.alpha_bar[kept], rtol=1e-12)
    np.testing.assert_array_equal(spaced.timesteps, kept)
    np.testing.assert_allclose(respace(ADM, evenly_spaced(1000, 1000)).betas, ADM.betas, rtol=1e-9)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"not {steps}"):
            evenly_spaced(1000, steps)


def _adm_even(timesteps: int, steps: int) -> list[int]:
    """ADM's space_timesteps for one section: a running sum, rounding half to even."""
    stride = 1.0 if steps == 1 else (timesteps - 1) / (steps - 1)
    position, taken = 0.0, set()
    for _ in range(steps):
        whole = math.floor(position)
        rest = position - whole
        taken.add(whole + (rest > 0.5 or (rest == 0.5 and whole % 2 == 1)))
        position += stride
    return sorted(taken)


def _adm_ddim(timesteps: int, steps: int) -> list[int] | None:
    """ADM's ddimN: the first integer stride that gives this many."""
    for stride in range(1, timesteps):
        taken = list(range(0, timesteps, stride))
        if len(taken) == steps:
            return taken
    return None


def test_even_spacing_matches_adm_at_every_count() -> None:
    multiples = 0
    for steps in range(1, 1001):
        expected = _adm_even(1000, steps)
        assert evenly_spaced(1000, steps).tolist() == expected, steps
        stride = 999 / (steps - 1) if steps > 1 else 0.0
        multiples += [round(i * stride) for i in range(steps)] != expected
    # Rounded multiples of the stride differ from the running sum.
    assert multiples == 278


def test_ddim_spacing_matches_adm_at_every_count() -> None:
    possible = 0
    for steps in range(1, 1001):
        expected = _adm_ddim(1000, steps)
        if expected is None:
            with pytest.raises(ValueError, match=f"no integer stride gives {steps} of 1000"):
                ddim_spaced(1000, steps)
            continue
        possible += 1
        assert ddim_spaced(1000, steps).tolist() == expected, steps
    assert 50 < possible < 100
    for timesteps in (2, 3, 10, 64, 97):
        found = [ddim_stride(timesteps, n) is not None for n in range(1, timesteps + 1)]
        assert found == [_adm_ddim(timesteps, n) is not None for n in range(1, timesteps + 1)]


def _exact_denoiser(mean: float, variance: float) -> guidance.Denoiser:
    """The best prediction of the noise where the data is one normal distribution."""

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        alpha_bar = ADM.alpha_bar[int(t)]
        total = alpha_bar * variance + 1 - alpha_bar
        noise = math.sqrt(1 - alpha_bar) * (x - math.sqrt(alpha_bar) * mean) / total
        return torch.cat([noise, torch.zeros_like(noise)], dim=1)

    return denoise


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [("ddpm", 1000, {}), ("ddim", 100, {}), ("ddim", 1000, {"eta": 1.0})],
)
def test_samplers_reach_a_known_distribution(name: str, steps: int, options: dict) -> None:
    generator = torch.Generator().manual_seed(0)

    def fresh(_: int) -> torch.Tensor:
        return torch.randn(4000, 1, 1, 1, generator=generator, dtype=torch.float64)

    schedule = respace(ADM, evenly_spaced(1000, steps))
    sampler = getattr(samplers, name)
    x = sampler(schedule, _exact_denoiser(0.5, 0.09), fresh(0), fresh, **options).flatten()
    # Five standard errors of 4,000 samples, and one percent for the discretization.
    assert x.mean().item() == pytest.approx(0.5, abs=5 * 0.3 / math.sqrt(4000) + 0.005)
    assert x.std().item() == pytest.approx(0.3, rel=5 / math.sqrt(8000) + 0.01)


def test_ddim_agrees_with_diffusers() -> None:
    denoise = _exact_denoiser(0.5, 0.09)
    scheduler = DDIMScheduler(
        **DIFFUSERS, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading"
    )
    scheduler.set_timesteps(50)
    kept = scheduler.timesteps.numpy()[::-1].copy()
    start = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, int(t)).chunk(2, dim=1)[0], t, x).prev_sample
    mine = samplers.ddim(respace(ADM, kept), denoise, start, lambda i: torch.empty(0))
    torch.testing.assert_close(mine, x, atol=1e-4, rtol=1e-4)


def test_power_cosine_starts_at_one_and_ends_at_the_scale() -> None:
    weight = guidance.power_cosine(4.4, 4.0)
    assert weight(1.0) == 1.0
    assert weight(0.0) == pytest.approx(4.4)
    half = 1 + 3.4 / 2 * (1 - math.cos(math.pi * 0.5**4))
    assert weight(0.5) == pytest.approx(half)
    # The release's guidance is off in the first quarter of sampling.
    assert all(weight(t / 1000) - 1 < 4e-5 * 3.4 for t in range(750, 1000))


def test_guidance_changes_only_its_channels() -> None:
    labels = torch.tensor([1, 2])

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value = y.double().view(-1, 1, 1, 1).expand(-1, 8, 2, 2)
        return value + t.view(-1, 1, 1, 1)

    x, t = torch.zeros(2, 4, 2, 2, dtype=torch.float64), torch.tensor([7, 7])
    out = guidance.guided(model, labels, 10, guidance.constant(3.0), channels=3)(x, 7)
    conditional = model(x, t, labels)
    unconditional = model(x, t, torch.tensor([10, 10]))
    expected = conditional.clone()
    expected[:, :3] = (unconditional + 3.0 * (conditional - unconditional))[:, :3]
    torch.testing.assert_close(out, expected)


def test_no_guidance_needs_no_unconditional_pass() -> None:
    seen: list[int] = []

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return torch.zeros(len(x), 2, 1, 1)

    denoise = guidance.guided(model, torch.tensor([0]), 1, guidance.constant(1.0), channels=1)
    denoise(torch.zeros(1, 1, 1, 1), 3)
    assert seen == [1]


def test_interval_guidance_is_off_outside_its_interval() -> None:
    section = IntervalGuidance(scale=2.0, low=0.2, high=0.6)
    weight = guidance.build_weight(section)
    assert [weight(level) for level in (0.199, 0.2, 0.6, 0.601)] == [1.0, 2.0, 2.0, 1.0]
    assert guidance.build_weight(NoGuidance())(0.5) == 1.0
    assert guidance.build_weight(ConstantGuidance(scale=9.0))(0.5) == 9.0


def test_idle_unconditional_passes_are_skipped_and_counted() -> None:
    weight = guidance.power_cosine(4.4, 4.0)
    evaluated: list[int] = []

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        evaluated.append(len(x))
        return y.double().view(-1, 1, 1, 1).expand(-1, 2, 1, 1)

    visited = [t / 1000 for t in evenly_spaced(1000, 250)]
    denoise = guidance.guided(model, torch.tensor([3]), 9, weight, 1, skip_within=1e-4)
    full = guidance.guided(model, torch.tensor([3]), 9, weight, 1)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    outputs = [denoise(x, t) for t in visited]
    spent = sum(evaluated)
    saved = guidance.skipped_fraction(weight, visited, 1e-4)
    assert spent == round((1 - saved) * 2 * len(visited))
    assert 0.1 < saved < 0.15
    for t, out in zip(visited, outputs, strict=True):
        # Labels 3 and 9 differ by 6.
        assert (out - full(x, t)).abs().max() <= 6 * 1e-4
