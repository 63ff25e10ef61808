"""Measures of agreement between tensors."""

from __future__ import annotations

import math

import torch


def psnr(a: torch.Tensor, b: torch.Tensor, peak: float) -> float:
    """Peak signal-to-noise ratio in dB of two tensors of one shape; infinite when equal."""
    error = float((a.double() - b.double()).square().mean())
    return float("inf") if error == 0 else 10 * math.log10(peak**2 / error)
