"""h-space Slerp on random U-Nets: what the middle block's output becomes, for whom, and when."""

import dataclasses

import comfy.model_management as management
import pytest
import torch

from pastiche.nodes.algorithms.slerp import masked_slerp, resize_features, slerp
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.hspace import H_SPACE, inject_content, sigma_of_timestep
from pastiche.nodes.host.trajectories.inversion import invert
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule

STEPS = 6


@pytest.fixture(scope="module")
def model():
    return tiny_unet()


@pytest.fixture(scope="module")
def positive(model):
    return tiny_cond(model)


def content_bank(model, positive, height=16, width=16, batch=1, seed=5, steps=STEPS, memory="ram", precision="full"):
    _, trajectory = invert(model, {"samples": random_latent(height, width, batch, seed)}, schedule(model, steps),
                           positive, "next")
    return capture(model, trajectory, "h_space", "auto", memory, precision)


@pytest.fixture(scope="module")
def bank(model, positive):
    return content_bank(model, positive)


def watch(model, seen):
    """A clone that notes (sigma, condition numbers, h) after the patches that `model` has."""
    watched = model.clone()

    def note(args):
        options = args["transformer_options"]
        seen.append((float(options["sigmas"][0]), list(options["cond_or_uncond"]), args["h"].clone()))
        return args

    watched.set_model_patch(note, "middle_block_after_patch")
    return watched


def h_values(model, latent, sigmas, positive, **settings):
    seen = []
    out = sample(watch(model, seen), latent, sigmas, positive, **settings)
    return seen, out


def captured(bank, step):
    return bank.store.read(H_SPACE, step, torch.device("cpu")).float()


@pytest.mark.parametrize("family", ["sd15", "sd20", "sdxl"])
def test_h_is_the_slerp_of_the_papers_equation(family):
    model = tiny_unet(family)
    positive = tiny_cond(model)
    bank = content_bank(model, positive)
    latent, sigmas = random_latent(16, 16), schedule(model, STEPS)[:2]
    plain, _ = h_values(model, latent, sigmas, positive)
    mixed, _ = h_values(inject_content(model, bank, 0.6, 0), latent, sigmas, positive)
    assert plain[0][2].shape[1] == 64
    torch.testing.assert_close(mixed[0][2], slerp(plain[0][2], captured(bank, STEPS), 0.6))
    torch.testing.assert_close(mixed[0][2].norm(), plain[0][2].norm())
    assert not torch.allclose(mixed[0][2], plain[0][2], atol=1e-2)


def test_masked_content_keeps_its_norm_where_the_node_is_told_so(model, positive, bank):
    """match_norm off, as the authors' code has it with masks; the closed form on the masked half."""
    mask = torch.zeros(1, 2, 2)
    mask[..., :1] = 1
    latent, sigmas = random_latent(16, 16), schedule(model, STEPS)[:2]
    plain, _ = h_values(model, latent, sigmas, positive)
    mixed, _ = h_values(inject_content(model, bank, 0.6, 0, mask=mask, match_norm=False), latent, sigmas, positive)
    a, b = plain[0][2][..., :1].double(), captured(bank, STEPS)[..., :1].double()
    theta = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    expected = (torch.sin(0.4 * theta) * a + torch.sin(0.6 * theta) * b) / torch.sin(theta)
    torch.testing.assert_close(mixed[0][2][..., :1].double(), expected, rtol=1e-4, atol=1e-5)
    matched, _ = h_values(inject_content(model, bank, 0.6, 0, mask=mask), latent, sigmas, positive)
    assert not torch.allclose(matched[0][2][..., :1].double(), expected, rtol=1e-2, atol=1e-3)


def test_nothing_to_do_is_the_plain_result_bit_for_bit(model, positive, bank):
    latent, sigmas = random_latent(16, 16), schedule(model, STEPS)
    plain = sample(model, latent, sigmas, positive)
    zero = torch.zeros(1, 64, 64)
    for settings in [(0.0, 400), (0.6, 1000), (0.6, 400, "both", zero)]:
        assert torch.equal(sample(inject_content(model, bank, *settings), latent, sigmas, positive), plain), settings
    changed = sample(inject_content(model, bank, 0.6, 400), latent, sigmas, positive)
    assert (changed - plain).abs().max() > 1e-2
    assert torch.equal(sample(inject_content(model, bank, 0.6, 400), latent, sigmas, positive), changed)  # re-queued
    assert torch.equal(sample(model, latent, sigmas, positive), plain)  # the node is gone, so is its effect


def test_t_edit_is_where_it_stops(model, positive, bank):
    latent, sigmas = random_latent(16, 16), schedule(model, STEPS)
    sampling = model.get_model_object("model_sampling")
    t = [int(sampling.timestep(sigma.view(1))) for sigma in sigmas[:-1]]
    for t_edit in (t[2], t[2] + 1, 0):
        plan = injected_steps(inject_content(model, bank, 0.5, t_edit), latent, sigmas, positive)
        assert plan == [i for i in range(STEPS) if t[i] >= t_edit]
    assert sigma_of_timestep(sampling, 1000) == float("inf") and sigma_of_timestep(sampling, 0) == 0
    assert sigma_of_timestep(sampling, 999) == float(sampling.sigma_max)


