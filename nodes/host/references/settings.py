"""What a Style Reference node asks for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...algorithms.references import RotaryLayout
from ..injections.schedule import SigmaRange
from .sources import PictureSource, TrajectorySource

Source = PictureSource | TrajectorySource


@dataclass(frozen=True)
class Cures:
    """What keeps a shared reference from being copied. The defaults change nothing.

    key_scale: multiplies the reference's keys, so its share of the attention.
    untwist_high, untwist_low, untwist_beta: factors of the highest and lowest rotary frequencies and the curve between.
    position_shift: picture widths that the reference stands to the right.
    token_adain: 0..1, how far the sample's queries and keys take the reference's token statistics.
    leak_guard: 0..1, how far the unconditional rows ask with the reference's queries (StyleKeeper's negative row).
    """

    key_scale: float = 1.0
    untwist_high: float = 1.0
    untwist_low: float = 1.0
    untwist_beta: float = 1.0
    position_shift: float = 0.0
    token_adain: float = 0.0
    leak_guard: float = 0.0

    @property
    def needs_rotation(self) -> bool:
        return self.untwist_high != 1.0 or self.untwist_low != 1.0 or self.position_shift != 0.0


PRESETS = {
    "balanced": Cures(untwist_high=0.7, untwist_low=1.1),
    "more style": Cures(key_scale=1.1, untwist_high=0.5, untwist_low=1.3, token_adain=0.5),
    "plain": Cures(),
}
DEFAULT_PRESET = "balanced"


@dataclass(frozen=True)
class Reference:
    """One Style Reference node: settings only, nothing of a run.

    styles: (source, weight) with weights that sum to 1. content: whose queries are preserved.
    places: (block, number) in U-Nets, or None; layers: numbers of image calls, or None for the last two thirds.
    sigmas: the range it acts in. mask: (B or 1, H, W). rotary: how the network turns its keys.
    row_style: number of the Multi-Style Guider's style whose rows alone it acts on.
    """

    styles: tuple[tuple[Source, float], ...]
    content: TrajectorySource | None
    share: str
    gamma: float
    gamma_end: float
    schedule: str
    temperature: float
    strength: float
    mask: Tensor | None
    places: frozenset | None
    layers: frozenset[int] | None
    sigmas: SigmaRange
    noise_seed: int
    family: str
    cures: Cures = Cures()
    rotary: RotaryLayout | None = None
    unrotated: bool = False
    row_style: int | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """Of its rows, styles first."""
        return tuple(source for source, _ in self.styles) + ((self.content,) if self.content is not None else ())
