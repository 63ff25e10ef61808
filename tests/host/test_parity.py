"""The authors' StyleID codes, reached by settings: against whole runs written by hand in their variables, float64.

The oracles know timesteps, alpha-bar and the network's own latent z; nothing of them is ours but the random weights.
"""

import math
import re

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import BasicScheduler, ManualSigmas
from pastiche.nodes.host.trajectories.inversion import invert, reconstruct
from pastiche.nodes.inversion import DDIMInversion, DDIMSampler
from pastiche.nodes.styleid import LatentAdaIN, StyleInjection
from support.models import smooth_eps, tiny_cond, tiny_unet
from support.sampling import random_latent

STEPS, GAMMA, TAU, SHARE = 4, 0.75, 1.5, 0.4
ALPHA = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)  # SD1.x, SD2.x


@pytest.fixture(scope="module")
def model():
    """The noise that Gaussian pictures of deviation 0.5 would have, and a share of what a random network says.

    Such a network alone enlarges the sampler's own float32 roundings a hundred times in ten steps.
    """
    model = tiny_unet(dtype=torch.float64)
    network = model.model.diffusion_model

    def calm(module, args, output):
        a = ALPHA[args[1].long()].view(-1, 1, 1, 1).to(args[0])
        return args[0] * (1 - a).sqrt() / (1 - 0.75 * a) + SHARE * output

    hook = network.register_forward_hook(calm)
    yield model
    hook.remove()


class Official:
    """eps of a random SD-like U-Net, keeping or changing q, k, v of decoder layers as the codes do."""

    def __init__(self, model, positive, layers):
        self.network, self.context = model.model.diffusion_model, positive[0][0].double()
        self.scale, self.layers, self.kept = model.model.latent_format.scale_factor, layers, None

    def attention(self, number):
        def replace(q, k, v, options):
            if self.injected is None:
                self.kept[number] = q, k, v
            else:
                content, style = self.injected
                q, k, v = GAMMA * content[number][0] + (1 - GAMMA) * q, style[number][1], style[number][2]
            heads, tau = options["n_heads"], 1.0 if self.injected is None else TAU
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
            weights = (tau * q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
            return (weights @ v).transpose(1, 2).flatten(2)

        return replace

    def eps(self, z, t, injected=None):
        """injected: (content's, style's) q, k, v; without it they are put into `kept`."""
        self.kept, self.injected = {}, injected
        slots = {("output", number, 0): self.attention(number) for number in self.layers}
        return self.network(
            z, torch.tensor([float(t)], dtype=torch.float64), context=self.context, transformer_options={"patches_replace": {"attn1": slots}}
        )


def ddim(z, eps, a, a_next):
    """(z', predicted clean latent) between two alpha-bars, either way."""
    clean = (z - (1 - a).sqrt() * eps) / a.sqrt()
    return a_next.sqrt() * clean + (1 - a_next).sqrt() * eps, clean


def adain(content, style, epsilon):
    moments = [(x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)) for x in (content, style)]
    return (content - moments[0][0]) / (moments[0][1] + epsilon) * moments[1][1] + moments[1][0]


def diffusers_styleid(code, content, style):
    """Timesteps 1, 251, ... with the clean latent at alpha-bar[0]; eps is asked with the timestep entered; features by timestep;
    what is decoded is the last prediction of the clean latent."""
    stride = 1000 // STEPS
    times = [1 + stride * i for i in range(STEPS)]
    ends, features = [], []
    for z in (content, style):
        seen = {}
        for t in times:
            eps = code.eps(z, t)
            seen[t] = code.kept
            z, _ = ddim(z, eps, ALPHA[max(0, t - stride)], ALPHA[t])
        ends.append(z), features.append(seen)
    z = adain(*ends, 1e-4)
    for t in reversed(times):
        eps = code.eps(z, t, (features[0][t], features[1][t]))
        z, clean = ddim(z, eps, ALPHA[t], ALPHA[max(0, t - stride)])
    return clean


