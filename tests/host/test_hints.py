"""Likely mistakes are told while sampling, and right graphs are left in peace; on the mini model, whose inversions mean something."""

import comfy.sample
import comfy.samplers
import pytest
import torch
from pastiche.nodes.algorithms.metrics import channel_correlation
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections import base
from pastiche.nodes.host.injections.content import inject_features
from pastiche.nodes.host.injections.hspace import inject_content
from pastiche.nodes.host.injections.injectfusion_sampler import injectfusion_sampler
from pastiche.nodes.host.injections.style import inject_style
from pastiche.nodes.host.networks.mini import load_mini
from pastiche.nodes.host.trajectories.inversion import inverted_noise, invert
from pastiche.nodes.host.trajectories.latent_adain import latent_adain
from support.sampling import schedule

STEPS = 4


class Scene:
    def __init__(self):
        self.model, _, kinds = load_mini()
        self.empty = kinds["empty"]
        self.sigmas = schedule(self.model, STEPS)
        generator = torch.Generator().manual_seed(1)
        self.clean, self.noise, self.trajectory, self.bank = {}, {}, {}, {}
        for name in ("content", "style"):
            blobs = torch.nn.functional.interpolate(torch.randn(1, 16, 3, 4, generator=generator), (8, 12), mode="bicubic")
            self.clean[name] = {"samples": self.model.model.process_latent_out(1.5 * blobs)}
            self.noise[name], self.trajectory[name], *_ = invert(self.model, self.clean[name], self.sigmas, self.empty)
            self.bank[name] = capture(
                self.model, self.trajectory[name], "self_attention, self_attention_qk, cross_attention, residual, h_space", "4-11"
            )

    def styled(self, style="style", content="content", **how):
        settings = {"gamma": 0.75, "temperature": 1.5, "strength": 1.0, "layers": "6-11", "start_percent": 0.0,
                    "end_percent": 1.0, "mask": None} | how
        return inject_style(self.model, self.bank[style], content and self.bank[content], **settings)

    def sample(self, model, latent, noise=None, cfg=1.0, sampler="euler", sigmas=None):
        sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
        samples = latent["samples"]
        noise = torch.zeros_like(samples) if noise is None else noise
        comfy.sample.sample_custom(
            model, noise, cfg, sampler, self.sigmas if sigmas is None else sigmas, self.empty, self.empty, samples, disable_pbar=True, seed=0
        )


@pytest.fixture(scope="module")
def scene():
    return Scene()


@pytest.fixture
def told(monkeypatch):
    """[(node, sentence)] of everything said."""
    said = []
    monkeypatch.setattr(base, "hint", lambda node_id, title, text: said.append((title, text)))
    return said


def fresh_noise(latent, seed=5):
    return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(seed))


def test_correlation_is_blind_to_adain_and_to_nothing_else():
    generator = torch.Generator().manual_seed(0)
    a, other = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, 3, 8, 8, generator=generator)
    assert channel_correlation(a, 4 * a - 7) == pytest.approx(1)
    assert channel_correlation(a, -a) == pytest.approx(-1)
    assert abs(channel_correlation(a, other)) < 0.2
    assert channel_correlation(a, a + other - other.mean((2, 3), keepdim=True)) == pytest.approx(0.5**0.5, abs=0.1)
    assert channel_correlation(a, torch.ones_like(a)) == 0


def test_right_graphs_hear_nothing(scene, told):
    toned = latent_adain(scene.noise["content"], scene.noise["style"], 1.0, None, None)
    half = torch.zeros(1, 8, 12)
    half[..., :6] = 1
    masked = latent_adain(scene.noise["content"], scene.noise["style"], 1.0, half, None)
    for latent in (scene.noise["content"], toned, masked):
        scene.sample(scene.styled(), latent)
    empty = {"samples": torch.zeros_like(scene.noise["content"]["samples"])}
    noise = inverted_noise(scene.model, scene.trajectory["content"]).generate_noise(empty)
    scene.sample(scene.styled(), empty, noise)
    scene.sample(scene.styled(content=None), empty, fresh_noise(empty))  # style reference for a picture from noise
    features = inject_features(scene.model, scene.bank["content"], 0.6, 0.5, "auto", "auto", "auto")
    scene.sample(features, scene.noise["content"], cfg=7.5)
    fused = inject_content(scene.model, scene.bank["content"], 0.6, 400.0)
    scene.sample(fused, scene.noise["style"], sampler=injectfusion_sampler(0.3, 0.0, 0), cfg=7.5)
    assert told == []


