"""The InjectFusion sampler inside real sampling: against a float64 alpha-bar run, in batches, and undisturbed."""

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import numpy as np
import pytest
import torch

from pastiche.nodes.algorithms.slerp import slerp
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.hspace import H_SPACE, INJECT, inject_content
from pastiche.nodes.host.injections.injectfusion_sampler import PredictionPair, RowNoise, injectfusion_sampler
from pastiche.nodes.host.trajectories.inversion import invert
from support.models import smooth_eps, tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule

STEPS = 6


@pytest.fixture(scope="module")
def model():
    return tiny_unet()


@pytest.fixture(scope="module")
def positive(model):
    return tiny_cond(model)


@pytest.fixture(scope="module")
def bank(model, positive):
    return bank_of(model, positive)


def bank_of(model, positive, seed=5):
    _, trajectory = invert(model, {"samples": random_latent(8, 8, seed=seed)}, schedule(model, STEPS), positive, "next")
    return capture(model, trajectory, "h_space", "auto", "ram", "full")


def run(model, latent, sigmas, positive, negative=None, cfg=1.0, omega=0.3, t_boost=0, seed=0, dt_lambda=1.0,
        callback=None, noise_mask=None):
    return comfy.sample.sample_custom(
        model, torch.zeros_like(latent), cfg, injectfusion_sampler(omega, t_boost, seed, dt_lambda), sigmas, positive,
        negative or positive, latent, noise_mask=noise_mask, callback=callback, disable_pbar=True, seed=0,
    )


@pytest.mark.parametrize("settings", [
    dict(omega=0.3), dict(omega=0.0), dict(omega=0.3, t_boost=600), dict(omega=0.0, t_boost=250, dt_lambda=0.99),
    dict(omega=0.3, dt_lambda=0.9), dict(omega=0.0, t_boost="a step's own"),
])
def test_whole_run_is_the_papers(model, positive, bank, settings):
    """The paper's equations in z and alpha-bar, float64 around the network, with its own h-injecting patch."""
    settings = {"t_boost": 0, "dt_lambda": 1.0, "seed": 3, **settings}
    gamma, t_edit = 0.6, 300
    latent, sigmas = random_latent(8, 8, seed=1), schedule(model, STEPS)
    if settings["t_boost"] == "a step's own":
        settings["t_boost"] = int(model.model.model_sampling.timestep(sigmas[STEPS - 2].view(1)))
    found = run(inject_content(model, bank, gamma, t_edit), latent, sigmas, positive, **settings)

    context = positive[0][0]
    noise = RowNoise(settings["seed"], 1)

    def eps(z, sigma, content=None):
        def patch(args):
            return {"h": slerp(args["h"], content, gamma)}

        patches = {"middle_block_after_patch": [patch]} if content is not None else {}
        x = (z * (1 + sigma**2) ** 0.5).float()
        options = {"patches": patches, "cond_or_uncond": [0], "sigmas": torch.tensor([sigma])}
        denoised = model.model.apply_model(x, torch.tensor([sigma], dtype=torch.float32), c_crossattn=context,
                                           transformer_options=options)
        return ((x - denoised) / np.float32(sigma)).double()

    levels = sigmas.double().tolist()
    bars = [1 / (1 + sigma**2) for sigma in levels]
    times = [int(model.model.model_sampling.timestep(sigma.view(1))) for sigma in sigmas[:-1]]
    z = (latent * model.model.latent_format.scale_factor).double() * bars[0] ** 0.5
    with torch.no_grad():
        for i in range(STEPS):
            a, a_next = bars[i], bars[i + 1]
            e = eps(z, levels[i])
            clean = injected = (z - (1 - a) ** 0.5 * e) / a**0.5
            direction = 1.0
            if times[i] >= t_edit:
                direction = settings["dt_lambda"] if times[i] >= 950 and settings["omega"] == 0 else 1.0
                changed = eps(z, levels[i], bank.store.read(H_SPACE, STEPS - i, torch.device("cpu")).float())
                injected = (z - (1 - a) ** 0.5 * changed) / a**0.5
                if settings["omega"] > 0:
                    matched = injected.mean() + (injected - injected.mean()) * clean.std() / injected.std()
                    z = z + a**0.5 * (matched - clean) + settings["omega"] * (1 - a) ** 0.5 * (changed - e)
                    e = eps(z, levels[i])
                    injected = (z - (1 - a) ** 0.5 * e) / a**0.5
            spread = 0.0
            if times[i] <= settings["t_boost"] and a_next < 1:
                spread = ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
            z = a_next**0.5 * injected + direction * (1 - a_next - spread**2) ** 0.5 * e
            if spread:
                z = z + spread * noise.like(latent)
    expected = (z / model.model.latent_format.scale_factor).float()
    plain = sample(model, latent, sigmas, positive)
    assert (found - expected).abs().max() < 2e-3 * (plain - expected).abs().max()


