"""Deterministic DDIM with the papers' last level, and with the steps that their codes leave out."""

from __future__ import annotations

import comfy.model_management
import comfy.samplers
import torch
from tqdm.auto import trange

from ...algorithms.inversion import ddim_step
from .clean_level import SAME, clean_sigma, input_scale


def ddim_sampler(clean_level: str = "sigma 0", skip_steps: int = 0) -> comfy.samplers.KSAMPLER:
    """SAMPLER; see `sample_ddim`."""
    return comfy.samplers.KSAMPLER(sample_ddim, {"clean_level": clean_level, "skip_steps": skip_steps})


@torch.no_grad()
def sample_ddim(
    model, x, sigmas, extra_args=None, callback=None, disable=None, *, clean_level: str = "sigma 0", skip_steps: int = 0
):
    """x: (B, C, ...) at sigmas[0]; sigmas: (S + 1,) descending to 0. Signature of k-diffusion's samplers.

    clean_level: where the last step ends, in place of sigma 0; the result is then the network's own latent there,
    which the papers' codes decode. skip_steps: levels left out at the start, over which the network's own latent
    stays as it is (CompVis StyleID).
    """
    extra_args, sampling = extra_args or {}, model.inner_model.inner_model.model_sampling
    if not 0 <= skip_steps < len(sigmas) - 1:
        raise ValueError(f"skip_steps: got {skip_steps} of {len(sigmas) - 1} steps; leave at least one.")
    last = torch.tensor(clean_sigma(sampling, clean_level)).to(sigmas)

    def kept(x, sigma, sigma_next):
        return x * (input_scale(sampling, sigma) / input_scale(sampling, sigma_next)).to(x)

    if skip_steps:
        x = kept(x, sigmas[0], sigmas[skip_steps])
    for i in trange(skip_steps, len(sigmas) - 1, disable=disable):
        comfy.model_management.throw_exception_if_processing_interrupted()
        sigma, ends = sigmas[i], sigmas[i + 1] == 0
        sigma_next = last if ends else sigmas[i + 1]
        if sigma > sigma_next * (1 + SAME):
            denoised = model(x, sigma * x.new_ones([x.shape[0]]), **extra_args)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
            x = ddim_step(x, denoised, sigma, sigma_next)
        if ends and last > 0:
            x = x * input_scale(sampling, last).to(x)
    return x
