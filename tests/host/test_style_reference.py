"""Style Reference on every family: the spans it finds, and what must not change."""

from dataclasses import replace

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from pastiche.nodes.host.references import run
from pastiche.nodes.host.references.install import style_reference
from pastiche.nodes.host.references.layout import SLOT, Probe
from pastiche.nodes.host.references.run import KEY
from pastiche.nodes.host.references.sources import PictureSource, seeded_noise
from support.families import FAMILIES, family, family_cond, family_latent
from support.forwards import Rows, cond_of, forward, model_of

EVERY = (*FAMILIES, "sd15")
SEVERAL = ("flux", "sd35_medium", "qwen_image", "z_image", "omnigen2", "lens", "wan", "sd15")


def referenced(name, latent, **settings):
    settings = dict(
        share="replace", gamma=0.75, gamma_end=0.75, schedule="constant", temperature=1.0, strength=1.0, layers="auto",
        start_percent=0.0, end_percent=1.0,
    ) | settings
    model = model_of(name)
    style = None if latent is None else {"samples": model.model.process_latent_out(latent)}
    return style_reference(model, style, settings.pop("style_trajectory", None), settings.pop("content", None), **settings)


def references(patched):
    return patched.get_wrappers(WrappersMP.APPLY_MODEL, KEY)[0].__self__


def faded(patched):
    """The same with weights of 0: rows run beside, and give nothing."""
    wrapper = references(patched)
    wrapper.references = tuple(replace(reference, strength=0.0) for reference in wrapper.references)
    return patched


def noised(name, latent, seed=0, share=0.7):
    """The latent as the reference's rows see it at that step, with the reference's own noise."""
    model = model_of(name).model
    sampling = model.model_sampling
    sigma = torch.tensor(float(sampling.percent_to_sigma(1 - share)))
    latent = model.process_latent_in(model.process_latent_out(latent))  # rounds as the node's input does
    return PictureSource(latent).at(sigma, seeded_noise(tuple(latent.shape[1:]), seed), sampling)


def draw(name, patched, steps=2, cfg=3.0, seed=5, batch=1, extra=None):
    model = patched.clone()
    if extra is not None:
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", extra)
    noise = family_latent(name, seed=seed, batch=batch)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    return comfy.sample.sample_custom(
        model, noise, cfg, comfy.samplers.sampler_object("euler"), sigmas, cond_of(name), family_cond(name, seed=1, model=model),
        torch.zeros_like(noise), disable_pbar=True, seed=0,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_spans_are_those_of_the_specification(name):
    """7 text and 24 image tokens (96 at patch size 1); padding does not count (Z-Image)."""
    x = torch.cat([family_latent(name), family_latent(name, seed=1)])
    probe = Probe(1)

    def look(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        return executor(x, t, c_concat, c_crossattn, control, {**options, SLOT: probe}, **kwargs)

    forward(name, x, extra=look)
    found = {}
    for call in probe.layout.calls:
        if call.span is not None:
            found.setdefault(call.tokens, call.span)
    assert found == family(name).spans


@pytest.mark.parametrize("name, size", [*((name, (48, 64)) for name in EVERY), ("flux", (36, 50)), ("sd15", (36, 50)), ("z_image", (36, 50))])
def test_a_small_latents_layout_is_that_of_the_whole(name, size, monkeypatch):
    """Where it is not (Z-Image pads 90 and 450 tokens otherwise), the whole is looked at and the step done again."""
    shapes = []

    def look(executor, x, *args, **kwargs):
        shapes.append(tuple(x.shape[-2:]))
        return executor(x, *args, **kwargs)

    x, patched = family_latent(name, seed=4, size=size), referenced(name, family_latent(name, seed=3, size=size))
    got = forward(name, x, patched, extra=look)
    assert shapes == [size] * (3 if (name, size) == ("z_image", (36, 50)) else 1)  # the small look passes others' wrappers by
    monkeypatch.setattr(run, "small_shape", lambda shape: None)
    shapes.clear()
    assert torch.equal(got, forward(name, x, patched, extra=look))
    assert len(shapes) == 2


def test_cross_attention_with_as_many_tokens_as_the_picture_is_left_alone():
    """A prompt of 96 tokens on a U-Net whose finest grid has 96."""
    x = torch.cat([family_latent("sd15"), family_latent("sd15", seed=1)])
    probe = Probe(1)

    def look(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        return executor(x, t, c_concat, c_crossattn, control, {**options, SLOT: probe}, **kwargs)

    forward("sd15", x, extra=look, text=family_cond("sd15", tokens=96, model=model_of("sd15")))
    finest = [call.span for call in probe.layout.calls if call.tokens == 96]
    assert finest.count((0, 96)) == finest.count(None) > 0


@pytest.mark.parametrize("name", EVERY)
def test_style_into_itself_is_plain_and_the_reference_is_untouched(name):
    """Bit for bit in one forward: the same two rows with and without sharing."""
    picture = 0.5 * family_latent(name, seed=3)
    x, other = noised(name, picture), noised(name, picture.flip(-1))
    rows = Rows()
    itself = forward(name, x, referenced(name, picture), extra=rows)
    pair = forward(name, torch.cat([x, x]))
    assert torch.equal(itself, pair[:1])
    assert torch.equal(rows.outputs[-1][1:], pair[1:])
    styled = forward(name, other, referenced(name, picture), extra=rows)
    pair = forward(name, torch.cat([other, x]))
    assert torch.equal(rows.outputs[-1][1:], pair[1:])
    assert (styled - pair[:1]).std() > 1e-4 * (other - pair[:1]).std()


@pytest.mark.parametrize("share", ["join", "replace"])
@pytest.mark.parametrize("name", EVERY)
def test_no_weight_is_plain_bit_for_bit_and_two_equal_styles_are_one(name, share):
    picture, x = family_latent(name, seed=3), family_latent(name, seed=4)
    none = forward(name, x, faded(referenced(name, picture, share=share)))
    assert torch.equal(none, forward(name, torch.cat([x, noised(name, picture)]))[:1])
    one = forward(name, x, referenced(name, picture, share=share))
    two = forward(name, x, referenced(name, picture.repeat(2, *[1] * (picture.ndim - 1)), share=share))
    assert (one - two).abs().max() <= 2e-5 * (x - one).std()
    assert (one - none).std() > 1e-4 * (x - none).std()


@pytest.mark.parametrize("name", EVERY)
def test_through_the_sampler_at_cfg_3(name):
    """No weight changes nothing, another pack's override is called, model and options stay, one style costs one more row."""
    model, calls = model_of(name).clone(), []

    def other_override(func, *args, **kwargs):
        calls.append(1)
        return func(*args, **kwargs)

    before = {key: value.clone() for key, value in model.model.diffusion_model.state_dict().items()}
    patched = faded(referenced(name, family_latent(name, seed=3)))
    plain_rows, rows = Rows(), Rows()
    for changed in (model, patched):
        changed.model_options["transformer_options"][SLOT] = other_override
    plain = draw(name, model, extra=plain_rows)
    plain_calls = len(calls)
    same = draw(name, patched, extra=rows)
    assert (same - plain).abs().max() <= 1e-4 * plain.std()
    assert len(calls) > plain_calls + plain_calls
    assert patched.model_options["transformer_options"] == {SLOT: other_override}
    assert all(torch.equal(value, before[key]) for key, value in model.model.diffusion_model.state_dict().items())
    probe = 2  # once a run: at 20 steps with guidance a style costs 82 rows where 40 are plain, 2.05 times
    assert rows.count == 2 * plain_rows.count + probe
