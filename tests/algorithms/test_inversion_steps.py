"""DDIM steps against diffusers' own schedulers, in the papers' alpha-bar variables."""

import math

import pytest
import torch
from pastiche.nodes.algorithms.inversion import SCHEMES, Leg, ddim_step, noise_prediction, step_fixed_point, step_next

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


def leg(low, high, **settings):
    return Leg(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64), **settings)


def counted(denoise):
    """(the same prediction, the list of what it was asked)"""
    asked = []

    def count(x, sigma):
        asked.append((x, float(sigma)))
        return denoise(x, sigma)

    return count, asked


def test_fixed_point_solves_the_step_so_that_the_sampler_undoes_it():
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise, step = predict(0.5), leg(0.3, 1.0, iterations=60)
    solved = step_fixed_point(denoise, x, step)
    assert not solved.diverged.any()
    assert (ddim_step(solved.x, denoise(solved.x, step.sigma_next), step.sigma_next, step.sigma) - x).abs().max() < 1e-6


def test_fixed_point_asks_first_at_the_guess_of_predicted():
    x, eps = torch.randn(2, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise, asked = counted(predict(0.5))
    step_fixed_point(denoise, x, leg(0.3, 1.0, iterations=1, eps=eps))
    torch.testing.assert_close(asked[0][0], x + 0.7 * eps)
    assert asked[0][1] == 1.0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("strength, settled", [(0.5, True), (8.0, False)])
def test_whether_the_last_evaluation_was_where_the_step_ends(scheme, strength, settled):
    """Only fixed_point looks for a better place after the one it keeps: where it grows worse."""
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    denoise, asked = counted(predict(strength))
    landing = SCHEMES[scheme](denoise, x, leg(0.3, 1.0, iterations=40))
    assert landing.settled == (settled or scheme != "fixed_point")
    if scheme == "fixed_point":
        assert torch.equal(asked[-1][0], landing.x) == settled


def residuals(denoise, x, y, step):
    return (y - x - step.step * noise_prediction(y, denoise(y, step.sigma_next), step.sigma_next)).flatten(1).norm(dim=1)


def test_each_sample_stops_on_its_own_and_never_ends_worse_than_next():
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    strengths, step = torch.tensor([0.3, 8.0], dtype=torch.float64).view(2, 1, 1, 1), leg(0.0, 1.0, iterations=40)
    denoise = predict(strengths)
    plain = step_next(denoise, x, step).x
    solved = step_fixed_point(denoise, x, step)
    assert solved.diverged.tolist() == [False, True]
    assert (residuals(denoise, x, solved.x, step) <= residuals(denoise, x, plain, step) * (1 + 1e-12)).all()
    alone = step_fixed_point(predict(strengths[:1]), x[:1], step)
    assert torch.allclose(solved.x[:1], alone.x)


@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
def test_however_many_iterations_the_result_is_never_worse_than_next(iterations):
    """Maps that do not contract: the last iterate is often worse than the first."""
    x = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    denoise = predict(torch.linspace(1.5, 12, 16, dtype=torch.float64).view(16, 1, 1, 1))
    step = leg(0.0, 1.0, iterations=iterations)
    plain, solved = (method(denoise, x, step) for method in (step_next, step_fixed_point))
    left = residuals(denoise, x, solved.x, step)
    assert (left <= residuals(denoise, x, plain.x, step) * (1 + 1e-12)).all()
    assert torch.allclose(solved.residual * solved.x.flatten(1).norm(dim=1), left, rtol=1e-9)
    own = denoise(solved.x, step.sigma_next)  # what is handed on belongs to the iterate that was kept
    assert torch.allclose(solved.denoised, own) and torch.allclose(solved.eps, noise_prediction(solved.x, own, step.sigma_next))


def test_a_sample_that_diverges_is_not_followed_any_further():
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    denoise, asked = counted(predict(8.0))
    solved = step_fixed_point(denoise, x, leg(0.0, 1.0, iterations=40))
    before, last = (residuals(predict(8.0), x, at, leg(0.0, 1.0)) for at, _ in asked[-2:])
    assert solved.diverged.all() and last >= before and len(asked) < 1 + 41


def test_where_the_guess_leads_nowhere_next_is_taken():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 1, 4, 4, generator=generator, dtype=torch.float64)
    denoise = predict(torch.linspace(1.5, 12, 16, dtype=torch.float64).view(16, 1, 1, 1))
    step = leg(0.0, 1.0, iterations=7, eps=20 * torch.randn(x.shape, generator=generator, dtype=torch.float64))
    plain, solved = (method(denoise, x, step) for method in (step_next, step_fixed_point))
    left = residuals(denoise, x, solved.x, step)
    assert solved.diverged.any()
    assert (left <= residuals(denoise, x, plain.x, step) * (1 + 1e-12))[solved.diverged].all()


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_a_contraction_cut_off_before_its_tolerance_is_not_worse_than_next(iterations):
    """From a bad guess every iterate is better than the one before, and still worse than `next`."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    eps = 200 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    denoise, asked = counted(predict(0.5))
    step = leg(0.1, 0.5, iterations=iterations, eps=eps)
    solved, plain = step_fixed_point(denoise, x, step), step_next(predict(0.5), x, step)
    assert not solved.diverged.any() and len(asked) == iterations + 3
    left, other = (residuals(predict(0.5), x, landing.x, step) for landing in (solved, plain))
    assert (left <= other * (1 + 1e-12)).all()


def test_a_sample_that_is_done_waits_for_the_others_where_it_is():
    """What is evaluated last, and kept as features, is each sample's own result, as when it is alone."""
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    strengths, step = torch.tensor([0.01, 0.5], dtype=torch.float64).view(2, 1, 1, 1), leg(0.0, 1.0, iterations=40, tolerance=1e-3)
    denoise, asked = counted(predict(strengths))
    solved = step_fixed_point(denoise, x, step)
    assert torch.equal(asked[-1][0], solved.x)
    for i in range(2):
        alone, seen = counted(predict(strengths[i : i + 1]))
        own = step_fixed_point(alone, x[i : i + 1], step)
        assert torch.equal(own.x, solved.x[i : i + 1]) and torch.equal(seen[-1][0], own.x)
    assert len(seen) == len(asked) > 4


