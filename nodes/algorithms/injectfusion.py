"""InjectFusion's reverse process in ComfyUI's notation: x = z / sqrt(alpha_bar), sigma^2 = (1 - alpha_bar) / alpha_bar.

Jeong et al., "Training-free Content Injection using h-space in Diffusion Models" (WACV 2024). P is the clean
image predicted without injection, P~ the one predicted with it, both (B, C, H, W); eps = (x - P) / sigma.
"""

from __future__ import annotations

from typing import Literal, Sequence

import torch
from torch import Tensor

from .inversion import ddim_step, noise_prediction

Ramp = Literal["constant", "increasing", "decreasing"]
SCHEDULES: tuple[str, ...] = ("constant", "increasing", "decreasing")


def gamma_schedule(gamma: float, count: int, schedule: Ramp) -> list[float]:
    """The share injected at each of `count` injecting steps, from the noisy end on; always sums to gamma * count.

    The paper's Appendix G compares schedules of equal total. The ramps run linearly around `gamma` as wide as
    they can while every share stays in 0..1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f'schedule: got "{schedule}", choose among {", ".join(SCHEDULES)}.')
    if schedule == "constant" or count < 2:
        return [gamma] * count
    reach = min(gamma, 1 - gamma) * (1 if schedule == "increasing" else -1)
    return [gamma + reach * (2 * k / (count - 1) - 1) for k in range(count)]


def injecting_steps(sampled: Sequence[float], captured: Sequence[float], lowest: float) -> list[int]:
    """Which steps of a sampling run inject: indices into `sampled`, ascending.

    sampled, captured: sigmas > 0 of the run and of the content's features; lowest: sigma(t_edit), under which
    nothing is injected. With no more sampling steps than captured ones in that range every step injects; with
    more, only the sampling step nearest to each captured one (in log sigma), so that the total stays the same.
    """
    floor = lowest * (1 - 1e-5)
    steps = [i for i, sigma in enumerate(sampled) if sigma >= floor and sigma > 0]
    kept = [sigma for sigma in captured if sigma >= floor and sigma > 0]
    if len(steps) <= len(kept):
        return steps
    levels = torch.tensor([sampled[i] for i in steps], dtype=torch.float64).log()
    wanted = torch.tensor(kept, dtype=torch.float64).log()
    nearest = (levels[:, None] - wanted).abs().argmin(dim=0) if kept else []
    return sorted({steps[int(i)] for i in nearest})


def asymmetric_step(
    x: Tensor, clean: Tensor, injected: Tensor, sigma: Tensor, sigma_next: Tensor,
    direction_scale: float = 1.0, noise: Tensor | None = None,
) -> Tensor:
    """P~ + scale * sigma' * eps: the clean image with injection, the direction without (Asyrp, Kwon et al. 2023).

    With P~ = P this is the DDIM step. `noise` (unit variance) makes it eta = 1: see `stochastic_split`.
    """
    if injected is clean and direction_scale == 1.0 and noise is None:
        return ddim_step(x, clean, sigma, sigma_next)
    direction = direction_scale * noise_prediction(x, clean, sigma)
    if noise is None:
        return injected + sigma_next * direction
    down, up = stochastic_split(sigma, sigma_next)
    return injected + down * direction + up * noise


def stochastic_split(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up) of an eta = 1 DDIM step: x' = P + down * eps + up * noise, down^2 + up^2 = sigma'^2.

    DDIM's variance (1 - a') / (1 - a) * (1 - a / a'), divided by a' because x = z / sqrt(a), and with
    a = 1 / (1 + sigma^2), becomes up = sigma' * sqrt(1 - sigma'^2 / sigma^2); what is left is down = sigma'^2 / sigma.
    """
    ratio = sigma_next / sigma
    return sigma_next * ratio, sigma_next * (1 - ratio**2).clamp(min=0).sqrt()


def calibrate(x: Tensor, clean: Tensor, injected: Tensor, omega: float) -> Tensor:
    """x + dx with dx = (P~' - P) + omega * sigma * (eps~ - eps): latent calibration (the paper's eq. 10-12).

    P~' is P~ with its standard deviation matched to P's, over C, H, W of each sample. Since
    sigma * (eps~ - eps) = P - P~, sigma drops out. At omega = 1 only the matching is left:
    dx = P~' - P~ = (P~ - mean P~) * (std P / std P~ - 1).
    """
    return x + (match_spread(injected, clean) - clean) + omega * (clean - injected)


def match_spread(source: Tensor, target: Tensor) -> Tensor:
    """mean(s) + (s - mean(s)) * std(t) / std(s) over C, H, W of each sample; a constant source stays as it is."""
    dims = (1, 2, 3)
    mean = source.mean(dim=dims, keepdim=True)
    spread = source.std(dim=dims, keepdim=True)
    scale = torch.where(spread > 0, target.std(dim=dims, keepdim=True) / spread, torch.ones_like(spread))
    return mean + (source - mean) * scale
