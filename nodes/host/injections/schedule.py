"""Which step of a schedule a noise level is, and which steps a share of it means."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

SAME_SIGMA = 5e-3  # relative: `timestep()` and schedulers round to this


class Schedule:
    """SIGMAS, (S + 1,) descending. Steps count from 0, the noisiest."""

    def __init__(self, sigmas: Tensor):
        self._levels = sigmas.float().cpu()

    @property
    def steps(self) -> int:
        return len(self._levels) - 1

    def step(self, sigma: float) -> int:
        """The step whose noise level is nearest."""
        return nearest(self._levels, sigma)

    def is_part_of(self, whole: Schedule) -> bool:
        """Whether these are neighbouring levels of `whole`, as a split schedule has them."""
        first = whole.step(float(self._levels[0]))
        part = whole._levels[first : first + len(self._levels)]
        return len(part) == len(self._levels) and bool(((part - self._levels).abs() <= SAME_SIGMA * part).all())

    def tolist(self) -> list[float]:
        return self._levels.tolist()

    def first_steps(self, share: float) -> int:
        """How many steps a share of the schedule means: 0.6 of 50 is 30."""
        return round(share * self.steps)

    def within(self, sigma: float, share: float) -> bool:
        """Whether `sigma` belongs to one of the first `share` of the steps."""
        return share >= 1 or self.step(sigma) < self.first_steps(share)


class SigmaRange(NamedTuple):
    """Noise levels from `high` down to `low`, both included."""

    high: float = float("inf")
    low: float = 0.0

    def holds(self, sigma: float) -> bool:
        return self.low <= sigma <= self.high


def sigma_range(model_sampling: Any, start_percent: float, end_percent: float) -> SigmaRange:
    """The noise levels between two shares (0..1) of the model's timesteps."""
    return SigmaRange(model_sampling.percent_to_sigma(start_percent), model_sampling.percent_to_sigma(end_percent))


def nearest(levels: Tensor, sigma: float) -> int:
    """Index of the level nearest to `sigma`; levels on the CPU, in any order."""
    return int((levels - sigma).abs().argmin())


def current_sigma(options: dict) -> float:
    """The noise level of the forward that a patch's options belong to."""
    return float(options["sigmas"].flatten()[0])
