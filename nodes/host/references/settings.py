"""What a Style Reference node asks for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...algorithms.references import RotaryLayout
from ..injections.schedule import Schedule, SigmaRange
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
    "balanced": Cures(key_scale=1.1, untwist_high=0.7, untwist_low=1.1, token_adain=0.5),
    "more style": Cures(key_scale=1.2, untwist_high=0.5, untwist_low=1.3, token_adain=1.0),
    "plain": Cures(),
}
DEFAULT_PRESET = "balanced"


@dataclass(frozen=True)
class Borrow:
    """What the sample takes from the content's own row in the first steps (plug-and-play, DiffStyler), instead of styles.

    attention_steps, feature_steps: shares of the schedule that the content was inverted with. attention_layers (queries
    and keys), feature_layers (attention outputs): numbers of image calls, empty for nowhere, None for auto: all of them,
    and the middle third.
    """

    schedule: Schedule
    attention_steps: float
    feature_steps: float
    attention_layers: frozenset[int] | None
    feature_layers: frozenset[int] | None
    blends: bool

    def layers(self, sigma: float, count: int) -> tuple[frozenset[int], frozenset[int]]:
        """(attention, features) at this noise level, of `count` image calls."""
        attention = frozenset(range(count)) if self.attention_layers is None else self.attention_layers
        features = frozenset(range(count // 3, 2 * count // 3)) if self.feature_layers is None else self.feature_layers
        return tuple(
            numbers if self.schedule.within(sigma, share) else frozenset()
            for numbers, share in ((attention, self.attention_steps), (features, self.feature_steps))
        )


@dataclass(frozen=True)
class Reference:
    """One Style Reference node: settings only, nothing of a run.

    styles: (source, weight) with weights that sum to 1. content: whose queries are preserved.
    places: (block, number) in U-Nets, or None; layers: numbers of image calls, or None for the last two thirds.
    sigmas: the range it acts in. mask: (B or 1, H, W). rotary: how the network turns its keys.
    row_style: number of the Multi-Style Guider's style whose rows alone it acts on.
    borrow: what the content gives apart from styles; there are none then.
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
    borrow: Borrow | None = None

    @property
    def content_input(self) -> str:
        """The node's input that the content came by."""
        return "content" if self.borrow is None else "trajectory"

    @property
    def sources(self) -> tuple[Source, ...]:
        """Of its rows, styles first."""
        return tuple(source for source, _ in self.styles) + ((self.content,) if self.content is not None else ())
