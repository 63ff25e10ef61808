"""Injections beside each other, and under core's own ways of sampling: several on one MODEL, split schedules, other guiders."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from support.models import smooth_eps, tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule

from pastiche.nodes.algorithms.slerp import slerp
from pastiche.nodes.algorithms.styleid import blend
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.features.library import load_bank
from pastiche.nodes.host.injections.content import ContentPatches, inject_features
from pastiche.nodes.host.injections.hspace import H_SPACE, INJECT, HSpacePatches, inject_content
from pastiche.nodes.host.injections.injectfusion_sampler import injectfusion_sampler
from pastiche.nodes.host.injections.keep_outside import keep_content_outside
from pastiche.nodes.host.injections.run import rows_of
from pastiche.nodes.host.injections.schedule import Schedule
from pastiche.nodes.host.injections.style import inject_style
from pastiche.nodes.host.injections.style_rows import RowPatches
from pastiche.nodes.host.multistyle.guider import multi_style_guider
from pastiche.nodes.host.networks.adapter import RUN
from pastiche.nodes.host.networks.fingerprint import fingerprint
from pastiche.nodes.host.networks.marks import injected_by
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.sockets import StyleEntry, Trajectory

STEPS = 4
FINE = 10  # a decoder block on the grid of the latent


class Scene:
    """One content and two styles on a small random model; every bank holds whatever the tests inject."""

    def __init__(self):
        self.model = tiny_unet()
        self.sigmas = schedule(self.model, STEPS)
        self.positive, self.negative = tiny_cond(self.model), tiny_cond(self.model, seed=9)
        self.banks = {}
        self.noise, self.content = self._reference(1)
        _, self.first = self._reference(2)
        _, self.second = self._reference(3)

    def _reference(self, seed):
        noise, trajectory = invert(self.model, {"samples": random_latent(8, 8, seed=seed)}, self.sigmas, self.positive, "next")
        return noise["samples"], trajectory

    def bank(self, trajectory, streams, layers="6-11"):
        key = (id(trajectory), streams, layers)
        if key not in self.banks:
            self.banks[key] = capture(self.model, trajectory, streams, layers, "ram", "full")
        return self.banks[key]

    def style(self, trajectory, model=None, streams="self_attention", layers=f"{FINE}", **options):
        settings = dict(content=self.bank(self.content, streams, layers), gamma=0.75, temperature=1.5, strength=1.0, layers=layers,
                        start_percent=0.0, end_percent=1.0, mask=None)
        return inject_style(model or self.model, self.bank(trajectory, streams, layers), **(settings | options))


@pytest.fixture(scope="module")
def scene():
    return Scene()


def attended(scene, model, number=FINE):
    """attn1's output at one decoder block in the first step: (8, 8, C), what other nodes' output patches see."""
    seen = []

    def note(out, options):
        if options["block"] == ("output", number):
            seen.append(out[0].unflatten(0, tuple(options["activations_shape"][-2:])).clone())
        return out

    watched = model.clone()
    watched.set_model_attn1_output_patch(note)
    sample(watched, scene.noise, scene.sigmas[:2], scene.positive)
    return seen[0]


def halves():
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    return left, 1 - left


@pytest.mark.parametrize("streams", ["self_attention", "self_attention_qkv"])
def test_two_masked_styles_each_have_their_half(scene, streams):
    """Left what the first alone gives, right what the second alone gives, whichever was connected first."""
    left, right = halves()
    first = attended(scene, scene.style(scene.first, streams=streams, mask=left))
    second = attended(scene, scene.style(scene.second, streams=streams, mask=right))
    plain = attended(scene, scene.model)
    assert (first[:, :4] - plain[:, :4]).abs().max() > 1e-2 and (second[:, 4:] - plain[:, 4:]).abs().max() > 1e-2
    one_way = scene.style(scene.second, scene.style(scene.first, streams=streams, mask=left), streams=streams, mask=right)
    other_way = scene.style(scene.first, scene.style(scene.second, streams=streams, mask=right), streams=streams, mask=left)
    for both in (attended(scene, one_way), attended(scene, other_way)):
        torch.testing.assert_close(both[:, :4], first[:, :4], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(both[:, 4:], second[:, 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("streams", ["self_attention", "self_attention_qkv"])
def test_three_styles_nest(scene, streams):
    """Each blends its own attention, of the sample's own queries, with what came before it."""
    weights, model = (0.5, 0.25, 0.75), scene.model
    expected = attended(scene, model)
    for trajectory, weight in zip((scene.first, scene.second, scene.content), weights):
        expected = blend(expected, attended(scene, scene.style(trajectory, streams=streams)), weight)
        model = scene.style(trajectory, model, streams=streams, strength=weight)
    torch.testing.assert_close(attended(scene, model), expected, rtol=1e-5, atol=1e-5)


