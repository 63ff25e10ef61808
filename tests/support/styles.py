"""Random LoRAs, and several styles the slow way: every model patched and run on its own."""

import comfy.model_management
import comfy.samplers
import comfy.sd
import pytest
import torch


@pytest.fixture(autouse=True)
def oracle_merges_in_float32(monkeypatch):
    """Import it where merged LoRAs are the oracle: on NVIDIA cards core merges them in half precision."""
    monkeypatch.setattr(comfy.model_management, "lora_compute_dtype", lambda device: torch.float32)


SIZE = (2, 4, 16, 8)  # two samples, not square


def random_lora(model, seed, rank=4, layers=("to_q", "to_k", "to_v"), scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and name.rsplit(".", 1)[-1] in layers:
            weight = module.weight
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator)
            tensors[f"{name}.lora_down.weight"] = down / weight[0].numel() ** 0.5
            tensors[f"{name}.lora_up.weight"] = up * scale
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def sample(guider, steps=4, seed=0, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, generator=generator)
    model = guider.model_patcher
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    return guider.sample(noise, torch.zeros(size), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)


def plain(model, positive, negative, cfg):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def merged(model, lora, strength=1.0):
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def masks(count, seed=3):
    return [mask for mask in torch.rand(count, 1, 64, 32, generator=torch.Generator().manual_seed(seed))]


class Loop(comfy.samplers.CFGGuider):
    """Eq. 7 as written: every model patched and run on its own, the predictions added up.

    parts: (model, positive, negative, cfg, weight (B or 1, 1, h, w)); the sampling itself is `base`'s.
    """

    def __init__(self, base, parts):
        super().__init__(base)
        self.parts = parts
        self.set_conds(*parts[-1][1:3])

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        return sum(weight.to(x) * predict(plain(*part), x, timestep) for *part, weight in self.parts)


def predict(guider, x, timestep):
    """One prediction (B, C, h, w) of a guider at a latent in the model's own space."""
    out = []

    def once(wrapped, start, sigmas, extra_args=None, **others):
        out.append(wrapped(x, timestep, **extra_args))
        return start

    guider.sample(torch.zeros_like(x), x, comfy.samplers.KSAMPLER(once), timestep[:1].repeat(2), disable_pbar=True, seed=0)
    return out[0]
