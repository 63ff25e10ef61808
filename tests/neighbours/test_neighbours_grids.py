"""Nodes that change token counts by a known rule: features recorded and injected by module hooks on their MODEL, without our code."""

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from support import neighbours
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule
from support.styles import plain, predict

from pastiche.nodes.algorithms.slerp import slerp
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.features.library import save_bank
from pastiche.nodes.host.injections.content import inject_features
from pastiche.nodes.host.injections.hspace import inject_content
from pastiche.nodes.host.injections.style import inject_style
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.sockets import FeatureKey

STEPS, CFG, TEMPERATURE, GAMMA, TURN, LAYERS = 4, 3.0, 1.5, 0.4, 0.6, (6, 9)
TEXT = ", ".join(f"output {number}" for number in LAYERS)
OURS = {"style": "Style Injection", "preserved": "Style Injection (query preservation)", "features": "Feature Injection", "h-space": "h-space Slerp"}
STREAMS = {"style": "self_attention", "preserved": "self_attention", "features": "residual, self_attention_qk, cross_attention", "h-space": "h_space"}


def shrunk(model):
    """Two of the four steps run on smaller grids."""
    return neighbours.deep_shrink(model, 0.5)


class Picture:
    """An inverted latent, and what the network computed at each of its levels, recorded by module hooks."""

    def __init__(self, model, seed):
        positive = tiny_cond(model)
        _, self.trajectory = invert(model, {"samples": random_latent(16, 8, seed=seed)}, schedule(model, STEPS), positive, "next")
        self.steps = [{} for _ in range(STEPS + 1)]
        for step in range(1, STEPS + 1):
            hooks = list(self.recorders(model, self.steps[step]))
            sigma = self.trajectory.sigmas[step].reshape(1)
            predict(plain(model, positive, positive, 1.0), self.trajectory.latents[step], sigma)
            for hook in hooks:
                hook.remove()

    def recorders(self, model, found):
        network = model.model.diffusion_model

        def keep(key, value=lambda module, args, out: out):
            def hook(module, args, out):
                found[key] = value(module, args, out).clone()
            return hook

        yield network.middle_block[-1].register_forward_hook(keep("h_space"))
        for number in LAYERS:
            block = network.output_blocks[number][1].transformer_blocks[0]
            yield block.norm1.register_forward_hook(keep(("self_attention", number)))
            for module, stream in ((block.attn1, "self_attention"), (block.attn2, "cross_attention")):
                for name in ("q", "k"):
                    yield getattr(module, f"to_{name}").register_forward_hook(keep((f"{stream}_{name}", number)))
            added = lambda module, args, out: out - module.skip_connection(args[0])
            yield network.output_blocks[number][0].register_forward_hook(keep(("residual", number), added))

    def at(self, options):
        sigma = float(options["sigmas"][0])
        return self.steps[1 + int((self.trajectory.sigmas[1:] - sigma).abs().argmin())]


class Scene:
    def __init__(self, theirs):
        self.base = tiny_unet()
        self.model = theirs(self.base)
        self.positive, self.negative = tiny_cond(self.base), tiny_cond(self.base, seed=9)
        self.style, self.content = Picture(self.model, 5), Picture(self.model, 6)

    def bank(self, picture, ours, memory="ram", model=None):
        layers = "auto" if ours == "h-space" else TEXT
        return capture(model or self.model, picture.trajectory, STREAMS[ours], layers, memory, "full")

    def inject(self, ours, model, memory="ram"):
        if ours in ("style", "preserved"):
            content = self.bank(self.content, ours, memory) if ours == "preserved" else None
            return inject_style(model, self.bank(self.style, ours, memory), content, GAMMA, TEMPERATURE, 1.0, TEXT, 0.0, 1.0, None)
        bank = self.bank(self.content, ours, memory)
        if ours == "features":
            return inject_features(model, bank, 1.0, 1.0, TEXT, TEXT, TEXT)
        return inject_content(model, bank, TURN, 0, "both")

    def query(self, ours, own, number, options):
        if ours == "style":
            return TEMPERATURE * own
        return TEMPERATURE * (GAMMA * self.content.at(options)["self_attention", number] + (1 - GAMMA) * own)

    def by_hand(self, ours, model):
        """`model` sampled with module hooks that do what `ours` promises."""
        network, hooks, now = model.model.diffusion_model, [], {}
        hooks.append(network.register_forward_pre_hook(lambda module, args, kwargs: now.update(kwargs["transformer_options"]), with_kwargs=True))
        swap = lambda key: lambda module, args, out: self.content.at(now)[key].expand_as(out)

        def attention(number):
            def hook(module, args, kwargs):
                style = self.style.at(now)["self_attention", number].expand(args[0].shape[0], -1, -1)
                return (self.query(ours, args[0], number, now),), {**kwargs, "context": style, "value": style}
            return hook

        if ours == "h-space":
            hooks.append(network.middle_block[-1].register_forward_hook(lambda module, args, out: slerp(out, self.content.at(now)["h_space"], TURN)))
        for number in LAYERS if ours != "h-space" else ():
            residual, block = network.output_blocks[number][0], network.output_blocks[number][1].transformer_blocks[0]
            if ours != "features":
                hooks.append(block.attn1.register_forward_pre_hook(attention(number), with_kwargs=True))
                continue
            for module, stream in ((block.attn1, "self_attention"), (block.attn2, "cross_attention")):
                hooks += [getattr(module, f"to_{name}").register_forward_hook(swap((f"{stream}_{name}", number))) for name in ("q", "k")]
            assert isinstance(residual, ResBlock)
            added = lambda module, args, out, number=number: module.skip_connection(args[0]) + self.content.at(now)["residual", number]
            hooks.append(residual.register_forward_hook(added))
        try:
            return self.sample(model)
        finally:
            for hook in hooks:
                hook.remove()

    def sample(self, model):
        return sample(model, random_latent(16, 8), schedule(self.base, STEPS), self.positive, self.negative, CFG)