def injected_steps(patched, latent, sigmas, positive):
    """The steps at which the patches of `patched` change h."""
    seen = []
    model = patched.clone()
    patches = model.model_options["transformer_options"]["patches"]["middle_block_after_patch"]

    def spy(args):
        h = args["h"]
        for patch in patches[:-1]:
            args = patch(args)
        seen.append(not torch.equal(args["h"], h))
        return args

    patches.append(spy)
    model.model_options["transformer_options"]["patches"]["middle_block_after_patch"] = [spy]
    sample(model, latent, sigmas, positive)
    return [i for i, changed in enumerate(seen) if changed]


def test_more_steps_than_captured_inject_sparsely(model, positive):
    bank = content_bank(model, positive, steps=5)
    latent, sigmas = random_latent(16, 16), schedule(model, 20)
    floor = sigma_of_timestep(model.get_model_object("model_sampling"), 400)
    due = [sigma for sigma in bank.trajectory.schedule.tolist() if sigma >= floor]
    steps = injected_steps(inject_content(model, bank, 0.5, 400), latent, sigmas, positive)
    assert len(steps) == len(due) == 3
    for step, sigma in zip(steps, due):
        assert abs(sigmas[step].log() - torch.tensor(sigma).log()) == (sigmas[:-1].log() - torch.tensor(sigma).log()).abs().min()


@pytest.mark.parametrize("ramp", ["increasing", "decreasing"])
def test_schedules_ramp_over_the_run(model, positive, bank, ramp):
    latent, sigmas = random_latent(16, 16), schedule(model, STEPS)
    plain, _ = h_values(model, latent, sigmas[:2], positive)
    mixed, _ = h_values(inject_content(model, bank, 0.5, 0, schedule=ramp), latent, sigmas, positive)
    first = 0.0 if ramp == "increasing" else 1.0
    torch.testing.assert_close(mixed[0][2], slerp(plain[0][2], captured(bank, STEPS), first))
    last = sample(inject_content(model, bank, 0.5, 0, schedule=ramp), latent, sigmas, positive)
    assert not torch.equal(last, sample(inject_content(model, bank, 0.5, 0), latent, sigmas, positive))


def test_branches(model, positive, bank):
    negative = tiny_cond(model, seed=9)
    latent, sigmas = random_latent(16, 16), schedule(model, STEPS)[:2]
    settings = dict(negative=negative, cfg=5.0)
    plain, _ = h_values(model, latent, sigmas, positive, **settings)
    for branch, kinds in (("conditional", (0,)), ("both", (0, 1))):
        mixed, _ = h_values(inject_content(model, bank, 0.6, 0, branch), latent, sigmas, positive, **settings)
        numbers = plain[0][1]
        assert sorted(numbers) == [0, 1] and mixed[0][1] == numbers
        for number, before, after in zip(numbers, plain[0][2], mixed[0][2]):
            expected = slerp(before[None], captured(bank, STEPS), 0.6)[0] if number in kinds else before
            torch.testing.assert_close(after, expected)


def test_masks_stay_inside_and_contents_share_one_run(model, positive, bank):
    other = content_bank(model, positive, seed=6)
    latent, sigmas = random_latent(16, 16), schedule(model, STEPS)[:2]
    left = torch.zeros(1, 128, 128)
    left[..., :64] = 1
    plain, _ = h_values(model, latent, sigmas, positive)
    h = plain[0][2]
    one, _ = h_values(inject_content(model, bank, 0.6, 0, mask=left), latent, sigmas, positive)
    half = torch.zeros(1, 1, 2, 2)
    half[..., :1] = 1
    assert torch.equal(one[0][2][..., 1:], h[..., 1:])
    torch.testing.assert_close(one[0][2], masked_slerp(h, captured(bank, STEPS), 0.6, half))
    both = inject_content(inject_content(model, bank, 0.6, 0, mask=left), other, 0.9, 0, mask=1 - left)
    two, _ = h_values(both, latent, sigmas, positive)
    torch.testing.assert_close(two[0][2][..., :1], one[0][2][..., :1])
    expected = masked_slerp(h, captured(other, STEPS), 0.9, 1 - half)
    torch.testing.assert_close(two[0][2][..., 1:], expected[..., 1:])
    full, _ = h_values(inject_content(model, bank, 0.6, 0, mask=torch.ones(1, 9, 9)), latent, sigmas, positive)
    unmasked, _ = h_values(inject_content(model, bank, 0.6, 0), latent, sigmas, positive)
    assert torch.equal(full[0][2], unmasked[0][2])


