"""What a MODEL's U-Net looks like: blocks, widths, grids, and the modules that compute them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock

from ...algorithms.layers import format_numbers, parse_layers
from ...sockets import STREAMS, FeatureKey

Place = tuple[str, int]  # (block, number)

EXPLICIT = {"self_attention_qkv": ("self_attention_q", "self_attention_k", "self_attention_v"),
            "self_attention_qk": ("self_attention_q", "self_attention_k"),
            "cross_attention": ("cross_attention_q", "cross_attention_k")}


@dataclass(frozen=True)
class UNetLayout:
    """Blocks of one U-Net. `family` is the word used in messages; `scale` maps a place to its downsampling steps."""

    family: str
    attention: dict[Place, list[Any]]  # BasicTransformerBlocks, by depth
    residual: dict[Place, Any]  # ResBlocks
    scale: dict[Place, int]
    counts: dict[str, int]
    h_channels: int
    context_dim: int | None

    def grid(self, place: Place, height: int, width: int) -> tuple[int, int]:
        """(h, w) of a block for a (height, width) latent: every Downsample halves, rounding up."""
        for _ in range(self.scale[place]):
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width

    def places(self, layers: str, kind: str = "attention") -> list[Place]:
        """Resolves layer text against this model; `kind` is "attention" or "residual".

        "auto" is the paper's 6-11 on a 12-block decoder, elsewhere the decoder's finest attention level.
        """
        known = getattr(self, kind)
        if not known:
            raise ValueError(f"streams: {self.family} has no {kind} blocks that can be captured; use h_space.")
        if layers.strip().lower() == "auto":
            return self._default_places(known)
        places = parse_layers(layers)
        for block, number in places:
            if (block, number) not in known:
                raise ValueError(f"layers: {self._describe(kind)}: got {block} {number}.")
        return places

    def _default_places(self, known: dict) -> list[Place]:
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

    def keys(self, streams: str, layers: str) -> list[FeatureKey]:
        """Every tensor that `streams` (comma-separated) of `layers` consists of."""
        keys: dict[FeatureKey, None] = {}
        for stream in parse_streams(streams):
            if stream == "h_space":
                keys[FeatureKey(stream, "middle", 0)] = None
                continue
            kind = "residual" if stream == "residual" else "attention"
            for place in self.places(layers, kind):
                depths = 1 if kind == "residual" else len(self.attention[place])
                keys.update({FeatureKey(stream, *place, depth): None for depth in range(depths)})
        return list(keys)

    def shape(self, key: FeatureKey, height: int, width: int, context_tokens: int = 77) -> tuple[int, ...]:
        """Shape of one captured tensor of one sample, without batch and step."""
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

    def elements(self, keys, height: int, width: int, context_tokens: int = 77) -> int:
        return sum(prod(self.shape(key, height, width, context_tokens)) for key in keys)


def parse_streams(text: str) -> list[str]:
    """Comma-separated stream names -> members of STREAMS, `self_attention_qkv` and the like spelled out."""
    streams: dict[str, None] = {}
    for name in (part.strip().lower() for part in text.split(",")):
        members = EXPLICIT.get(name, (name,))
        if members[0] not in STREAMS:
            raise ValueError(
                f'streams: unknown stream "{name}"; choose among self_attention, residual, h_space, {", ".join(EXPLICIT)}.'
            )
        streams.update(dict.fromkeys(members))
    return list(streams)


def inspect_model(model: Any) -> UNetLayout:
    """Layout of a MODEL. Raises ValueError for models without a U-Net."""
    network = model.model.diffusion_model
    family = type(model.model.model_config).__name__
    if hasattr(network, "pastiche_layout"):
        return network.pastiche_layout(family)
    if not all(hasattr(network, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        raise ValueError(
            f"{family} has no U-Net ({type(network).__name__}): connect an SD1.x, SD2.x, SDXL or Pastiche mini model."
        )
    attention: dict[Place, list] = {}
    residual: dict[Place, Any] = {}
    scale: dict[Place, int] = {}

    def visit(place: Place, layers) -> None:
        for layer in layers:
            if isinstance(layer, SpatialTransformer):
                attention[place] = list(layer.transformer_blocks)
            elif isinstance(layer, ResBlock):
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
    return UNetLayout(
        family=family,
        attention=attention,
        residual=residual,
        scale=scale,
        counts={"input": len(network.input_blocks), "middle": 1, "output": count},
        h_channels=residual["middle", 0].out_channels if ("middle", 0) in residual else 0,
        context_dim=attended[0].attn2.to_k.in_features if attended else None,
    )


def attention_block(network: torch.nn.Module, block: str, number: int, depth: int) -> Any:
    """The BasicTransformerBlock at a place of a running U-Net."""
    layers = network.middle_block if block == "middle" else getattr(network, f"{block}_blocks")[number]
    transformer = next(layer for layer in layers if isinstance(layer, SpatialTransformer))
    return transformer.transformer_blocks[depth]
