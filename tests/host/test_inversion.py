import logging

import pytest
import torch
from pastiche.nodes.host.trajectories.inversion import invert, noise_latent, reconstruct
from support.models import smooth_eps, tiny_cond, tiny_unet
from support.sampling import cancelled_at, random_latent, sample, schedule


@pytest.fixture(scope="module")
def model():
    return smooth_eps(tiny_unet())


@pytest.fixture(scope="module")
def positive(model):
    return tiny_cond(model)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_stock_sampler_continues_the_inverted_latent(model, positive):
    latent, sigmas = random_latent(6, 10, batch=2), schedule(model, 12)
    noise, trajectory = invert(model, {"samples": latent}, sigmas, positive, "fixed_point", 30, tolerance=1e-7)
    back = sample(model, noise["samples"], sigmas, positive)
    assert relative(back, latent) < 1e-5
    assert trajectory.latents.shape == (13, 2, 4, 6, 10)
    assert torch.equal(trajectory.schedule, sigmas)


def test_ksampler_advanced_from_step_zero_continues_it(model, positive):
    import comfy.samplers

    latent, sigmas = random_latent(), schedule(model, 8)
    noise, _ = invert(model, {"samples": latent}, sigmas, positive, "fixed_point", 30, tolerance=1e-7)
    sampler = comfy.samplers.KSampler(model, steps=8, device=model.load_device, sampler="euler", scheduler="normal")
    back = sampler.sample(
        torch.zeros_like(latent), positive, positive, cfg=1.0, latent_image=noise["samples"], start_step=0,
        last_step=10000, force_full_denoise=False, disable_pbar=True, seed=1,
    )
    assert relative(back, latent) < 1e-5


def test_schemes_rank_and_more_steps_are_never_worse(model, positive):
    latent = random_latent(seed=3)
    error = {}
    for scheme, iterations, steps in (("next", 0, 10), ("next", 0, 25), ("next", 0, 50), ("current", 0, 25), ("fixed_point", 5, 10)):
        sigmas = schedule(model, steps)
        noise, trajectory = invert(model, {"samples": latent}, sigmas, positive, scheme, iterations)
        error[scheme, steps] = relative(reconstruct(model, trajectory), latent)
    assert error["next", 50] < error["next", 25] < error["next", 10]
    assert error["fixed_point", 10] < error["next", 50]
    assert error["current", 25] > error["fixed_point", 10]


def test_zero_iterations_is_next(model, positive):
    latent, sigmas = {"samples": random_latent()}, schedule(model, 5)
    a, _ = invert(model, latent, sigmas, positive, "fixed_point", 0)
    b, _ = invert(model, latent, sigmas, positive, "next", 7)
    assert torch.equal(a["samples"], b["samples"])


def test_reconstruct_equals_the_stock_sampler(model, positive):
    sigmas = schedule(model, 7)
    noise, trajectory = invert(model, {"samples": random_latent()}, sigmas, positive, "next")
    assert relative(reconstruct(model, trajectory), sample(model, noise["samples"], sigmas, positive)) < 1e-6


def test_batch_equals_single_runs(model, positive):
    sigmas, latent = schedule(model, 6), random_latent(batch=3)
    together, _ = invert(model, {"samples": latent}, sigmas, positive)
    for i in range(3):
        alone, _ = invert(model, {"samples": latent[i : i + 1]}, sigmas, positive)
        assert relative(together["samples"][i : i + 1], alone["samples"]) < 1e-5


def test_divergence_keeps_the_best_iterate_and_says_so(positive, caplog):
    model = smooth_eps(tiny_unet(), strength=40.0)
    latent, sigmas = {"samples": random_latent()}, schedule(model, 4)
    with caplog.at_level(logging.WARNING):
        _, wild = invert(model, latent, sigmas, positive, "fixed_point", 10)
    assert "diverged" in caplog.text
    _, plain = invert(model, latent, sigmas, positive, "next")
    assert torch.isfinite(wild.latents).all()
    assert residual(model, wild, positive, 1) <= residual(model, plain, positive, 1) * (1 + 1e-5)


def test_what_is_left_above_the_tolerance_is_logged(model, positive, caplog):
    latent, sigmas = {"samples": random_latent()}, schedule(model, 6)
    with caplog.at_level(logging.INFO):
        invert(model, latent, sigmas, positive, "fixed_point", 1, tolerance=1e-6)
    assert "stopped above its tolerance (1.0e-06)" in caplog.text and "diverged" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        invert(model, latent, sigmas, positive, "fixed_point", 40, tolerance=1e-4)
    assert "tolerance" not in caplog.text


def residual(model, trajectory, positive, step):
    """|x_j - (x_{j-1} + ds eps(x_j, s_j))|: how far a step is from being undone exactly."""
    low, high = trajectory.latents[step - 1], trajectory.latents[step]
    sigmas = trajectory.sigmas[step - 1 : step + 1].flip(0)
    start = model.model.process_latent_out(high)
    back = sample(model, start, sigmas, positive)
    return float((model.model.process_latent_in(back) - low).norm())


def test_substeps_keep_only_the_schedules_levels(model, positive):
    sigmas = schedule(model, 5)
    _, thin = invert(model, {"samples": random_latent()}, sigmas, positive, "next", 0, substeps=20)
    _, coarse = invert(model, {"samples": random_latent()}, sigmas, positive, "next", 0)
    assert torch.equal(thin.sigmas, coarse.sigmas) and thin.latents.shape == coarse.latents.shape
    exact, _ = invert(model, {"samples": random_latent()}, schedule(model, 500), positive, "fixed_point", 10)
    target = model.model.process_latent_in(exact["samples"])
    assert relative(thin.latents[-1], target) < relative(coarse.latents[-1], target)