def test_nan_predictions_fall_back():
    calls = []

    def denoise(x, sigma):
        calls.append(x)
        return x * float("nan") if len(calls) > 1 else 0.5 * x

    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    solved = step_fixed_point(denoise, x, leg(0.5, 1.0))
    assert solved.diverged.all() and torch.isfinite(solved.x).all()


def test_fixed_point_stops_at_its_tolerance_and_at_rounding():
    """eps = c x is a geometric series: y_m = x (1 + q + ... + q^m), q = h c, residual q^(m+1) |x|; y_1 comes from `next`."""
    x = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    q = 0.5
    for tolerance, floor in ((1e-3, 1e-3), (1e-5, 1e-5), (0.0, 1e-7)):
        terms = next(m for m in range(1, 60) if q ** (m + 1) <= floor * (1 - q ** (m + 1)) / (1 - q))
        denoise, asked = counted(lambda y, sigma: y - sigma * q * y)
        solved = step_fixed_point(denoise, x, leg(0.0, 1.0, iterations=50, tolerance=tolerance))
        assert len(asked) == 1 + terms  # next's own, then the residuals of y_1 ... y_terms
        assert torch.allclose(solved.x, x * (1 - q ** (terms + 1)) / (1 - q), rtol=1e-12)
        assert not solved.diverged.any()
        alike = torch.full((2,), q ** (terms + 1) * (1 - q) / (1 - q ** (terms + 1)), dtype=torch.float64)
        assert torch.allclose(solved.residual, alike, rtol=1e-6)


