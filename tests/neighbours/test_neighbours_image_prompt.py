"""Feature Injection beside an image prompt in attn2's slots, against module hooks on the projections."""

import pytest
import torch
from support import neighbours
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule

from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.content import inject_features
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.sockets import FeatureKey

STEPS = 3
PLACES = {"sd15": ("output 6-7", {("output", 6): 1, ("output", 7): 1}), "sdxl": ("output 1, output 3", {("output", 1): 2, ("output", 3): 1})}


def by_hand(model, depths, bank, latent, sigmas, positive):
    """One step with the content's queries and keys, written into the projections' outputs."""
    hooks = []
    for (block, number), count in depths.items():
        for depth in range(count):
            attention = model.model.diffusion_model.output_blocks[number][1].transformer_blocks[depth].attn2
            for name in ("q", "k"):
                key = FeatureKey(f"cross_attention_{name}", block, number, depth)
                content = bank.store.read(key, STEPS, torch.device("cpu")).float()
                replace = lambda module, args, out, content=content: content.expand_as(out)
                hooks.append(getattr(attention, f"to_{name}").register_forward_hook(replace))
    try:
        return sample(model, latent, sigmas, positive)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("order", ["ours first", "ours last", "between two"])
def test_image_prompts_get_the_contents_queries_and_keys(pair, family, order):
    pair("Feature Injection", "IPAdapter*")
    layers, depths = PLACES[family]
    model = tiny_unet(family)
    positive, sigmas = tiny_cond(model), schedule(model, STEPS)
    _, trajectory = invert(model, {"samples": random_latent(16, 8, seed=5)}, sigmas, tiny_cond(model, seed=3), "next")
    bank = capture(model, trajectory, "cross_attention", layers, "ram", "full")
    prompt = lambda model: neighbours.image_prompt(model, depths)
    inject = lambda model: inject_features(model, bank, 0.0, 1.0, "none", "none", layers)
    both = {"ours first": lambda: prompt(inject(model)), "ours last": lambda: inject(prompt(model)), "between two": lambda: prompt(inject(prompt(model)))}
    prompted = prompt(prompt(model)) if order == "between two" else prompt(model)
    latent, one = random_latent(16, 8), sigmas[:2]
    ours, expected = sample(both[order](), latent, one, positive), by_hand(prompted, depths, bank, latent, one, positive)
    effect = (expected - sample(prompted, latent, one, positive)).abs().max()
    assert effect > 1e-2 * expected.abs().max()
    assert (ours - expected).abs().max() < 1e-4 * effect
    assert not any(module._forward_hooks for module in model.model.modules())
