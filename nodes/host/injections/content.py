"""DiffStyler's (and plug-and-play's) feature injection: the content's residuals and attention in another model's pass."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor

from ...algorithms.diffstyler import blend_share, override_or_blend
from ...sockets import FeatureBank, FeatureKey
from .attention_slots import Attend, AttentionSlots, Slot
from ..networks.fingerprint import fingerprint, require_same_model
from ..networks.unet import Place, inspect_model
from .run import attach_banks, check_banks_schedule, current_run, current_sigma, rows_of

MODES = ("override", "blend")
SELF = ("self_attention_q", "self_attention_k")
CROSS = ("cross_attention_q", "cross_attention_k")
FIRST_FEATURE_LAYER = 4  # the paper's residual features are those of decoder layers 4-11
CAPTURE = {"residual": "residual", SELF: "self_attention_qk", CROSS: "cross_attention"}


class FeatureInjection:
    """The patches of one Feature Injection node. Holds settings only; what belongs to a run lives in the run."""

    def __init__(
        self,
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
        self.residual = set(residual)
        self.attention = {"attn1": set(self_attention), "attn2": set(cross_attention)}
        self._slots = AttentionSlots()

    @property
    def changes(self) -> bool:
        return bool(self.residual or self.attention["attn1"] or self.attention["attn2"])

    def keys(self, depths: dict[Place, int]) -> list[FeatureKey]:
        found = [FeatureKey("residual", *place) for place in self.residual]
        for kind, streams in (("attn1", SELF), ("attn2", CROSS)):
            found += [
                FeatureKey(stream, *place, depth)
                for place in self.attention[kind] for depth in range(depths[place]) for stream in streams
            ]
        return found

    def install(self, model: Any, depths: dict[Place, int]) -> None:
        """Adds the patches to `model` (a clone)."""
        attach_banks(model, [(self.content, self.keys(depths))], self.check)
        options = model.model_options["transformer_options"]
        if self.residual:
            patches = options.setdefault("patches", {})
            # The first handler of a class runs; ours comes first and passes on what is not its own.
            patches["forward_timestep_embed_patch"] = [
                (ResBlock, self.residual_block), *patches.get("forward_timestep_embed_patch", [])
            ]
        for kind, places in self.attention.items():
            slots = [(*place, depth) for place in places for depth in range(depths[place])]
            self._slots.fill(model, kind, slots, lambda slot, attend, kind=kind: self.replacement(kind, slot, attend))

    def check(self, guider: Any, noise: Tensor, sigmas: Tensor) -> None:
        """Refuses features that do not fit the sampling about to start, and names blocks that another node took."""
        trajectory, batch = self.content.trajectory, noise.shape[0]
        last = max(self.feature_steps if self.residual else 0, self.attention_steps if any(self.attention.values()) else 0)
        due = sigmas[: _steps(last, len(sigmas) - 1)]
        if len(due):
            check_banks_schedule(self.content, due, "The content features")
        if trajectory.batch not in (1, batch):
            raise ValueError(
                f"content: features of {trajectory.batch} images cannot be shared among {batch} samples; "
                "invert one image, or as many as the sampled latent holds."
            )
        if trajectory.latents.shape[-2:] != noise.shape[-2:]:
            height, width = trajectory.latents.shape[-2:]
            raise ValueError(
                f"content: features are of a {width}x{height} latent, the sampled one is "
                f"{noise.shape[-1]}x{noise.shape[-2]}. Invert and sample the content at one size."
            )
        options = guider.model_options["transformer_options"]
        self._slots.warn_of_losses(options, "Feature Injection")
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
        """Whether the step that these options belong to is one of the first `share` of the schedule."""
        if share >= 1:
            return True
        sigmas = options["sample_sigmas"]
        step = int((sigmas - current_sigma(options)).abs().argmin())
        return step < _steps(share, len(sigmas) - 1)

    def _feature(self, stream: str, place: tuple, options: dict, like: Tensor) -> Tensor:
        feature = current_run(options).feature(self.content, FeatureKey(stream, *place), current_sigma(options), like)
        return rows_of(feature, like.shape[0], options)

    def residual_block(self, layer: Any, x: Tensor, emb: Tensor, context: Any, options: dict, *rest: Any) -> Tensor:
        """Runs a residual block: its skip, plus the content's output in place of its own."""
        place = tuple(options["block"])
        if place not in self.residual or current_run(options) is None or not self._due(options, self.feature_steps):
            return self._next_handler(layer, x, emb, context, options, *rest)
        skip = layer.skip_connection(layer.x_upd(x) if layer.updown else x)
        feature = self._feature("residual", (*place, 0), options, x)
        if feature.shape[-2:] != skip.shape[-2:]:
            raise ValueError(
                f"content: {place[0]} {place[1]} has a {feature.shape[-1]}x{feature.shape[-2]} grid, the sample "
                f"{skip.shape[-1]}x{skip.shape[-2]}. Conditions with an area cannot be combined with Feature Injection: use masks."
            )
        return skip + feature

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

    def _share(self, run: Any, options: dict) -> float:
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
                   "Conditions with an area and token merging cannot be combined with Feature Injection.")
            )
        return feature.repeat(1, repeat, 1) if repeat > 1 else feature


