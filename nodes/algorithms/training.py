"""The training objective of style LoRAs, for any parameterisation of a diffusion or flow model.

A model gives a denoised prediction D of the clean latent x0 at x = a x0 + b noise. Its own output m enters D
linearly, D = c m + ..., so the squared error of m is that of D divided by c^2: eps, v and velocity alike.
"""

from __future__ import annotations

import math
from typing import Callable

import torch
from torch import Tensor

SCHEDULES = ("constant", "cosine")
WARM_UP = 0.1  # of a cosine schedule's steps
Scaling = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(sigma (B,), first (B, 1), second (B, 1)) -> (B, 1)"""


def output_gain(calculate_denoised: Scaling, sigma: Tensor) -> Tensor:
    """(B,) -> (B,): c = dD / dm. calculate_denoised(sigma, output, input) is the model's own."""
    one = torch.ones_like(sigma)[:, None]
    return calculate_denoised(sigma, one, torch.zeros_like(one))[:, 0]


def signal_to_noise(noise_scaling: Scaling, sigma: Tensor) -> Tensor:
    """(B,) -> (B,): SNR = (a / b)^2 of x = a x0 + b noise. noise_scaling(sigma, noise, latent) is the model's own."""
    one = torch.ones_like(sigma)[:, None]
    signal = noise_scaling(sigma, torch.zeros_like(one), one)[:, 0]
    noise = noise_scaling(sigma, one, torch.zeros_like(one))[:, 0]
    return (signal / noise) ** 2


def loss_weight(gain: Tensor, snr: Tensor, min_snr_gamma: float, clean_weight: float = 0.0) -> Tensor:
    """(B,): weight of |D - x0|^2.

    gamma 0: 1 / c^2, the plain error of the model's own output. Else min(SNR, gamma) (Hang et al. 2023), which
    is min(SNR, gamma) / SNR on eps and min(SNR, gamma) / (SNR + 1) on v. clean_weight adds that many times the
    error of x0 itself, which the error of eps all but leaves out at high noise; 1 beside eps is the error of v.
    """
    weight = snr.clamp(max=min_snr_gamma) if min_snr_gamma > 0 else gain**-2
    return weight + clean_weight if clean_weight > 0 else weight


def rate_share(schedule: str, step: int, steps: int) -> float:
    """The learning rate of a step (from 0) as a share of the given one.

    cosine: rises evenly over the first tenth, times half a cosine that would reach 0 after the last step.
    """
    if schedule == "constant":
        return 1.0
    if schedule != "cosine":
        raise ValueError(f'schedule: got "{schedule}", choose among {", ".join(SCHEDULES)}.')
    return min(1.0, (step + 1) / (WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


def weighted_error(denoised: Tensor, clean: Tensor, weight: Tensor) -> Tensor:
    """(B, ...), (B, ...), (B,) -> (B,): weighted mean squared error of every sample."""
    return weight * (denoised - clean).square().flatten(1).mean(dim=1)


def window_means(values: list[float], window: int) -> list[float]:
    """Mean of each value and those before it, at most `window` of them: as many as there are values."""
    return [sum(part) / len(part) for part in (values[max(0, end - window) : end] for end in range(1, len(values) + 1))]


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator that belongs to one training step, so that resuming needs no generator state.

    Step -1 is the initialisation. The two numbers are mixed (splitmix64) so that neighbours do not correlate.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xD1B54A32D192ED03) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return torch.Generator().manual_seed((mixed ^ (mixed >> 31)) >> 1)


def random_crop(latents: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """(B, C, H, W) -> (B, C, h, w): one random window for the batch, sides `share` .. 1 of the latent's.

    Sides are whole multiples of 8 cells (a U-Net halves three times), or the latent's own where that is smaller.
    """
    height, width = latents.shape[-2:]
    scale = share + (1 - share) * float(torch.rand((), generator=generator))
    h, w = (max(min(8, side), int(side * scale) // 8 * 8) for side in (height, width))
    top = int(torch.randint(height - h + 1, (), generator=generator))
    left = int(torch.randint(width - w + 1, (), generator=generator))
    return latents[..., top : top + h, left : left + w]
