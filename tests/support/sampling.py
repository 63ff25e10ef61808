"""Sampling as core's SamplerCustom does it, without the node."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch


def schedule(model, steps: int, name: str = "normal") -> torch.Tensor:
    """Core's SIGMAS of a scheduler: (steps + 1,), descending to 0."""
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), name, steps)


def sample(model, latent: torch.Tensor, sigmas, positive, negative=None, cfg=1.0, sampler="euler", callback=None) -> torch.Tensor:
    """Continues a LATENT (B, C, H, W) without added noise; cfg 1 leaves the negative unused."""
    return comfy.sample.sample_custom(
        model, torch.zeros_like(latent), cfg, comfy.samplers.sampler_object(sampler), sigmas, positive,
        positive if negative is None else negative, latent, callback=callback, disable_pbar=True, seed=0,
    )


def random_latent(height: int = 8, width: int = 8, batch: int = 1, seed: int = 0, channels: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(batch, channels, height, width, generator=generator)


def cancelled_at(model, evaluation: int):
    """A clone of `model` and the list of sigmas it is evaluated at; Cancel is pressed during the `evaluation`-th, from 1."""
    levels, cancelling = [], model.clone()
    inner = cancelling.model_options.get("model_function_wrapper")

    def wrapper(apply_model, args):
        levels.append(float(args["timestep"][0]))
        if len(levels) == evaluation:
            comfy.model_management.interrupt_current_processing()
        return inner(apply_model, args) if inner else apply_model(args["input"], args["timestep"], **args["c"])

    cancelling.set_model_unet_function_wrapper(wrapper)
    return cancelling, levels
