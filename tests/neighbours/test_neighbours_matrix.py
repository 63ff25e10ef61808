"""Our injections beside other nodes, in both orders, against module hooks on the network and that node alone."""

from contextlib import contextmanager

import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from support import neighbours
from support.models import tiny_cond, tiny_unet
from support.neighbours import NODES, patched
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
OURS = {"style": "Style Injection", "features": "Feature Injection", "h-space": "h-space Slerp"}


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
    def by_hand(self, ours, controlled=False):
        """Module hooks that do what `ours` promises, on every row. A ControlNet's part belongs to h: it is added before."""
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
            first, width = network.output_blocks[0][0], network.middle_block[-1].out_channels
            late = lambda module, args: (torch.cat([turn(module, args, args[0][:, :width]), args[0][:, width:]], 1), *args[1:])
            hooks.append(first.register_forward_pre_hook(late) if controlled else network.middle_block[-1].register_forward_hook(turn))
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

    def sample(self, model, conditions=None, steps=2):
        return sample(model, random_latent(16, 16), self.sigmas[: steps + 1], *(conditions or (self.positive, self.negative)), CFG)


@pytest.fixture(scope="module")
def content():
    return Content()


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("theirs", NODES)
def test_ours_and_theirs(content, pair, ours, theirs):
    pair(OURS[ours], NODES[theirs])
    other = patched(theirs, content.model)
    with content.by_hand(ours):
        expected = content.sample(other)
        without = content.sample(content.model)
    effect = (expected - without).abs().max()
    assert effect > 1e-3 * expected.abs().max()  # theirs does something beside ours
    assert (expected - content.sample(other)).abs().max() > 1e-2 * expected.abs().max()  # and ours beside theirs
    for both in (content.inject(ours, other), patched(theirs, content.inject(ours, content.model))):
        assert (content.sample(both) - expected).abs().max() < 5e-3 * effect


@pytest.mark.parametrize("theirs", NODES)
def test_multi_style_guider_and_theirs(content, pair, theirs):
    """One style everywhere: its LoRA merged, that node alone."""
    pair("Multi-Style Guider", NODES[theirs])
    model, lora, size = content.model, random_lora(content.model, 1), (1, 4, 16, 16)
    entry, cfg = StyleEntry(lora=lora), CFG
    ours = sample_guider(multi_style_guider(patched(theirs, model), content.positive, content.negative, cfg, [entry]), 2, size=size)
    # Weights are patched in the nodes' order, and a merge takes its share of what came before.
    alone = merged(patched(theirs, model), lora) if theirs == "merge" else patched(theirs, merged(model, lora))
    expected = sample_guider(plain(alone, content.positive, content.negative, cfg), 2, size=size)
    effect = (expected - sample_guider(plain(merged(model, lora), content.positive, content.negative, cfg), 2, size=size)).abs().max()
    assert effect > 1e-3 * expected.abs().max()
    assert (ours - expected).abs().max() < 5e-3 * effect


def check(content, ours, alone, both, conditions=None, steps=2):
    """`alone` (theirs), under module hooks that do what `ours` does, against `both` on one MODEL."""
    with content.by_hand(ours, controlled=any("control" in entry[1] for part in conditions or () for entry in part)):
        expected = content.sample(alone, conditions, steps)
        unchanged = content.sample(content.model, None, steps)
    effect = (expected - unchanged).abs().max()
    assert effect > 1e-3 * expected.abs().max()
    assert (expected - content.sample(alone, conditions, steps)).abs().max() > 1e-2 * expected.abs().max()
    for model in both:
        assert (content.sample(model, conditions, steps) - expected).abs().max() < 5e-3 * effect


@pytest.mark.parametrize("ours", OURS)
def test_control_nets_act_beside_ours(content, pair, ours):
    pair(OURS[ours], "Apply ControlNet")
    conditions = neighbours.controlled(content.positive, content.negative)
    check(content, ours, content.model, [content.inject(ours, content.model)], conditions)


def test_control_nets_in_the_multi_style_guider(content, pair):
    pair("Multi-Style Guider", "Apply ControlNet")
    model, lora, size = content.model, random_lora(content.model, 1), (1, 4, 16, 16)
    conditions = neighbours.controlled(content.positive, content.negative)
    ours = sample_guider(multi_style_guider(model, *conditions, CFG, [StyleEntry(lora=lora)]), 2, size=size)
    expected = sample_guider(plain(merged(model, lora), *conditions, CFG), 2, size=size)
    effect = (expected - sample_guider(plain(merged(model, lora), content.positive, content.negative, CFG), 2, size=size)).abs().max()
    assert effect > 1e-2 * expected.abs().max() and (ours - expected).abs().max() < 1e-3 * effect


