"""The noise level that an encoded picture counts as: the papers' codes begin and end at a timestep, ComfyUI at sigma 0."""

from __future__ import annotations

from typing import Any

import torch

CLEAN_LEVELS = ("sigma 0", "t = 0", "t = 1")
SAME = 1e-6  # relative; levels of one timestep


def clean_sigma(model_sampling: Any, clean_level: str) -> float:
    """The sigma of a member of CLEAN_LEVELS; timesteps count from 0, as in the papers' tables of alpha-bar."""
    if clean_level not in CLEAN_LEVELS:
        raise ValueError(f'clean_level: got "{clean_level}", choose among {", ".join(CLEAN_LEVELS)}.')
    if clean_level == "sigma 0":
        return 0.0
    timestep = int(clean_level[-1])
    table = getattr(model_sampling, "log_sigmas", None)
    if table is not None:
        return float(model_sampling.sigmas[timestep])
    return float(model_sampling.sigma_min) if timestep == 0 else float(model_sampling.percent_to_sigma(1 - timestep / 999))


def input_scale(model_sampling: Any, sigma: torch.Tensor) -> torch.Tensor:
    """c_in(sigma): what the model multiplies a latent with before its network sees it."""
    return model_sampling.calculate_input(sigma, torch.ones_like(sigma))
