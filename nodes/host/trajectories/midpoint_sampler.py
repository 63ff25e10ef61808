"""FireFlow's sampler: the way down for what `midpoint` inverted."""

from __future__ import annotations

import comfy.model_management
import comfy.samplers
import torch
from tqdm.auto import trange

from ...algorithms.inversion import Leg, step_midpoint


def midpoint_sampler() -> comfy.samplers.KSAMPLER:
    """SAMPLER of second order with one evaluation a step (and one more in the first)."""
    return comfy.samplers.KSAMPLER(sample_midpoint)


@torch.no_grad()
def sample_midpoint(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """x: (B, C, ...) at sigmas[0]; sigmas: (S + 1,) descending. Signature of k-diffusion's samplers."""
    sampling = model.inner_model.inner_model.model_sampling
    extra_args, eps = extra_args or {}, None

    def predict(x, sigma):
        return model(x, sigma * x.new_ones([x.shape[0]]), **extra_args)

    def input_scale(sigma):
        return sampling.calculate_input(sigma, torch.ones_like(sigma))

    for i in trange(len(sigmas) - 1, disable=disable):
        comfy.model_management.throw_exception_if_processing_interrupted()
        landing = step_midpoint(predict, x, Leg(sigmas[i], sigmas[i + 1], eps, input_scale=input_scale))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": landing.denoised})
        x, eps = landing.x, landing.eps
    return x