def test_the_second_part_of_a_split_schedule_hears_nothing(scene, told):
    model = scene.styled()
    split = comfy.sample.sample_custom(
        model, torch.zeros_like(scene.noise["content"]["samples"]), 1.0, comfy.samplers.sampler_object("euler"), scene.sigmas[:3],
        scene.empty, scene.empty, scene.noise["content"]["samples"], disable_pbar=True, seed=0,
    )
    scene.sample(model, {"samples": split}, sigmas=scene.sigmas[2:])
    assert told == []


MISTAKES = {
    "noise added": ("noise was added to the content's inverted latent", lambda s: s.sample(
        s.styled(), s.noise["content"], fresh_noise(s.noise["content"]))),
    "noise of its own": ("does not start from the content's inverted noise", lambda s: s.sample(
        s.styled(), {"samples": torch.zeros_like(s.noise["content"]["samples"])}, fresh_noise(s.noise["content"]))),
    "encoded picture": ("starts from the content's encoded picture", lambda s: s.sample(s.styled(), s.clean["content"])),
    "swapped at the sampler": ("starts from the style's inverted noise. Content and style look swapped", lambda s: s.sample(
        s.styled(), s.noise["style"])),
    "swapped at the node": ("starts from the style's inverted noise. Content and style look swapped", lambda s: s.sample(
        s.styled(style="content", content="style"), s.noise["content"])),
    "style's own noise": ("starts from the style's inverted noise. It will return to that picture", lambda s: s.sample(
        s.styled(content=None), s.noise["style"])),
    "guidance": ("cfg is 7:", lambda s: s.sample(s.styled(), s.noise["content"], cfg=7.0)),
    "ancestral": ("euler_ancestral adds new noise", lambda s: s.sample(s.styled(), s.noise["content"], sampler="euler_ancestral")),
    "sde": ("dpmpp_2m_sde adds new noise", lambda s: s.sample(s.styled(), s.noise["content"], sampler="dpmpp_2m_sde")),
    "features, noise added": ("noise was added to the content's inverted latent", lambda s: s.sample(
        inject_features(s.model, s.bank["content"], 0.6, 0.5, "auto", "auto", "auto"), s.noise["content"],
        fresh_noise(s.noise["content"]))),
    "wrong level": ("begins at sigma", lambda s: s.sample(
        inject_features(s.model, s.bank["content"], 0.6, 0.5, "auto", "auto", "auto"), s.noise["content"], sigmas=s.sigmas[2:])),
    "h-space with euler": ("InjectFusion Sampler is not the sampler", lambda s: s.sample(
        inject_content(s.model, s.bank["content"], 0.6, 400.0), s.noise["style"])),
    "h-space from the content": ("starts from the content's inverted noise. The sampler gets the original's", lambda s: s.sample(
        inject_content(s.model, s.bank["content"], 0.6, 400.0), s.noise["content"], sampler=injectfusion_sampler(0.3, 0.0, 0))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_once_and_alone(scene, told, mistake):
    sentence, run = MISTAKES[mistake]
    run(scene)
    assert len(told) == 1, told
    assert sentence in told[0][1]
    assert told[0][0] in ("Style Injection", "Feature Injection", "h-space Slerp")


def test_it_is_told_again_in_the_next_run(scene, told):
    model = scene.styled()
    for _ in range(2):
        scene.sample(model, scene.noise["content"], cfg=7.0)
    assert len(told) == 2
