"""Our injections beside other nodes, in both orders, against module hooks on the network and that node alone."""

from contextlib import contextmanager

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from support import neighbours
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule
from support.styles import merged, plain, random_lora
from support.styles import sample as sample_guider

from pastiche.nodes.algorithms.slerp import slerp
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.content import inject_features
from pastiche.nodes.host.injections.hspace import inject_content
from pastiche.nodes.host.injections.style import inject_style
from pastiche.nodes.host.multistyle.guider import multi_style_guider
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.sockets import FeatureKey, StyleEntry

STEPS, CFG, TEMPERATURE, GAMMA, LAYERS = 4, 3.0, 1.5, 0.6, (6, 9)
THEIRS = {
    "pag": "PerturbedAttentionGuidance", "sag": "SelfAttentionGuidance", "nag": "NAGuidance", "freeu": "FreeU_V2", "rescale_cfg": "RescaleCFG",
    "cfg_zero": "CFGZeroStar", "mahiro": "Mahiro", "fresca": "FreSca", "lora": "Load LoRA", "blurred_queries": "smoothed energy guidance*",
    "perturbed_tokens": "token perturbation guidance*", "couple_one": "attention couple*", "prompted": "IPAdapter*",
}
OURS = {"style": "Style Injection", "features": "Feature Injection", "h-space": "h-space Slerp"}


def neighbour(name, model):
    if name == "lora":
        return merged(model, random_lora(model, 3))
    if name == "prompted":
        return neighbours.image_prompt(model, {("output", number): 1 for number in (5, 6, 10)})
    if name == "couple_one":
        return neighbours.couple(model, [tiny_cond(model, seed=20)[0][0]])
    return getattr(neighbours, name)(model)


class Content:
    """One inverted picture, its features, and how to put them in with and without our nodes."""

    def __init__(self):
        self.model = tiny_unet()
        self.positive, self.negative = tiny_cond(self.model), tiny_cond(self.model, seed=9)
        self.sigmas = schedule(self.model, STEPS)
        _, self.trajectory = invert(self.model, {"samples": random_latent(16, 16, seed=5)}, self.sigmas, self.positive, "next")
        layers = ", ".join(f"output {number}" for number in LAYERS)
        self.layers = layers
        self.banks = {
            "style": capture(self.model, self.trajectory, "self_attention", layers, "ram", "full"),
            "features": capture(self.model, self.trajectory, "residual, self_attention_qk, cross_attention", layers, "ram", "full"),
            "h-space": capture(self.model, self.trajectory, "h_space", "auto", "ram", "full"),
        }

    def inject(self, ours, model):
        bank = self.banks[ours]
        if ours == "style":
            return inject_style(model, bank, None, 0.0, TEMPERATURE, 1.0, self.layers, 0.0, 1.0, None)
        if ours == "features":
            return inject_features(model, bank, 1.0, 1.0, self.layers, self.layers, self.layers)
        return inject_content(model, bank, GAMMA, 0, "both")

    @contextmanager
    def by_hand(self, ours):
        """Module hooks that do what `ours` promises, on every row."""
        network, hooks, now = self.model.model.diffusion_model, [], {}
        read = lambda key: self.banks[ours].store.read(key, now["step"], torch.device("cpu")).float()

        def level(module, args, kwargs):
            sigma = float(kwargs["transformer_options"]["sigmas"][0])
            now["step"] = 1 + int((self.trajectory.sigmas[1:] - sigma).abs().argmin())

        hooks.append(network.register_forward_pre_hook(level, with_kwargs=True))

        def keys_and_values(number):
            def hook(module, args, kwargs):
                style = read(FeatureKey("self_attention", "output", number, 0)).expand(args[0].shape[0], -1, -1)
                return (TEMPERATURE * args[0],), {**kwargs, "context": style, "value": style}
            return hook

        def projection(stream, number):
            return lambda module, args, out: read(FeatureKey(stream, "output", number, 0)).expand(out.shape[0], -1, -1)

        def residual(number):
            return lambda module, args, out: module.skip_connection(args[0]) + read(FeatureKey("residual", "output", number, 0))

        if ours == "h-space":
            turn = lambda module, args, out: slerp(out, read(FeatureKey("h_space", "middle", 0)), GAMMA)
            hooks.append(network.middle_block[-1].register_forward_hook(turn))
        for number in LAYERS if ours != "h-space" else ():
            block = network.output_blocks[number][1].transformer_blocks[0]
            if ours == "style":
                hooks.append(block.attn1.register_forward_pre_hook(keys_and_values(number), with_kwargs=True))
                continue
            for module, stream in ((block.attn1, "self_attention"), (block.attn2, "cross_attention")):
                for name in ("q", "k"):
                    hooks.append(getattr(module, f"to_{name}").register_forward_hook(projection(f"{stream}_{name}", number)))
            assert isinstance(network.output_blocks[number][0], ResBlock)
            hooks.append(network.output_blocks[number][0].register_forward_hook(residual(number)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def sample(self, model):
        return sample(model, random_latent(16, 16), self.sigmas[:3], self.positive, self.negative, CFG)


@pytest.fixture(scope="module")
def content():
    return Content()


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("theirs", THEIRS)
def test_ours_and_theirs(content, pair, ours, theirs):
    pair(OURS[ours], THEIRS[theirs])
    other = neighbour(theirs, content.model)
    with content.by_hand(ours):
        expected = content.sample(other)
        without = content.sample(content.model)
    effect = (expected - without).abs().max()
    assert effect > 1e-3 * expected.abs().max()  # theirs does something beside ours
    assert (expected - content.sample(other)).abs().max() > 1e-2 * expected.abs().max()  # and ours beside theirs
    for both in (content.inject(ours, other), neighbour(theirs, content.inject(ours, content.model))):
        assert (content.sample(both) - expected).abs().max() < 5e-3 * effect


@pytest.mark.parametrize("theirs", THEIRS)
def test_multi_style_guider_and_theirs(content, pair, theirs):
    """One style everywhere: its LoRA merged, that node alone."""
    pair("Multi-Style Guider", THEIRS[theirs])
    model, lora, size = content.model, random_lora(content.model, 1), (1, 4, 16, 16)
    entry, cfg = StyleEntry(lora=lora), CFG
    ours = sample_guider(multi_style_guider(neighbour(theirs, model), content.positive, content.negative, cfg, [entry]), 2, size=size)
    alone = neighbour(theirs, merged(model, lora))
    expected = sample_guider(plain(alone, content.positive, content.negative, cfg), 2, size=size)
    effect = (expected - sample_guider(plain(merged(model, lora), content.positive, content.negative, cfg), 2, size=size)).abs().max()
    assert effect > 1e-3 * expected.abs().max()
    assert (ours - expected).abs().max() < 5e-3 * effect
