"""An inverted latent as core's samplers take it: the NOISE that makes them start from it."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.graph_utils import ExecutionBlocker

ALIKE = 1e-6  # a share of the latent or noise that a sampler keeps; below it the start cannot be set


class InvertedNoise:
    """NOISE for SamplerCustomAdvanced: whatever latent it is given, sampling starts from the inverted one.

    latent: (B, C, ...) at sigmas[0] in the model's own latent space. Core's samplers start from
    noise_scaling(sigma, noise, latent), which is affine in the noise: x = a n + b. So n = (x - b) / a.
    """

    seed = 0

    def __init__(self, model: ModelPatcher, sigmas: torch.Tensor, latent: torch.Tensor):
        self.model, self.sigmas, self.latent = model, sigmas, latent

    def generate_noise(self, input_latent: dict) -> torch.Tensor:
        """(B, C, ...) float32 on the CPU for the LATENT that the sampler gets. ValueError where it does not fit."""
        samples = input_latent["samples"]
        if samples.is_nested or samples.shape != self.latent.shape:
            got = "several latents of different kinds" if samples.is_nested else tuple(samples.shape)
            raise ValueError(
                f"noise: it was inverted from a latent of shape {tuple(self.latent.shape)}, the sampler's latent_image is "
                f"{got}. Connect DDIM Inversion's own latent, or an empty one of its size and batch."
            )
        share = float(self._start(torch.ones(1), torch.zeros(1)))
        if abs(share) < ALIKE:
            raise ValueError(
                "noise: this model's sampling takes the latent as it is and no noise. "
                "Connect DDIM Inversion's latent output to the sampler instead."
            )
        samples = samples.to("cpu", torch.float32)
        if bool(samples.any()):  # core leaves an empty latent as it is
            samples = self.model.model.process_latent_in(samples)
        return (self.latent - self._start(torch.zeros_like(samples), samples)) / share

    def as_latent(self) -> torch.Tensor:
        """(B, C, ...) samples of the LATENT from which a sampler without added noise starts alike.

        Where a sampler keeps nothing of its latent (`latent_refusal`) these are the inverted latent as it is.
        """
        samples = self.model.model.process_latent_out(self.latent / (self._latent_share() or 1.0))
        return samples.to(comfy.model_management.intermediate_device())

    def latent_refusal(self) -> str | None:
        """For users: why `as_latent` would be lost on a sampler's way in; None where it is not."""
        if self._latent_share():
            return None
        return (
            f"On this flow model a sampler that starts at sigma {float(self.sigmas[0]):.3f} takes everything from its noise and "
            "nothing from latent_image, so the inverted latent would be lost. Connect the NOISE output to "
            "SamplerCustomAdvanced, with the same SIGMAS and an empty latent of the same size as latent_image."
        )

    def _latent_share(self) -> float:
        """How much of its latent a sampler without added noise starts from: 1, for flow models 1 - sigmas[0]."""
        share = float(self._start(torch.zeros(1), torch.ones(1)))
        return share if abs(share) > ALIKE else 0.0

    def _start(self, noise: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """What core's samplers start from, in the model's latent space, by their own rule for the largest sigma."""
        sampling = self.model.get_model_object("model_sampling")
        model_wrap = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling))
        everything = comfy.samplers.Sampler().max_denoise(model_wrap, self.sigmas)
        return sampling.noise_scaling(self.sigmas[:1].cpu(), noise, latent, everything)


def latent_output(noise: InvertedNoise, latent: dict) -> dict | ExecutionBlocker:
    """`latent` as a node's output; where a sampler would lose it, what stops the nodes behind it with the reason."""
    refusal = noise.latent_refusal()
    if refusal is None:
        return latent
    logging.info("Pastiche: the latent output is closed. %s", refusal)
    return ExecutionBlocker(refusal)


def no_output(reason: str) -> ExecutionBlocker:
    """An output that there is not: nodes behind it stop with `reason`."""
    return ExecutionBlocker(reason)
