"""Latent AdaIN on LATENT dictionaries."""

from __future__ import annotations

import torch

from ...algorithms.masks import resize_mask
from ...algorithms.styleid import adain, blend
from .inversion import check_latent


def latent_adain(
    content: dict, style: dict, strength: float, content_mask: torch.Tensor | None, style_mask: torch.Tensor | None
) -> dict:
    """Content LATENT with the style LATENT's channel statistics (StyleID eq. 7).

    Masks (B or 1, H, W) of any size choose what the statistics are taken from; the content's mask also limits
    what changes, softly. strength blends, 0..1. Raises ValueError for unlike channels or batches.
    """
    target, reference = check_latent(content, "content"), check_latent(style, "style").to(content["samples"])
    if target.shape[1] != reference.shape[1]:
        raise ValueError(
            f"style: {reference.shape[1]} latent channels, the content has {target.shape[1]}. "
            "Encode and invert both with the same model and VAE."
        )
    if reference.shape[0] not in (1, target.shape[0]):
        raise ValueError(
            f"style: {reference.shape[0]} latents for {target.shape[0]} contents; connect one style, or one for each."
        )
    if strength == 0:
        return content
    weights = {name: _latent_mask(mask, name, latent) for name, mask, latent in
               (("content_mask", content_mask, target), ("style_mask", style_mask, reference))}
    styled = adain(target.float(), reference.float(), weights["content_mask"], weights["style_mask"]).to(target)
    weight = strength if content_mask is None else strength * weights["content_mask"].to(target)
    return content | {"samples": blend(target, styled, weight)}


def _latent_mask(mask: torch.Tensor | None, name: str, latent: torch.Tensor) -> torch.Tensor | None:
    """(B, H, W) in pixels -> (B, 1, h, w) on the latent's grid."""
    if mask is None:
        return None
    if mask.shape[0] not in (1, latent.shape[0]):
        raise ValueError(f"{name}: {mask.shape[0]} masks for {latent.shape[0]} latents; connect one mask or {latent.shape[0]}.")
    return resize_mask(mask, *latent.shape[-2:]).unsqueeze(1)