def _steps(share: float, steps: int) -> int:
    """The first steps that a share of the schedule means: 0.6 of 50 is 30."""
    return round(share * steps)


def _ours(handler: Any) -> bool:
    return isinstance(getattr(handler, "__self__", None), FeatureInjection)


def inject_features(
    model: Any,
    content: FeatureBank,
    feature_steps: float,
    attention_steps: float,
    feature_layers: str,
    self_attention_layers: str,
    cross_attention_layers: str,
    mode: str = "override",
) -> Any:
    """`model` whose first steps take residuals and attention from the content's pass through its own model.

    feature_steps, attention_steps: shares of the schedule, 0..1. Layers as text, "none" for nowhere; "auto" is, of what
    was captured, every decoder layer with attention, and for features from layer 4 on. Returns an unpatched clone
    where nothing would change. Raises ValueError where the features do not fit the model or were not captured.
    """
    if mode not in MODES:
        raise ValueError(f'mode: got "{mode}", choose among {", ".join(MODES)}.')
    layout = inspect_model(model)
    require_same_model(fingerprint(model), content.trajectory.fingerprint, "The content features")
    injection = FeatureInjection(
        content, feature_steps, attention_steps,
        _places(layout, content, feature_layers, "residual", feature_steps),
        _places(layout, content, self_attention_layers, SELF[0], attention_steps),
        _places(layout, content, cross_attention_layers, CROSS[0], attention_steps),
        mode,
    )
    patched = model.clone()
    if not injection.changes:
        return patched
    depths = {place: len(blocks) for place, blocks in layout.attention.items()}
    _require_captured(injection, depths)
    injection.install(patched, depths)
    return patched


def _places(layout: Any, content: FeatureBank, layers: str, stream: str, share: float) -> list[Place]:
    """Resolves layer text; "auto" is what the paper takes of the layers that were captured, "none" nothing."""
    words = layers.strip().lower()
    if words in ("none", "") or share <= 0:
        return []
    kind = "residual" if stream == "residual" else "attention"
    if words != "auto":
        return layout.places(layers, kind)
    held = {(key.block, key.number) for key in content.keys_of(stream)}
    first = FIRST_FEATURE_LAYER if stream == "residual" else 0
    return [place for place in getattr(layout, kind) if place[0] == "output" and place[1] >= first and (not held or place in held)]


def _require_captured(injection: FeatureInjection, depths: dict[Place, int]) -> None:
    held = set(injection.content.keys)
    missing: dict[str, set[str]] = {}
    for key in injection.keys(depths):
        if key not in held:
            stream = next(name for group, name in CAPTURE.items() if key.stream == group or key.stream in group)
            missing.setdefault(stream, set()).add(f"{key.block} {key.number}")
    if missing:
        parts = "; ".join(f"{stream} of {', '.join(sorted(places, key=_natural))}" for stream, places in missing.items())
        raise ValueError(
            f"content: the bank lacks {parts}. Set Capture Features to streams "
            f'"{", ".join(CAPTURE.values())}" and to all layers of this node.'
        )


def _natural(place: str) -> tuple:
    block, number = place.split()
    return block, int(number)