def test_without_injection_it_is_cores_ddim_bit_for_bit(model, positive, bank):
    negative = tiny_cond(model, seed=2)
    latent, sigmas = random_latent(8, 8), schedule(model, STEPS)
    for cfg in (1.0, 4.0):
        plain = sample(model, latent, sigmas, positive, negative, cfg, "ddim")
        for patched in (model, inject_content(model, bank, 0.0, 400), inject_content(model, bank, 0.6, 1000)):
            found = run(patched, latent, sigmas, positive, negative, cfg, omega=0.0, t_boost=500, dt_lambda=0.9)
            assert torch.equal(found, plain)


def test_omega_one_keeps_the_original_but_for_the_spread(model, positive, bank):
    latent, sigmas = random_latent(8, 8), schedule(model, STEPS)
    plain = sample(model, latent, sigmas, positive)
    patched = inject_content(model, bank, 0.6, 900)  # one calibrated step
    far = [(run(patched, latent, sigmas, positive, omega=omega) - plain).norm() for omega in (0.1, 0.6, 1.0)]
    assert far[0] > far[1] > far[2]


@pytest.fixture
def count_rows():
    """Notes the batch size and what patches are told of every forward: a hook on the network, no patch on the MODEL."""
    hooks = []

    def watch(model, rows):
        def note(module, args, kwargs):
            options = kwargs["transformer_options"]
            rows.append((args[0].shape[0], list(options["cond_or_uncond"]), options.get(INJECT)))

        hooks.append(model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True))
        return model

    yield watch
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("branch, cfg, chunks, injected", [
    ("conditional", 1.0, 2, 1), ("conditional", 4.0, 3, 1), ("both", 4.0, 4, 2),
])
def test_both_predictions_run_in_one_batch(model, positive, bank, count_rows, branch, cfg, chunks, injected):
    negative = tiny_cond(model, seed=2)
    latent, sigmas = random_latent(8, 8, batch=2), schedule(model, STEPS)[:2]
    rows = []
    patched = count_rows(inject_content(model, bank, 0.6, 0, branch), rows)
    batched = run(patched, latent, sigmas, positive, negative, cfg, omega=0.0)
    assert [row[0] for row in rows] == [2 * chunks]
    kinds, flags = rows[0][1:]
    assert set(kinds) == ({0} if cfg == 1 else {0, 1})  # no condition number that other patches do not know
    assert sum(flags) == injected and all(kind == 0 or branch == "both" for kind, flag in zip(kinds, flags) if flag)

    rows.clear()
    apart = patched.clone()  # a wrapper around apply_model makes it take the two in turn
    apart.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    found = run(apart, latent, sigmas, positive, negative, cfg, omega=0.0)
    assert [row[0] for row in rows] == [2 * (1 if cfg == 1 else 2)] * 2
    torch.testing.assert_close(found, batched, rtol=0, atol=1e-3)


def test_short_memory_splits_the_batch(model, positive, bank, count_rows, monkeypatch):
    latent, sigmas = random_latent(8, 8), schedule(model, STEPS)[:3]
    rows = []
    patched = count_rows(inject_content(model, bank, 0.6, 0), rows)
    expected = run(patched, latent, sigmas, positive, omega=0.0)
    assert {row[0] for row in rows} == {2}
    rows.clear()
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: 1)
    found = run(patched, latent, sigmas, positive, omega=0.0)
    assert [row[0] for row in rows] == [1] * 4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_calibration_costs_one_more_prediction_of_the_new_latent(model, positive, bank, count_rows):
    rows = []
    patched = count_rows(inject_content(model, bank, 0.6, 0), rows)
    run(patched, random_latent(8, 8), schedule(model, STEPS)[:2], positive, omega=0.3)
    assert [row[0] for row in rows] == [2, 1]
    assert sorted(rows[0][2]) == [False, True] and rows[1][2] is False


