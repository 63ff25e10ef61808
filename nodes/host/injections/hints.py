"""Likely mistakes that sampling can see: what an injection expects of the run it is used in, and sentences where it differs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterator

from torch import Tensor

from ...algorithms.metrics import channel_correlation
from ...sockets import Trajectory
from .schedule import nearest

CONTINUES = 0.85  # channel correlation with the inverted latent above which sampling starts from it, AdaIN'ed or masked
NOISED = 0.5  # noise of its own size on top leaves 0.71; two pictures' inversions have next to none
STEADY = 1.6  # an inverted latent's deviation is within this factor of what belongs to the noise level
BELOW = 0.98  # of the inversion's last sigma: a schedule that starts lower is a part of it
STOCHASTIC = ("ancestral", "sde", "lcm", "ddpm", "seeds_", "sa_solver")  # in the names of samplers that add noise

NOISE_WAY = (
    "Connect DDIM Inversion's noise (through Latent AdaIN) to SamplerCustom's latent_image with add_noise off, or its NOISE to "
    "SamplerCustomAdvanced"
)


@dataclass(frozen=True)
class Other:
    """A picture whose latents the sampling should not start from: the sentences' name for it, and what to do."""

    name: str
    trajectory: Trajectory
    advice: str


@dataclass(frozen=True)
class Expected:
    """The sampling that an injection is made for.

    start:    whose inverted latent the sampling continues, if it must be one; others: pictures it is mistaken for.
    unguided: the method has no guidance. sampler: the display name of the sampler node that belongs to it, with the
    name of that sampler's function.
    """

    start: tuple[str, Trajectory] | None = None
    others: tuple[Other, ...] = ()
    unguided: bool = False
    sampler: tuple[str, str] | None = None


def hints(expected: Expected, guider: Any, sampler: Any, x: Tensor, sigma: float) -> Iterator[str]:
    """Sentences about a run that starts from x (B, C, ...) in model space at noise level `sigma`."""
    start = _start_hint(expected, x, sigma)
    if start:
        yield start
    cfg = getattr(guider, "cfg", None)
    if expected.unguided and isinstance(cfg, (int, float)) and not math.isclose(cfg, 1.0):
        yield f"cfg is {cfg:g}: the method samples without guidance, which drives this picture to neon colours. Set cfg to 1."
    function = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    options = getattr(sampler, "extra_options", {})
    if any(part in function for part in STOCHASTIC) or options.get("s_churn", 0) > 0 or options.get("eta", 0) > 0:
        yield (
            f"the sampler {function.removeprefix('sample_')} adds new noise at its steps, so an inverted picture does not come back. "
            "Choose euler (ComfyUI's ddim), or another sampler without noise of its own."
        )
    if expected.sampler is not None and function != expected.sampler[1]:
        yield (
            f"{expected.sampler[0]} is not the sampler of this run: without its calibration the injected picture falls apart. "
            f"Connect {expected.sampler[0]} to SamplerCustom or SamplerCustomAdvanced."
        )


def _start_hint(expected: Expected, x: Tensor, sigma: float) -> str:
    if expected.start is not None:
        name, trajectory = expected.start
        own = _likeness(x, trajectory, sigma)
        if own is None:
            return ""
        if sigma < BELOW * float(trajectory.sigmas[-1]):  # a later part of a split schedule: restyled already, but no noisier
            return "" if own.scale < STEADY else (
                f"sampling begins at sigma {sigma:.3g}, but the latent it continues has {own.scale:.2g} times that level's noise. "
                "Give the sampler the SIGMAS that DDIM Inversion had (denoise 1)."
            )
        if own.clean >= NOISED and own.scale < 1 / STEADY:
            return f"sampling starts from the {name}'s encoded picture, not from its inverted noise. {NOISE_WAY}."
        if own.noise >= CONTINUES:
            return ""
        if own.noise >= NOISED:
            return (
                f"noise was added to the {name}'s inverted latent, which then returns to another picture. Turn add_noise off "
                "(KSampler always adds it: use SamplerCustom)."
            )
    for other in expected.others:
        found = _likeness(x, other.trajectory, sigma)
        if found is not None and max(found.noise, found.clean) >= NOISED:
            what = "inverted noise" if found.noise >= found.clean else "encoded picture"
            return f"sampling starts from the {other.name}'s {what}. {other.advice}"
    if expected.start is not None:
        return f"sampling does not start from the {expected.start[0]}'s inverted noise, so its shapes are not in the result. {NOISE_WAY}."
    return ""


@dataclass(frozen=True)
class _Likeness:
    noise: float
    clean: float
    scale: float


def _likeness(x: Tensor, trajectory: Trajectory, sigma: float) -> _Likeness | None:
    """How alike x is to the trajectory's latent at `sigma` and to its clean one; None for latents of another size."""
    noise, clean = trajectory.latents[nearest(trajectory.sigmas, sigma)], trajectory.latents[0]
    x = x.detach().float().cpu()
    if x.shape[1:] != noise.shape[1:] or noise.shape[0] not in (1, x.shape[0]):
        return None
    return _Likeness(
        channel_correlation(x, noise), channel_correlation(x, clean), float(x.std() / noise.std().clamp_min(1e-12))
    )
