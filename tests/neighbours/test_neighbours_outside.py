"""Keep Outside Mask beside other nodes, against a loop that blends every step by hand and asks their MODEL alone."""

import pytest
import torch
from support import neighbours
from support.models import tiny_cond, tiny_unet
from support.neighbours import NODES, patched
from support.sampling import random_latent, sample, schedule
from support.styles import merged, plain, predict, random_lora

from pastiche.nodes.host.injections.keep_outside import keep_content_outside
from pastiche.nodes.host.multistyle.guider import multi_style_guider
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.sockets import StyleEntry

STEPS, CFG = 4, 3.0
OTHERS = {**NODES, "deep_shrink": "PatchModelAddDownscale", "hypertile": "HyperTile", "tiled": "tiled diffusion*", "control": "Apply ControlNet", "area": "conditions with an area"}


class Scene:
    def __init__(self):
        self.model = tiny_unet()
        self.positive, self.negative = tiny_cond(self.model), tiny_cond(self.model, seed=9)
        self.sigmas = schedule(self.model, STEPS)
        noise, self.trajectory = invert(self.model, {"samples": random_latent(16, 16, seed=5)}, self.sigmas, self.positive, "next")
        self.start = noise["samples"]
        self.mask = torch.zeros(1, 16, 16)
        self.mask[..., 4:12], self.mask[..., 12:] = torch.linspace(0.1, 1, 8), 1.0  # a quarter outside, a soft edge

    def keep(self, model):
        return keep_content_outside(model, self.trajectory, self.mask)

    def by_hand(self, model, conditions):
        levels, latents = self.trajectory.sigmas.flip(0), self.trajectory.latents.flip(0)
        assert torch.equal(levels, self.sigmas)
        outside, x = (self.mask == 0)[:, None], latents[0]
        for i in range(STEPS):
            seen = torch.where(outside, latents[i], x)
            denoised = predict(plain(model, *conditions, CFG), seen, levels[i].reshape(1))
            stepped = x + (levels[i + 1] - levels[i]) * (x - denoised) / levels[i]
            x = self.mask[:, None] * stepped + (1 - self.mask[:, None]) * latents[i + 1]
        return self.model.model.process_latent_out(x)


@pytest.fixture(scope="module")
def scene():
    return Scene()


@pytest.mark.parametrize("name", OTHERS)
def test_the_inside_is_theirs_and_the_outside_the_contents(scene, pair, name):
    pair("Keep Outside Mask", OTHERS[name])
    conditions, theirs = (scene.positive, scene.negative), lambda model: model
    if name == "control":
        conditions = neighbours.controlled(*conditions)
    elif name == "area":
        conditions = neighbours.with_area(scene.positive, tiny_cond(scene.model, seed=4)), scene.negative
    else:
        theirs = lambda model: patched(name, model)
    expected = scene.by_hand(theirs(scene.model), conditions)
    effect = (expected - scene.by_hand(scene.model, (scene.positive, scene.negative))).abs().max()
    assert effect > 1e-3 * expected.abs().max()
    for both in (scene.keep(theirs(scene.model)), theirs(scene.keep(scene.model))):
        assert (sample(both, scene.start, scene.sigmas, *conditions, CFG) - expected).abs().max() < 5e-3 * effect


def test_styles_stay_inside(scene, pair):
    pair("Keep Outside Mask", "Multi-Style Guider")
    lora = random_lora(scene.model, 1)
    expected = scene.by_hand(merged(scene.model, lora), (scene.positive, scene.negative))
    guider = multi_style_guider(scene.keep(scene.model), scene.positive, scene.negative, CFG, [StyleEntry(lora=lora)])
    ours = guider.sample(torch.zeros_like(scene.start), scene.start, euler(), scene.sigmas, disable_pbar=True, seed=0)
    effect = (expected - scene.by_hand(scene.model, (scene.positive, scene.negative))).abs().max()
    assert effect > 1e-2 * expected.abs().max() and (ours - expected).abs().max() < 5e-3 * effect


def euler():
    import comfy.samplers

    return comfy.samplers.sampler_object("euler")
