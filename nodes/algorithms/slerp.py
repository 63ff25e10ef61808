"""Spherical interpolation of U-Net features, as InjectFusion mixes them (Jeong et al. 2024, section 4.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DEGENERATE = 1e-4  # sin(angle) under which the arc is taken as straight (or, near pi, has no unique direction)


def slerp(h: Tensor, content: Tensor, gamma: float) -> Tensor:
    """Turns `h` towards `content` by the share `gamma` of their angle, keeping the norm of `h`.

        h~ = sin((1 - g) a) / sin(a) * h + sin(g a) / sin(a) * h_c * |h| / |h_c|      a: angle of h and h_c

    h: (B, C, H, W); content: (B or 1, C, H, W) -> (B, C, H, W) with the dtype of `h`. Norms and the angle
    are over C, H, W of each sample and computed in float32 at least. Angles near 0 or pi interpolate
    linearly; where either norm is 0 there is no direction to turn to and `h` is returned. gamma 0 returns
    `h` itself, gamma 1 the norm-matched content.
    """
    if gamma == 0:
        return h
    ours, theirs = _widen(h), _widen(content)
    return _arc(ours, theirs, gamma).to(h.dtype)


def masked_slerp(h: Tensor, content: Tensor, gamma: float, mask: Tensor, matched: bool = True) -> Tensor:
    """Local mixing: slerp of the masked parts, norms of the masked parts, and (1 - M) h outside.

    mask: (B or 1, 1, H, W) in 0..1 on the grid of `h`. Where it is 0, `h` is untouched bit for bit.
    matched: whether the content's masked part is brought to the norm of h's, as everywhere else (eq. 5); the
    authors' code does not do it with masks.
    """
    if gamma == 0:
        return h
    ours = _widen(h)
    mask = mask.to(ours)
    inside = _arc(mask * ours, mask * _widen(content), gamma, matched)
    return (inside + (1 - mask) * ours).to(h.dtype)


def match_norm(content: Tensor, h: Tensor) -> Tensor:
    """h_c * |h| / |h_c| for each sample of (B, C, H, W); zero content stays zero."""
    norm = _norm(content)
    return content * torch.where(norm > 0, _norm(h) / norm, torch.zeros_like(norm))


def lerp(h: Tensor, content: Tensor, gamma: float) -> Tensor:
    """(1 - g) h + g h_c: the paper's comparison, which shrinks the norm of features at an angle."""
    return ((1 - gamma) * _widen(h) + gamma * _widen(content)).to(h.dtype)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """(B, 1, 1, 1) angle of every sample in radians; accurate near 0 and pi (Kahan's form). Norms must be > 0."""
    a, b = a / _norm(a), b / _norm(b)
    return 2 * torch.atan2(_norm(a - b), _norm(a + b))


def resize_features(features: Tensor, height: int, width: int) -> Tensor:
    """(B, C, h, w) -> (B, C, height, width): bicubic, antialiased when it shrinks, in float32 at least."""
    if features.shape[-2:] == (height, width):
        return features
    wide = _widen(features)
    return F.interpolate(wide, (height, width), mode="bicubic", antialias=True).to(features.dtype)


def _arc(h: Tensor, content: Tensor, gamma: float, matched: bool = True) -> Tensor:
    if matched:
        content = match_norm(content, h)
    turn = angle(h, content)
    sine = torch.sin(turn)
    straight = ~(sine > DEGENERATE)  # also true for NaN, the angle of a zero vector
    safe = torch.where(straight, torch.ones_like(sine), sine)
    keep = torch.where(straight, torch.full_like(sine, 1 - gamma), torch.sin((1 - gamma) * turn) / safe)
    take = torch.where(straight, torch.full_like(sine, gamma), torch.sin(gamma * turn) / safe)
    turned = keep * h + take * content
    return torch.where((_norm(content) > 0) & (_norm(h) > 0), turned, h)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