def test_boost_noise_is_seeded_by_row(model, positive, bank):
    latents, sigmas = random_latent(8, 8, batch=2), schedule(model, STEPS)
    patched = inject_content(model, bank, 0.6, 900)
    both = run(patched, latents, sigmas, positive, t_boost=400, seed=7)
    assert torch.equal(run(patched, latents, sigmas, positive, t_boost=400, seed=7), both)
    assert not torch.allclose(run(patched, latents, sigmas, positive, t_boost=400, seed=8), both, atol=1e-2)
    for i in range(2):
        alone = run(patched, latents[i : i + 1], sigmas, positive, t_boost=400, seed=7 + i)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=2e-2)
    first, again = RowNoise(7, 2), RowNoise(8, 1)
    a, b = first.like(latents), first.like(latents)
    assert torch.equal(a[1:], again.like(latents[:1])) and torch.equal(b[1:], again.like(latents[:1]))
    assert not torch.equal(a, b)
    initial = comfy.sample.prepare_noise(latents, 7)
    assert abs(float(torch.corrcoef(torch.stack([a.flatten(), initial.flatten()]))[0, 1])) < 0.2


def test_direction_scale_needs_an_early_injection_and_no_calibration(model, positive, bank, caplog):
    latent, sigmas = random_latent(8, 8), schedule(model, STEPS)
    early = inject_content(model, bank, 0.6, 400)

    def same(sigmas, omega):
        scaled = run(early, latent, sigmas, positive, omega=omega, dt_lambda=0.95)
        return torch.equal(scaled, run(early, latent, sigmas, positive, omega=omega))

    assert not same(sigmas, 0.0)
    assert same(sigmas[1:], 0.0)  # begins under timestep 950
    with caplog.at_level("INFO"):
        assert same(sigmas, 0.3)
    assert "dt_lambda 0.95 has no effect with omega 0.3" in caplog.text


def test_extra_evaluations_get_their_own_prediction(model, positive, bank):
    """Guidance that evaluates other conditions, and other latents, of its own: as where nothing is kept for later."""
    negative = tiny_cond(model, seed=2)
    latent, sigmas = random_latent(8, 8), schedule(model, STEPS)[:3]
    calls = []

    def guide(args):
        calls.append(None)
        cond, uncond = args["cond"], args["uncond"]
        asked = [[cond], [uncond]] if len(calls) % 2 else [[uncond], [cond]]  # not in the order of the first time
        latents = [args["input"], args["input"] + 0.1 * args["denoised"]]
        extra = [
            comfy.samplers.calc_cond_batch(args["model"], conds, x, args["sigma"], args["model_options"])[0]
            for conds, x in zip(asked, latents)
        ]
        return args["denoised"] + extra[0] - 0.5 * extra[1]

    patched = inject_content(model, bank, 0.6, 0, "both")
    patched.set_model_sampler_post_cfg_function(guide)
    found = run(patched, latent, sigmas, positive, negative, 4.0, omega=0.0)
    calls.clear()
    apart = patched.clone()  # anything of another node in the forward: two predictions, one after the other
    apart.set_model_attn1_patch(lambda n, context, value, options: (n, context, value))
    expected = run(apart, latent, sigmas, positive, negative, 4.0, omega=0.0)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_inpainting_mask_keeps_the_outside(model, positive, bank):
    latent, sigmas = random_latent(8, 8), schedule(model, STEPS)
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1
    out = run(inject_content(model, bank, 0.6, 0), latent, sigmas, positive, noise_mask=mask)
    torch.testing.assert_close(out[..., :4], latent[..., :4], rtol=0, atol=1e-4)
    assert (out[..., 4:] - latent[..., 4:]).abs().max() > 1e-2


