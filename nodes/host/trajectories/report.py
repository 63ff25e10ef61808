"""The picture and the numbers that tell how well an inversion can be undone."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...algorithms.metrics import psnr
from ...sockets import Trajectory
from ..checks import HALF, check_tensor
from ..networks.fingerprint import fingerprint, require_same_model
from .inversion import reconstruct


def inversion_report(
    model: ModelPatcher, trajectory: Trajectory, vae: Any, amplify: float, sampler: Any | None = None
) -> tuple[torch.Tensor, float, float]:
    """Reconstructs a trajectory with a SAMPLER (None: euler) and compares it with what was inverted.

    Returns a BHWC picture (original | reconstruction | amplified difference around grey), the PSNR in latent
    space (peak: the original's range) and in pixels (peak 1), both in dB against the VAE's own decode.
    """
    require_same_model(fingerprint(model), trajectory.fingerprint, "The trajectory's latents")
    original = model.model.process_latent_out(trajectory.latents[0])
    result = reconstruct(model, trajectory, sampler)
    in_latents = psnr(result, original, float(original.max() - original.min()))
    before, after = (check_tensor(_images(vae.decode(latent)), "vae", HALF) for latent in (original, result))
    difference = (0.5 + amplify * (after - before)).clamp(0, 1)
    return torch.cat([before, after, difference], dim=2), in_latents, psnr(after, before, 1.0)


def _images(decoded: torch.Tensor) -> torch.Tensor:
    """BHWC or BTHWC -> BHWC, frames one after another, colours only."""
    return decoded.reshape(-1, *decoded.shape[-3:])[..., :3].float().cpu()
