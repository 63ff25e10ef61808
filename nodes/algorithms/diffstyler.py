"""DiffStyler (localized image style transfer): masks and mixtures on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE = 1e-6  # what rounding leaves of a partition of unity
OVERLAPS: tuple[str, ...] = ("share", "later")


def normalise_masks(masks: Tensor, overlap: str = "share") -> tuple[Tensor, Tensor]:
    """Weights of the styles and of the base model: (S, B, H, W) in [0, 1] -> (S, B, H, W), (B, H, W), summing to 1.

    overlap "share": where the masks add up to more than 1 they are divided by their sum; where to less, the base has
    the rest. "later": a later mask covers the earlier ones as a layer of its opacity, w_i = m_i prod_{j>i} (1 - m_j);
    with hard masks that is the official code's overwriting. A mask alone is returned as it is, exactly.
    Raises ValueError for another overlap.
    """
    if overlap not in OVERLAPS:
        raise ValueError(f'overlap: got "{overlap}", choose among {", ".join(OVERLAPS)}.')
    if overlap == "later":
        weights, rest = masks.clone(), torch.ones_like(masks[0])
        for number in reversed(range(len(masks))):
            weights[number] = masks[number] * rest
            rest = rest * (1 - masks[number])
        return weights, rest
    total = masks.sum(dim=0)
    rest = 1 - total.clamp(max=1)
    return masks / total.clamp(min=1), torch.where(rest < NEGLIGIBLE, torch.zeros_like(rest), rest)


def mix_predictions(weighted: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Eq. 7: the sum of predictions times masks. Pairs of (B, C, H, W) and (B or 1, 1, H, W); at least one."""
    (prediction, weight), *others = weighted
    mixed = prediction * weight
    for prediction, weight in others:
        mixed = mixed + prediction * weight
    return mixed


def keep_outside(sample: Tensor, content: Tensor, mask: Tensor) -> Tensor:
    """Eq. 6: M z* + (1 - M) z, exactly `content` where M is 0 and `sample` where it is 1. (B, C, H, W), mask (B or 1, 1, H, W)."""
    blended = mask * sample + (1 - mask) * content
    return torch.where(mask == 0, content, torch.where(mask == 1, sample, blended))


def blend_share(timestep: float) -> float:
    """The official code's share of the content in queries and keys: min(1, 2 t / 1000), t in 0..999."""
    return min(1.0, 2.0 * timestep / 1000.0)


def override_or_blend(ours: Tensor, content: Tensor, share: float) -> Tensor:
    """(rows, ...) twice: content where share is 1 (the paper's override), a mixture below."""
    return content if share >= 1.0 else share * content + (1.0 - share) * ours
