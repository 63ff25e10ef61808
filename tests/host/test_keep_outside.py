import math

import pytest
import torch
from support.models import smooth_eps, tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule

from pastiche.nodes.host.trajectories.inversion import invert, reconstruct
from pastiche.nodes.host.injections.keep_outside import keep_content_outside


def psnr(a, b):
    return 10 * math.log10(float((b.max() - b.min()) ** 2 / (a - b).square().mean().clamp_min(1e-30)))


class Scene:
    """A content inverted on a smooth model, and another prompt to sample with."""

    def __init__(self, batch=1, steps=6, size=(8, 16)):
        self.model = smooth_eps(tiny_unet())
        self.sigmas = schedule(self.model, steps)
        self.positive, self.other = tiny_cond(self.model), tiny_cond(self.model, seed=7)
        self.content = random_latent(*size, batch=batch, seed=1)
        noise, self.trajectory = invert(self.model, {"samples": self.content}, self.sigmas, self.positive, "fixed_point", 20)
        self.noise = noise["samples"]
        self.mask = torch.zeros(1, 64, 128)
        self.mask[..., 32:96] = torch.linspace(0, 1, 64)  # a soft edge over half the width
        self.mask[..., 96:] = 1

    def sample(self, mask, noise=None, **options):
        model = keep_content_outside(self.model, self.trajectory, mask)
        return sample(model, self.noise if noise is None else noise, self.sigmas.clone(), options.pop("positive", self.other), **options)


@pytest.fixture(scope="module")
def scene():
    return Scene()


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_ancestral", "dpm_2", "lcm", "uni_pc"])
def test_outside_is_the_content(scene, sampler):
    """Whatever the sampler, the noise it started from and the prompt."""
    result = scene.sample(scene.mask, random_latent(8, 16, seed=9) * 3, sampler=sampler)
    clean = scene.model.model.process_latent_out(scene.trajectory.latents[0])
    assert torch.equal(result[..., :4], clean[..., :4])
    assert psnr(result[..., :4], reconstruct(scene.model, scene.trajectory)[..., :4]) > 60
    inside = scene.sample(torch.ones(1, 8, 16), sampler=sampler)
    assert psnr(result[..., 12:], clean[..., 12:]) < 30 and torch.isfinite(inside).all()


def test_outside_follows_the_trajectory_at_every_step(scene):
    seen = []
    scene.sample(scene.mask, callback=lambda i, denoised, x, steps: seen.append(x))
    latents = scene.trajectory.latents.flip(0)
    assert len(seen) == 6
    for x, content in zip(seen, latents):
        assert psnr(x[..., :4], content[..., :4]) > 100
    assert psnr(seen[-1][..., 12:], latents[5][..., 12:]) < 60  # inside it does not


def test_soft_edges_are_equation_six(scene):
    """Step by step by hand: z' = M z* + (1 - M) z, with z* one DDIM step from the blended latent."""
    from pastiche.nodes.algorithms.masks import resize_mask

    mask = resize_mask(scene.mask, 8, 16).unsqueeze(1)
    content = scene.trajectory.latents.flip(0)
    x = content[0]
    context = scene.other[0][0]
    predict = scene.model.model_options["model_function_wrapper"]
    for i, (sigma, following) in enumerate(zip(scene.sigmas[:-1], scene.sigmas[1:])):
        denoised = predict(None, {"input": x, "timestep": sigma.view(1), "c": {"c_crossattn": context}})
        step = x + (following - sigma) * (x - denoised) / sigma
        x = mask * step + (1 - mask) * content[i + 1]
    expected = scene.model.model.process_latent_out(x)
    result = scene.sample(scene.mask)
    assert (result - expected).abs().max() < 1e-4 * expected.abs().max()


def test_masks_of_nothing_and_everything(scene):
    empty = scene.sample(torch.zeros(1, 8, 16))
    assert torch.equal(empty, scene.model.model.process_latent_out(scene.trajectory.latents[0]))
    full = keep_content_outside(scene.model, scene.trajectory, torch.ones(64, 64))
    assert full.wrappers == scene.model.wrappers
    assert torch.equal(scene.sample(torch.ones(1, 8, 16)), sample(scene.model, scene.noise, scene.sigmas, scene.other))


def test_batches_and_masks_of_their_own():
    pair = Scene(batch=2)
    masks = torch.stack([torch.zeros(8, 16), torch.ones(8, 16)])
    result = pair.sample(masks)
    clean = pair.model.model.process_latent_out(pair.trajectory.latents[0])
    plain = sample(pair.model, pair.noise, pair.sigmas, pair.other)
    assert torch.equal(result[0], clean[0])
    torch.testing.assert_close(result[1], plain[1], rtol=1e-5, atol=1e-5)
    guided = pair.sample(masks[:1], negative=pair.positive, cfg=5.0)
    assert torch.equal(guided, clean)


def test_a_finer_schedule_walks_between_the_levels(scene):
    model = keep_content_outside(scene.model, scene.trajectory, scene.mask)
    result = sample(model, scene.noise, schedule(scene.model, 12), scene.other)
    assert torch.equal(result[..., :4], scene.model.model.process_latent_out(scene.trajectory.latents[0])[..., :4])


def test_refusals(scene):
    model = keep_content_outside(scene.model, scene.trajectory, scene.mask)
    with pytest.raises(ValueError, match="its latent is 16x8, the sampled one 8x8"):
        sample(model, random_latent(8, 8), scene.sigmas, scene.other)
    with pytest.raises(ValueError, match="3 masks for 2 samples"):
        scene.sample(torch.zeros(3, 8, 16), random_latent(8, 16, batch=2))
    with pytest.raises(ValueError, match="Connect the same SIGMAS"):
        sample(model, scene.noise, torch.cat([scene.sigmas[:1] * 2, scene.sigmas]), scene.other)
    with pytest.raises(ValueError, match="made with another model"):
        keep_content_outside(tiny_unet(seed=3), scene.trajectory, scene.mask)


def test_works_with_several_styles(scene):
    from pastiche.nodes.host.multistyle.guider import multi_style_guider
    from pastiche.nodes.sockets import StyleEntry
    import comfy.samplers

    model = keep_content_outside(scene.model, scene.trajectory, scene.mask)
    guider = multi_style_guider(model, scene.other, scene.positive, 3.0, [StyleEntry(conditioning=scene.positive, mask=scene.mask)])
    out = guider.sample(torch.zeros_like(scene.noise), scene.noise, comfy.samplers.sampler_object("euler"), scene.sigmas, seed=0, disable_pbar=True)
    assert torch.equal(out[..., :4], scene.model.model.process_latent_out(scene.trajectory.latents[0])[..., :4])
