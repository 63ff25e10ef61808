"""What a reference row shows: a picture noised to the step's level, or an inverted one's own latent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...algorithms.references import fit_latent
from ...sockets import Trajectory
from ..injections.schedule import SigmaRange

OTHER_NOISE = 0x5EED0F5717E  # keeps a reference's noise apart from the sampler's at the same seed
BEYOND = 1.005  # schedulers round; a sigma this far above a trajectory's last one still counts as it


def seeded_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """(1, *shape) float32 normal noise on the CPU, the same for every style, step and sample of a run."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed((seed + OTHER_NOISE) % 2**63))


@dataclass(frozen=True)
class PictureSource:
    """One clean latent (1, C, [T,] h, w) in model space; noised as the model's own sampling starts from a picture."""

    latent: Tensor
    conditioning: list | None = None

    def at(self, sigma: Tensor, noise: Tensor, model_sampling: Any) -> Tensor:
        """(1, C, ...) at the size of `noise`: (1 - s) x + s n for flows, x + s n for eps and v models."""
        latent = fit_latent(self.latent.to(noise), tuple(noise.shape[2:]))
        return model_sampling.noise_scaling(sigma, noise, latent)


@dataclass(frozen=True)
class TrajectorySource:
    """Pictures `rows` of an inversion, in model space; between two levels along the straight line of a DDIM step."""

    trajectory: Trajectory
    rows: tuple[int, ...]

    @property
    def conditioning(self) -> list:
        return self.trajectory.conditioning

    def at(self, sigma: Tensor, noise: Tensor, model_sampling: Any) -> Tensor:
        """(len(rows), C, ...) at the size of `noise`."""
        latent = _between(self.trajectory, float(sigma))[list(self.rows)]
        return fit_latent(latent.to(noise), tuple(noise.shape[2:]))

    def check(self, name: str, sigmas: Tensor, due: SigmaRange) -> None:
        """Refuses a sampling that uses this source above the noise level where the inversion ended."""
        last = float(self.trajectory.sigmas[-1])
        asked = [sigma for sigma in sigmas.tolist() if sigma > 0 and due.holds(sigma)]
        if asked and max(asked) > BEYOND * last:
            raise ValueError(
                f"{name}: the inversion ends at sigma {last:.3f}, sampling asks for {max(asked):.3f}. "
                "Connect the same SIGMAS to DDIM Inversion and to the sampler."
            )


def _between(trajectory: Trajectory, sigma: float) -> Tensor:
    levels, latents = trajectory.sigmas, trajectory.latents
    above = int(torch.searchsorted(levels, sigma))
    if above == 0 or above == len(levels):
        return latents[min(above, len(levels) - 1)]
    low, high = float(levels[above - 1]), float(levels[above])
    share = (sigma - low) / (high - low)
    if share < 1e-4 or share > 1 - 1e-4:
        return latents[above - 1 if share < 0.5 else above]
    return torch.lerp(latents[above - 1], latents[above], share)
