"""`recompute`: the references run in the sample's own forward, and give what they give in forwards of their own."""

import pytest
import torch
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections import run as runs
from pastiche.nodes.host.injections.hspace import inject_content
from pastiche.nodes.host.injections.style import inject_style
from pastiche.nodes.host.trajectories.inversion import invert
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule

STEPS, LAYERS = 2, "6-8"


class Scene:
    def __init__(self, size=(8, 8), style_size=(8, 8), batch=1, streams="self_attention", prediction="eps", family="sd15"):
        self.model = tiny_unet(family, prediction, dtype=torch.float64)
        self.sigmas, self.positive = schedule(self.model, STEPS), tiny_cond(self.model)
        self.layers = LAYERS if family == "sd15" else "3-5"
        self.noise, self.content = self.inverted(size, batch, 1, streams)
        _, self.style = self.inverted(style_size, 1, 2, streams)
        self.forwards = []
        self.model.model.diffusion_model.register_forward_pre_hook(lambda module, args: self.forwards.append(len(args[0])))

    def inverted(self, size, batch, seed, streams):
        latent = {"samples": random_latent(*size, batch=batch, seed=seed)}
        noise, trajectory = invert(self.model, latent, self.sigmas, self.positive, "next")
        return noise["samples"], capture(self.model, trajectory, streams, self.layers)

    def inject(self, model=None, **options):
        settings = dict(style=self.style, content=self.content, gamma=0.75, temperature=1.5, strength=1.0, layers=self.layers,
                        start_percent=0.0, end_percent=1.0, mask=None)
        return inject_style(model or self.model, **(settings | options))

    def sample(self, model, **options):
        """(the picture, the batch size of every forward)"""
        self.forwards.clear()
        picture = sample(model, self.noise, self.sigmas, options.pop("positive", self.positive), **options)
        return picture, list(self.forwards)


@pytest.fixture(scope="module")
def scene():
    return Scene()


def together_and_apart(scene, monkeypatch, model, **options):
    """The same sampling with rows beside the sample, then with every reference in forwards of its own."""
    together, forwards = scene.sample(model, **options)
    with monkeypatch.context() as patched:
        patched.setattr(runs, "obstacle", lambda *args: "a test wants it")
        apart, separate = scene.sample(model, **options)
    assert (together - apart).abs().max() <= 1e-6 * apart.abs().max()
    return forwards, separate


def test_one_forward_a_step_and_the_same_picture(scene, monkeypatch):
    forwards, separate = together_and_apart(scene, monkeypatch, scene.inject())
    assert forwards == [3] * STEPS and separate == [1] * 3 * STEPS


@pytest.mark.parametrize("options", [dict(strength=0.4), dict(mask=torch.arange(64.0).view(1, 8, 8) / 63), dict(content=None)])
def test_blends_and_masks(scene, monkeypatch, options):
    forwards, _ = together_and_apart(scene, monkeypatch, scene.inject(**options))
    assert forwards == [2 if "content" in options else 3] * STEPS


def test_several_injections_share_the_rows(scene, monkeypatch):
    """The second one's own style is one row more; the content, which both have, is one row."""
    _, other = scene.inverted((8, 8), 1, 5, "self_attention")
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    twice = scene.inject(scene.inject(mask=left), style=other, mask=1 - left)
    assert together_and_apart(scene, monkeypatch, twice)[0] == [4] * STEPS


def test_guidance_in_one_batch_or_apart(scene, monkeypatch):
    """The references stand beside the first forward of a step; the other takes what they gave. A longer prompt included."""
    negative = tiny_cond(scene.model, tokens=14, seed=5)
    patched = scene.inject()
    assert together_and_apart(scene, monkeypatch, patched, negative=negative, cfg=3.0)[0] == [4] * STEPS
    several = dict(positive=scene.positive + tiny_cond(scene.model, tokens=21, seed=6), negative=negative, cfg=2.0)
    together_and_apart(scene, monkeypatch, patched, **several)


def test_a_batch_of_contents(monkeypatch):
    scene = Scene(batch=2)
    assert together_and_apart(scene, monkeypatch, scene.inject())[0] == [5] * STEPS


@pytest.mark.parametrize("family, prediction", [("sd20", "v"), ("sdxl", "eps")])
def test_other_families(monkeypatch, family, prediction):
    scene = Scene(family=family, prediction=prediction)
    assert together_and_apart(scene, monkeypatch, scene.inject())[0] == [3] * STEPS


def test_steps_outside_the_range_run_no_reference(scene, monkeypatch):
    late = scene.inject(start_percent=0.5)
    forwards, separate = together_and_apart(scene, monkeypatch, late)
    assert forwards == [1, 3] and separate == [1, 1, 1, 1]


def another_node(scene):
    patched = scene.inject()
    patched.set_model_attn2_patch(lambda n, context, value, options: (n, context, value))
    return patched


def wrapped(scene):
    patched = scene.inject()
    patched.set_model_unet_function_wrapper(lambda apply_model, args: apply_model(args["input"], args["timestep"], **args["c"]))
    return patched


def with_h_space(scene):
    _, trajectory = invert(scene.model, {"samples": random_latent(seed=3)}, scene.sigmas, scene.positive, "next")
    return inject_content(scene.inject(), capture(scene.model, trajectory, "h_space", "auto"), 0.3, 400)


@pytest.mark.parametrize("make, reason", [
    (another_node, "another node changes the sampled model alone"), (wrapped, "in its own way"), (with_h_space, "h-space Slerp is on"),
])
def test_other_nodes_have_the_references_apart(scene, caplog, make, reason):
    caplog.set_level("INFO")
    picture, forwards = scene.sample(make(scene))
    assert max(forwards) == 1 and len(forwards) >= 3 * STEPS and reason in caplog.text
    if make is not with_h_space:
        assert (picture - scene.sample(scene.inject())[0]).abs().max() <= 1e-6 * picture.abs().max()


def test_what_both_models_have_is_no_obstacle():
    """A patch below Style Injection, which the references ran under too."""
    scene = Scene()
    scene.model.set_model_attn2_patch(lambda n, context, value, options: (1.1 * n, context, value))
    _, scene.style = scene.inverted((8, 8), 1, 2, "self_attention")
    scene.noise, scene.content = scene.inverted((8, 8), 1, 1, "self_attention")
    assert scene.sample(scene.inject())[1] == [3] * STEPS


def test_another_size_and_projected_streams_go_apart():
    for options in (dict(style_size=(8, 12)), dict(streams="self_attention_qkv")):
        scene = Scene(**options)
        forwards = scene.sample(scene.inject())[1]
        assert forwards == [1] * 3 * STEPS


def test_too_little_memory_goes_apart(scene, monkeypatch):
    expected, _ = scene.sample(scene.inject())
    monkeypatch.setattr(type(scene.model), "get_free_memory", lambda self, device: 0)
    picture, forwards = scene.sample(scene.inject())
    assert forwards == [1] * 3 * STEPS and (picture - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_latent_cut_into_parts_goes_apart(scene):
    """A prompt with an area: the network sees a part of the latent."""
    half = [[scene.positive[0][0], {"area": (8, 4, 0, 0)}]]
    with pytest.raises(ValueError, match="area"):
        scene.sample(scene.inject(), positive=scene.positive + half)


def test_memory_for_the_rows_is_asked_for(scene, monkeypatch):
    import comfy.sampler_helpers

    asked, inner = [], comfy.sampler_helpers.estimate_memory
    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", lambda model, shape, conds: (asked.append(list(shape)), inner(model, shape, conds))[1])
    scene.sample(scene.inject())
    assert asked == [[3, 4, 8, 8]]
