"""DiffStyler's (and plug-and-play's) feature injection: the content's residuals and attention in another model's pass."""

from __future__ import annotations

import logging
from copy import copy
from typing import Any, Callable

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...algorithms.diffstyler import blend_share, override_or_blend
from ...sockets import FeatureBank, FeatureKey
from ..networks.adapter import Attend, NetworkAdapter, Place, Slot
from ..networks.families import find_adapter
from .base import Injection, Source
from .cross_projections import CrossProjections
from .hints import Expected
from .run import SamplingRun, current_run, rows_of
from .schedule import Schedule, current_sigma

MODES = ("override", "blend")
SELF = ("self_attention_q", "self_attention_k")
CROSS = ("cross_attention_q", "cross_attention_k")
FIRST_FEATURE_LAYER = 4  # the paper's residual features are those of decoder layers 4-11
STREAMS = "residual, self_attention_qk, cross_attention"
SAME_SIZE = "Invert and sample the content at one size."
CONTENT_OF = "pastiche_content_of"  # in transformer_options: the number of the style, with content features of its own, that runs


class ContentPatches(Injection):
    """The content's residuals in the first steps, and its queries and keys in the attention."""

    name = "Feature Injection"
    style: int | None = None  # the Multi-Style Guider's style that this belongs to; None: all that have none of their own

    def __init__(
        self,
        adapter: NetworkAdapter,
        content: FeatureBank,
        feature_steps: float,
        attention_steps: float,
        residual: list[Place],
        self_attention: list[Place],
        cross_attention: list[Place],
        mode: str,
    ):
        self.content, self.mode = content, mode
        self.feature_steps, self.attention_steps = feature_steps, attention_steps
        self.residual = residual
        self.attention = {"attn1": adapter.slots(self_attention), "attn2": adapter.slots(cross_attention)}
        self.schedule = schedule = Schedule(content.trajectory.schedule)
        last = max(feature_steps if residual else 0, attention_steps if self_attention or cross_attention else 0)
        self._lost: Callable[[dict], list[str]] = lambda options: []
        self._clashes: Callable[[dict], bool] = lambda options: False
        self._crossed = CrossProjections(self.attention["attn2"], self.cross_projection)
        self.sources = (
            Source("content", "The content features", content.trajectory, content, self._keys(), STREAMS, SAME_SIZE,
                   lambda sigma: schedule.within(sigma, last)),
        )

    @property
    def expected(self) -> Expected:
        return Expected(("content", self.content.trajectory))

    def for_style(self, number: int) -> ContentPatches:
        """The same for the forwards of one style of the Multi-Style Guider."""
        own = copy(self)
        own.style = number
        own._crossed = CrossProjections(own.attention["attn2"], own.cross_projection)
        return own

    def _keys(self) -> tuple[FeatureKey, ...]:
        keys = [FeatureKey("residual", *place) for place in self.residual]
        for kind, streams in (("attn1", SELF), ("attn2", CROSS)):
            keys += [FeatureKey(stream, *slot) for slot in self.attention[kind] for stream in streams]
        return tuple(keys)

    @property
    def changes(self) -> bool:
        return bool(self.residual or any(self.attention.values()))

    def patch(self, model: ModelPatcher) -> None:
        adapter = find_adapter(model)
        if self.residual:
            self._clashes = adapter.change_residual(model, self.residual, self.residual_block)
        self._lost = adapter.replace_attention(model, "attn1", self.attention["attn1"], self.replacement)
        self._crossed.patch(model)

    def _outer_sample(self, executor, *args, **kwargs):
        with self._crossed.attached(executor.class_obj):
            return super()._outer_sample(executor, *args, **kwargs)

    def check(self, guider: Any, noise: Tensor, sigmas: Tensor) -> None:
        """Names blocks that another node took."""
        options = guider.model_options["transformer_options"]
        self.warn_of_losses(self._lost(options))
        if self._clashes(options):
            logging.warning(
                "Pastiche: another node runs residual blocks in its own way; in %s the content's are injected instead.",
                ", ".join(f"{block} {number}" for block, number in sorted(self.residual)),
            )

    def _due(self, options: dict, share: float) -> bool:
        """Whether a forward belongs to the first `share` of the steps that the content was inverted with.

        Not of the sampler's own: those may be a part of the schedule. Nor to a style with content features of its own.
        """
        return options.get(CONTENT_OF) == self.style and self.schedule.within(current_sigma(options), share)

    def _feature(self, stream: str, place: tuple, options: dict, like: Tensor) -> Tensor:
        feature = current_run(options).feature(self.content, FeatureKey(stream, *place), current_sigma(options), like)
        return rows_of(feature, like.shape[0], options)

    def residual_block(self, place: Place, x: Tensor, grid: tuple[int, int], options: dict) -> Tensor | None:
        """(rows, C, h, w) that the content's own pass added to the skip of a residual block, which gives `grid`."""
        if not self._due(options, self.feature_steps):
            return None
        feature = self._feature("residual", (*place, 0), options, x)
        if tuple(feature.shape[-2:]) != grid:
            raise ValueError(
                f"content: {place[0]} {place[1]} has a {feature.shape[-1]}x{feature.shape[-2]} grid, the sample "
                f"{grid[1]}x{grid[0]}. {current_run(options).why_other_size(self.name)}"
            )
        return feature

    def replacement(self, slot: Slot, attend: Attend) -> Attend:
        """attn1 replacement: attends with the content's queries and keys and the sample's values."""

        def replace(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
            q, k = (self._injected(stream, slot, own, options) for stream, own in zip(SELF, (q, k)))
            return attend(q, k, v, options)

        return replace

    def cross_projection(self, slot: Slot, name: str, projected: Tensor, options: dict) -> Tensor:
        """The content's queries ("q") or keys ("k") of a cross-attention in place of the sample's."""
        return self._injected(f"cross_attention_{name}", slot, projected, options)

    def _injected(self, stream: str, slot: Slot, own: Tensor, options: dict) -> Tensor:
        run = current_run(options)
        if run is None or not self._due(options, self.attention_steps):
            return own
        return override_or_blend(own, self._fitting(stream, slot, options, own), self._share(run, options))

    def _share(self, run: SamplingRun, options: dict) -> float:
        if self.mode == "override":
            return 1.0
        return blend_share(float(run.model_sampling.timestep(options["sigmas"].flatten()[:1])))

    def _fitting(self, stream: str, slot: tuple, options: dict, like: Tensor) -> Tensor:
        """(rows, T, C) as many tokens as the sample has: ComfyUI pads prompts by repeating them, so do we."""
        feature = self._feature(stream, slot, options, like)
        repeat, odd = divmod(like.shape[1], feature.shape[1])
        if odd or (repeat != 1 and stream != "cross_attention_k"):
            raise ValueError(
                f"content: {stream} of {slot[0]} {slot[1]} has {feature.shape[1]} tokens, the sample {like.shape[1]}. "
                + ("Invert the content with a prompt of as many tokens, or set cross_attention_layers to none."
                   if stream == "cross_attention_k" else
                   current_run(options).why_other_size(self.name))
            )
        return feature.repeat(1, repeat, 1) if repeat > 1 else feature


def inject_features(
    model: ModelPatcher,
    content: FeatureBank,
    feature_steps: float,
    attention_steps: float,
    feature_layers: str,
    self_attention_layers: str,
    cross_attention_layers: str,
    mode: str = "override",
) -> ModelPatcher:
    """`model` whose first steps take residuals and attention from the content's pass through its own model.

    feature_steps, attention_steps: shares of the schedule that the content was inverted with, 0..1. Layers as text,
    "none" for nowhere; "auto" is, of what was captured, every decoder layer with attention, and for features from
    layer 4 on. Returns an unpatched clone where nothing would change. Raises ValueError where the features do not
    fit the model or were not captured.
    """
    if mode not in MODES:
        raise ValueError(f'mode: got "{mode}", choose among {", ".join(MODES)}.')
    adapter = find_adapter(model)
    return ContentPatches(
        adapter, content, feature_steps, attention_steps,
        _places(adapter, content, feature_layers, "residual", feature_steps),
        _places(adapter, content, self_attention_layers, SELF[0], attention_steps),
        _places(adapter, content, cross_attention_layers, CROSS[0], attention_steps),
        mode,
    ).install(model)


def _places(adapter: NetworkAdapter, content: FeatureBank, layers: str, stream: str, share: float) -> list[Place]:
    """Resolves layer text; "auto" is what the paper takes of the layers that were captured, "none" nothing."""
    words = layers.strip().lower()
    if words in ("none", "") or share <= 0:
        return []
    kind = "residual" if stream == "residual" else "attention"
    if words != "auto":
        return adapter.places(layers, kind)
    held = {(key.block, key.number) for key in content.keys_of(stream)}
    first = FIRST_FEATURE_LAYER if stream == "residual" else 0
    return [place for place in adapter.default_places(kind) if place[1] >= first and (not held or place in held)]
