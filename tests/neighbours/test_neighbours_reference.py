"""Style Reference beside other nodes: at every call of the network, module hooks first run it on the style's latent, with
that call's own patches and rows, and then put what its self-attention saw there in the place of the sample's keys and values."""

from contextlib import contextmanager

import pytest
import torch
from support import neighbours
from support.models import tiny_cond, tiny_unet
from support.neighbours import NODES, patched
from support.sampling import random_latent, sample, schedule

from pastiche.nodes.host.references.install import style_reference
from pastiche.nodes.host.trajectories.inversion import invert

STEPS, CFG, TEMPERATURE, LAYERS = 4, 3.0, 1.5, (6, 9)
SETTINGS = dict(
    share="replace", gamma=0.0, gamma_end=0.0, schedule="constant", temperature=TEMPERATURE, strength=1.0,
    layers=", ".join(f"output {number}" for number in LAYERS), start_percent=0.0, end_percent=1.0,
)
OTHERS = {**NODES, "lazycache": "LazyCache", "deep_shrink": "PatchModelAddDownscale", "control": "Apply ControlNet"}


class Scene:
    def __init__(self):
        self.model = tiny_unet()
        self.positive, self.negative = tiny_cond(self.model), tiny_cond(self.model, seed=9)
        self.sigmas = schedule(self.model, STEPS)
        _, self.style = invert(self.model, {"samples": random_latent(16, 16, seed=5)}, self.sigmas, tiny_cond(self.model, seed=3), "next")

    def ours(self, model):
        return style_reference(model, None, self.style, None, **SETTINGS)

    @contextmanager
    def by_hand(self):
        network, seen, hooks, inside = self.model.model.diffusion_model, {}, [], []
        context = self.style.conditioning[0][0]

        def record(number):
            def hook(module, args, out):
                if inside:
                    seen[number] = out
            return hook

        def run_the_style(module, args, kwargs):
            if inside:
                return
            x, options = args[0], kwargs["transformer_options"]
            sigma = float(options["sigmas"][0])
            level = int((self.style.sigmas - sigma).abs().argmin())
            latent = self.style.latents[level] / (1 + self.style.sigmas[level] ** 2) ** 0.5
            inside.append(True)
            try:
                rows = x.shape[0]
                module(latent.expand(rows, -1, -1, -1), args[1], **{**kwargs, "context": context.expand(rows, -1, -1), "control": None})
            finally:
                inside.pop()

        def share(number):
            def hook(module, args, kwargs):
                return None if inside else ((TEMPERATURE * args[0],), {**kwargs, "context": seen[number], "value": seen[number]})
            return hook

        hooks.append(network.register_forward_pre_hook(run_the_style, with_kwargs=True))
        for number in LAYERS:
            block = network.output_blocks[number][1].transformer_blocks[0]
            hooks.append(block.norm1.register_forward_hook(record(number)))
            hooks.append(block.attn1.register_forward_pre_hook(share(number), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def sample(self, model, conditions=None, steps=STEPS):
        return sample(model, random_latent(16, 16), self.sigmas[: steps + 1], *(conditions or (self.positive, self.negative)), CFG)


@pytest.fixture(scope="module")
def scene():
    return Scene()


@pytest.mark.parametrize("name", OTHERS)
def test_references_and_theirs(scene, pair, name):
    pair("Style Reference", OTHERS[name])
    conditions, theirs = None, lambda model: patched(name, model)
    if name == "control":
        conditions, theirs = neighbours.controlled(scene.positive, scene.negative), lambda model: model
    steps = STEPS if "cache" in name else 2
    with scene.by_hand():
        expected = scene.sample(theirs(scene.model), conditions, steps)
        without = scene.sample(scene.model, None, steps)
    effect = (expected - without).abs().max()
    assert effect > 1e-3 * expected.abs().max()
    assert (expected - scene.sample(theirs(scene.model), conditions, steps)).abs().max() > 1e-2 * expected.abs().max()
    for both in (scene.ours(theirs(scene.model)), theirs(scene.ours(scene.model))):
        assert (scene.sample(both, conditions, steps) - expected).abs().max() < 5e-3 * effect


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_easycache_skips_no_references(scene, pair, first, caplog):
    """It keeps outputs by condition, and the style's rows stand under the sample's."""
    pair("Style Reference", "EasyCache", "left out")
    cache = neighbours.easycache
    expected = scene.sample(scene.ours(scene.model))
    both = scene.ours(cache(scene.model)) if first == "theirs" else cache(scene.ours(scene.model))
    assert torch.equal(scene.sample(both), expected)
    assert not torch.equal(scene.sample(cache(scene.model)), scene.sample(scene.model))  # it does skip
    assert "EasyCache skips no steps in a run with Style Reference" in caplog.text
