"""Masks as tensors: resizing by area, growing, feathering, contours.

A MASK is float, (B, H, W), 0 outside and 1 inside; values between are soft edges.
"""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def as_batch(mask: Tensor) -> Tensor:
    """(H, W) or (B, H, W) -> (B, H, W). Raises ValueError for other ranks."""
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3:
        raise ValueError(f"A mask must be (B, H, W) or (H, W), got shape {tuple(mask.shape)}.")
    return mask


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize soft masks by area: each target cell takes the mean of the source it covers.

    mask: (B, H, W) or (H, W), any dtype -> (B, height, width) float32, same device.
    An axis that grows is interpolated linearly (cell centres, edges held). Ratios need not
    be whole: a source cell on a border counts by its overlap. Constant masks stay constant
    exactly, so an all-zero mask is no mask and an all-one mask is everything.
    Raises ValueError for other ranks or an empty target.
    """
    mask = as_batch(mask)
    if height < 1 or width < 1:
        raise ValueError(f"Cannot resize a mask to {height}x{width}; both sides must be at least 1.")
    if mask.shape[1:] == (height, width):
        return mask.float()
    # float64: weights of one row sum to 1 within 1e-16, which float32 rounds to exactly 1
    device = mask.device
    exact = mask.to("cpu" if device.type == "mps" else device, torch.float64)
    rows = _axis_weights(mask.shape[1], height).to(exact)
    columns = _axis_weights(mask.shape[2], width).to(exact)
    return torch.einsum("yh,bhw,xw->byx", rows, exact, columns).float().to(device)


def _axis_weights(source: int, target: int) -> Tensor:
    """Weights (target, source), rows sum to 1: box overlap when shrinking, linear when growing."""
    cells = torch.arange(source, dtype=torch.float64)
    step = source / target
    if target <= source:
        start = torch.arange(target, dtype=torch.float64)[:, None] * step
        overlap = torch.minimum(start + step, cells + 1) - torch.maximum(start, cells)
        weights = overlap.clamp(min=0)
    else:
        centre = (torch.arange(target, dtype=torch.float64) + 0.5) * step - 0.5
        centre = centre.clamp(0, source - 1)
        weights = (1 - (centre[:, None] - cells).abs()).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


def grow_mask(mask: Tensor, pixels: int, each: Callable[[], None] = lambda: None) -> Tensor:
    """Grow (or with a negative number shrink) masks by a disc of this radius. (B, H, W) -> (B, H, W).

    The grey-scale dilation: each pixel takes the largest value within the disc, so soft edges move
    and stay soft. The image's border neither adds nor takes anything. each: called for every row of the disc; may raise.
    """
    if pixels == 0:
        return mask
    if pixels < 0:
        return 1 - grow_mask(1 - mask, -pixels, each)
    height, width = mask.shape[1:]
    margin = min(pixels, width)
    grown = mask.clone()
    window, size = F.pad(mask, (margin, margin), value=-torch.inf), 1  # window[x]: the largest of `size` neighbours from x on
    for offset in range(min(pixels, height - 1), -1, -1):  # from the disc's edge inwards, where it is widest
        each()
        reach = min(int((pixels * pixels - offset * offset) ** 0.5), margin)
        while 2 * size <= 2 * reach + 1:
            window, size = torch.maximum(window[..., :-size], window[..., size:]), 2 * size
        left, right = margin - reach, margin + reach + 1 - size
        row = torch.maximum(window[..., left : left + width], window[..., right : right + width])
        torch.maximum(grown[:, offset:], row[:, : height - offset], out=grown[:, offset:])
        torch.maximum(grown[:, : height - offset], row[:, offset:], out=grown[:, : height - offset])
    return grown


def feather_mask(mask: Tensor, pixels: float) -> Tensor:
    """Soften edges over about `pixels` on either side: a Gaussian of half that deviation, borders held.

    (B, H, W) -> (B, H, W). Constant masks stay constant.
    """
    if pixels <= 0:
        return mask
    sigma = pixels / 2
    radius = max(1, round(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=mask.dtype, device=mask.device) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    soft = mask[:, None]
    for shape, padding in (((1, 1, 1, -1), (radius, radius, 0, 0)), ((1, 1, -1, 1), (0, 0, radius, radius))):
        soft = F.conv2d(F.pad(soft, padding, mode="replicate"), kernel.view(shape))
    return soft[:, 0].clamp(0, 1)


def boundary(mask: Tensor, thickness: int = 1) -> Tensor:
    """Inner contour of binary masks: (B, H, W) bool -> bool. The image's border is no contour."""
    solid = mask.float()
    return mask & (grow_mask(solid, -max(1, thickness)) < 0.5)
