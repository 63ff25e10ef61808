"""InjectFusion's reverse process against an independent NumPy run written from the alpha-bar equations."""

import math

import numpy as np
import pytest
import torch

from pastiche.nodes.algorithms.injectfusion import (
    asymmetric_step, calibrate, gamma_schedule, injecting_steps, match_spread, stochastic_split,
)
from pastiche.nodes.algorithms.inversion import ddim_step
from pastiche.nodes.algorithms.slerp import slerp

SHAPE, H_SHAPE, STEPS, T_EDIT, T_BOOST = (3, 4, 5), (6, 2, 2), 20, 400, 200
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
ALPHA_BAR = np.cumprod(1 - BETAS)
TIMES = np.arange(999, -1, -50)[:STEPS]


class Toy:
    """A smooth eps(z, t) that reads a side tensor h(z, t), as a U-Net reads its bottleneck."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        n, k = math.prod(SHAPE), math.prod(H_SHAPE)
        self.read = rng.normal(size=(k, n)) / math.sqrt(n)
        self.write = rng.normal(size=(n, k)) / math.sqrt(k)
        self.bias = rng.normal(size=k)

    def h(self, z, t):
        return np.tanh(self.read @ z.ravel() + self.bias * math.cos(t / 300)).reshape(H_SHAPE)

    def eps(self, z, t, h):
        scale = math.sqrt(1 - ALPHA_BAR[t])
        return 0.7 * scale * z + 0.4 * np.sin(self.write @ h.ravel()).reshape(SHAPE)


def reference(toy, z, content, gamma, omega, dt_lambda, noise):
    """Sections 4.1-4.3 of the paper in z and alpha-bar; returns every z_t."""
    path = [z]
    for j, t in enumerate(TIMES):
        a = ALPHA_BAR[t]
        a_next = ALPHA_BAR[TIMES[j + 1]] if j + 1 < STEPS else 1.0
        clean = lambda z, e: (z - math.sqrt(1 - a) * e) / math.sqrt(a)
        h = toy.h(z, t)
        e = toy.eps(z, t, h)
        p = p_injected = clean(z, e)
        if t >= T_EDIT:
            c = content[j] * np.linalg.norm(h) / np.linalg.norm(content[j])
            theta = np.arccos((h * c).sum() / np.linalg.norm(h) / np.linalg.norm(c))
            mixed = (np.sin((1 - gamma) * theta) * h + np.sin(gamma * theta) * c) / np.sin(theta)
            e_injected = toy.eps(z, t, mixed)
            p_injected = clean(z, e_injected)
            if omega > 0:
                matched = p_injected.mean() + (p_injected - p_injected.mean()) * p.std(ddof=1) / p_injected.std(ddof=1)
                z = z + math.sqrt(a) * (matched - p) + omega * math.sqrt(1 - a) * (e_injected - e)
                e = toy.eps(z, t, toy.h(z, t))
                p_injected = clean(z, e)
        spread = math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next)) if t < T_BOOST else 0.0
        direction = math.sqrt(1 - a_next - spread**2) * e * (dt_lambda if t >= 950 else 1.0)
        z = math.sqrt(a_next) * p_injected + direction + spread * noise[j]
        path.append(z)
    return path


def ours(toy, z, content, gamma, omega, dt_lambda, noise):
    """The same run through the pack's functions, in x and sigma."""
    levels = torch.tensor(np.append(np.sqrt((1 - ALPHA_BAR[TIMES]) / ALPHA_BAR[TIMES]), 0.0))
    x = torch.from_numpy(z)[None] * (1 + levels[0] ** 2).sqrt()
    path = [x]
    for j, t in enumerate(TIMES):
        sigma, sigma_next = levels[j], levels[j + 1]

        def predict(x, inject=False):
            z = (x / (1 + sigma**2).sqrt())[0].numpy()
            h = toy.h(z, t)
            if inject:
                h = slerp(torch.from_numpy(h)[None], torch.from_numpy(content[j])[None], gamma)[0].numpy()
            return x - sigma * torch.from_numpy(toy.eps(z, t, h))[None]

        clean = injected = predict(x)
        if t >= T_EDIT:
            injected = predict(x, inject=True)
            if omega > 0:
                x = calibrate(x, clean, injected, omega)
                clean = injected = predict(x)
        x = asymmetric_step(x, clean, injected, sigma, sigma_next, dt_lambda if t >= 950 else 1.0,
                            torch.from_numpy(noise[j])[None] if t < T_BOOST else None)
        path.append(x)
    return path, levels