def test_content_of_another_size_is_resampled(model, positive):
    bank = content_bank(model, positive, 32, 16)
    latent, sigmas = random_latent(16, 40), schedule(model, STEPS)[:2]
    plain, _ = h_values(model, latent, sigmas, positive)
    mixed, _ = h_values(inject_content(model, bank, 0.6, 0), latent, sigmas, positive)
    assert plain[0][2].shape[-2:] == (2, 5)
    expected = slerp(plain[0][2], resize_features(captured(bank, STEPS), 2, 5), 0.6)
    torch.testing.assert_close(mixed[0][2], expected)


def test_a_batch_is_its_single_runs(model, positive):
    latents, sigmas = random_latent(16, 16, batch=2), schedule(model, STEPS)[:4]
    pair = content_bank(model, positive, batch=2)
    together = sample(inject_content(model, pair, 0.6, 0), latents, sigmas, positive)
    for i in range(2):
        trajectory = dataclasses.replace(pair.trajectory, latents=pair.trajectory.latents[:, i : i + 1])
        alone = inject_content(model, capture(model, trajectory, "h_space", "auto", "ram", "full"), 0.6, 0)
        torch.testing.assert_close(together[i : i + 1], sample(alone, latents[i : i + 1], sigmas, positive), rtol=0, atol=2e-3)


@pytest.mark.parametrize("memory", ["recompute", "vram", "disk"])
def test_memory_modes_agree(model, positive, bank, memory):
    latent, sigmas = random_latent(16, 16), schedule(model, STEPS)
    expected = sample(inject_content(model, bank, 0.6, 400), latent, sigmas, positive)
    other = capture(model, bank.trajectory, "h_space", "auto", memory, "full")
    found = sample(inject_content(model, other, 0.6, 400), latent, sigmas, positive)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype, cast", [
    (torch.float16, None), (torch.bfloat16, None), (torch.float8_e4m3fn, torch.float32), (torch.float8_e4m3fn, torch.float16),
])
def test_low_precision_models_stay_finite(dtype, cast):
    model = tiny_unet(dtype=dtype, cast=cast)
    positive = tiny_cond(model)
    bank = content_bank(model, positive, 8, 8, steps=2, precision="half")
    patched = inject_content(model, bank, 0.6, 0, "both")
    assert torch.isfinite(sample(patched, random_latent(8, 8), schedule(model, 2), positive)).all()


def test_zero_features_leave_h_alone(model, positive, bank):
    silent = content_bank(model, positive)
    for step in range(1, STEPS + 1):
        silent.store.write(H_SPACE, step, torch.zeros_like(captured(bank, step)))
    latent, sigmas = random_latent(16, 16), schedule(model, STEPS)
    out = sample(inject_content(model, silent, 0.6, 0), latent, sigmas, positive)
    assert torch.equal(out, sample(model, latent, sigmas, positive))


def test_cancel_leaves_nothing_behind(model, positive, bank):
    latent, sigmas = random_latent(16, 16), schedule(model, STEPS)
    patched = inject_content(model, bank, 0.6, 400)
    before = sample(patched, latent, sigmas, positive)

    def cancel(step, *_):
        if step == 1:
            management.interrupt_current_processing()

    with pytest.raises(management.InterruptProcessingException):
        sample(patched, latent, sigmas, positive, callback=cancel)
    management.interrupt_current_processing(False)
    assert torch.equal(sample(patched, latent, sigmas, positive), before)


def test_outside_a_sampling_run_the_patch_is_idle(model, bank):
    patch = inject_content(model, bank, 0.6, 0).model_options["transformer_options"]["patches"]["middle_block_after_patch"][0]
    args = {"h": torch.ones(1, 64, 2, 2), "transformer_options": {"cond_or_uncond": [0], "sigmas": torch.ones(1)}}
    assert patch(args) is args


def test_bad_input_says_what_to_do(model, positive, bank):
    with pytest.raises(ValueError, match="conditional, both"):
        inject_content(model, bank, 0.6, 400, "unconditional")
    with pytest.raises(ValueError, match="constant, increasing, decreasing"):
        inject_content(model, bank, 0.6, 400, schedule="wavy")
    attention = capture(model, bank.trajectory, "self_attention", "6", "recompute")
    with pytest.raises(ValueError, match='lack h_space of middle 0 .they are self_attention.*streams "h_space"'):
        inject_content(model, attention, 0.6, 400)
    with pytest.raises(ValueError, match="another model"):
        inject_content(tiny_unet(seed=1), bank, 0.6, 400)
    three, sigmas = random_latent(16, 16, batch=3), schedule(model, STEPS)
    with pytest.raises(ValueError, match="2 images cannot be shared among 3"):
        sample(inject_content(model, content_bank(model, positive, batch=2), 0.6, 400), three, sigmas, positive)
    with pytest.raises(ValueError, match="2 masks for 3 samples"):
        sample(inject_content(model, bank, 0.6, 400, mask=torch.ones(2, 8, 8)), three, sigmas, positive)