def test_thousand_step_inversion_of_fifty(model, positive):
    _, trajectory = invert(model, {"samples": random_latent()}, schedule(model, 50), positive, "next", 0, substeps=20)
    assert trajectory.steps == 50 and len(trajectory.latents) == 51


def test_original_model_is_untouched(model, positive):
    before = {name: dict(options) if isinstance(options, dict) else options for name, options in model.model_options.items()}
    invert(model, {"samples": random_latent()}, schedule(model, 3), positive)
    assert model.model_options.keys() == before.keys()
    assert model.model_options["transformer_options"] == before["transformer_options"]
    assert not model.wrappers


def test_noise_mask_is_dropped_and_other_keys_kept(model, positive):
    latent = {"samples": random_latent(), "noise_mask": torch.ones(1, 8, 8), "batch_index": [4], "downscale_ratio_spacial": 8}
    out, trajectory = invert(model, latent, schedule(model, 3), positive)
    assert set(out) == {"samples", "batch_index"} and out["batch_index"] == [4]
    assert torch.equal(out["samples"], noise_latent(model, trajectory))


def test_cancel_stops_within_a_step(model, positive):
    import comfy.model_management as management

    cancelling, levels = cancelled_at(model, 3)
    with pytest.raises(management.InterruptProcessingException):
        invert(cancelling, {"samples": random_latent()}, schedule(model, 20), positive)
    assert len(levels) == 3
    invert(model, {"samples": random_latent()}, schedule(model, 2), positive)  # and the next run works


@pytest.mark.parametrize(
    "sigmas, words",
    [
        (torch.tensor([0.0, 1.0, 5.0]), "must descend"),
        (torch.tensor([5.0, 5.0, 0.0]), "must descend"),
        (torch.tensor([5.0, 1.0]), "must end in 0"),
        (torch.tensor([0.0]), "at least one step"),
        (torch.tensor([5.0, float("nan"), 0.0]), "must descend"),
    ],
)
def test_bad_schedules_get_a_sentence(model, positive, sigmas, words):
    with pytest.raises(ValueError, match=words):
        invert(model, {"samples": random_latent()}, sigmas, positive)


def test_nan_latent_and_unknown_scheme_get_a_sentence(model, positive):
    with pytest.raises(ValueError, match="NaN"):
        invert(model, {"samples": random_latent() * float("nan")}, schedule(model, 3), positive)
    with pytest.raises(ValueError, match="fixed_point, next, current"):
        invert(model, {"samples": random_latent()}, schedule(model, 3), positive, "ddim")
    with pytest.raises(ValueError, match="one conditioning"):
        invert(model, {"samples": random_latent()}, schedule(model, 3), positive * 2)
    with pytest.raises(ValueError, match="use at most 20"):
        invert(model, {"samples": random_latent()}, schedule(model, 50), positive, substeps=200)


@pytest.mark.parametrize("family, prediction", [("sd15", "eps"), ("sd20", "v"), ("sdxl", "eps")])
def test_families_without_a_prompt(family, prediction, caplog):
    model = tiny_unet(family, prediction)
    with caplog.at_level(logging.INFO):
        _, trajectory = invert(model, {"samples": random_latent(9, 12)}, schedule(model, 2), None, "next")
    assert torch.isfinite(trajectory.latents).all()
    assert "empty prompt" in caplog.text


def test_next_equals_diffusers_inverse_scheduler_on_the_same_network(positive):
    """eps of the network's own latent z with the timestep it enters, over 20 steps, back in the papers' variables."""
    diffusers = pytest.importorskip("diffusers")

    def network(z, t):
        return torch.sin(1.3 * z + t.view(-1, 1, 1, 1) / 300) + 0.2 * z.roll(1, -1)

    model = tiny_unet().clone()
    sampling = model.get_model_object("model_sampling")

    def predict(apply_model, args):
        x, sigma = args["input"], args["timestep"]
        return x - sigma.view(-1, 1, 1, 1) * network(sampling.calculate_input(sigma, x), sampling.timestep(sigma).float())

    model.set_model_unet_function_wrapper(predict)
    scheduler = diffusers.DDIMInverseScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(20)
    sigmas = torch.cat([sampling.sigmas[scheduler.timesteps].flip(0), torch.zeros(1)])
    latent = random_latent(6, 9)
    _, trajectory = invert(model, {"samples": latent}, sigmas, positive, "next")
    z = model.model.process_latent_in(latent)
    for step, t in enumerate(scheduler.timesteps, 1):
        z = scheduler.step(network(z, t.float().view(1)), t, z).prev_sample
        ours = trajectory.latents[step] / (1 + trajectory.sigmas[step] ** 2).sqrt()
        assert (ours - z).abs().max() <= 2e-5 * z.abs().max()


def test_a_model_that_predicts_nan_is_told():
    model = tiny_unet()
    model.model.diffusion_model.out[2].weight.data[:] = float("nan")
    for scheme in ("predicted", "fixed_point", "next"):
        with pytest.raises(ValueError, match="model: it predicts NaN at sigma .*--force-fp32"):
            invert(model, {"samples": random_latent()}, schedule(model, 2), tiny_cond(model), scheme)


def test_latents_and_prompts_of_another_model_are_told():
    model = tiny_unet()
    with pytest.raises(ValueError, match="latent: got 16 channels, but .* works on latents of 4"):
        invert(model, {"samples": random_latent(channels=16)}, schedule(model, 2), tiny_cond(model))
    wide = [[torch.zeros(1, 7, 48), {}]]
    with pytest.raises(ValueError, match="positive: the model cannot compute with it"):
        invert(model, {"samples": random_latent()}, schedule(model, 2), wide)