@pytest.fixture(scope="module")
def small():
    return Scene(shrunk)


@pytest.fixture(scope="module")
def tiles():
    return Scene(neighbours.hypertile)


def assert_close(ours, expected, without):
    effect = (expected - without).abs().max()
    assert effect > 1e-2 * expected.abs().max()
    assert (ours - expected).abs().max() < 5e-3 * effect


@pytest.mark.parametrize("memory", ["ram", "recompute"])
def test_deep_shrinks_grids_are_captured(small, pair, memory):
    """What hooks saw, in every step and each in its own size."""
    pair("Capture Features", "PatchModelAddDownscale")
    bank = small.bank(small.style, "style", memory)
    if memory == "recompute":  # read while sampling, by the injections below
        assert bank.store is None
        return
    sizes = set()
    for step in range(1, STEPS + 1):
        for number in LAYERS:
            found = bank.store.read(FeatureKey("self_attention", "output", number, 0), step, torch.device("cpu"))
            expected = small.style.steps[step]["self_attention", number]
            assert found.shape == expected.shape and (found - expected).abs().max() < 1e-4
            sizes.add((number, found.shape[1]))
    assert len(sizes) == 3  # output 6 in both sizes, output 9 in one


@pytest.mark.parametrize("memory", ["ram", "recompute"])
@pytest.mark.parametrize("ours", OURS)
def test_injections_on_deep_shrinks_grids(small, pair, ours, memory):
    pair(OURS[ours], "PatchModelAddDownscale")
    expected = small.by_hand(ours, small.model)
    for both in (small.inject(ours, small.model, memory), shrunk(small.inject(ours, small.base, memory))):
        assert_close(small.sample(both), expected, small.sample(small.model))


def test_files_are_refused_deep_shrinks_grids(small, pair, tmp_path):
    pair("Capture Features (disk), Save Features", "PatchModelAddDownscale", "refused")
    with pytest.raises(ValueError, match=r"Deep Shrink\) their sizes change from step to step, .* Choose recompute, ram or vram"):
        small.bank(small.style, "style", "disk")
    with pytest.raises(ValueError, match=r"Deep Shrink\) their sizes change from step to step, .* Save them from"):
        save_bank(small.bank(small.style, "style"), "shrunk")


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
@pytest.mark.parametrize("ours", ["style", "preserved"])
def test_style_injection_before_hypertile(tiles, pair, ours, order):
    """An attn1_patch of the test's own in front of HyperTile's, which cuts its queries."""
    pair(OURS[ours], "HyperTile")

    def patch(own, context, value, options):
        block, number = options["block"]
        if block != "output" or number not in LAYERS:
            return own, context, value
        style = tiles.style.at(options)["self_attention", number].expand(own.shape[0], -1, -1)
        return tiles.query(ours, own, number, options), style, style

    by_hand = tiles.base.clone()
    by_hand.set_model_attn1_patch(patch)
    expected, without = tiles.sample(neighbours.hypertile(by_hand)), tiles.sample(tiles.model)
    assert (expected - tiles.sample(by_hand)).abs().max() > 1e-2 * expected.abs().max()  # it does cut
    both = tiles.inject(ours, tiles.model) if order == "theirs first" else neighbours.hypertile(tiles.inject(ours, tiles.base))
    assert_close(tiles.sample(both), expected, without)


def test_capture_before_hypertiles_tiles(tiles, pair):
    pair("Capture Features", "HyperTile")
    bank = tiles.bank(tiles.style, "style")
    for step in range(1, STEPS + 1):
        found = bank.store.read(FeatureKey("self_attention", "output", 9, 0), step, torch.device("cpu"))
        assert (found - tiles.style.steps[step]["self_attention", 9]).abs().max() < 1e-4


def test_h_space_beside_hypertile(tiles, pair):
    pair(OURS["h-space"], "HyperTile")
    for both in (tiles.inject("h-space", tiles.model), neighbours.hypertile(tiles.inject("h-space", tiles.base))):
        assert_close(tiles.sample(both), tiles.by_hand("h-space", tiles.model), tiles.sample(tiles.model))


def test_what_tiles_cannot_hold_is_refused_by_name(tiles, pair):
    """A second, plain attention, keys of another size, and queries after their projection."""
    pair("Style Injection (strength or mask)", "HyperTile", "refused")
    pair("Feature Injection (self-attention)", "HyperTile", "refused")
    bank = tiles.bank(tiles.style, "style")
    blend = inject_style(tiles.model, bank, None, GAMMA, TEMPERATURE, 0.5, TEXT, 0.0, 1.0, None)
    with pytest.raises(ValueError, match=r"HyperTile \(attention in tiles\) cannot be combined with strength below 1 or a mask"):
        tiles.sample(blend)
    with pytest.raises(ValueError, match=r"HyperTile \(attention in tiles\) cannot be combined with Feature Injection"):
        tiles.sample(tiles.inject("features", tiles.model))
    positive, sigmas = tiles.positive, schedule(tiles.base, STEPS)
    _, larger = invert(tiles.base, {"samples": random_latent(16, 16, seed=5)}, sigmas, positive, "next")
    other = inject_style(tiles.model, capture(tiles.base, larger, "self_attention", TEXT, "ram"), None, GAMMA, TEMPERATURE, 1.0, TEXT, 0.0, 1.0, None)
    with pytest.raises(ValueError, match=r"HyperTile \(attention in tiles\) cannot be combined with a style of another size"):
        tiles.sample(other)
