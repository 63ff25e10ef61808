"""Multi-Style Guider and Keep Outside Mask on transformers and beside Style Reference."""

from dataclasses import replace

import comfy.sample
import comfy.samplers
import pytest
import torch
from pastiche.nodes.host.injections.keep_outside import keep_content_outside
from pastiche.nodes.host.multistyle.guider import multi_style_guider
from pastiche.nodes.host.references import install
from pastiche.nodes.host.references.install import reference_rows, references_of
from pastiche.nodes.host.references.run import StyleReferences
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.sockets import StyleEntry
from support.families import family_cond, family_latent, tiny_model
from support.sampling import schedule
from support.styles import Loop, merged, oracle_merges_in_float32, plain, random_lora, sample  # noqa: F401

LAYERS = {"flux": ("qkv", "linear1"), "qwen_image": ("to_q", "to_k", "to_v"), "sd15": ("to_q", "to_k", "to_v")}


@pytest.fixture(autouse=True)
def same_at_every_step(monkeypatch):
    """The loop asks for one prediction at a time, so nothing may depend on how far the sampling is."""
    monkeypatch.setattr(install, "DEFAULT_PRESET", "plain")


def halves(batch=1):
    left = torch.zeros(batch, 64, 96)
    left[..., :40] = 1
    left[..., 40:48] = 0.5
    return left, 1 - left


def same(ours, expected, base):
    assert (ours - expected).abs().max() <= 1e-4 * expected.std()
    assert (ours - base).abs().max() > 1e-2 * expected.std()


def own_reference(model, picture):
    """The model with the picture on all of its rows, with the settings that a Style Entry's picture has."""
    patched = reference_rows(model, 0, picture, "join", 1.0, "auto")
    reference = replace(references_of(patched)[0], row_style=None)
    patched = model.clone()
    StyleReferences((reference,)).install(patched)
    return patched


@pytest.mark.parametrize("name", LAYERS)
def test_loras_by_region_beside_a_reference_are_a_loop_over_models(name):
    """Two LoRAs with masks on a MODEL that carries a Style Reference: every added row takes its own sample's LoRA."""
    model = tiny_model(name)
    positive, negative = family_cond(name, model=model), family_cond(name, seed=1, model=model)
    styled = own_reference(model, {"samples": family_latent(name, seed=3)})
    loras = [random_lora(model, seed, layers=LAYERS[name], scale=1.0) for seed in (1, 2)]
    entries = [StyleEntry(lora=lora, mask=mask) for lora, mask in zip(loras, halves())]
    size = (2, *family_latent(name).shape[1:])
    ours = sample(multi_style_guider(styled, positive, negative, 3.0, entries), steps=2, size=size)
    weights = [torch.nn.functional.interpolate(mask[None], size[-2:], mode="area").reshape(1, *[1] * (len(size) - 3), *size[-2:]) for mask in halves()]
    parts = [(merged(styled, lora), positive, negative, 3.0, weight) for lora, weight in zip(loras, weights)]
    expected = sample(Loop(styled, parts), steps=2, size=size)
    same(ours, expected, sample(plain(styled, positive, negative, 3.0), steps=2, size=size))


@pytest.mark.parametrize("name", ["flux", "qwen_image", "sd15"])
def test_pictures_by_region_are_a_loop_over_models(name):
    """Each style's rows see its own picture only; outside of both masks the plain model draws."""
    model = tiny_model(name)
    positive, negative = family_cond(name, model=model), family_cond(name, seed=1, model=model)
    pictures = [{"samples": family_latent(name, seed=seed)} for seed in (3, 4)]
    masks = [0.6 * mask for mask in halves()]
    entries = [StyleEntry(picture=picture, mask=mask, temperature=1.0) for picture, mask in zip(pictures, masks)]
    size = (2, *family_latent(name).shape[1:])
    ours = sample(multi_style_guider(model, positive, negative, 3.0, entries), steps=2, size=size)
    weights = [torch.nn.functional.interpolate(mask[None], size[-2:], mode="area").reshape(1, *[1] * (len(size) - 3), *size[-2:]) for mask in masks]
    parts = [(own_reference(model, picture), positive, negative, 3.0, weight) for picture, weight in zip(pictures, weights)]
    expected = sample(Loop(model, [*parts, (model, positive, negative, 3.0, 1 - sum(weights))]), steps=2, size=size)
    base = sample(plain(model, positive, negative, 3.0), steps=2, size=size)
    assert (ours - expected).abs().max() <= 1e-4 * expected.std()
    assert (ours - base).abs().max() > 1e-3 * expected.std()


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_outside_the_mask_a_flow_models_sample_is_the_content(name):
    model = tiny_model(name)
    sigmas, positive = schedule(model, 3, "simple"), family_cond(name)
    content = torch.cat([family_latent(name, seed=1), family_latent(name, seed=2)])
    trajectory = invert(model, {"samples": content}, sigmas, positive, "next")[1]
    patched = keep_content_outside(model, trajectory, torch.stack([half[0] for half in halves()]))
    noise = torch.randn(content.shape, generator=torch.Generator().manual_seed(0))
    result = comfy.sample.sample_custom(
        patched, noise, 1.0, comfy.samplers.sampler_object("euler"), sigmas, family_cond(name, seed=5), positive,
        torch.zeros_like(noise), disable_pbar=True, seed=0,
    )
    clean = model.model.process_latent_out(trajectory.latents[0])
    assert torch.equal(result[0, ..., 6:], clean[0, ..., 6:]) and torch.equal(result[1, ..., :5], clean[1, ..., :5])
    assert (result[0, ..., :5] - clean[0, ..., :5]).abs().mean() > 0.1 * clean.std()
