"""DiffStyler's (and plug-and-play's) feature injection: the content's residuals and attention in another model's pass."""

from __future__ import annotations

import logging
from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...algorithms.diffstyler import blend_share, override_or_blend
from ...sockets import FeatureBank, FeatureKey
from ..networks.adapter import NetworkAdapter, Place, Slot
from ..networks.families import find_adapter
from ..networks.unet import residual_skip
from .attention_slots import Attend, AttentionSlots
from .base import Injection, Source
from .run import SamplingRun, current_run, rows_of
from .schedule import Schedule, current_sigma

MODES = ("override", "blend")
SELF = ("self_attention_q", "self_attention_k")
CROSS = ("cross_attention_q", "cross_attention_k")
FIRST_FEATURE_LAYER = 4  # the paper's residual features are those of decoder layers 4-11
STREAMS = "residual, self_attention_qk, cross_attention"
SAME_SIZE = "Invert and sample the content at one size."


class ContentPatches(Injection):
    """The content's residuals in the first steps, and its queries and keys in the attention."""

    name = "Feature Injection"

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
        self._replaced = AttentionSlots()
        self.sources = (
            Source("content", "The content features", content.trajectory, content, self._keys(), STREAMS, SAME_SIZE,
                   lambda sigma: schedule.within(sigma, last)),
        )

    def _keys(self) -> tuple[FeatureKey, ...]:
        keys = [FeatureKey("residual", *place) for place in self.residual]
        for kind, streams in (("attn1", SELF), ("attn2", CROSS)):
            keys += [FeatureKey(stream, *slot) for slot in self.attention[kind] for stream in streams]
        return tuple(keys)

    @property
    def changes(self) -> bool:
        return bool(self.residual or any(self.attention.values()))

    def patch(self, model: ModelPatcher) -> None:
        if self.residual:
            patches = model.model_options["transformer_options"].setdefault("patches", {})
            # The first handler of a class runs; ours comes first and passes on what is not its own.
            patches["forward_timestep_embed_patch"] = [
                (ResBlock, self.residual_block), *patches.get("forward_timestep_embed_patch", [])
            ]
        for kind, slots in self.attention.items():
            self._replaced.fill(model, kind, slots, lambda slot, attend, kind=kind: self.replacement(kind, slot, attend))

    def check(self, guider: Any, noise: Tensor, sigmas: Tensor) -> None:
        """Names blocks that another node took."""
        options = guider.model_options["transformer_options"]
        self._replaced.warn_of_losses(options, self.name)
        self._warn_of_clashes(options)

    def _warn_of_clashes(self, options: dict) -> None:
        handlers = options.get("patches", {}).get("forward_timestep_embed_patch", [])
        others = [handler for kind, handler in handlers if issubclass(ResBlock, kind) and not _ours(handler)]
        if others and self.residual:
            logging.warning(
                "Pastiche: another node runs residual blocks in its own way; in %s the content's are injected instead.",
                ", ".join(f"{block} {number}" for block, number in sorted(self.residual)),
            )

    def _due(self, options: dict, share: float) -> bool:
        """Whether a forward belongs to the first `share` of the steps that the content was inverted with.

        Not of the sampler's own: those may be a part of the schedule.
        """
        return self.schedule.within(current_sigma(options), share)

    def _feature(self, stream: str, place: tuple, options: dict, like: Tensor) -> Tensor:
        feature = current_run(options).feature(self.content, FeatureKey(stream, *place), current_sigma(options), like)
        return rows_of(feature, like.shape[0], options)

    def residual_block(self, layer: Any, x: Tensor, emb: Tensor, context: Any, options: dict, *rest: Any) -> Tensor:
        """Runs a residual block: its skip, plus the content's output in place of its own."""
        place = tuple(options["block"])
        run = current_run(options)
        if run is None or not self._is_ours(run, layer, place) or not self._due(options, self.feature_steps):
            return self._next_handler(layer, x, emb, context, options, *rest)
        skip = residual_skip(layer, x)
        feature = self._feature("residual", (*place, 0), options, x)
        if feature.shape[-2:] != skip.shape[-2:]:
            raise ValueError(
                f"content: {place[0]} {place[1]} has a {feature.shape[-1]}x{feature.shape[-2]} grid, the sample "
                f"{skip.shape[-1]}x{skip.shape[-2]}. {run.why_other_size(self.name)}"
            )
        return skip + feature

    def _is_ours(self, run: SamplingRun, layer: Any, place: Place) -> bool:
        return place in self.residual and run.adapter.is_residual(layer, place)

    def _next_handler(self, layer: Any, x: Tensor, emb: Tensor, context: Any, options: dict, *rest: Any) -> Tensor:
        handlers = options["patches"]["forward_timestep_embed_patch"]
        mine = next(i for i, (_, handler) in enumerate(handlers) if getattr(handler, "__self__", None) is self)
        for kind, handler in handlers[mine + 1 :]:
            if isinstance(layer, kind):
                return handler(layer, x, emb, context, options, *rest)
        return layer(x, emb)

    def replacement(self, kind: str, slot: Slot, attend: Attend) -> Attend:
        """attn1/attn2 replacement: attends with the content's queries and keys and the sample's values."""
        streams = SELF if kind == "attn1" else CROSS

        def replace(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
            run = current_run(options)
            if run is not None and self._due(options, self.attention_steps):
                share = self._share(run, options)
                q = override_or_blend(q, self._fitting(streams[0], slot, options, q), share)
                k = override_or_blend(k, self._fitting(streams[1], slot, options, k), share)
            return attend(q, k, v, options)

        return replace

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


def _ours(handler: Any) -> bool:
    return isinstance(getattr(handler, "__self__", None), ContentPatches)


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
