"""StyleID (Chung, Hyun, Heo: Style Injection in Diffusion, CVPR 2024): the equations on tensors."""

from __future__ import annotations

import torch


def masked_statistics(x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased standard deviation of each channel over the pixels of one sample.

    x: (B, C, H, W); mask: (B or 1, 1, H, W) weights in [0, 1] or None. Returns two (B, C, 1, 1).
    A single pixel deviates from nothing: 0. With weights w the variance is sum w (x - mean)^2 / (sum w - sum w^2 / sum w), torch's own for w = 1.
    """
    if mask is None:
        mean = x.mean(dim=(2, 3), keepdim=True)
        return mean, x.std(dim=(2, 3), keepdim=True) if x[0, 0].numel() > 1 else torch.zeros_like(mean)
    weight = mask.to(x).expand(x.shape[0], 1, *x.shape[2:])
    total = weight.sum(dim=(2, 3), keepdim=True).clamp_min(1e-12)
    mean = (weight * x).sum(dim=(2, 3), keepdim=True) / total
    freedom = (total - weight.square().sum(dim=(2, 3), keepdim=True) / total).clamp_min(1e-12)
    variance = (weight * (x - mean).square()).sum(dim=(2, 3), keepdim=True) / freedom
    return mean, variance.sqrt()


def adain(
    content: torch.Tensor,
    style: torch.Tensor,
    content_mask: torch.Tensor | None = None,
    style_mask: torch.Tensor | None = None,
    flat: float = 1e-5,
    epsilon: float = 0.0,
) -> torch.Tensor:
    """Initial latent AdaIN (StyleID eq. 7): std_s (c - mean_c) / std_c + mean_s, per channel and sample.

    content: (B, C, H, W); style: (B or 1, C, h, w), any size. Masks (B or 1, 1, H, W) choose the pixels that
    the statistics come from. A flat content channel (std below `flat` of the style's) has no shape to
    rescale and takes the style's mean only. epsilon: added to std_c.
    """
    return restandardised(content, masked_statistics(content, content_mask), masked_statistics(style, style_mask), flat, epsilon)


def restandardised(
    content: torch.Tensor, own: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor], flat: float = 1e-5,
    epsilon: float = 0.0,
) -> torch.Tensor:
    """(B, C, H, W) with means and deviations `own` -> with `wanted`; each a pair of (B or 1, C, 1, 1). flat, epsilon: see `adain`."""
    (content_mean, content_std), (style_mean, style_std) = own, wanted
    degenerate = content_std <= flat * style_std.clamp_min(flat)
    scale = torch.where(degenerate, torch.zeros_like(content_std), style_std / (content_std + epsilon).clamp_min(1e-12))
    return scale * (content - content_mean) + style_mean


def injected_query(query: torch.Tensor, content: torch.Tensor | None, gamma: float, temperature: float) -> torch.Tensor:
    """tau (gamma Q_c + (1 - gamma) Q) (eq. 5 and 6): query preservation, and the temperature that multiplies the logits.

    (rows, T, C) each. As the projections of SD's U-Nets are linear without bias, the same line on the hidden
    state before to_q gives the same attention. `content` None leaves the query to the sample.
    """
    mixed = query if content is None else gamma * content + (1.0 - gamma) * query
    return mixed if temperature == 1.0 else temperature * mixed


def blend(plain: torch.Tensor, styled: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    """plain + weight (styled - plain): exactly `plain` where the weight is 0."""
    return plain + weight * (styled - plain)