HIDDEN, PROJECTED = "self_attention", "self_attention_qkv"


@pytest.mark.parametrize("below, above, layers, said", [
    (PROJECTED, HIDDEN, f"{FINE}", True), (HIDDEN, PROJECTED, f"6-{FINE}", True),
    (HIDDEN, HIDDEN, f"{FINE}", False), (PROJECTED, PROJECTED, f"{FINE}", False), (PROJECTED, HIDDEN, "6", False),
])
def test_styles_of_both_kinds_of_features_on_one_layer_are_told_once(scene, caplog, below, above, layers, said):
    model = scene.style(scene.second, scene.style(scene.first, streams=below), streams=above, layers=layers)
    sample(model, scene.noise, scene.sigmas[:2], scene.positive)
    assert caplog.text.count("features of the other kind") == said


@pytest.mark.parametrize("streams", ["self_attention", "self_attention_qkv"])
def test_strength_counts_under_a_mask_too(scene, streams):
    """A mask of ones at strength 0.5 is strength 0.5; half a mask halves what it covers."""
    half = attended(scene, scene.style(scene.first, streams=streams, strength=0.5))
    assert (half - attended(scene, scene.style(scene.first, streams=streams))).abs().max() > 1e-2
    masked = attended(scene, scene.style(scene.first, streams=streams, strength=0.5, mask=torch.ones(1, 64, 64)))
    torch.testing.assert_close(masked, half, rtol=1e-5, atol=1e-5)
    soft = attended(scene, scene.style(scene.first, streams=streams, mask=torch.full((1, 64, 64), 0.5)))
    torch.testing.assert_close(soft, half, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("streams", ["self_attention", "self_attention_qkv"])
def test_the_plain_attention_of_a_blend_is_another_nodes_where_it_replaced_it(scene, streams):
    """With a replacement that halves and shifts: blended is the replacement's own result, not core's attention."""
    def halved_attention(q, k, v, options):
        return 0.5 * optimized_attention(q, k, v, options["n_heads"], transformer_options=options) + 1

    for slot in (("output", FINE), ("output", FINE, 0)):
        theirs = scene.model.clone()
        theirs.set_model_attn1_replace(halved_attention, *slot)
        plain, styled = attended(scene, theirs), attended(scene, scene.style(scene.first, theirs, streams=streams))
        assert (plain - attended(scene, scene.model)).abs().max() > 1e-2
        halved = attended(scene, scene.style(scene.first, theirs, streams=streams, strength=0.5))
        torch.testing.assert_close(halved, (plain + styled) / 2, rtol=1e-5, atol=1e-5)


def test_every_condition_takes_the_features_of_its_own_samples():
    one, two, options = torch.arange(3.0).view(1, 3), torch.arange(6.0).view(2, 3), {"cond_or_uncond": [1, 0]}
    assert rows_of(one, 4, options).tolist() == [[0, 1, 2]] * 4
    assert rows_of(two, 4, options).tolist() == [[0, 1, 2], [3, 4, 5]] * 2


def test_an_unmasked_style_covers_those_before_it(scene):
    alone = attended(scene, scene.style(scene.second))
    for below in (dict(), dict(strength=0.5)):
        both = scene.style(scene.second, scene.style(scene.first, **below))
        torch.testing.assert_close(attended(scene, both), alone, rtol=1e-5, atol=1e-5)


def test_other_nodes_output_patches_see_the_blended_attention(scene):
    """One that was there before must not be undone where the mask is 0, nor run on the style only."""
    def halve(out, options):
        return out / 2 if options["block"] == ("output", FINE) else out

    left, _ = halves()
    halved = scene.model.clone()
    halved.set_model_attn1_output_patch(halve)
    expected = attended(scene, scene.style(scene.first, mask=left)) / 2
    torch.testing.assert_close(attended(scene, scene.style(scene.first, halved, mask=left)), expected, rtol=1e-5, atol=1e-5)


def test_a_style_of_the_multi_style_guider_lies_over_the_models_own(scene, monkeypatch):
    """Its rows have its attention also where the model's Style Injection is masked; the base rows keep the model's."""
    left, right = halves()
    model = scene.style(scene.first, mask=left)
    bank = scene.bank(scene.second, "self_attention", str(FINE))
    entry = StyleEntry(features=bank, layers=str(FINE), mask=right, temperature=1.5)
    # Module hooks, as a patch of another node would have the styles run one after the other: n of x = n + x.
    block = scene.model.model.diffusion_model.output_blocks[FINE][1].transformer_blocks[0]
    entered, rows = [], []
    hooks = [norm.register_forward_pre_hook(lambda module, args: entered.append(args[0].clone())) for norm in (block.norm1, block.norm2)]
    original = RowPatches.change_hidden
    monkeypatch.setattr(RowPatches, "change_hidden", lambda self, own, inputs, options: (
        rows.append(options["pastiche_style_rows"]), original(self, own, inputs, options))[1])
    try:
        guider = multi_style_guider(model, scene.positive, scene.negative, 1.0, [entry])
        guider.sample(torch.zeros_like(scene.noise), scene.noise, comfy.samplers.sampler_object("euler"), scene.sigmas[:2],
                      disable_pbar=True, seed=0)
    finally:
        [hook.remove() for hook in hooks]
    before, after = entered
    found = dict(zip(rows[0], (after - before).unflatten(1, (8, 8))))
    assert set(found) == {0, -1}
    alone = attended(scene, scene.style(scene.second, content=None))
    for number, expected in ((0, alone), (-1, attended(scene, model))):
        torch.testing.assert_close(found[number], expected, rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_take_their_own_style_image(scene):
    """Two samples, a bank of two style images: each row gets its own sample's, guidance or not."""
    latents = torch.cat([random_latent(8, 8, seed=seed) for seed in (2, 3)])
    _, pair = invert(scene.model, {"samples": latents}, scene.sigmas, scene.positive, "next")
    singles = [replace(pair, latents=pair.latents[:, index : index + 1]) for index in range(2)]

    def run(trajectory, noise):
        bank = capture(scene.model, trajectory, "self_attention", "6-11", "ram", "full")
        guider = multi_style_guider(scene.model, scene.positive, scene.negative, 3.0, [StyleEntry(features=bank, layers="6-11")])
        return guider.sample(torch.zeros_like(noise), noise, comfy.samplers.sampler_object("euler"), scene.sigmas[:2],
                             disable_pbar=True, seed=0)

    noise = scene.noise.repeat(2, 1, 1, 1)
    both = run(pair, noise)
    alone = [run(single, noise[:1]) for single in singles]
    apart = float((alone[0] - alone[1]).abs().max())
    for row, expected in zip(both, alone):
        assert (row - expected[0]).abs().max() < 1e-3 * apart


@pytest.mark.parametrize("where", ["patch", "wrapper"])
def test_recompute_runs_the_reference_with_its_own_patches_and_wrappers(scene, where):
    """A bank of a MODEL that carries another node's: recomputed beside the sample as it was captured."""
    model = scene.model.clone()
    if where == "patch":
        model.set_model_attn1_patch(lambda n, context, value, options: (1.5 * n, context, value))
    else:
        def wrapper(executor, x, *args, **kwargs):
            return executor(0.7 * x, *args, **kwargs)

        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "theirs", wrapper)

    def run(source, memory):
        bank = capture(source, scene.first, "self_attention", "6-11", memory, "full")
        injected = inject_style(scene.model, bank, None, 0.0, 1.5, 1.0, "6-11", 0.0, 1.0, None)
        return sample(injected, scene.noise, scene.sigmas[:2], scene.positive)

    kept, recomputed, undecorated = run(model, "ram"), run(model, "recompute"), run(scene.model, "ram")
    assert (recomputed - kept).abs().max() < 1e-3 * (undecorated - kept).abs().max()


@pytest.mark.parametrize("mode, share", [("override", 1.0), ("blend", 0.6)])
@pytest.mark.parametrize("kind", ["attn1", "attn2"])
def test_blend_mode_mixes_queries_and_keys_in_float64(mode, share, kind):
    """At timestep 300 the official code takes 2 * 300 / 1000 of the content's."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, q_content, k_content = torch.randn(5, 1, 6, 8, generator=generator, dtype=torch.float64)

    class Patches(ContentPatches):
        def __init__(self):
            self.mode, self.attention_steps, self.schedule = mode, 1.0, Schedule(torch.tensor([1.0, 0.0]))

        def _feature(self, stream, place, options, like):
            return q_content if stream.endswith("_q") else k_content

    class Run:
        class model_sampling:
            timestep = staticmethod(lambda sigma: torch.tensor([300.0]))

    patches, slot, options = Patches(), ("output", 5, 0), {RUN: Run(), "sigmas": torch.ones(1)}
    if kind == "attn1":
        entered = patches.replacement(slot, lambda *inputs: inputs[:3])(q, k, v, options)
    else:
        entered = (*(patches.cross_projection(slot, name, own, options) for name, own in (("q", q), ("k", k))), v)
    for found, expected in zip(entered, (share * q_content + (1 - share) * q, share * k_content + (1 - share) * k, v)):
        assert (found - expected).abs().max() < 1e-15


@pytest.mark.parametrize("sampler", ["dpm_2", "euler_ancestral"])
def test_the_model_sees_the_trajectory_outside(scene, sampler):
    """Samplers that stray or add noise outside the mask: what the network gets there is the content's own latent."""
    smooth, seen = smooth_eps(scene.model), []
    _, trajectory = invert(smooth, {"samples": random_latent(8, 8, seed=1)}, scene.sigmas, scene.positive, iterations=3)
    predict = smooth.model_options["model_function_wrapper"]

    def note(apply_model, args):
        seen.append((float(args["timestep"][0]), args["input"].clone()))
        return predict(apply_model, args)

    smooth.set_model_unet_function_wrapper(note)
    left, _ = halves()
    out = sample(keep_content_outside(smooth, trajectory, left), 3 * random_latent(8, 8, seed=6), scene.sigmas, scene.negative, sampler=sampler)
    levels = trajectory.sigmas.tolist()
    captured = 0
    for sigma, x in seen:
        above = min(i for i, level in enumerate(levels) if level >= sigma * (1 - 1e-6))
        low, high = levels[above - 1], levels[above]
        expected = torch.lerp(trajectory.latents[above - 1], trajectory.latents[above], (sigma - low) / (high - low))
        captured += sigma in levels
        torch.testing.assert_close(x[..., 4:], expected[..., 4:], rtol=1e-4, atol=1e-3)
    assert captured == STEPS and len(seen) == (2 * STEPS - 1 if sampler == "dpm_2" else STEPS)
    assert torch.equal(out[..., 4:], scene.model.model.process_latent_out(trajectory.latents[0])[..., 4:])


def test_a_model_tells_what_it_carries(scene):
    bank = scene.bank(scene.content, "h_space")
    keep = keep_content_outside(scene.model, scene.content, torch.zeros(8, 8))
    styled = scene.style(scene.first, keep)
    assert injected_by(scene.model) == () and injected_by(scene.style(scene.first, strength=0.0)) == ()
    assert injected_by(inject_content(styled, bank, 0.6, 400)) == ("Keep Outside Mask", "Style Injection", "h-space Slerp")
    assert injected_by(styled) == ("Keep Outside Mask", "Style Injection")
    assert injected_by(styled.clone()) == injected_by(styled)


def test_what_carries_an_injection_is_not_captured(scene):
    residual = scene.bank(scene.content, "residual")
    carriers = {
        "Keep Outside Mask": keep_content_outside(scene.model, scene.content, torch.zeros(8, 8)),
        "Style Injection": scene.style(scene.first),
        "h-space Slerp": inject_content(scene.model, scene.bank(scene.content, "h_space"), 0.6, 400),
        "Feature Injection": inject_features(scene.model, residual, 1.0, 0.0, "auto", "none", "none"),
    }
    for name, carrier in carriers.items():
        with pytest.raises(ValueError, match=f"already carries {name}, which would be captured too. Connect the model from before {name}"):
            capture(carrier, scene.content, "self_attention", "6")
        with pytest.raises(ValueError, match=f"already carries {name}"):
            load_bank("any.safetensors", "recompute", carrier)


@pytest.mark.parametrize("make", ["style", "explicit", "h-space", "outside"])
def test_masks_without_a_batch_are_masks(scene, make):
    """(H, W), as some nodes make them, equals (1, H, W)."""
    mask = torch.linspace(0, 1.2, 72).clamp(max=1).view(9, 8)
    inject = {
        "style": lambda mask: scene.style(scene.first, mask=mask),
        "explicit": lambda mask: scene.style(scene.first, streams="self_attention_qkv", mask=mask),
        "h-space": lambda mask: inject_content(scene.model, scene.bank(scene.content, "h_space"), 0.6, 0, mask=mask),
        "outside": lambda mask: keep_content_outside(scene.model, scene.content, mask),
    }[make]
    flat, batched = (sample(inject(each), scene.noise, scene.sigmas[:3], scene.positive) for each in (mask, mask[None]))
    assert torch.equal(flat, batched)


def split(model, latent, sigmas, at, *conditions, **options):
    """Two samplers on a split schedule, as SplitSigmas wires them."""
    half = sample(model, latent, sigmas[: at + 1], *conditions, **options)
    return sample(model, half, sigmas[at:], *conditions, **options)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_feature_injection_counts_the_steps_of_the_whole_schedule(scene, monkeypatch, at):
    """Shares of 0.75 and 0.25 are the first 3 steps and the first one, however the schedule is split."""
    bank = scene.bank(scene.content, "residual, self_attention_qk, cross_attention", "3-11")
    injected = inject_features(scene.model, bank, 0.75, 0.25, "auto", "auto", "auto")
    seen, original = set(), ContentPatches._feature
    monkeypatch.setattr(ContentPatches, "_feature", lambda self, stream, place, options, like: (
        seen.add((stream == "residual", float(options["sigmas"][0]))), original(self, stream, place, options, like))[1])
    latent = random_latent(8, 8, seed=5)
    split(injected, latent, scene.sigmas, at, scene.positive)
    levels = [sorted((sigma for residual, sigma in seen if residual is wanted), reverse=True) for wanted in (True, False)]
    assert levels == [scene.sigmas[:3].tolist(), scene.sigmas[:1].tolist()]


def test_feature_injection_on_a_split_schedule_is_the_unsplit_one(scene):
    smooth = smooth_eps(scene.model)  # its network never runs: what follows is the plumbing of two samplers
    whole = sample(smooth, scene.noise, scene.sigmas, scene.positive)
    torch.testing.assert_close(split(smooth, scene.noise, scene.sigmas, 2, scene.positive), whole, rtol=1e-5, atol=1e-5)
    bank = scene.bank(scene.content, "residual, self_attention_qk", "3-11")
    injected = inject_features(scene.model, bank, 0.5, 0.5, "auto", "auto", "none")
    latent = random_latent(8, 8, seed=5)
    whole, plain = (sample(model, latent, scene.sigmas, scene.positive) for model in (injected, scene.model))
    parts = split(injected, latent, scene.sigmas, 2, scene.positive)
    assert (parts - whole).abs().max() < 1e-3 * (plain - whole).abs().max()


@pytest.mark.parametrize("ramp", ["constant", "increasing", "decreasing"])
def test_h_space_ramps_over_the_whole_of_a_split_schedule(scene, ramp):
    injected = inject_content(scene.model, scene.bank(scene.content, "h_space"), 0.4, 0, schedule=ramp)
    latent = random_latent(8, 8, seed=5)
    patch = injected.model_options["transformer_options"]["patches"]["middle_block_after_patch"][0]

    def shares(run):
        seen = []
        watched = injected.clone()
        watched.set_model_patch(lambda args: (seen.append(patch.share(args["transformer_options"])), args)[1], "middle_block_after_patch")
        run(watched)
        return seen

    whole = shares(lambda model: sample(model, latent, scene.sigmas, scene.positive))
    parts = shares(lambda model: split(model, latent, scene.sigmas, 1, scene.positive))
    assert whole == parts and len(whole) == STEPS
    expected = {"constant": [0.4] * 4, "increasing": [0, 0.8 / 3, 1.6 / 3, 0.8], "decreasing": [0.8, 1.6 / 3, 0.8 / 3, 0]}
    assert whole == pytest.approx(expected[ramp])


class FlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """A rectified-flow parameterisation, as core makes it for Flux and the like."""


def flow_model():
    """A smooth velocity on flow sampling: exact for Gaussian data of deviation 0.5, bent by a tanh."""
    model = tiny_unet()
    model.add_object_patch("model_sampling", FlowSampling())

    def predict(apply_model, args):
        x, sigma = args["input"], args["timestep"].view(-1, 1, 1, 1)
        mean = x * (1 - sigma) * 0.25 / ((1 - sigma) ** 2 * 0.25 + sigma**2)
        return mean + 0.2 * sigma * torch.tanh(x.roll(1, -1))

    model.set_model_unet_function_wrapper(predict)
    return model


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_keep_outside_on_a_split_schedule(kind, at):
    """The two parts hand over a latent that is the trajectory's outside, and end where one sampler ends."""
    model = flow_model() if kind == "flow" else smooth_eps(tiny_unet())
    positive = tiny_cond(model)
    sigmas = schedule(model, STEPS, "simple")
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(STEPS + 1, 1, 4, 8, 8, generator=generator)
    trajectory = Trajectory(sigmas.flip(0), latents, positive, "next", fingerprint(model))
    left, _ = halves()
    kept = keep_content_outside(model, trajectory, left)
    noise = torch.randn(1, 4, 8, 8, generator=generator)

    def run(sigmas, noise, latent):
        return comfy.sample.sample_custom(kept, noise, 1.0, comfy.samplers.sampler_object("euler"), sigmas, positive, positive,
                                          latent, disable_pbar=True, seed=0)

    nothing = torch.zeros_like(noise)
    whole = run(sigmas, noise, nothing)
    half = run(sigmas[: at + 1], noise, nothing)
    scale = 1 - float(sigmas[at]) if kind == "flow" else 1.0
    handed = model.model.process_latent_in(half) * scale
    torch.testing.assert_close(handed[..., 4:], latents[STEPS - at][..., 4:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(sigmas[at:], nothing, half), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole[..., 4:], model.model.process_latent_out(latents[0])[..., 4:])


def h_by_prompt(scene, make, model):
    """{name of the condition: h of the middle block} in one step under a guider."""
    seen, guiders = {}, []

    def note(args):
        options = args["transformer_options"]
        names = {cond["uuid"]: name for name, conds in guiders[0].conds.items() for cond in conds}
        seen.update(zip((names[uuid] for uuid in options["uuids"]), args["h"].clone()))
        return args

    watched = model.clone()
    watched.set_model_patch(note, "middle_block_after_patch")
    guiders.append(make(watched))
    guiders[0].sample(torch.zeros_like(scene.noise), scene.noise, comfy.samplers.sampler_object("euler"), scene.sigmas[:2],
                      disable_pbar=True, seed=0)
    return seen


def dual_guider(nested):
    def make(model):
        guider = Guider_DualCFG(model)
        guider.set_conds(*(tiny_cond(model, seed=seed) for seed in (1, 2, 3)))
        guider.set_cfg(2.0, 3.0, nested=nested)
        return guider

    return make


def perpneg_guider(model):
    guider = Guider_PerpNeg(model)
    guider.set_conds(*(tiny_cond(model, seed=seed) for seed in (1, 2, 3)))
    guider.set_cfg(3.0, 1.0)
    return guider


def area_guider(model):
    """A prompt for the left half beside one for all: core then makes a negative for that area, with the prompt's uuid."""
    guider = comfy.samplers.CFGGuider(model)
    regional = [[tiny_cond(model, seed=1)[0][0], {"area": (8, 4, 0, 0), "strength": 1.0}]]
    guider.set_conds(regional + tiny_cond(model, seed=2), tiny_cond(model, seed=3))
    guider.set_cfg(3.0)
    return guider


@pytest.mark.parametrize("make, prompts, others", [
    (dual_guider(False), {"positive", "middle"}, {"negative"}),
    (dual_guider(True), {"positive", "middle"}, {"negative"}),
    (perpneg_guider, {"positive"}, {"negative", "empty_negative_prompt"}),
])
def test_conditional_is_told_by_the_condition_not_by_its_number(scene, make, prompts, others):
    bank = scene.bank(scene.content, "h_space")
    content = bank.store.read(H_SPACE, STEPS, torch.device("cpu"))
    plain = h_by_prompt(scene, make, scene.model)
    injected = h_by_prompt(scene, make, inject_content(scene.model, bank, 0.6, 0, "conditional"))
    assert set(plain) == prompts | others
    for name, h in plain.items():
        expected = slerp(h[None], content, 0.6)[0] if name in prompts else h
        torch.testing.assert_close(injected[name], expected, rtol=1e-5, atol=1e-5)


def test_the_negative_of_an_area_is_not_taken_for_the_prompt_of_that_area(scene):
    """Forwards that inject, counted by condition: both prompts, neither negative."""
    bank = scene.bank(scene.content, "h_space")
    seen, guiders = [], []
    injected = inject_content(scene.model, bank, 0.6, 0, "conditional")
    (patch,) = injected.model_options["transformer_options"]["patches"]["middle_block_after_patch"]

    def note(args):
        options = args["transformer_options"]
        before = args["h"].chunk(len(options["uuids"]))
        after = patch(args)["h"].chunk(len(options["uuids"]))
        seen.extend((number, not torch.equal(a, b)) for number, a, b in zip(options["cond_or_uncond"], before, after))
        return args

    injected.model_options["transformer_options"]["patches"]["middle_block_after_patch"] = [note]
    guider = area_guider(injected)
    guider.sample(torch.zeros_like(scene.noise), scene.noise, comfy.samplers.sampler_object("euler"), scene.sigmas[:2],
                  disable_pbar=True, seed=0)
    assert sorted(seen) == [(0, True), (0, True), (1, False), (1, False)]


@pytest.mark.parametrize("make, pairs", [(dual_guider(False), 2), (perpneg_guider, 1)])
def test_injectfusions_second_prediction_is_of_the_prompts(scene, monkeypatch, make, pairs):
    """Its batch holds every condition once plainly and every prompt once with the injection."""
    rows, guiders, original = [], [], HSpacePatches.__call__
    injected = inject_content(scene.model, scene.bank(scene.content, "h_space"), 0.6, 0, "conditional")

    def note(self, args):  # a patch of another node would have the two predictions made one after the other
        options = args["transformer_options"]
        names = {cond["uuid"]: name for name, conds in guiders[0].conds.items() for cond in conds}
        rows.extend(zip((names[uuid] for uuid in options["uuids"]), options[INJECT]))
        return original(self, args)

    monkeypatch.setattr(HSpacePatches, "__call__", note)
    guiders.append(make(injected))
    guiders[0].sample(torch.zeros_like(scene.noise), scene.noise, injectfusion_sampler(0.0, 0, 0), scene.sigmas[:2],
                      disable_pbar=True, seed=0)
    assert len(rows) == 3 + pairs and {name for name, flag in rows if flag} == ({"positive", "middle"} if pairs == 2 else {"positive"})
    assert sum(flag for _, flag in rows) == pairs


def test_injectfusion_injects_into_every_style(scene):
    """Multi-Style Guider, h-space Slerp and InjectFusion Sampler: the same styles one by one are the same image."""
    model = inject_content(scene.model, scene.bank(scene.content, "h_space"), 0.6, 0, "conditional")
    prompts = [tiny_cond(scene.model, seed=seed) for seed in (1, 2)]
    left, right = halves()

    def run(model, entries):
        guider = multi_style_guider(model, scene.positive, scene.negative, 3.0, entries)
        return guider.sample(torch.zeros_like(scene.noise), scene.noise, injectfusion_sampler(0.0, 0, 0), scene.sigmas[:2],
                             disable_pbar=True, seed=0)

    both = run(model, [StyleEntry(conditioning=prompt, mask=mask) for prompt, mask in zip(prompts, (left, right))])
    for prompt, part in zip(prompts, (slice(0, 4), slice(4, 8))):
        alone, without = (run(each, [StyleEntry(conditioning=prompt)])[..., part] for each in (model, scene.model))
        assert (both[..., part] - alone).abs().max() < 1e-3 * (without - alone).abs().max()


class Executor:
    """Core's WrapperExecutor as an OUTER_SAMPLE wrapper sees it, around `body`; a guider of plain attributes."""

    def __init__(self, model, body):
        self.class_obj = type("Guider", (), dict(model_options=model.model_options, model_patcher=model, inner_model=model.model, conds={}))()
        self.body = body

    def __call__(self, *args, **kwargs):
        return self.body(self.class_obj.model_options["transformer_options"])


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_runs_state_goes_with_the_run(scene, error):
    """Also on an error and on Cancel; a run inside another injection's run leaves that one its state."""
    model = scene.style(scene.first, inject_content(scene.model, scene.bank(scene.content, "h_space"), 0.6, 0)).clone()
    outer, inner = model.get_wrappers(WrappersMP.OUTER_SAMPLE, "pastiche")
    seen = []

    def body(options):
        seen.append(options[RUN])
        if error is not None:
            raise error

    def nested(options):
        seen.append(options[RUN])
        inner(Executor(model, body), scene.noise, None, None, scene.sigmas)
        assert options[RUN] is seen[0]

    with pytest.raises(error) if error else contextlib.nullcontext():
        outer(Executor(model, nested), scene.noise, None, None, scene.sigmas)
    assert len(seen) == 2 and seen[0] is seen[1]
    assert RUN not in model.model_options["transformer_options"]