@pytest.mark.parametrize("omega", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [0.3, 0.9])
@pytest.mark.parametrize("dt_lambda", [1.0, 0.9985])
def test_whole_run_is_the_papers(omega, gamma, dt_lambda):
    toy = Toy()
    rng = np.random.default_rng(1)
    z, noise = rng.normal(size=SHAPE), rng.normal(size=(STEPS, *SHAPE))
    content = np.stack([toy.h(rng.normal(size=SHAPE), t) for t in TIMES])
    theirs = reference(toy, z, content, gamma, omega, dt_lambda, noise)
    path, levels = ours(toy, z, content, gamma, omega, dt_lambda, noise)
    plain = reference(toy, z, content, 0.0, 1.0, 1.0, noise)
    for x, sigma, expected in zip(path, levels, theirs):
        np.testing.assert_allclose(x[0].numpy(), expected * math.sqrt(1 + sigma**2), rtol=0, atol=1e-8)
    assert np.abs(theirs[-1] - plain[-1]).max() > (1e-2 if omega < 1 else 1e-5)  # the injection did something


def test_sigma_form_in_single_precision():
    """The same whole run in float32 stays within 1e-6 of the alpha-bar form, relative to the latent's size."""
    toy = Toy()
    rng = np.random.default_rng(2)
    z = rng.normal(size=SHAPE)
    theirs = [z]
    for j, t in enumerate(TIMES):
        a, a_next = ALPHA_BAR[t], ALPHA_BAR[TIMES[j + 1]] if j + 1 < STEPS else 1.0
        e = toy.eps(theirs[-1], t, toy.h(theirs[-1], t))
        theirs.append(math.sqrt(a_next / a) * (theirs[-1] - math.sqrt(1 - a) * e) + math.sqrt(1 - a_next) * e)
    levels = torch.tensor(np.append(np.sqrt((1 - ALPHA_BAR[TIMES]) / ALPHA_BAR[TIMES]), 0.0), dtype=torch.float32)
    x = (torch.from_numpy(z)[None] * (1 + levels[0].double() ** 2).sqrt()).float()
    for j, t in enumerate(TIMES):
        z = (x.double() / (1 + levels[j].double() ** 2).sqrt())[0].numpy()
        eps = torch.from_numpy(toy.eps(z, t, toy.h(z, t)))[None].float()
        x = asymmetric_step(x, x - levels[j] * eps, x - levels[j] * eps, levels[j], levels[j + 1])
        expected = theirs[j + 1] * math.sqrt(1 + float(levels[j + 1]) ** 2)
        assert np.abs(x[0].numpy() - expected).max() < 1e-6 * np.abs(expected).max()


