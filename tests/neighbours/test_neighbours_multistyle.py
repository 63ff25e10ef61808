"""The Multi-Style Guider beside other nodes, against each style's LoRA merged and run alone with that node."""

import pytest
import torch
from support import neighbours
from support.models import tiny_cond, tiny_unet
from support.styles import SIZE, Loop, merged, plain, random_lora, sample

from pastiche.nodes.host.multistyle.guider import multi_style_guider
from pastiche.nodes.sockets import StyleEntry

CFG = 3.0


class Scene:
    """Two LoRAs with prompts of their own in soft masks on the latent's grid, the base model in the rest."""

    def __init__(self, batch=SIZE[0], grid=SIZE[2:]):
        self.model = tiny_unet()
        self.loras = [random_lora(self.model, 1), random_lora(self.model, 2, 2)]
        self.prompts = [tiny_cond(self.model, seed=seed) for seed in (1, 2, 3)]
        self.negative = tiny_cond(self.model, seed=9)
        self.size = (batch, SIZE[1], *grid)
        generator = torch.Generator().manual_seed(3)
        self.masks = torch.rand(2, batch, 1, *grid, generator=generator) / 2

    def ours(self, neighbour, steps=2):
        entries = [StyleEntry(lora=lora, conditioning=self.prompts[i], mask=self.masks[i][:, 0]) for i, lora in enumerate(self.loras)]
        guider = multi_style_guider(neighbour(self.model), self.prompts[2], self.negative, CFG, entries)
        return sample(guider, steps, size=self.size)

    def expected(self, neighbour, steps=2):
        models = [merged(self.model, lora) for lora in self.loras] + [self.model]
        weights = [*self.masks, 1 - self.masks.sum(0)]
        parts = [(neighbour(model), prompt, self.negative, CFG, weight) for model, prompt, weight in zip(models, self.prompts, weights)]
        return sample(Loop(self.model, parts), steps, size=self.size)


def alone(model):
    return model


def assert_close(ours, expected, without):
    """Within 1e-3 of the neighbour's own effect."""
    effect = (expected - without).abs().max()
    assert effect > 1e-2 * expected.abs().max()
    assert (ours - expected).abs().max() < 1e-3 * effect


NAMES = {
    "pag": "PerturbedAttentionGuidance", "nag": "NAGuidance", "blurred_queries": "smoothed energy guidance*",
    "perturbed_tokens": "token perturbation guidance*", "tiled": "tiled diffusion*",
}


@pytest.mark.parametrize("name", NAMES)
def test_each_style_as_if_alone(pair, name):
    pair("Multi-Style Guider", NAMES[name])
    scene, neighbour = Scene(), getattr(neighbours, name)
    assert_close(scene.ours(neighbour), scene.expected(neighbour), scene.expected(alone))


def test_attention_couple(pair):
    pair("Multi-Style Guider", "attention couple*")
    scene = Scene()
    contexts = [tiny_cond(scene.model, seed=seed)[0][0] for seed in (20, 21)]
    neighbour = lambda model: neighbours.couple(model, contexts)
    assert_close(scene.ours(neighbour), scene.expected(neighbour), scene.expected(alone))


def test_sliding_windows_of_another_sampling_function(pair):
    """Masks differ from frame to frame, windows overlap."""
    pair("Multi-Style Guider", "AnimateDiff-Evolved*")
    scene = Scene(batch=4)
    without = sample(plain(scene.model, scene.prompts[2], scene.negative, CFG), 2, size=scene.size)
    with neighbours.sliding_windows([[0, 1, 2], [1, 2, 3]]):
        ours, expected = scene.ours(alone), scene.expected(alone)
    assert_close(ours, expected, without)


def test_self_attention_guidance_of_one_style_everywhere():
    model, size = tiny_unet(), (2, 4, 16, 16)
    lora, positive, negative = random_lora(model, 1), tiny_cond(model), tiny_cond(model, seed=5)
    entry = StyleEntry(lora=lora)
    ours = sample(multi_style_guider(neighbours.sag(model), positive, negative, CFG, [entry]), 2, size=size)
    expected = sample(plain(neighbours.sag(merged(model, lora)), positive, negative, CFG), 2, size=size)
    assert_close(ours, expected, sample(plain(merged(model, lora), positive, negative, CFG), 2, size=size))


def test_self_attention_guidance_of_several_styles(pair):
    """One step by hand: the blurred latent is evaluated with every style, its mask is the base's (the last part's)."""
    pair("Multi-Style Guider", "SelfAttentionGuidance")
    from comfy_extras.nodes_sag import attention_basic_with_sim, create_blur_map

    scene, scale = Scene(grid=(16, 16)), 0.8
    ours = scene.ours(lambda model: neighbours.sag(model, scale), steps=1)
    seen = {}

    def look(network, q, k, v, options):
        out, seen["scores"] = attention_basic_with_sim(q, k, v, heads=options["n_heads"])
        return out

    from support.styles import predict

    class Sag(Loop):
        def predict_noise(self, x, timestep, model_options={}, seed=None):
            def mixed(which, latent):
                total = 0
                for model, positive, negative, cfg, weight in self.parts:
                    watched = model.clone()
                    watched.set_model_attn1_replace(lambda *args: look(None, *args), "middle", 0, 0)
                    total = total + weight * predict(plain(watched, positive if which == "cond" else negative, negative, 1.0), latent, timestep)
                return total

            cond = mixed("cond", x)
            uncond = mixed("uncond", x)  # the base is the last to run: its scores stay
            degraded = create_blur_map(uncond, seen["scores"], 2.0, 1.0)
            again = mixed("uncond", degraded + x - uncond)
            return uncond + CFG * (cond - uncond) + scale * (degraded - again)

    models = [merged(scene.model, lora) for lora in scene.loras] + [scene.model]
    weights = [*scene.masks, 1 - scene.masks.sum(0)]
    parts = [(m, prompt, scene.negative, CFG, weight) for m, prompt, weight in zip(models, scene.prompts, weights)]
    expected = sample(Sag(scene.model, parts), 1, size=scene.size)
    assert_close(ours, expected, scene.expected(alone, steps=1))


@pytest.mark.parametrize("name, theirs", [("easycache", "EasyCache"), ("lazycache", "LazyCache")])
def test_caches_of_one_style_everywhere(pair, name, theirs):
    """They skip the steps that they would skip with its LoRA merged."""
    pair("Multi-Style Guider", theirs)
    model, cache = tiny_unet(), getattr(neighbours, name)
    lora, positive, negative = random_lora(model, 1), tiny_cond(model), tiny_cond(model, seed=5)
    ours = sample(multi_style_guider(cache(model), positive, negative, CFG, [StyleEntry(lora=lora)]), 4)
    expected = sample(plain(cache(merged(model, lora)), positive, negative, CFG), 4)
    assert_close(ours, expected, sample(plain(merged(model, lora), positive, negative, CFG), 4))
