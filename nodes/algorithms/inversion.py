"""DDIM inversion in ComfyUI's sigma notation (x = z / sqrt(alpha_bar), sigma = sqrt((1 - alpha_bar) / alpha_bar))."""

from __future__ import annotations

from typing import Callable

import torch

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x (B, C, H, W), sigma scalar tensor) -> denoised (B, C, H, W)."""

SCHEMES = ("fixed_point", "next", "current")
CONVERGED = 1e-7  # residual over |x'| at which single precision has nothing left to gain


def ddim_step(x: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    """One deterministic DDIM step (Song et al. 2021, eq. 12 with eta 0) from `sigma` to `sigma_next`, either way."""
    return x + (sigma_next - sigma) * noise_prediction(x, denoised, sigma)


def noise_prediction(x: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """eps = (x - D) / sigma; sigma > 0."""
    return (x - denoised) / sigma


def sample_norm(x: torch.Tensor) -> torch.Tensor:
    """(B, ...) -> (B,): L2 norm of every sample."""
    return x.flatten(1).norm(dim=1)


def step_current(predict: Predict, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> tuple:
    """x' = x + (s' - s) eps(x, s): the classic inversion, exact only if eps were the same at both ends.

    Returns (x', denoised).
    """
    denoised = predict(x, sigma)
    return ddim_step(x, denoised, sigma, sigma_next), denoised


def step_fixed_point(
    predict: Predict,
    x: torch.Tensor,
    sigma: torch.Tensor,
    sigma_next: torch.Tensor,
    iterations: int,
    rescale: torch.Tensor | float = 1.0,
) -> tuple:
    """Solves x' = x + (s' - s) eps(x', s'), whose solution the sampler's Euler step takes back to x exactly.

    The first guess is `next`, which `iterations` = 0 returns: eps of the latent as it is with the entered
    noise level's timestep. The network's own latent is z = c_in(s) x, and diffusers leaves z alone while t
    moves on, so x comes to s' times `rescale` = c_in(s) / c_in(s') (1 for flow models). Each iteration moves
    only where eps is evaluated, never the anchor x. A sample whose residual |x' - x - (s' - s) eps(x')| grows
    goes back to its best iterate and stops; one whose residual reaches rounding stops where it is.

    Returns (x', denoised, diverged (B,) bool).
    """
    step = sigma_next - sigma
    moved = rescale * x
    denoised = predict(moved, sigma_next)
    previous = candidate = x + step * noise_prediction(moved, denoised, sigma_next)
    smallest = torch.full_like(sample_norm(x), float("inf"))
    rounding = CONVERGED * sample_norm(candidate)
    active = torch.ones_like(smallest, dtype=torch.bool)
    diverged = torch.zeros_like(active)
    for _ in range(iterations):
        denoised = predict(candidate, sigma_next)
        update = x + step * noise_prediction(candidate, denoised, sigma_next)
        residual = sample_norm(update - candidate)
        grew = active & ~(residual < smallest) & ~(residual <= rounding)  # NaN compares false: it grew
        diverged |= grew
        candidate = torch.where(_rows(grew, x), previous, candidate)
        active &= ~grew
        previous = torch.where(_rows(active, x), candidate, previous)
        candidate = torch.where(_rows(active, x), update, candidate)
        smallest = torch.where(active, residual, smallest)
        active &= residual > rounding
        if not bool(active.any()):
            break
    return candidate, denoised, diverged


def _rows(flags: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ...) to broadcast over `like`."""
    return flags.view(-1, *[1] * (like.ndim - 1))