def compvis_styleid(code, content, style):
    """Timesteps 1, 251, ...: the clean latent is one of t = 1, eps is asked with the timestep left, the last step goes to 999;
    sampling leaves out the first timestep and starts from that latent at the second, and ends at alpha-bar[0]."""
    times = [1 + 1000 // STEPS * i for i in range(STEPS)]
    ends, features = [], []
    for z in (content, style):
        seen = {}
        for t, t_next in zip(times, [*times[1:], 999]):
            eps = code.eps(z, t)
            seen[t] = code.kept
            z, _ = ddim(z, eps, ALPHA[t], ALPHA[t_next])
        ends.append(z), features.append(seen)
    z = adain(*ends, 0.0)
    for t, t_next in reversed(list(zip(times, [0, *times]))[:-1]):
        eps = code.eps(z, t, (features[0][t], features[1][t]))
        z, _ = ddim(z, eps, ALPHA[t], ALPHA[t_next])
    return z


def ours(model, positive, sigmas, layers, scheme, inversion_level, sampler, epsilon):
    """The node graph of the parity page."""
    parts = [
        DDIMInversion.execute(
            model, {"samples": random_latent(*size, seed=seed)}, sigmas, positive, scheme, memory="ram", precision="full",
            layers=layers, clean_level=inversion_level,
        ).result
        for size, seed in (((8, 8), 1), ((8, 12), 2))
    ]
    (content, _, _, content_features), (style, _, _, style_features) = (part[:4] for part in parts)
    start = LatentAdaIN.execute(content, style, epsilon=epsilon).result[0]["samples"]
    patched = StyleInjection.execute(model, style_features, content_features, GAMMA, TAU, layers=layers).result[0]
    return comfy.sample.sample_custom(
        patched, torch.zeros_like(start), 1.0, sampler, sigmas, positive, positive, start, disable_pbar=True, seed=0
    )


def close(found, expected, code):
    """To 1e-5, in the latent that the VAE decodes."""
    expected = expected / code.scale
    return float((found - expected).norm() / expected.norm()) < 1e-5


def test_diffusers_styleid(model):
    positive, layers = tiny_cond(model), range(7, 12)
    code = Official(model, positive, layers)
    sigmas = BasicScheduler.execute(model, "ddim_uniform", STEPS, 1.0).result[0]
    expected = diffusers_styleid(code, *(random_latent(*size, seed=seed).double() * code.scale for size, seed in (((8, 8), 1), ((8, 12), 2))))
    epsilon = 1e-4 * float((1 + sigmas[0] ** 2).sqrt()) / code.scale  # in z there, in LATENT's units here
    euler = comfy.samplers.sampler_object("euler")
    found = ours(model, positive, sigmas, "7-11", "next", "t = 0", euler, epsilon)
    assert close(found, expected, code)
    for other in (dict(inversion_level="sigma 0"), dict(epsilon=0.0)):
        settings = dict(layers="7-11", scheme="next", inversion_level="t = 0", sampler=euler, epsilon=epsilon) | other
        assert not close(ours(model, positive, sigmas, **settings), expected, code), other


def manual(times):
    """What Manual Sigmas makes of a text with these timesteps' sigmas."""
    text = ", ".join(f"{float(((1 - ALPHA[t]) / ALPHA[t]).sqrt()):.7f}" for t in times)
    return ManualSigmas.execute(text + ", 0").result[0]


def test_compvis_styleid(model):
    positive, layers = tiny_cond(model), range(6, 12)
    code = Official(model, positive, layers)
    sigmas = manual([999, *(1 + 250 * i for i in reversed(range(STEPS)))])
    expected = compvis_styleid(code, *(random_latent(*size, seed=seed).double() * code.scale for size, seed in (((8, 8), 1), ((8, 12), 2))))
    settings = dict(layers="6-11", scheme="current", inversion_level="t = 1", epsilon=0.0)
    sampler = DDIMSampler.execute("t = 0", 2).result[0]
    assert close(ours(model, positive, sigmas, sampler=sampler, **settings), expected, code)
    for other in (("sigma 0", 2), ("t = 0", 1)):
        assert not close(ours(model, positive, sigmas, sampler=DDIMSampler.execute(*other).result[0], **settings), expected, code), other
    assert not close(ours(model, positive, sigmas, sampler=sampler, **(settings | {"inversion_level": "t = 0"})), expected, code)


def test_the_levels_of_the_parity_page_are_stable_diffusions(repository):
    """The text for Manual Sigmas: 999, then 981 to 1 by 20, then 0."""
    page = (repository / "docs" / "parity.md").read_text(encoding="utf-8")
    text = max(re.findall(r"(?:\d+\.\d+, )+0\b", page), key=len)
    sigmas = ManualSigmas.execute(text).result[0]
    expected = manual([999, *range(981, 0, -20)])
    assert sigmas.shape == expected.shape and (sigmas - expected).abs().max() < 1e-4
    table = tiny_unet().get_model_object("model_sampling")
    assert [int(table.timestep(sigma.view(1))) for sigma in sigmas[:-1]] == [999, *range(981, 0, -20)]


def test_diffstylers_thousand_steps(model):
    """The clean latent is one of t = 0 and the first step leads to t = 1, then one timestep a step; every 4th latent is kept."""
    z, latent = (random_latent(8, 8, seed=1).double() * code for code in (model.model.latent_format.scale_factor, 1.0))
    positive, code = tiny_cond(model), Official(model, tiny_cond(model), ())
    sigmas = manual([9, 5, 1])
    noise, trajectory = DDIMInversion.execute(model, {"samples": latent.float()}, sigmas, positive, "next", 0, 4, clean_level="t = 0").result[:2]
    kept = []
    for t in range(1, 10):
        z, _ = ddim(z, code.eps(z, t), ALPHA[t - 1], ALPHA[t])
        kept += [z] if t % 4 == 1 else []
    for found, sigma, expected in zip(trajectory.latents[1:], trajectory.sigmas[1:], kept, strict=True):
        assert ((found / (1 + sigma**2).sqrt() - expected).norm() / expected.norm()) < 1e-5


def test_a_clean_level_above_the_schedule_is_refused(model):
    with pytest.raises(ValueError, match="clean_level.*above the schedule's last level"):
        DDIMInversion.execute(model, {"samples": random_latent()}, torch.tensor([5.0, 0.02, 0.0]), tiny_cond(model), "next", clean_level="t = 1")
    with pytest.raises(ValueError, match="sigma 0, t = 0, t = 1"):
        DDIMInversion.execute(model, {"samples": random_latent()}, torch.tensor([5.0, 0.0]), tiny_cond(model), "next", clean_level="t = 5")
    with pytest.raises(ValueError, match="skip_steps: got 2 of 2"):
        sampler = DDIMSampler.execute("sigma 0", 2).result[0]
        comfy.sample.sample_custom(
            model, torch.zeros(1, 4, 8, 8), 1.0, sampler, torch.tensor([5.0, 1.0, 0.0]), tiny_cond(model), tiny_cond(model),
            torch.zeros(1, 4, 8, 8), disable_pbar=True, seed=0,
        )


def test_left_alone_the_sampler_is_cores_ddim_bit_for_bit():
    model = tiny_unet()
    sigmas, positive, latent = torch.tensor([5.0, 1.0, 0.3, 0.0]), tiny_cond(model), random_latent()
    results = [
        comfy.sample.sample_custom(
            model, torch.zeros_like(latent), 1.0, sampler, sigmas, positive, positive, latent, disable_pbar=True, seed=0
        )
        for sampler in (comfy.samplers.sampler_object("ddim"), DDIMSampler.execute().result[0])
    ]
    assert torch.equal(*results)


def test_what_was_inverted_from_a_timestep_is_sampled_back_to_it():
    """On flow models too, whose network sees the latent as it is."""
    for prediction in ("eps", "flow"):
        model = smooth_eps(tiny_unet(prediction=prediction), 0.05)
        sigmas = BasicScheduler.execute(model, "simple", 20, 1.0).result[0]
        latent = {"samples": random_latent() / (4 if prediction == "flow" else 1)}
        _, trajectory = invert(model, latent, sigmas, tiny_cond(model), "fixed_point", 30, tolerance=1e-7, clean_level="t = 0")
        at, before = (
            (reconstruct(model, trajectory, DDIMSampler.execute(level).result[0]) - latent["samples"]).norm() for level in ("t = 0", "sigma 0")
        )
        assert at < 1e-5 * latent["samples"].norm() < before
        assert torch.equal(trajectory.latents[0], model.model.process_latent_in(latent["samples"])) and trajectory.sigmas[0] == 0
