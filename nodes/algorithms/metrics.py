"""Measures of agreement between tensors."""

from __future__ import annotations

import math

import torch


def psnr(a: torch.Tensor, b: torch.Tensor, peak: float) -> float:
    """Peak signal-to-noise ratio in dB of two tensors of one shape; infinite when equal."""
    error = float((a.double() - b.double()).square().mean())
    return float("inf") if error == 0 else 10 * math.log10(peak**2 / error)


def channel_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over samples and channels of the correlation of two (B, C, ...) tensors, -1 to 1; B of `b` may be 1.

    A change of each channel's mean and deviation, as AdaIN's, leaves it 1. A constant channel counts as 0.
    """
    a, b = (tensor.double().flatten(2) for tensor in (a, b))
    a, b = (tensor - tensor.mean(-1, keepdim=True) for tensor in (a, b))
    lengths = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return float(((a * b).sum(-1) / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).mean())