@pytest.mark.parametrize("iterations", [1, 4])
def test_iterations_are_the_evaluations_after_the_first(iterations):
    """The series above, cut off: with the first step's own evaluation there are `iterations` + 2."""
    x, q = torch.ones(1, 1, 2, 2, dtype=torch.float64), 0.9
    denoise, asked = counted(lambda y, sigma: y - sigma * q * y)
    solved = step_fixed_point(denoise, x, leg(0.0, 1.0, iterations=iterations, tolerance=0.0))
    assert len(asked) == iterations + 2
    assert torch.allclose(solved.x, x * (1 - q ** (iterations + 2)) / (1 - q), rtol=1e-12)


def test_predicted_and_midpoint_are_their_equations_with_one_evaluation_a_step():
    generator = torch.Generator().manual_seed(5)
    x, eps = (torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))  # five dimensions
    for name, share in (("predicted", 1.0), ("midpoint", 0.5)):
        denoise, asked = counted(predict(0.5))
        landing = SCHEMES[name](denoise, x, leg(0.3, 0.8, eps=eps))
        guess, level = x + share * 0.5 * eps, 0.3 + share * 0.5
        at = 0.5 * torch.sin(guess) + 0.1 * guess.roll(1, -1)  # the eps of predict(0.5)
        assert len(asked) == 1 and asked[0][1] == pytest.approx(level) and torch.allclose(asked[0][0], guess)
        assert torch.allclose(landing.x, x + 0.5 * at, rtol=1e-12) and torch.allclose(landing.eps, at, rtol=1e-12)
        denoise, asked = counted(predict(0.5))
        SCHEMES[name](denoise, x, leg(0.0, 0.5))
        assert len(asked) == 2


def walk(scheme, x, steps, rate, **settings):
    """Inverts along `steps` even levels from 0 to 1 on dx/ds = rate(x)."""
    eps = None
    for i in range(steps):
        landing = SCHEMES[scheme](lambda y, sigma: y - sigma * rate(y), x, leg(i / steps, (i + 1) / steps, eps=eps, **settings))
        x, eps = landing.x, landing.eps
    return x


def logistic(x):
    return x * (1 - x)


def test_midpoint_is_second_order_and_next_is_first():
    """The logistic equation, whose solution is known."""
    x = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64)
    exact = 1 / (1 + (1 / x - 1) * math.exp(-1))

    def gain(scheme):
        coarse, fine = ((walk(scheme, x, steps, logistic) - exact).norm() for steps in (40, 80))
        return float(coarse / fine)

    assert 3.5 < gain("midpoint") < 4.5 and 1.8 < gain("next") < 2.2


def test_what_euler_does_not_undo_shrinks_with_the_square_of_the_step_for_predicted_and_linearly_for_next():
    x = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64)

    def error(scheme, steps):
        y = walk(scheme, x, steps, logistic)
        for _ in range(steps):
            y = y - logistic(y) / steps
        return float((y - x).norm())

    gains = {scheme: error(scheme, 40) / error(scheme, 80) for scheme in ("predicted", "next")}
    assert 3.5 < gains["predicted"] < 4.5 and 1.8 < gains["next"] < 2.2
    assert error("predicted", 10) < error("next", 50)
    assert float((walk("fixed_point", x, 10, logistic, iterations=40) - x).norm()) > 0.1 and error("fixed_point", 10) < 1e-5


def test_current_starts_at_the_models_smallest_sigma_and_next_keeps_the_networks_latent():
    x = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise, asked = counted(predict(0.5))
    settings = dict(smallest=torch.tensor(0.03, dtype=torch.float64), input_scale=lambda sigma: (1 + sigma**2) ** -0.5)
    SCHEMES["current"](denoise, x, leg(0.0, 0.5, **settings))
    SCHEMES["current"](denoise, x, leg(0.5, 1.0, **settings))
    SCHEMES["next"](denoise, x, leg(0.75, 1.0, **settings))
    assert [sigma for _, sigma in asked] == [0.03, 0.5, 1.0]
    assert torch.allclose(asked[2][0], x * math.sqrt(2) / 1.25, rtol=1e-12)
