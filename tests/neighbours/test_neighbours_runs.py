"""Nodes that skip, compile or resize a run: stepped over, or refused by name."""

import pytest
import torch
from support import neighbours
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule
from support.styles import plain, random_lora
from support.styles import sample as sample_guider

from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.content import inject_features
from pastiche.nodes.host.injections.hspace import inject_content
from pastiche.nodes.host.injections.style import inject_style
from pastiche.nodes.host.multistyle.guider import multi_style_guider
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.sockets import StyleEntry

STEPS = 4


@pytest.fixture(scope="module")
def model():
    return tiny_unet()


@pytest.fixture(scope="module")
def positive(model):
    return tiny_cond(model)


def trajectory_of(model, positive, size=(16, 8), seed=5):
    return invert(model, {"samples": random_latent(*size, seed=seed)}, schedule(model, STEPS), positive, "next")[1]


@pytest.fixture(scope="module")
def trajectory(model, positive):
    return trajectory_of(model, positive)


def bank_of(model, trajectory, streams, memory="ram"):
    return capture(model, trajectory, streams, "auto", memory, "full")


def styled(model, bank, content=None, strength=1.0, mask=None):
    return inject_style(model, bank, content, 0.5, 1.5, strength, "auto", 0.0, 1.0, mask)


def injected(name, model, source, trajectory):
    """`model` with one of our nodes; what it reads comes from `source`."""
    if name == "style":
        return styled(model, bank_of(source, trajectory, "self_attention"))
    if name == "features":
        return inject_features(model, bank_of(source, trajectory, "residual, self_attention_qk, cross_attention"), 1.0, 1.0, "auto", "auto", "auto")
    return inject_content(model, bank_of(source, trajectory, "h_space"), 0.6, 0)


@pytest.mark.parametrize("name", ["style", "features", "h-space"])
def test_compiled_models_run_their_patches(model, positive, trajectory, pair, name, caplog):
    pair({"style": "Style Injection", "features": "Feature Injection", "h-space": "h-space Slerp"}[name], "TorchCompileModel*", "left out")
    latent, sigmas = random_latent(16, 8), schedule(model, STEPS)[:3]
    compiled = neighbours.compiled(model)
    plain = sample(compiled, latent, sigmas, positive)  # the run whose (no) patches stay
    expected = sample(injected(name, model, model, trajectory), latent, sigmas, positive)
    ours = sample(injected(name, compiled, model, trajectory), latent, sigmas, positive)
    assert torch.equal(ours, expected) and not torch.equal(ours, plain)
    assert "TorchCompileModel is left out" in caplog.text


def test_compiled_models_run_every_style(model, positive, pair):
    pair("Multi-Style Guider", "TorchCompileModel*", "left out")
    entry = StyleEntry(lora=random_lora(model, 1))
    negative = tiny_cond(model, seed=9)
    expected = sample_guider(multi_style_guider(neighbours.nag(model), positive, negative, 3.0, [entry]), 2)
    compiled = neighbours.compiled(neighbours.nag(model))
    sample_guider(plain(compiled, positive, negative, 3.0), 1)
    assert torch.equal(sample_guider(multi_style_guider(compiled, positive, negative, 3.0, [entry]), 2), expected)


def test_compiled_models_capture_the_same(model, positive, trajectory, pair):
    pair("Capture Features", "TorchCompileModel*", "left out")
    compiled = neighbours.compiled(model)
    sample(compiled, random_latent(16, 8), schedule(model, 1), positive)
    found, expected = (bank_of(source, trajectory, "h_space") for source in (compiled, model))
    for step in range(1, STEPS + 1):
        assert torch.equal(*(bank.store.read(bank.keys[0], step, torch.device("cpu")) for bank in (found, expected)))


