"""ComfyUI's U-Net: blocks, widths, grids, and the patches that read and change what they compute."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Callable, Iterable

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...algorithms.layers import format_numbers, parse_layers
from ...sockets import FeatureKey
from .adapter import Attend, ChangeHidden, ChangeResidual, Emit, NetworkAdapter, Place, Slot
from .attention_slots import AttentionSlots
from .neighbours import before_tiles
from .unet_hidden import HiddenPatch
from .unet_residual import HOOK, ResidualHandler, residual_skip, runs_residual_blocks


@dataclass(frozen=True, eq=False)
class UNet(NetworkAdapter):
    """One U-Net. `family` is the word used in messages; `scale` maps a place to its downsampling steps."""

    model: BaseModel
    family: str
    attention: dict[Place, list[Any]]  # BasicTransformerBlocks, by depth
    residual: dict[Place, Any]  # ResBlocks
    scale: dict[Place, int]
    counts: dict[str, int]
    h_channels: int
    context_dim: int | None

    def grid(self, place: Place, height: int, width: int) -> tuple[int, int]:
        """Every Downsample halves, rounding up."""
        for _ in range(self.scale[place]):
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width

    def places(self, layers: str, kind: str = "attention") -> list[Place]:
        """"auto" is the paper's 6-11 on a 12-block decoder, elsewhere the decoder's finest attention level."""
        known = getattr(self, kind)
        if not known:
            raise ValueError(f"streams: {self.family} has no {kind} blocks that can be captured; use h_space.")
        if layers.strip().lower() == "auto":
            return self._auto_places(known)
        places = parse_layers(layers)
        for block, number in places:
            if (block, number) not in known:
                raise ValueError(f"layers: {self._describe(kind)}: got {block} {number}.")
        return places

    def default_places(self, kind: str, block: str = "output") -> list[Place]:
        return [place for place in getattr(self, kind) if place[0] == block]

    def _auto_places(self, known: dict) -> list[Place]:
        decoder = [place for place in known if place[0] == "output"]
        if self.counts["output"] == 12:
            return [place for place in decoder if place[1] >= 6]
        finest = min(self.scale[place] for place in decoder if place in self.attention)
        return [place for place in decoder if self.scale[place] == finest]

    def _describe(self, kind: str) -> str:
        parts = []
        for block in ("input", "output"):
            numbers = [number for name, number in getattr(self, kind) if name == block]
            parts.append(f"{block} 0-{self.counts[block] - 1}, {kind} in {format_numbers(numbers) or 'none'}")
        middle = "" if ("middle", 0) in getattr(self, kind) else " no"
        return f"{self.family} has {parts[1]} ({parts[0]};{middle} {kind} in middle)"

    def depth(self, place: Place) -> int:
        return len(self.attention[place])

    def heads(self, slot: Slot) -> int:
        return self.attention[slot[:2]][slot[2]].n_heads

    def shape(self, key: FeatureKey, height: int, width: int, context_tokens: int = 77) -> tuple[int, ...]:
        place = (key.block, key.number)
        h, w = self.grid(place, height, width)
        if key.stream == "h_space":
            return self.h_channels, h, w
        if key.stream == "residual":
            return self.residual[place].out_channels, h, w
        block = self.attention[place][key.depth]
        if key.stream == "self_attention":
            return h * w, block.attn1.to_q.in_features
        if key.stream.startswith("self_attention"):
            return h * w, block.attn1.to_q.out_features
        tokens = context_tokens if key.stream == "cross_attention_k" else h * w
        return tokens, block.attn2.to_q.out_features

    def project(self, kind: str, slot: Slot, name: str, hidden: Tensor) -> Tensor:
        return getattr(self.attention_module(kind, slot), name)(hidden)

    def projection_weight(self, kind: str, slot: Slot, name: str) -> Tensor:
        return getattr(self.attention_module(kind, slot), name).weight.detach().float().cpu()

    def attention_module(self, kind: str, slot: Slot) -> Any:
        return getattr(self.attention[slot[:2]][slot[2]], kind)

    def is_residual(self, layer: Any, place: Place) -> bool:
        return self.residual.get(place) is layer

    def capture(self, transformer_options: dict, keys: Iterable[FeatureKey], emit: Emit) -> None:
        wanted = set(keys)
        streams = {key.stream for key in wanted}
        patches = transformer_options.setdefault("patches", {})

        def add(name: str, patch: Any) -> None:
            patches[name] = before_tiles(patches.get(name, []), patch)

        def tell(stream: str, options: dict, compute: Callable[[], Tensor], depth: int) -> None:
            key = FeatureKey(stream, *options["block"], depth)
            if key in wanted:
                emit(key, compute())

        def attention(kind: str, stream: str):
            def patch(n, context, value, options):
                depth = options["block_index"]
                slot = (*options["block"], depth)
                if kind == "attn1":
                    tell(stream, options, lambda: n, depth)
                for name, source in (("q", n), ("k", context), ("v", value)):
                    tell(f"{stream}_{name}", options, lambda: self.project(kind, slot, f"to_{name}", source), depth)
                return n, context, value

            return patch

        def residual(layer, x, emb, context, options, *_):
            out = layer(x, emb)
            if self.is_residual(layer, tuple(options["block"])):
                tell("residual", options, lambda: out - residual_skip(layer, x), 0)
            return out

        def middle(args: dict) -> dict:
            emit(FeatureKey("h_space", "middle", 0), args["h"])
            return args

        if any(stream.startswith("self_attention") for stream in streams):
            add("attn1_patch", attention("attn1", "self_attention"))
        if any(stream.startswith("cross_attention") for stream in streams):
            add("attn2_patch", attention("attn2", "cross_attention"))
        if "residual" in streams:
            if HOOK in patches:
                raise ValueError(
                    f"Another node already runs this model's residual blocks in its own way ({HOOK}), "
                    "so they cannot be captured: connect Capture Features before that node."
                )
            add(HOOK, (ResBlock, residual))
        if "h_space" in streams:
            add("middle_block_after_patch", middle)

    def change_hidden(self, model: ModelPatcher, change: ChangeHidden, blends: bool) -> None:
        patch = HiddenPatch(change)
        patches = model.model_options["transformer_options"].setdefault("patches", {})
        patches["attn1_patch"] = before_tiles(patches.get("attn1_patch", []), patch)
        if blends:
            # In front: other nodes' output patches then see the blended result, as they would the plain one.
            patches["attn1_output_patch"] = [patch.settle, *patches.get("attn1_output_patch", [])]

    def replace_attention(
        self, model: ModelPatcher, kind: str, slots: Iterable[Slot], make: Callable[[Slot, Attend], Attend]
    ) -> Callable[[dict], list[str]]:
        replaced = AttentionSlots(kind)
        replaced.fill(model, slots, make)
        return replaced.lost

    def change_residual(self, model: ModelPatcher, places: Iterable[Place], change: ChangeResidual) -> Callable[[dict], bool]:
        ResidualHandler(places, change).install(model)
        return runs_residual_blocks

    def change_h_space(self, model: ModelPatcher, change: Callable[[dict], dict]) -> None:
        model.set_model_patch(change, "middle_block_after_patch")

    def empty_prompt(self) -> list:
        """The model's own empty context (as the mini model has), else zeros, which is core's ConditioningZeroOut."""
        empty = getattr(self.model, "empty_context", None)
        if empty is not None:
            return [[empty.float().cpu(), {}]]
        if self.context_dim is None:
            return [[None, {}]]
        logging.info("Pastiche: no positive connected; a zero context stands for the empty prompt.")
        extra = {"pooled_output": torch.zeros(1, 1280)} if self.model.adm_channels else {}
        return [[torch.zeros(1, 77, self.context_dim), extra]]


def adapt_unet(model: ModelPatcher) -> UNet | None:
    """The adapter of ComfyUI's own U-Nets; None for other networks."""
    network = model.model.diffusion_model
    if not all(hasattr(network, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        return None
    attention: dict[Place, list] = {}
    residual: dict[Place, Any] = {}
    scale: dict[Place, int] = {}

    def visit(place: Place, layers) -> None:
        for layer in layers:
            if isinstance(layer, SpatialTransformer):
                attention[place] = list(layer.transformer_blocks)
            elif isinstance(layer, ResBlock) and not (layer.updown and place in residual):
                # The last one of a block; but one that resamples (resblock_updown) stands at the end of another's block.
                residual[place] = layer

    level = 0
    for number, layers in enumerate(network.input_blocks):
        level += any(isinstance(layer, Downsample) or getattr(layer, "updown", False) for layer in layers)
        scale["input", number] = level
        visit(("input", number), layers)
    scale["middle", 0] = level
    visit(("middle", 0), network.middle_block or [])
    count = len(network.output_blocks)
    for number, layers in enumerate(network.output_blocks):
        # A decoder block runs on the grid of the skip it takes: encoder blocks in reverse.
        scale["output", number] = scale["input", count - 1 - number]
        visit(("output", number), layers)
    attended = [blocks[0] for blocks in attention.values() if blocks[0].attn2 is not None]
    return UNet(
        model=model.model,
        family=type(model.model.model_config).__name__,
        attention=attention,
        residual=residual,
        scale=scale,
        counts={"input": len(network.input_blocks), "output": count},
        h_channels=residual["middle", 0].out_channels if ("middle", 0) in residual else 0,
        context_dim=attended[0].attn2.to_k.in_features if attended else None,
    )