def test_conditions_with_an_area(content, pair):
    """Style Injection's keys are the style's whatever part of the picture asks; features of the whole do not fit a part."""
    pair("Style Injection", "conditions with an area")
    pair("Feature Injection", "conditions with an area", "refused")
    conditions = neighbours.with_area(content.positive, tiny_cond(content.model, seed=4)), content.negative
    check(content, "style", content.model, [content.inject("style", content.model)], conditions)
    with pytest.raises(ValueError, match="Conditions with an area cannot be combined with Feature Injection: use masks"):
        content.sample(content.inject("features", content.model), conditions)


def test_areas_in_the_multi_style_guider(content, pair):
    pair("Multi-Style Guider", "conditions with an area")
    model, lora, size = content.model, random_lora(content.model, 1), (1, 4, 16, 16)
    positive = neighbours.with_area(content.positive, tiny_cond(model, seed=4))
    ours = sample_guider(multi_style_guider(model, positive, content.negative, CFG, [StyleEntry(lora=lora)]), 2, size=size)
    expected = sample_guider(plain(merged(model, lora), positive, content.negative, CFG), 2, size=size)
    effect = (expected - sample_guider(plain(merged(model, lora), content.positive, content.negative, CFG), 2, size=size)).abs().max()
    assert effect > 1e-2 * expected.abs().max() and (ours - expected).abs().max() < 1e-3 * effect


@pytest.mark.parametrize("ours", ["style", "features"])
@pytest.mark.parametrize("theirs", ["easycache", "lazycache"])
def test_caches_skip_steps_as_they_would(content, pair, ours, theirs):
    pair(OURS[ours], {"easycache": "EasyCache", "lazycache": "LazyCache"}[theirs])
    cache = getattr(neighbours, theirs)
    both = [content.inject(ours, cache(content.model)), cache(content.inject(ours, content.model))]
    check(content, ours, cache(content.model), both, steps=STEPS)


def test_every_tile_sees_the_whole_style(content, pair):
    pair("Style Injection", "tiled diffusion*")
    tiled = neighbours.tiled
    check(content, "style", tiled(content.model), [content.inject("style", tiled(content.model)), tiled(content.inject("style", content.model))])


@pytest.mark.parametrize("ours", OURS)
def test_dual_guidance(content, pair, ours):
    """Core's DualCFGGuider; h-space Slerp on both branches here, the conditional one below."""
    pair(OURS[ours], "DualCFGGuider")

    def run(model):
        return dual(model, content)

    with content.by_hand(ours):
        expected = run(content.model)
    effect = (expected - run(content.model)).abs().max()
    assert effect > 1e-2 * expected.abs().max()
    assert (run(content.inject(ours, content.model)) - expected).abs().max() < 5e-3 * effect


def dual(model, content):
    from comfy_extras.nodes_custom_sampler import DualCFGGuider

    second = tiny_cond(content.model, seed=4)
    guider = DualCFGGuider.execute(model, content.positive, second, content.negative, CFG, 2.0, "regular").result[0]
    latent = random_latent(16, 16)
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(torch.zeros_like(latent), latent, sampler, content.sigmas[:3], disable_pbar=True, seed=0)


def test_dual_guidance_has_two_conditional_predictions(content, pair):
    """It asks for [negative, second, first]: h-space Slerp's "conditional" turns the last two."""
    pair("h-space Slerp", "DualCFGGuider")
    bank, network, now = content.banks["h-space"], content.model.model.diffusion_model, {}

    def look(module, args, kwargs):
        now.update(kwargs["transformer_options"])

    def turn(module, args, out):
        step = 1 + int((content.trajectory.sigmas[1:] - float(now["sigmas"][0])).abs().argmin())
        feature = bank.store.read(FeatureKey("h_space", "middle", 0), step, torch.device("cpu")).float()
        rows = [slerp(row, feature, GAMMA) if kind else row for row, kind in zip(out.split(1), now["cond_or_uncond"])]
        return torch.cat(rows)

    hooks = [network.register_forward_pre_hook(look, with_kwargs=True), network.middle_block[-1].register_forward_hook(turn)]
    try:
        expected = dual(content.model, content)
    finally:
        for hook in hooks:
            hook.remove()
    effect = (expected - dual(content.model, content)).abs().max()
    ours = dual(inject_content(content.model, bank, GAMMA, 0, "conditional"), content)
    assert effect > 1e-2 * expected.abs().max() and (ours - expected).abs().max() < 5e-3 * effect