def test_parts_compiled_in_place_are_refused(model, positive, trajectory):
    class Compiled(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

    patched = injected("h-space", model, model, trajectory)
    patched.add_object_patch("diffusion_model.middle_block", Compiled(model.model.diffusion_model.middle_block))
    with pytest.raises(ValueError, match="model: diffusion_model.middle_block is compiled"):
        sample(patched, random_latent(16, 8), schedule(model, 1), positive)


@pytest.mark.parametrize("name", ["easycache", "lazycache"])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_caches_skip_no_injection(model, positive, trajectory, pair, name, first, caplog):
    pair("h-space Slerp", {"easycache": "EasyCache", "lazycache": "LazyCache"}[name], "left out")
    cache, latent, sigmas = getattr(neighbours, name), random_latent(16, 8), schedule(model, STEPS)
    expected = sample(injected("h-space", model, model, trajectory), latent, sigmas, positive)
    skipping = sample(cache(model), latent, sigmas, positive)
    assert not torch.equal(skipping, sample(model, latent, sigmas, positive))  # it does skip
    both = injected("h-space", cache(model), model, trajectory) if first == "theirs" else cache(injected("h-space", model, model, trajectory))
    assert torch.equal(sample(both, latent, sigmas, positive), expected)
    assert "skips no steps in a run with h-space Slerp" in caplog.text


LEFT_OUT = {
    "pag": "PerturbedAttentionGuidance", "sag": "SelfAttentionGuidance", "nag": "NAGuidance", "easycache": "EasyCache", "lazycache": "LazyCache",
    "compiled": "TorchCompileModel*", "blurred_queries": "smoothed energy guidance*",
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_inversion_and_capture_leave_guidance_and_caches_out(model, positive, trajectory, pair, name):
    for ours in ("DDIM Inversion", "Capture Features"):
        pair(ours, LEFT_OUT[name], "works" if name == "nag" else "left out")  # NAG has no second condition to look at
    other = getattr(neighbours, name)(model)
    found = trajectory_of(other, positive)
    assert torch.equal(found.latents, trajectory.latents)
    for memory in ("ram", "recompute"):
        bank = bank_of(other, found, "h_space", memory)
        latent, sigmas = random_latent(16, 8), schedule(model, STEPS)[:3]
        ours = sample(inject_content(model, bank, 0.6, 0), latent, sigmas, positive)
        assert (ours - sample(injected("h-space", model, model, trajectory), latent, sigmas, positive)).abs().max() < 1e-3


def test_features_on_another_grid_are_refused_by_name(model, positive, trajectory, pair):
    pair("Capture Features", "TomePatchModel", "refused")
    other = neighbours.tome(model)
    found = trajectory_of(other, positive)
    with pytest.raises(ValueError, match=r"is expected. TomePatchModel \(token merging\) changes the grid: connect the model from before that node"):
        bank_of(other, found, "self_attention")


def test_refusals_name_what_changes_the_size(model, positive, trajectory, pair):
    pair("Style Injection (query preservation)", "TomePatchModel", "refused")
    pair("Style Injection (query preservation)", "tiled diffusion*", "refused")
    latent, sigmas, bank = random_latent(16, 8), schedule(model, STEPS)[:2], bank_of(model, trajectory, "self_attention")
    preserved = styled(neighbours.deep_shrink(model), bank, bank)
    with pytest.raises(ValueError, match=r"PatchModelAddDownscale \(Deep Shrink\) cannot be combined with query preservation"):
        sample(preserved, latent, sigmas, positive)
    features = bank_of(model, trajectory, "residual, self_attention_qk, cross_attention")
    shrunk = inject_features(neighbours.deep_shrink(model), features, 1.0, 1.0, "auto", "auto", "none")
    with pytest.raises(ValueError, match=r"Deep Shrink\) cannot be combined with Feature Injection"):
        sample(shrunk, latent, sigmas, positive)
    tiles = styled(neighbours.tiled(model), bank, bank)
    with pytest.raises(ValueError, match="tiled, which evaluates the latent in its own way, cannot be combined with query preservation"):
        sample(tiles, latent, sigmas, positive)
    merged = styled(neighbours.tome(model), bank, bank)
    with pytest.raises(ValueError, match=r"TomePatchModel \(token merging\) cannot be combined with query preservation"):
        sample(merged, latent, sigmas, positive)


@pytest.mark.parametrize("strength, mask", [(0.5, None), (1.0, torch.ones(1, 16, 8) / 2)])
def test_blends_and_token_merging_are_refused_by_name(model, positive, trajectory, pair, strength, mask):
    pair("Style Injection (strength or mask)", "TomePatchModel", "refused")
    bank = bank_of(model, trajectory, "self_attention")
    both = neighbours.tome(styled(model, bank, None, strength, mask))
    with pytest.raises(ValueError, match=r"TomePatchModel \(token merging\) cannot be combined with strength below 1 or a mask"):
        sample(both, random_latent(16, 8), schedule(model, STEPS)[:2], positive)


