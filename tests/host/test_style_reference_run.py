"""Style Reference: the attention it computes, its agreement with Style Injection, and what it refuses."""

import math

import comfy.ldm.modules.attention as attention
import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from pastiche.nodes.algorithms.references import RotaryLayout
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.schedule import SigmaRange
from pastiche.nodes.host.injections.style import inject_style
from pastiche.nodes.host.references.install import parse_weights, references_of, style_reference
from pastiche.nodes.host.references.layout import Call, Layout
from pastiche.nodes.host.networks.rows import lengthen, own_conditions, without_control
from pastiche.nodes.host.references.run import KEY, chosen_calls
from pastiche.nodes.host.references.settings import Cures, Reference
from pastiche.nodes.host.references.sharing import Part, Sharing
from pastiche.nodes.host.references.sources import seeded_noise
from pastiche.nodes.host.trajectories.inversion import invert
from support.families import UNREACHED, family_cond, family_latent, tiny_model
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule

SETTINGS = dict(
    share="replace", gamma=0.75, gamma_end=0.75, schedule="constant", temperature=1.5, strength=1.0, layers="auto", start_percent=0.0, end_percent=1.0,
)
TEXT, PICTURE, HEADS, DEPTH = 3, 8, 2, 4
SPAN = (TEXT, TEXT + PICTURE)


def a_reference(weights=(1.0,), **settings):
    settings = dict(
        content=None, share="replace", gamma=0.75, gamma_end=0.75, schedule="constant", temperature=1.0, strength=1.0, mask=None, places=None,
        layers=None, sigmas=SigmaRange(), noise_seed=0, family="Test", unrotated=True,
    ) | settings
    return Reference(styles=tuple((None, weight) for weight in weights), **settings)