def test_guidance_functions_run_on_both_predictions(model, positive, bank):
    """A post-CFG function that halves the prediction halves what both predictions contribute."""
    latent, sigmas = random_latent(8, 8), schedule(model, STEPS)[:2]
    patched = inject_content(model, bank, 0.6, 0).clone()
    calls = []

    def halve(args):
        calls.append(args["denoised"])
        return args["denoised"] / 2

    patched.set_model_sampler_post_cfg_function(halve)
    out = run(patched, latent, sigmas, positive, tiny_cond(model, seed=2), 4.0, omega=0.0)
    assert len(calls) == 2
    x = latent * model.model.latent_format.scale_factor
    clean, injected = (call / 2 for call in calls)
    expected = injected + sigmas[1] * (x - clean) / sigmas[0]
    torch.testing.assert_close(out * model.model.latent_format.scale_factor, expected, rtol=0, atol=1e-4)


def test_models_without_a_unet_pass_run_plainly(model, positive):
    smooth = smooth_eps(model)
    latent, sigmas = random_latent(8, 8), schedule(model, STEPS)
    assert torch.equal(run(smooth, latent, sigmas, positive, t_boost=500), sample(smooth, latent, sigmas, positive))


def test_progress_previews_and_cancel(model, positive, bank, count_rows):
    latent, sigmas = random_latent(8, 8), schedule(model, STEPS)
    patched = inject_content(model, bank, 0.6, 400)
    steps = []

    def report(step, denoised, x, total):
        assert denoised.shape == x.shape == latent.shape and total == STEPS
        steps.append(step)

    expected = run(patched, latent, sigmas, positive, callback=report)
    assert steps == list(range(STEPS))

    def cancel(step, *_):
        management.interrupt_current_processing()

    rows = []
    with pytest.raises(management.InterruptProcessingException):
        run(count_rows(patched, rows), latent, sigmas, positive, callback=cancel)
    assert len(rows) == 2  # the first step's pair and its calibrated prediction
    management.interrupt_current_processing(False)
    assert torch.equal(run(patched, latent, sigmas, positive), expected)


def test_boosting_begins_at_its_timestep(model, positive, bank):
    """A step at exactly t_boost is stochastic, as in the paper's code, one above is not; the last, to zero noise, never."""
    latent, sigmas = random_latent(8, 8), schedule(model, STEPS, "simple")  # exactly the sigmas of whole timesteps
    t = [int(model.model.model_sampling.timestep(sigma.view(1))) for sigma in sigmas[:-1]]
    patched = inject_content(model, bank, 0.6, 900)

    def boosted(t_boost):
        return run(patched, latent, sigmas, positive, t_boost=t_boost, seed=7)

    at = boosted(t[3])
    assert torch.equal(at, boosted(t[3] + 1)) and torch.equal(at, boosted(t[2] - 1)) and not torch.equal(at, boosted(t[3] - 1))
    assert torch.equal(boosted(t[5]), boosted(0))


def test_a_waiting_prediction_goes_to_its_own_step_only():
    """Between the two predictions another node may ask for other conditions, or a latent of another size."""
    class Run:
        def conditional(self, uuid, number):
            return number == 0

    pair = PredictionPair([], Run())
    conds = [[{"uuid": "a"}], [{"uuid": "b"}]]
    asked = []

    def core(model, conds, x, timestep, options):
        asked.append(len(conds))
        return [torch.full_like(x, float(10 * len(asked) + i)) for i in range(len(conds))]

    x = torch.zeros(1, 4, 8, 8)
    clean = pair._double(core, None, conds, x, None, {})
    assert [float(out.mean()) for out in clean] == [10, 11] and asked == [3]
    other = pair._hand_out(core, None, conds[:1], x, None, {})
    wide = pair._hand_out(core, None, conds, torch.zeros(1, 4, 8, 16), None, {})
    assert [float(out.mean()) for out in other + wide] == [20, 30, 31] and asked == [3, 1, 2]
    injected = pair._hand_out(core, None, conds, x, None, {})
    assert [float(out.mean()) for out in injected] == [12, 11]  # the prompt's injected one, the negative as it was
    pair._hand_out(core, None, conds, x, None, {})
    assert asked == [3, 1, 2, 2]  # it is handed out once
