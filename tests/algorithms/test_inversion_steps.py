"""DDIM steps against diffusers' own schedulers, in the papers' alpha-bar variables."""

import pytest
import torch
from pastiche.nodes.algorithms.inversion import ddim_step, step_fixed_point

diffusers = pytest.importorskip("diffusers")

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
                steps_offset=0, timestep_spacing="leading")


def network(z, t):
    """Any smooth function of (z_t, t); the same one stands for eps and for v."""
    return torch.sin(1.3 * z + t / 300) + 0.2 * z.roll(1, -1)


def sigma_of(alpha_bar):
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def denoised_from(output, z, alpha_bar, prediction):
    if prediction == "epsilon":
        return (z - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()
    return alpha_bar.sqrt() * z - (1 - alpha_bar).sqrt() * output


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("inverse", [False, True])
def test_twenty_steps_equal_diffusers(prediction, inverse):
    make = diffusers.DDIMInverseScheduler if inverse else diffusers.DDIMScheduler
    scheduler = make(prediction_type=prediction, **SCHEDULE)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    for name in ("initial_alpha_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 8, 6, generator=generator, dtype=torch.float64)
    ours = z.clone()
    stride = scheduler.config.num_train_timesteps // 20
    for t in scheduler.timesteps.tolist():
        z = scheduler.step(network(z, t), t, z).prev_sample
        # DDIMInverseScheduler evaluates at the level it enters, and leaves from the one a stride below
        to, start = (t, t - stride) if inverse else (t - stride, t)
        first = scheduler.initial_alpha_cumprod if inverse else scheduler.final_alpha_cumprod
        alpha = scheduler.alphas_cumprod[start] if start >= 0 else first
        alpha_next = scheduler.alphas_cumprod[to] if to >= 0 else first
        denoised = denoised_from(network(ours, t), ours, alpha, prediction)
        x = ddim_step(ours / alpha.sqrt(), denoised, sigma_of(alpha), sigma_of(alpha_next))
        ours = x * alpha_next.sqrt()
        assert (ours - z).abs().max() <= 1e-6 * z.abs().max()


def predict(strength):
    def denoise(x, sigma):
        return x - sigma * (strength * torch.sin(x) + 0.1 * x.roll(1, -1))

    return denoise


def test_fixed_point_solves_the_step_so_that_the_sampler_undoes_it():
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = torch.tensor(0.3), torch.tensor(1.0)
    denoise = predict(0.5)
    solved, _, diverged = step_fixed_point(denoise, x, low, high, 60)
    assert not diverged.any()
    assert (ddim_step(solved, denoise(solved, high), high, low) - x).abs().max() < 1e-6


def test_each_sample_stops_on_its_own_and_never_ends_worse_than_next():
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = torch.tensor(0.0), torch.tensor(1.0)
    strengths = torch.tensor([0.3, 8.0], dtype=torch.float64).view(2, 1, 1, 1)
    denoise = predict(strengths)

    def residual(y):
        return (y - x - (high - low) * (y - denoise(y, high)) / high).flatten(1).norm(dim=1)

    plain, _, _ = step_fixed_point(denoise, x, low, high, 0)
    solved, _, diverged = step_fixed_point(denoise, x, low, high, 40)
    assert diverged.tolist() == [False, True]
    assert (residual(solved) <= residual(plain) * (1 + 1e-12)).all()
    alone, _, _ = step_fixed_point(predict(strengths[:1]), x[:1], low, high, 40)
    assert torch.allclose(solved[:1], alone)


def test_nan_predictions_fall_back():
    calls = []

    def denoise(x, sigma):
        calls.append(x)
        return x * float("nan") if len(calls) > 1 else 0.5 * x

    x = torch.ones(1, 1, 2, 2)
    solved, _, diverged = step_fixed_point(denoise, x, torch.tensor(0.5), torch.tensor(1.0), 5)
    assert diverged.all() and torch.isfinite(solved).all()