def images(count, seed=3):
    return torch.randn(count, 2, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_omega_one_leaves_only_the_spread_matching():
    x, clean, injected = images(3)
    injected = 2 * injected + 0.5
    mean = injected.mean(dim=(1, 2, 3), keepdim=True)
    ratio = clean.std(dim=(1, 2, 3), keepdim=True) / injected.std(dim=(1, 2, 3), keepdim=True)
    expected = x + (injected - mean) * (ratio - 1)
    torch.testing.assert_close(calibrate(x, clean, injected, 1.0), expected, rtol=0, atol=1e-12)
    # so with equal spreads omega 1 is the uninjected step
    equal = match_spread(injected, clean)
    torch.testing.assert_close(calibrate(x, clean, equal, 1.0), x, rtol=0, atol=1e-12)


def test_calibration_is_the_equation_with_eps():
    x, clean, injected = images(3)
    sigma = 1.7
    eps, eps_injected = (x - clean) / sigma, (x - injected) / sigma
    expected = x + match_spread(injected, clean) - clean + 0.3 * sigma * (eps_injected - eps)
    torch.testing.assert_close(calibrate(x, clean, injected, 0.3), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(calibrate(x, clean, clean, 0.3), x, rtol=0, atol=1e-12)  # nothing injected


def test_spread_matching_is_per_sample_and_survives_constants():
    _, clean, injected = images(3)
    matched = match_spread(injected, clean)
    torch.testing.assert_close(matched.std(dim=(1, 2, 3)), clean.std(dim=(1, 2, 3)))
    torch.testing.assert_close(matched.mean(dim=(1, 2, 3)), injected.mean(dim=(1, 2, 3)))
    constant = torch.full_like(clean, 0.25)
    torch.testing.assert_close(match_spread(constant, clean), constant)


def test_step_without_injection_is_the_ddim_step():
    x, clean, _ = images(3)
    sigma, sigma_next = torch.tensor(4.0), torch.tensor(3.0)
    assert torch.equal(asymmetric_step(x, clean, clean, sigma, sigma_next), ddim_step(x, clean, sigma, sigma_next))
    torch.testing.assert_close(asymmetric_step(x, clean, clean.clone(), sigma, sigma_next),
                               ddim_step(x, clean, sigma, sigma_next), rtol=0, atol=1e-12)


def test_stochastic_split_is_ddims_variance():
    for a, a_next in [(0.1, 0.2), (0.5, 0.9), (0.98, 0.999), (0.99, 1.0)]:
        sigma, sigma_next = (torch.tensor(math.sqrt((1 - v) / v), dtype=torch.float64) for v in (a, a_next))
        down, up = stochastic_split(sigma, sigma_next)
        variance = (1 - a_next) / (1 - a) * (1 - a / a_next) / a_next
        assert up.item() == pytest.approx(math.sqrt(variance), abs=1e-12)
        assert (down**2 + up**2).item() == pytest.approx(sigma_next.item() ** 2, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_schedules_have_equal_totals(gamma, count):
    for schedule in ("constant", "increasing", "decreasing"):
        shares = gamma_schedule(gamma, count, schedule)
        assert len(shares) == count and sum(shares) == pytest.approx(gamma * count)
        assert all(-1e-12 <= share <= 1 + 1e-12 for share in shares)
    rising = gamma_schedule(gamma, count, "increasing")
    assert rising == sorted(rising)
    np.testing.assert_allclose(rising, gamma_schedule(gamma, count, "decreasing")[::-1], atol=1e-12)
    if 0 < gamma < 1 and count > 1:
        assert rising[-1] - rising[0] == pytest.approx(2 * min(gamma, 1 - gamma))


def test_unknown_schedule_names_the_choices():
    with pytest.raises(ValueError, match="constant, increasing, decreasing"):
        gamma_schedule(0.5, 3, "cosine")


def test_injecting_steps():
    sigmas = lambda n: np.geomspace(14.6, 0.03, n).tolist()
    assert injecting_steps(sigmas(10), sigmas(10), 0.0) == list(range(10))
    assert injecting_steps(sigmas(10), sigmas(10), sigmas(10)[4]) == list(range(5))  # t_edit's own step injects
    assert injecting_steps(sigmas(5), sigmas(50), 0.0) == list(range(5))  # fewer: all
    assert injecting_steps(sigmas(10) + [0.0], sigmas(10), 0.0) == list(range(10))  # sigma 0 has no prediction
    assert injecting_steps([3.0, 2.0, 1.5, 1.0], [2.0, 0.0], 0.0) == [1]  # nor features
    assert injecting_steps(sigmas(10), sigmas(10), 100.0) == []
    dense, sparse = sigmas(46), sigmas(10)
    chosen = injecting_steps(dense, sparse, 0.0)
    assert len(chosen) == 10
    np.testing.assert_allclose([dense[i] for i in chosen], sparse, rtol=1e-6)
    half = injecting_steps(dense, sparse, 1.0)
    assert half == [i for i in chosen if dense[i] >= 1.0]