def share(reference, q, k, v, axis, rows=1, mask=None, kinds=(0,)):
    """One attention call of a forward: rows of samples, then each style's, then the content's where q has them."""
    count = len(reference.styles)
    places = [slice(number * rows, (number + 1) * rows) for number in range(1, q.shape[0] // rows)]
    part = Part(reference, None, kinds, tuple(places[:count]), places[count] if len(places) > count else None, frozenset({0}))
    sharing = Sharing(Layout((Call(q.shape[axis], SPAN),)), [part], rows, (4, 8), True, 0.0, None, lambda key, compute: compute())
    return sharing(attention.attention_pytorch, q, k, v, HEADS, mask=mask, skip_reshape=axis == 2)


def heads(x, axis):
    """(rows, heads, tokens, depth) of either layout."""
    return x if axis == 2 else x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def explicit(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d) + mask) v of (rows, heads, tokens, depth) -> (rows, tokens, heads * depth)."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (torch.softmax(logits if mask is None else logits + mask, -1) @ v).transpose(1, 2).flatten(2)


def tensors(rows, axis, seed=0):
    shape = (rows, HEADS, TEXT + PICTURE, DEPTH) if axis == 2 else (rows, TEXT + PICTURE, HEADS * DEPTH)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("kind", ["join", "replace"])
def test_sharing_is_the_explicit_attention_in_float64(kind, axis):
    """Row 0 samples, row 1 is the style, row 2 the content; query preservation, temperature and a scaled key."""
    q, k, v = tensors(3, axis)
    mask = torch.randn(1, 1, 1, TEXT + PICTURE, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    out = share(a_reference(share=kind, gamma=0.6, temperature=1.3, cures=Cures(key_scale=1.2)), q, k, v, axis, mask=mask)
    q, k, v = (heads(x, axis) for x in (q, k, v))
    query = q[:1].clone()
    query[:, :, TEXT:] = 1.3 * (0.6 * q[2:, :, TEXT:] + 0.4 * q[:1, :, TEXT:])
    if kind == "join":
        keys, values = torch.cat([k[:1], 1.2 * k[1:2, :, TEXT:]], 2), torch.cat([v[:1], v[1:2, :, TEXT:]], 2)
        seen = torch.cat([mask, torch.zeros(1, 1, 1, PICTURE, dtype=torch.float64)], -1)
    else:
        keys, values = torch.cat([k[:1, :, :TEXT], 1.2 * k[1:2, :, TEXT:]], 2), torch.cat([v[:1, :, :TEXT], v[1:2, :, TEXT:]], 2)
        seen = mask
    assert (out[:1] - explicit(query, keys, values, seen)).abs().max() < 1e-12
    assert (out[1:] - explicit(q[1:], k[1:], v[1:], mask)).abs().max() < 1e-12


def test_boolean_masks_of_single_rows():
    q, k, v = tensors(2, 2)
    mask = torch.ones(2, 1, 1, TEXT + PICTURE, dtype=torch.bool)
    mask[0, ..., 1] = False
    out = share(a_reference(share="join"), q, k, v, 2, mask=mask)
    seen = torch.zeros(TEXT + 2 * PICTURE, dtype=torch.float64)
    seen[1] = -math.inf
    assert (out[:1] - explicit(q[:1], torch.cat([k[:1], k[1:, :, TEXT:]], 2), torch.cat([v[:1], v[1:, :, TEXT:]], 2), seen)).abs().max() < 1e-12
    assert (out[1:] - explicit(q[1:], k[1:], v[1:])).abs().max() < 1e-12


def test_weights_strength_and_mask_mix_outputs():
    """Two styles 1 : 3 at strength 0.5 under a mask that covers the left half: text tokens take its mean."""
    q, k, v = tensors(3, 2)
    mask = torch.zeros(1, 4, 8)
    mask[..., :4] = 1
    out = share(a_reference((0.25, 0.75), strength=0.5, mask=mask), q, k, v, 2)[:1]
    plain = explicit(q[:1], k[:1], v[:1])
    one, two = (
        explicit(q[:1], torch.cat([k[:1, :, :TEXT], k[row : row + 1, :, TEXT:]], 2), torch.cat([v[:1, :, :TEXT], v[row : row + 1, :, TEXT:]], 2)) for row in (1, 2)
    )
    weight = 0.5 * torch.tensor([0.5] * TEXT + [1.0, 1.0, 0.0, 0.0] * 2, dtype=torch.float64).view(1, -1, 1)  # a 2x4 grid
    assert (out - (plain + weight * (0.25 * one + 0.75 * two - plain))).abs().max() < 1e-12


def test_leak_guard_asks_with_the_styles_queries_in_unconditional_rows_only():
    q, k, v = tensors(4, 2)  # two sample rows: conditional, unconditional; then the style's
    out = share(a_reference(cures=Cures(leak_guard=1.0)), q, k, v, 2, rows=2, kinds=(0, 1))
    plain = share(a_reference(), q, k, v, 2, rows=2, kinds=(0, 1))
    assert torch.equal(out[:1], plain[:1]) and torch.equal(out[2:], plain[2:])
    query = torch.cat([q[1:2, :, :TEXT], q[3:, :, TEXT:]], 2)
    keys, values = (torch.cat([x[1:2, :, :TEXT], x[3:, :, TEXT:]], 2) for x in (k, v))
    assert (out[1:2] - explicit(query, keys, values)).abs().max() < 1e-12


def unet_scene(prediction="eps", tokens=7):
    model = tiny_unet("sd15", prediction)
    sigmas, positive = schedule(model, 3), tiny_cond(model)
    noise, trajectory = invert(model, {"samples": random_latent(seed=1)}, sigmas, positive, "next")
    _, style = invert(model, {"samples": random_latent(seed=2)}, sigmas, tiny_cond(model, tokens, seed=3), "next")
    return model, sigmas, positive, noise["samples"], trajectory, style


@pytest.mark.parametrize("prediction, tokens", [("eps", 7), ("v", 14)])
def test_on_unets_it_equals_style_injection_with_recompute(prediction, tokens):
    """tokens: the style was inverted with a prompt of another length than the sample's."""
    model, sigmas, positive, noise, content, style = unet_scene(prediction, tokens)
    banks = [capture(model, trajectory, "self_attention", "6-11", "recompute", "full") for trajectory in (style, content)]
    expected = sample(inject_style(model, *banks, 0.75, 1.5, 1.0, "6-11", 0.0, 1.0, None), noise, sigmas, positive)
    got = sample(style_reference(model, None, style, content, **SETTINGS | dict(layers="6-11")), noise, sigmas, positive)
    plain = sample(model, noise, sigmas, positive)
    assert (got - expected).abs().max() <= 1e-4 * expected.std()
    assert (plain - expected).abs().max() > 1e-2 * expected.std()


def test_guidance_batches_and_several_nodes():
    model, sigmas, positive, noise, content, style = unet_scene()
    patched = style_reference(model, None, style, content, **SETTINGS)
    single = sample(patched, noise, sigmas, positive, tiny_cond(model, seed=5), cfg=3.0)
    double = sample(patched, torch.cat([noise, noise + 1]), sigmas, positive, tiny_cond(model, seed=5), cfg=3.0)
    assert (double[:1] - single).abs().max() <= 1e-4 * single.std()
    half = SETTINGS | dict(strength=0.5)
    twice = style_reference(style_reference(model, None, style, content, **half), None, style, content, **half)
    assert len(references_of(twice)) == 2 and len(references_of(patched)) == 1
    assert (sample(twice, noise, sigmas, positive) - sample(patched, noise, sigmas, positive)).abs().max() <= 1e-4 * single.std()


def test_masks_keep_what_they_do_not_cover_in_the_first_block():
    model, sigmas, positive, noise, content, style = unet_scene()
    everywhere = sample(style_reference(model, None, style, None, **SETTINGS), noise, sigmas, positive)
    ones = sample(style_reference(model, None, style, None, **SETTINGS, mask=torch.ones(1, 64, 64)), noise, sigmas, positive)
    zeros = style_reference(model, None, style, None, **SETTINGS, mask=torch.zeros(1, 64, 64))
    assert (ones - everywhere).abs().max() <= 1e-4 * everywhere.std()
    assert references_of(zeros) == ()
    with pytest.raises(ValueError, match="mask: 3 masks for 1 samples"):
        sample(style_reference(model, None, style, None, **SETTINGS, mask=torch.ones(3, 8, 8)), noise, sigmas, positive)


@pytest.mark.parametrize("change", [dict(strength=0.0), dict(start_percent=0.5, end_percent=0.5)])
def test_settings_without_effect_leave_the_model_alone(change):
    patched = style_reference(tiny_unet(), {"samples": random_latent()}, None, None, **SETTINGS | change)
    assert not patched.wrappers.get("apply_model")


def test_steps_outside_the_range_run_no_rows():
    model = tiny_model("flux")
    seen = []
    patched = style_reference(model, {"samples": family_latent("flux")}, None, None, **SETTINGS | dict(end_percent=0.5))

    def count(executor, x, t, *args, **kwargs):
        seen.append((float(t[0]), x.shape[0]))
        return executor(x, t, *args, **kwargs)

    patched.add_wrapper_with_key("apply_model", "test", count)
    sample(patched, family_latent("flux"), schedule(model, 4, "simple"), family_cond("flux"))
    low = patched.get_model_object("model_sampling").percent_to_sigma(0.5)
    assert {rows for sigma, rows in seen if sigma < low} == {1} and {rows for sigma, rows in seen if sigma >= low} == {2}


@pytest.mark.parametrize("name", UNREACHED)
def test_a_network_that_asks_no_override_is_named(name):
    model = tiny_model(name)
    latent = family_latent(name, size=(64, 64))  # PixArt knows no smaller picture
    patched = style_reference(model, {"samples": latent}, None, None, **SETTINGS)
    with pytest.raises(ValueError, match=f"^{type(model.model.model_config).__name__}: Style Reference cannot reach this model"):
        sample(patched, latent, schedule(model, 2, "simple"), family_cond(name))


def refusal(message, model, latent=None, trajectory=None, content=None, noise=None, sigmas=None, **settings):
    with pytest.raises(ValueError, match=message):
        patched = style_reference(model, latent, trajectory, content, **SETTINGS | settings)
        sample(patched, noise, sigmas, tiny_cond(model) if noise is not None and noise.shape[1] == 4 else family_cond("flux"))


def test_refusals_name_the_input():
    model, sigmas, _, noise, content, style = unet_scene()
    refusal("style: connect the LATENT", model)
    refusal("style: its latent is .1, 16, 8, 12., this model's have 4 channels", model, {"samples": family_latent("flux")})
    broken = random_latent()
    broken[0, 0, 0, 0] = float("nan")
    refusal("style: holds NaN or infinite values", model, {"samples": broken})
    refusal("weights: 3 for 1 style pictures", model, {"samples": random_latent()}, weights="1, 2, 3")
    refusal("content: its latent is 8x8 .height x width., the sampled one 8x12", model, {"samples": random_latent()}, None, content, random_latent(8, 12), sigmas)
    above = torch.cat([sigmas[:1] * 2, sigmas])
    refusal("style_trajectory: the inversion ends at sigma", model, None, style, None, noise, above)
    flux = tiny_model("flux")
    latent = {"samples": family_latent("flux")}
    refusal('layers: a transformer.s attention layers have plain numbers, for example "8-23"; got "middle"', flux, latent, layers="middle")
    refusal("layers: Flux has 4 attention layers about the picture, 0-3; got 7", flux, latent, None, None, family_latent("flux"), schedule(flux, 2, "simple"), layers="0-7")


def test_content_under_a_condition_with_an_area_is_refused():
    """Its row would show the whole picture, shrunk, beside a part of the sample."""
    model, sigmas, _, noise, content, _ = unet_scene()
    area = [[context, {**extra, "area": (4, 4, 0, 0)}] for context, extra in tiny_cond(model)]
    picture = {"samples": random_latent()}
    sample(style_reference(model, picture, None, None, **SETTINGS), noise, sigmas, area)
    with pytest.raises(ValueError, match="^content: a condition with an area"):
        sample(style_reference(model, picture, None, content, **SETTINGS), noise, sigmas, area)


@pytest.mark.parametrize("text", ["1, x", "-1, 1", "0, 0", "nan, 1", "inf, 1"])
def test_bad_weights(text):
    with pytest.raises(ValueError, match="^weights"):
        parse_weights(text, 2)
    assert parse_weights("1, 3", 2) == [0.25, 0.75] and parse_weights("", 2) == [0.5, 0.5]


@pytest.mark.parametrize("name, cures, said", [
    ("sd3", Cures(untwist_high=0.5), "has no rotary positions"), ("flux", Cures(untwist_high=0.5), None), ("ltxv", Cures(token_adain=1.0), "not known here"),
])
def test_what_has_no_effect_is_said(name, cures, said, caplog):
    caplog.set_level("INFO")
    style_reference(tiny_model(name), {"samples": family_latent(name)}, None, None, **SETTINGS, cures=cures)
    assert (said in caplog.text) if said else not caplog.text.count("no effect")


@pytest.mark.parametrize("name", ["flux", "cosmos_predict2", "z_image", "sd3", "sd15"])
@pytest.mark.parametrize("cures", [Cures(untwist_high=0.5, untwist_low=1.5), Cures(position_shift=1.0), Cures(token_adain=1.0)])
def test_cures_act_on_families_with_rotary_positions(name, cures):
    model = tiny_model(name)
    sigmas, positive, start = schedule(model, 2, "simple"), family_cond(name, model=model), family_latent(name, seed=1)
    latent = {"samples": family_latent(name)}
    plain, changed = (
        sample(style_reference(model, latent, None, None, **SETTINGS, cures=cures), start, sigmas, positive) for cures in (Cures(), cures)
    )
    acts = cures.token_adain > 0 or name not in ("sd3", "sd15")
    assert ((plain - changed).abs().max() > 1e-5 * plain.std()) == acts


def test_batches_are_lengthened_and_own_prompts_put_in():
    x = torch.arange(4.0).view(2, 2)
    assert lengthen(x, 2, [1, 0, 1])[:, 0].tolist() == [0, 2, 2, 0, 2]
    assert lengthen([x, 3], 2, [0])[0].shape == (3, 2) and lengthen(torch.ones(3), 2, [0]).shape == (3,)
    batch = {"c_crossattn": torch.zeros(4, 3, 2), "y": torch.zeros(4, 5), "steps": 3}
    own = {"c_crossattn": (torch.ones(1, 2, 2), False), "y": (torch.ones(1, 5), False), "other": (torch.ones(1), False)}
    out = own_conditions(batch, 2, [(slice(2, 4), own)])
    assert out["c_crossattn"][2:].tolist() == [[[1, 1], [1, 1], [0, 0]]] * 2 and not out["c_crossattn"][:2].any()
    assert torch.equal(out["y"].sum(1), torch.tensor([0.0, 0, 5, 5])) and out["steps"] == 3 and not batch["y"].any()
    repeated = own_conditions(batch, 2, [(slice(2, 4), {"c_crossattn": (torch.ones(1, 2, 2), True)})])["c_crossattn"]
    assert repeated.shape == (4, 6, 2) and repeated[2:].all() and not repeated[:2].any()
    control = without_control({"input": [None, torch.ones(2, 3)], "output": []}, 2, 2)
    assert control["input"][1].tolist() == [[1] * 3] * 2 + [[0] * 3] * 2 and control["input"][0] is None


def test_a_failing_run_leaves_nothing_behind():
    model = tiny_unet()
    patched = style_reference(model, {"samples": random_latent()}, None, None, **SETTINGS)

    def fail(executor, *args, **kwargs):
        raise RuntimeError("stopped")

    patched.add_wrapper_with_key("apply_model", "test", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        sample(patched, random_latent(seed=1), schedule(model, 2), tiny_cond(model))
    assert patched.model_options["transformer_options"] == {}


def test_cancel_ends_the_run_and_the_next_one_is_as_before():
    """Core raises it inside a forward; at the look for the layout, and later."""
    model, latent = tiny_model("flux"), family_latent("flux", seed=1)
    patched = style_reference(model, {"samples": family_latent("flux")}, None, None, **SETTINGS)
    sigmas, positive = schedule(model, 3, "simple"), family_cond("flux")
    before = sample(patched, latent, sigmas, positive)
    for allowed in (0, 1, 3):
        left = [allowed]

        def cancel(executor, *args, **kwargs):
            if not left[0]:
                raise comfy.model_management.InterruptProcessingException()
            left[0] -= 1
            return executor(*args, **kwargs)

        cancelled = patched.clone()
        cancelled.add_wrapper_with_key("apply_model", "test", cancel)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(cancelled, latent, sigmas, positive)
        assert cancelled.model_options["transformer_options"] == {}
    assert torch.equal(sample(patched, latent, sigmas, positive), before)


@pytest.mark.parametrize("name", ["flux", "z_image", "wan"])
def test_samples_of_a_batch_are_those_of_single_runs_under_guidance(name):
    model = tiny_model(name)
    patched = style_reference(model, {"samples": family_latent(name)}, None, None, **SETTINGS | dict(share="join"))
    sigmas, positive, negative = schedule(model, 2, "simple"), family_cond(name, model=model), family_cond(name, seed=1, model=model)
    both = torch.cat([family_latent(name, seed=1), family_latent(name, seed=2)])

    def drawn(noise):  # flows erase a latent that comes without noise
        return comfy.sample.sample_custom(
            patched, noise, 3.0, comfy.samplers.sampler_object("euler"), sigmas, positive, negative, torch.zeros_like(noise), disable_pbar=True, seed=0
        )

    together, alone = drawn(both), torch.cat([drawn(noise) for noise in both.split(1)])
    assert (together - alone).abs().max() <= 1e-4 * alone.std()
    assert (alone[0] - alone[1]).abs().max() > 0.1 * alone.std()


def test_one_style_at_four_steps_without_guidance_costs_at_most_2_1_times_plain():
    """Rows times picture cells that reach the network, the look for the layout among them."""
    model, size = tiny_model("flux"), (64, 64)
    patched = style_reference(model, {"samples": family_latent("flux", size=size)}, None, None, **SETTINGS)
    seen = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda network, args: seen.append(args[0].shape[0] * args[0].shape[-2:].numel()))
    costs = []
    for changed in (model, patched):
        seen.clear()
        sample(changed, family_latent("flux", seed=1, size=size), schedule(model, 4, "simple"), family_cond("flux"))
        costs.append(sum(seen))
    hook.remove()
    assert costs[0] == 4 * 64 * 64
    assert 2 * costs[0] < costs[1] <= 2.1 * costs[0]


def test_a_guider_is_left_as_it_was_and_asked_for_the_memory_of_all_rows():
    model, shapes, seen = tiny_unet(), [], []
    patched = style_reference(model, {"samples": random_latent(batch=2)}, None, None, **SETTINGS)

    def prepare(executor, model, noise_shape, *args, **kwargs):
        shapes.append(tuple(noise_shape))
        return executor(model, noise_shape, *args, **kwargs)

    def rows(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        seen.append((x.shape[0], len(options["cond_or_uncond"]), len(options["uuids"])))
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    patched.add_wrapper_with_key("prepare_sampling", "test", prepare)
    patched.add_wrapper_with_key("apply_model", "test", rows)
    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(tiny_cond(model), tiny_cond(model, seed=1))
    guider.set_cfg(3.0)
    noise = random_latent(batch=2)
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), schedule(model, 2), disable_pbar=True)
    assert shapes == [(6, 4, 8, 8)]  # two samples, each with two styles
    assert seen[0] == (2, 2, 2) and set(seen[1:]) == {(12, 6, 6)}
    assert KEY not in guider.model_options["transformer_options"]


def test_every_sample_has_its_own_mask_under_guidance():
    model, sigmas, positive, noise, content, style = unet_scene()
    both = torch.cat([noise, noise])
    mask = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
    negative = tiny_cond(model, seed=5)
    out = sample(style_reference(model, None, style, None, **SETTINGS, mask=mask), both, sigmas, positive, negative, cfg=3.0)
    styled = sample(style_reference(model, None, style, None, **SETTINGS), both, sigmas, positive, negative, cfg=3.0)
    plain = sample(model, both, sigmas, positive, negative, cfg=3.0)
    assert (out[:1] - styled[:1]).abs().max() <= 1e-4 * plain.std()
    assert (out[1:] - plain[1:]).abs().max() <= 1e-4 * plain.std()


def test_the_references_noise_is_not_the_samplers():
    ours, cores = seeded_noise((4, 8, 8), 7), comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 7)
    assert torch.equal(ours, seeded_noise((4, 8, 8), 7)) and (ours - cores).abs().mean() > 0.5


