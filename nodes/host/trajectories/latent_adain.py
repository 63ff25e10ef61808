"""Latent AdaIN on LATENT dictionaries."""

from __future__ import annotations

import torch

from ...algorithms.masks import resize_mask
from ...algorithms.styleid import adain, blend
from .inversion import check_latent
from .noise import InvertedNoise

EACH, BATCH = STATISTICS = ("each", "batch")


def noise_adain(
    content: InvertedNoise, style: InvertedNoise, strength: float, content_mask: torch.Tensor | None, style_mask: torch.Tensor | None,
    epsilon: float = 0.0, statistics: str = EACH,
) -> InvertedNoise:
    """`latent_adain` of two inversions' NOISE, in the model's own latent space."""
    for name, noise in (("content", content), ("style", style)):
        if not isinstance(noise, InvertedNoise):
            raise ValueError(
                f"{name}: expected DDIM Inversion's NOISE on both content and style, or its noise latent on both; "
                f"got {type(noise).__name__}."
            )
    styled = latent_adain({"samples": content.latent}, {"samples": style.latent}, strength, content_mask, style_mask, epsilon, statistics)
    return InvertedNoise(content.model, content.sigmas, styled["samples"])


def latent_adain(
    content: dict, style: dict, strength: float, content_mask: torch.Tensor | None, style_mask: torch.Tensor | None,
    epsilon: float = 0.0, statistics: str = EACH,
) -> dict:
    """Content LATENT with the style LATENT's channel statistics (StyleID eq. 7).

    Masks (B or 1, H, W) of any size choose what the statistics are taken from; the content's mask also limits
    what changes, softly. strength blends, 0..1. epsilon is added to the content's deviations. A video's statistics are over all its frames.
    statistics: "each" picture's own, or those of the whole "batch", one mean and deviation a channel for all contents and for all
    styles, so that the frames of a film move together; any number of styles then. Raises ValueError for unlike channels or batches.
    """
    target, reference = check_latent(content, "content"), check_latent(style, "style").to(content["samples"])
    if target.shape[1] != reference.shape[1]:
        raise ValueError(
            f"style: {reference.shape[1]} latent channels, the content has {target.shape[1]}. "
            "Encode and invert both with the same model and VAE."
        )
    if statistics not in STATISTICS:
        raise ValueError(f'statistics: got "{statistics}", choose among {", ".join(STATISTICS)}.')
    if statistics == EACH and reference.shape[0] not in (1, target.shape[0]):
        raise ValueError(
            f"style: {reference.shape[0]} latents for {target.shape[0]} contents; connect one style, or one for each, "
            f"or set statistics to {BATCH}."
        )
    if strength == 0:
        return content
    weights = {name: _latent_mask(mask, name, latent) for name, mask, latent in
               (("content_mask", content_mask, target), ("style_mask", style_mask, reference))}
    flat, style_pictures, weight = _as_picture(target), _as_picture(reference), strength
    lay = _below if statistics == BATCH else lambda pictures, count=1: pictures
    precision = torch.promote_types(target.dtype, torch.float32)
    styled = adain(
        lay(flat).to(precision), lay(style_pictures).to(precision),
        lay(weights["content_mask"], len(flat)), lay(weights["style_mask"], len(style_pictures)), epsilon=epsilon,
    ).to(target)
    if statistics == BATCH:
        styled = styled[0].unflatten(1, (len(flat), flat.shape[2])).movedim(1, 0)  # 1C(BH)W -> BCHW
    if content_mask is not None:
        weight = strength * weights["content_mask"].to(target)
    return content | {"samples": blend(flat, styled, weight).reshape(target.shape)}


def _below(pictures: torch.Tensor | None, count: int = -1) -> torch.Tensor | None:
    """BCHW -> 1C(BH)W: a batch as one picture, below each other; with `count` a single one is that many alike."""
    if pictures is None:
        return None
    return pictures.expand(count, -1, -1, -1).movedim(0, 1).flatten(1, 2).unsqueeze(0)


def _as_picture(latent: torch.Tensor) -> torch.Tensor:
    """BCTHW -> BC(TH)W: a video's frames below each other; BCHW stays."""
    return latent.flatten(2, 3) if latent.ndim == 5 else latent


def _latent_mask(mask: torch.Tensor | None, name: str, latent: torch.Tensor) -> torch.Tensor | None:
    """(B, H, W) in pixels -> (B, 1, h, w) on the latent's grid, once for every frame."""
    if mask is None:
        return None
    if mask.shape[0] not in (1, latent.shape[0]):
        raise ValueError(f"{name}: {mask.shape[0]} masks for {latent.shape[0]} latents; connect one mask or {latent.shape[0]}.")
    resized = resize_mask(mask, *latent.shape[-2:]).unsqueeze(1)  # BHW -> B1hw
    return resized.repeat(1, 1, latent.shape[2], 1) if latent.ndim == 5 else resized
