"""What the adapters tell of a MODEL's network, against the network itself."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule

from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.content import _places, inject_features
from pastiche.nodes.host.networks.conditioning import inversion_conditioning
from pastiche.nodes.host.networks.families import find_adapter
from pastiche.nodes.host.networks.fingerprint import fingerprint
from pastiche.nodes.sockets import FeatureKey, Trajectory

CPU = torch.device("cpu")


def output(*numbers):
    return [("output", number) for number in numbers]


@pytest.mark.parametrize("family, expected", [("sd15", output(6, 7, 8, 9, 10, 11)), ("sd20", output(6, 7, 8, 9, 10, 11)),
                                              ("sdxl", output(3, 4, 5))])
def test_auto_layers_are_the_papers(family, expected):
    adapter = find_adapter(tiny_unet(family))
    assert adapter.places("auto") == expected
    assert adapter.places(" AUTO ", "residual") == expected


def test_auto_layers_of_feature_injection():
    """Of what was captured: attention in every decoder layer that has it, residuals from layer 4 on."""
    model = tiny_unet()
    trajectory = path(model, tiny_cond(model), 1)[1]
    bank = capture(model, trajectory, "residual, self_attention_qk, cross_attention", "3-11, input 1", "recompute")
    adapter = find_adapter(model)
    assert _places(adapter, bank, "auto", "residual", 0.5) == output(4, 5, 6, 7, 8, 9, 10, 11)
    for stream in ("self_attention_q", "cross_attention_q"):
        assert _places(adapter, bank, "auto", stream, 0.5) == output(3, 4, 5, 6, 7, 8, 9, 10, 11)
    assert _places(adapter, bank, "auto", "residual", 0.0) == _places(adapter, bank, "none", "residual", 0.5) == []


def test_the_empty_prompt_is_zeros():
    """What core's ConditioningZeroOut gives, pooled output included, whatever the family needs."""
    for family in ("sd15", "sdxl"):
        ((context, extra),) = inversion_conditioning(tiny_unet(family), None)
        assert context.shape == (1, 77, 32) and not context.any()
        assert set(extra) == ({"pooled_output"} if family == "sdxl" else set())
        assert all(pooled.shape == (1, 1280) and not pooled.any() for pooled in extra.values())


def test_a_fingerprint_knows_the_strength_of_a_lora():
    model = tiny_unet()
    name = "diffusion_model.output_blocks.8.1.transformer_blocks.0.attn1.to_q.weight"
    prints = []
    for strength in (0.5, 0.7, 0.5):
        patched = model.clone()
        patched.add_patches({name: ("diff", (torch.ones(32, 32),))}, strength)
        prints.append(fingerprint(patched))
    assert prints[0] == prints[2] and prints[0].weights == prints[1].weights == fingerprint(model).weights
    assert len({prints[0].patches, prints[1].patches, fingerprint(model).patches}) == 3


def test_a_fingerprint_stays_while_a_clone_with_another_sampling_is_loaded():
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model = tiny_unet()
    before = fingerprint(model)
    patched = ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]
    assert fingerprint(patched) == before
    sample(patched, random_latent(), schedule(model, 1), tiny_cond(model))
    assert fingerprint(model) == fingerprint(patched) == before


def path(model, positive, steps):
    """(noise, the path of a sampling of it): reconstructing it is exact on any model."""
    sigmas, noise, seen = schedule(model, steps), random_latent(8, 8, seed=1), []
    result = sample(model, noise, sigmas, positive, callback=lambda i, x0, x, n: seen.append(x.clone()))
    levels = torch.stack([*seen, model.model.process_latent_in(result)]).flip(0).float().cpu()
    return noise, Trajectory(sigmas.flip(0), levels, positive, "next", fingerprint(model)), result


LAYERS = "input 1-11, middle, output 0-11"


@pytest.mark.parametrize("updown", [False, True])
def test_residuals_are_what_is_added_to_the_skip(updown):
    """Also where residual blocks resample (resblock_updown): their skip is resampled too."""
    model = tiny_unet(resblock_updown=updown)
    positive = tiny_cond(model)
    layers = LAYERS if updown else "input 1-2, input 4-5, middle, output 0-11"
    noise, trajectory, _ = path(model, positive, 1)
    bank = capture(model, trajectory, "residual", layers, "ram", "full")
    network, adapter, seen = model.model.diffusion_model, find_adapter(model), {}
    hooks = [
        layer.out_layers.register_forward_hook(lambda module, args, out, key=key: seen.__setitem__(key, out))
        for key in bank.keys for layer in [adapter.residual[key.block, key.number]]
    ]
    x, sigma = trajectory.latents[1], trajectory.sigmas[1:]
    sampling = model.model.model_sampling
    with torch.no_grad():
        network(sampling.calculate_input(sigma, x), sampling.timestep(sigma).float(), context=positive[0][0], transformer_options={})
    [hook.remove() for hook in hooks]
    assert set(seen) == set(bank.keys) and len(seen) == (24 if updown else 17)
    for key, added in seen.items():
        stored = bank.store.read(key, 1, CPU)
        assert stored.shape[1:] == adapter.shape(key, 8, 8)
        torch.testing.assert_close(stored, added, rtol=1e-5, atol=1e-5 * float(added.abs().max()) + 1e-5)


@pytest.mark.parametrize("updown", [False, True])
def test_residuals_of_every_block_reconstruct_their_own_run(updown):
    """The middle has two residual blocks, a decoder block that resamples two as well: each key means one of them."""
    model = tiny_unet(resblock_updown=updown)
    layers = LAYERS if updown else "input 1-2, input 4-5, middle, output 0-11"
    noise, trajectory, result = path(model, tiny_cond(model), 2)
    bank = capture(model, trajectory, "residual", layers, "ram", "full")
    injected = inject_features(model, bank, 1.0, 0.0, layers, "none", "none")
    again = sample(injected, noise, schedule(model, 2), tiny_cond(model))
    torch.testing.assert_close(again, result, rtol=0, atol=1e-4 * float(result.abs().max()))


def test_places_know_their_residual_block():
    adapter = find_adapter(tiny_unet(resblock_updown=True))
    network = adapter.model.diffusion_model
    assert adapter.residual["input", 3] is network.input_blocks[3][0]  # resamples, and is alone
    assert adapter.residual["output", 2] is network.output_blocks[2][0] and network.output_blocks[2][-1].updown
    assert adapter.residual["middle", 0] is network.middle_block[2]
    assert adapter.shape(FeatureKey("residual", "output", 2), 16, 16) == (64, 2, 2)


def test_networks_of_other_kinds_are_named():
    model = tiny_unet().clone()
    network = model.model.diffusion_model
    model.model.diffusion_model = torch.nn.Linear(2, 2)
    try:
        with pytest.raises(ValueError, match="Config has no U-Net .Linear.*connect an SD1.x, SD2.x, SDXL"):
            find_adapter(model)
    finally:
        model.model.diffusion_model = network