def test_auto_layers_are_the_last_two_thirds_of_the_image_calls():
    calls = tuple(Call(10, None if index in (0, 4) else (0, 10)) for index in range(11))  # 9 about the picture
    assert chosen_calls(a_reference(), Layout(calls)) == {5, 6, 7, 8, 9, 10}
    assert chosen_calls(a_reference(layers=frozenset({0, 8})), Layout(calls)) == {1, 10}


def test_keys_are_scaled_untwisted_and_moved_one_picture_aside():
    rotary = RotaryLayout((0, 2, 2), (1.0, 1.0, 1.0), True)
    cures = Cures(key_scale=2.0, untwist_high=0.5, untwist_low=3.0, position_shift=1.0)
    reference = a_reference(cures=cures, rotary=rotary)
    sharing = Sharing(Layout(()), [], 1, (4, 8), True, 0.5, None, None)
    key = torch.ones(1, 1, PICTURE, 4)
    height, width = sharing._cured(reference, key, SPAN, 4, 2)[0, 0, 0].view(2, 2)
    # one pair a direction: u = 0, so all of them take untwist_high; 4 token columns turn by 4 radians
    assert torch.allclose(height, torch.tensor([1.0, 1.0]))
    assert torch.allclose(width, torch.tensor([math.cos(4) - math.sin(4), math.sin(4) + math.cos(4)]), atol=1e-6)
    coarse = Cures(untwist_low=3.0)
    low = sharing._cured(a_reference(cures=coarse, rotary=RotaryLayout((4, 0, 0), (1.0,) * 3, True)), key, SPAN, 4, 2)
    assert torch.allclose(low, 2 * key)  # half way through the sampling, half of the way from 1 to 3
