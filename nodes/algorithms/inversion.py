"""DDIM inversion in ComfyUI's sigma notation (x = z / sqrt(alpha_bar), sigma = sqrt((1 - alpha_bar) / alpha_bar)).

Latents are (B, C, H, W) or (B, C, T, H, W). For flow models sigma is the flow's own time and eps its velocity:
the equations are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, ...), sigma scalar tensor) -> denoised (B, C, ...)."""

ROUNDING = 1e-7  # residual over |x'| at which single precision has nothing left to gain


def ddim_step(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One deterministic DDIM step (Song et al. 2021, eq. 12 with eta 0) from `sigma` to `sigma_next`, either way."""
    return x + (sigma_next - sigma) * noise_prediction(x, denoised, sigma)


def noise_prediction(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """eps = (x - D) / sigma; sigma > 0."""
    return (x - denoised) / sigma


def sample_norm(x: Tensor) -> Tensor:
    """(B, ...) -> (B,): L2 norm of every sample."""
    return x.flatten(1).norm(dim=1)


@dataclass(frozen=True)
class Leg:
    """One step of an inversion, and what a scheme may use for it.

    sigma, sigma_next: scalars, sigma < sigma_next; sigma is 0 in the first step. (A sampler's step goes down.)
    eps:         where the step before evaluated last, its (B, C, ...) noise prediction; None in the first step.
    smallest:    the model's smallest sigma.
    input_scale: c_in(sigma), what the network's own latent is in units of x: z = c_in x (1 for flow models).
    iterations, tolerance: of `fixed_point`; the tolerance is a residual over |x'|.
    """

    sigma: Tensor
    sigma_next: Tensor
    eps: Tensor | None = None
    smallest: Tensor | float = 0.0
    input_scale: Callable[[Tensor], Tensor | float] = lambda sigma: 1.0
    iterations: int = 5
    tolerance: float = ROUNDING

    @property
    def step(self) -> Tensor:
        return self.sigma_next - self.sigma


@dataclass(frozen=True)
class Landing:
    """Where a step ends.

    x:        (B, C, ...) the latent at sigma_next.
    eps:      (B, C, ...) the noise prediction that led there; denoised: the same as a clean latent.
    residual: (B,) |x' - x - h eps(x', s')| over |x'|, where the scheme knows it; diverged: (B,) bool, whether it grew.
    settled:  whether the last evaluation was at x, where the scheme means to ask there.
    """

    x: Tensor
    eps: Tensor
    denoised: Tensor
    residual: Tensor | None = None
    diverged: Tensor | None = None
    settled: bool = True


Step = Callable[[Predict, Tensor, Leg], Landing]


def step_current(predict: Predict, x: Tensor, leg: Leg) -> Landing:
    """x' = x + h eps(x, s): the classic inversion, exact only if eps were the same at both ends.

    The clean latent counts as one of the model's smallest sigma.
    """
    sigma = torch.clamp(leg.sigma, min=leg.smallest)
    denoised = predict(x, sigma)
    return Landing(ddim_step(x, denoised, sigma, leg.sigma_next), noise_prediction(x, denoised, sigma), denoised)


def step_next(predict: Predict, x: Tensor, leg: Leg) -> Landing:
    """x' = x + h eps(x, s'): eps of the latent as it is with the entered noise level's timestep.

    The network's own latent is z = c_in(s) x, and diffusers leaves z alone while t moves on, so in x the latent
    is rescaled by c_in(s) / c_in(s').
    """
    return _evaluate(predict, x, _carried(x, leg, leg.sigma_next), leg)


def step_predicted(predict: Predict, x: Tensor, leg: Leg) -> Landing:
    """x' = x + h eps(x + h eps_prev, s'): one evaluation, at a guess made with the previous step's eps.

    Known for flows as Uni-Inv (arXiv 2504.13109). The first step takes eps_prev from `next`.
    """
    eps = step_next(predict, x, leg).eps if leg.eps is None else leg.eps
    return _evaluate(predict, x, x + leg.step * eps, leg)


def step_midpoint(predict: Predict, x: Tensor, leg: Leg) -> Landing:
    """x' = x + h eps(x + h/2 eps_prev, s + h/2): second order with one evaluation (FireFlow, arXiv 2412.07517).

    Its inverse is a sampler that walks the same way down, not Euler; with sigma_next < sigma this is its step.
    The first step takes eps_prev from the latent as it is.
    """
    half, middle = leg.step / 2, leg.sigma + leg.step / 2
    eps = leg.eps
    if eps is None:
        carried = _carried(x, leg, middle)
        eps = noise_prediction(carried, predict(carried, middle), middle)
    guess = x + half * eps
    denoised = predict(guess, middle)
    eps = noise_prediction(guess, denoised, middle)
    return Landing(x + leg.step * eps, eps, denoised)


def step_fixed_point(predict: Predict, x: Tensor, leg: Leg) -> Landing:
    """Solves x' = x + h eps(x', s'), whose solution the sampler's Euler step takes back to x exactly.

    Iterates x' <- x + h eps(x', s') from the guess of `predicted` (in the first step from `next`) and returns the
    best iterate whose residual was seen. Each sample stops once its residual is within the tolerance or grows; where
    it did not come within it, `next` is tried too, so that a step is never worse than `next`'s and above the tolerance.
    `iterations` counts evaluations after the first; 0 is `next`.
    """
    if leg.iterations == 0:
        return step_next(predict, x, leg)
    start = step_next(predict, x, leg).x if leg.eps is None else x + leg.step * leg.eps
    best = Best(start, max(leg.tolerance, ROUNDING))
    candidate = start
    for _ in range(leg.iterations + 1):
        landing = _evaluate(predict, x, candidate, leg)
        best.judge(candidate, landing)
        candidate = best.go_on(landing.x)
        if not bool(best.active.any()):
            break
    if bool(best.short.any()) and leg.eps is not None:
        rescue = best.go_on(step_next(predict, x, leg).x, best.short)
        best.consider(best.short, rescue, _evaluate(predict, x, rescue, leg))
    return best.landing()


class Best:
    """Of each sample's iterates the one with the smallest residual, and whether to go on."""

    def __init__(self, start: Tensor, tolerance: float):
        self.tolerance = tolerance
        self.residual = torch.full_like(sample_norm(start), float("inf"))
        self.active = torch.ones_like(self.residual, dtype=torch.bool)
        self.diverged = torch.zeros_like(self.active)
        self._x = self._last = start
        self._eps = self._denoised = None

    def judge(self, candidate: Tensor, landing: Landing) -> None:
        """Takes the next iterate and what it leads to; a sample whose residual does not shrink ends here."""
        better = self.consider(self.active, candidate, landing)
        self.diverged |= self.active & ~better
        self.active &= better & self.short

    @property
    def short(self) -> Tensor:
        """(B,) samples whose best residual is above the tolerance."""
        return ~(self.residual <= self.tolerance * sample_norm(self._x))

    def go_on(self, candidate: Tensor, asked: Tensor | None = None) -> Tensor:
        """`candidate` for the (B,) `asked` samples, by default the active ones; the best iterate for those that are done."""
        return torch.where(_as_rows(self.active if asked is None else asked, candidate), candidate, self._x)

    def consider(self, asked: Tensor, candidate: Tensor, landing: Landing) -> Tensor:
        """Keeps `candidate` for those of the (B,) `asked` samples whose residual it lowers; returns these."""
        residual = sample_norm(landing.x - candidate)
        better = asked & (residual < self.residual)  # NaN compares false
        rows = _as_rows(better, candidate)
        first, self._last = self._eps is None, candidate
        self._x = torch.where(rows, candidate, self._x)
        self._eps = landing.eps if first else torch.where(rows, landing.eps, self._eps)
        self._denoised = landing.denoised if first else torch.where(rows, landing.denoised, self._denoised)
        self.residual = torch.where(better, residual, self.residual)
        return better

    def landing(self) -> Landing:
        settled = torch.equal(self._last, self._x)
        return Landing(self._x, self._eps, self._denoised, self.residual / sample_norm(self._x), self.diverged, settled)


SCHEMES: dict[str, Step] = {
    "fixed_point": step_fixed_point,
    "next": step_next,
    "current": step_current,
    "predicted": step_predicted,
    "midpoint": step_midpoint,
}


def _as_rows(flags: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...)."""
    return flags.view(-1, *[1] * (like.ndim - 1))


def _carried(x: Tensor, leg: Leg, sigma: Tensor) -> Tensor:
    """`x` with the network's own latent z kept while the noise level moves from the leg's to `sigma`."""
    return leg.input_scale(leg.sigma) / leg.input_scale(sigma) * x


def _evaluate(predict: Predict, x: Tensor, at: Tensor, leg: Leg) -> Landing:
    """x + h eps(at, s')."""
    denoised = predict(at, leg.sigma_next)
    eps = noise_prediction(at, denoised, leg.sigma_next)
    return Landing(x + leg.step * eps, eps, denoised)
