"""InjectFusion beside other nodes and in the Multi-Style Guider, against each prediction run alone and put together by hand."""

import comfy.samplers
import pytest
import torch
from support import neighbours
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, schedule
from support.styles import merged, plain, predict, random_lora

from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.hspace import H_SPACE, inject_content
from pastiche.nodes.host.injections.injectfusion_sampler import injectfusion_sampler
from pastiche.nodes.host.multistyle.guider import multi_style_guider
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.sockets import StyleEntry

STEPS, CFG, GAMMA = 3, 3.0, 0.6


@pytest.fixture(scope="module")
def model():
    return tiny_unet()


@pytest.fixture(scope="module")
def bank(model):
    _, trajectory = invert(model, {"samples": random_latent(16, 8, seed=5)}, schedule(model, STEPS), tiny_cond(model), "next")
    return capture(model, trajectory, "h_space", "auto", "ram", "full")


def alone(model):
    return model


def turned(model, content):
    """A clone whose conditional bottleneck features are turned towards the content: arc with kept norm, float64."""

    def patch(args):
        h, kinds = args["h"], args["transformer_options"]["cond_or_uncond"]
        size = h.shape[0] // len(kinds)
        out = h.clone()
        for chunk, kind in enumerate(kinds):
            for row in range(chunk * size, (chunk + 1) * size) if kind == 0 else ():
                a, b = h[row].double(), content[0].double()
                angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
                keep, take = torch.sin((1 - GAMMA) * angle) / torch.sin(angle), torch.sin(GAMMA * angle) / torch.sin(angle)
                out[row] = (keep * a + take * b * a.norm() / b.norm()).to(h.dtype)
        return {**args, "h": out}

    patched = model.clone()
    patched.set_model_patch(patch, "middle_block_after_patch")
    return patched


def by_hand(parts, bank, latent, sigmas, omega):
    """parts: (model, positive, negative, weight). The asymmetric step or latent calibration at every step."""
    scale = parts[0][0].model.latent_format.scale_factor

    def mixture(x, sigma, content=None):
        timestep, total = sigma.expand(x.shape[0]), 0
        for model, positive, negative, weight in parts:
            chosen = model if content is None else turned(model, content)
            total = total + weight * predict(plain(chosen, positive, negative, CFG), x, timestep)
        return total

    x = latent * scale
    for i in range(len(sigmas) - 1):
        content = bank.store.read(H_SPACE, bank.trajectory.steps - i, torch.device("cpu")).float()
        clean, injected = mixture(x, sigmas[i]), mixture(x, sigmas[i], content)
        if omega > 0:
            dims = (1, 2, 3)
            mean, spread = injected.mean(dims, keepdim=True), injected.std(dims, keepdim=True)
            matched = mean + (injected - mean) * clean.std(dims, keepdim=True) / spread
            x = x + matched - clean + omega * (clean - injected)
            clean = injected = mixture(x, sigmas[i])
        x = injected + sigmas[i + 1] * (x - clean) / sigmas[i]
    return x / scale


def run(guider, latent, sigmas, omega):
    sampler = injectfusion_sampler(omega, 0, 0)
    return guider.sample(torch.zeros_like(latent), latent, sampler, sigmas, disable_pbar=True, seed=0)


def assert_close(ours, expected, without):
    """Within 2e-3 of the effect in question (a bottleneck's rounding grows over the steps)."""
    effect = (expected - without).abs().max()
    assert effect > 1e-2 * expected.abs().max()
    assert (ours - expected).abs().max() < 2e-3 * effect


@pytest.mark.parametrize("omega, name", [(0.0, "alone"), (0.3, "alone"), (0.0, "nag"), (0.3, "pag")])
def test_every_style_of_the_guider_is_injected(model, bank, pair, omega, name):
    if name == "alone":
        pair("InjectFusion Sampler", "Multi-Style Guider")
    neighbour = alone if name == "alone" else getattr(neighbours, name)
    latent, sigmas = random_latent(16, 8, batch=2), schedule(model, STEPS)[:3]
    prompts, negative = [tiny_cond(model, seed=seed) for seed in (1, 2, 3)], tiny_cond(model, seed=9)
    masks = torch.rand(2, 1, 1, 16, 8, generator=torch.Generator().manual_seed(3)) / 2
    loras = [random_lora(model, 1), random_lora(model, 2, 2)]
    entries = [StyleEntry(lora=lora, conditioning=prompt, mask=mask[:, 0]) for lora, prompt, mask in zip(loras, prompts, masks)]
    patched = inject_content(neighbour(model), bank, GAMMA, 0)
    ours = run(multi_style_guider(patched, prompts[2], negative, CFG, entries), latent, sigmas, omega)

    models = [merged(model, lora) for lora in loras] + [model]
    parts = [(neighbour(m), prompt, negative, weight) for m, prompt, weight in zip(models, prompts, [*masks, 1 - masks.sum(0)])]
    expected = by_hand(parts, bank, latent, sigmas, omega)
    first = run(multi_style_guider(neighbour(model), prompts[2], negative, CFG, entries), latent, sigmas, omega)
    assert_close(ours, expected, first)


@pytest.mark.parametrize("name", ["nag", "pag", "perturbed_tokens"])
@pytest.mark.parametrize("omega", [0.0, 0.3])
def test_both_predictions_carry_the_neighbour(model, bank, pair, name, omega):
    names = {"nag": "NAGuidance", "pag": "PerturbedAttentionGuidance", "perturbed_tokens": "token perturbation guidance*"}
    pair("InjectFusion Sampler", names[name])
    neighbour = getattr(neighbours, name)
    latent, sigmas = random_latent(16, 8), schedule(model, STEPS)[:3]
    positive, negative = tiny_cond(model), tiny_cond(model, seed=9)
    ours = run(plain(inject_content(neighbour(model), bank, GAMMA, 0), positive, negative, CFG), latent, sigmas, omega)
    expected = by_hand([(neighbour(model), positive, negative, 1.0)], bank, latent, sigmas, omega)
    assert_close(ours, expected, by_hand([(model, positive, negative, 1.0)], bank, latent, sigmas, omega))
