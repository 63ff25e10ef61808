"""What a style LoRA is trained on: latents, or images whose VAE posterior is sampled anew each step."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from ...algorithms.training import random_crop
from ..trajectories.inversion import check_latent


class TrainingImages:
    """N images as latents of one size; `draw` gives a batch of them, augmented.

    mean: (V, N, C, H, W) float32, V = 1, or 2 with the mirrored images second. std: the like, or None where the
    latents are exact. Everything random comes from the generator given to `draw`.
    """

    def __init__(self, mean: Tensor, std: Tensor | None = None):
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return self.mean.shape[1]

    @property
    def shape(self) -> torch.Size:
        """(1, C, H, W): one image's latent."""
        return torch.Size((1, *self.mean.shape[2:]))

    @property
    def samples_posterior(self) -> bool:
        return self.std is not None

    def draw(self, indices: list[int], generator: torch.Generator, flip: bool, crop: float) -> Tensor:
        """(len(indices), C, h, w) on the CPU; h, w <= H, W with crop < 1 (smallest side as a share)."""
        mirrored = torch.rand(len(indices), generator=generator) < 0.5
        latents = []
        for index, mirror in zip(indices, (mirrored & flip).tolist()):
            variant = int(mirror and len(self.mean) > 1)
            latent = self.mean[variant, index]
            if self.std is not None:
                latent = latent + self.std[variant, index] * torch.randn(latent.shape, generator=generator)
            latents.append(latent.flip(-1) if mirror and not variant else latent)
        batch = torch.stack(latents)
        return random_crop(batch, crop, generator) if crop < 1 else batch

    def digest(self) -> str:
        content = hashlib.sha256()
        for tensor in (self.mean, self.std):
            if tensor is not None:
                content.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
        return content.hexdigest()[:16]


def training_images(latents: dict | None, image: Tensor | None, vae: Any | None, flip: bool) -> TrainingImages:
    """From a LATENT, or from an IMAGE (B, H, W, 3) and a VAE. Raises ValueError for neither or both."""
    if (latents is None) == (image is None):
        got = "neither" if latents is None else "both"
        raise ValueError(f"Connect either latents, or image and vae; got {got}.")
    name, batch = ("latents", latents["samples"]) if latents is not None else ("image", image)
    if batch.shape[0] == 0:
        raise ValueError(f"{name}: got a batch of 0 images, connect at least one.")
    if latents is not None:
        return TrainingImages(check_latent(latents, "latents").float().cpu().clone()[None])
    if vae is None:
        raise ValueError("image needs a vae to be encoded with: connect the checkpoint's VAE.")
    views = [image, image.flip(2)] if flip else [image]
    encoded = [encode_posterior(vae, view[..., :3]) for view in views]
    mean = torch.stack([mean for mean, _ in encoded])
    if not bool(torch.isfinite(mean).all()):
        raise ValueError("The VAE encodes this image to NaN: use a fp16-fixed VAE or start ComfyUI with --fp32-vae.")
    exact = any(std is None for _, std in encoded)
    return TrainingImages(mean, None if exact else torch.stack([std for _, std in encoded]))


def encode_posterior(vae: Any, image: Tensor) -> tuple[Tensor, Tensor | None]:
    """IMAGE (B, H, W, 3) -> mean and standard deviation (B, C, h, w) of the VAE's posterior, float32, CPU.

    The deviation is None where the VAE has no Gaussian posterior (TAESD, a mini VAE) or had to encode in tiles.
    ComfyUI's VAE hands out the mean alone, so the moments are read where they enter its regulariser.
    """
    regulariser = getattr(vae.first_stage_model, "regularization", None)
    moments: list[Tensor] = []
    hook = None
    if isinstance(regulariser, torch.nn.Module):
        hook = regulariser.register_forward_pre_hook(lambda module, args: moments.append(args[0].float().cpu()))
    try:
        latent = vae.encode(image).float().cpu().clone()
    finally:
        if hook is not None:
            hook.remove()
    stacked = torch.cat(moments) if moments else torch.empty(0)
    if stacked.shape != (len(latent), 2 * latent.shape[1], *latent.shape[2:]):
        return latent, None
    mean, log_variance = stacked.chunk(2, dim=1)
    if not torch.allclose(mean, latent, rtol=1e-2, atol=1e-2):
        return latent, None  # what the VAE returns is not its posterior's mean
    return latent, torch.exp(0.5 * log_variance.clamp(-30, 20)).clone()
