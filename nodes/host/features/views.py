"""Features of one layer and step as pictures."""

from __future__ import annotations

from dataclasses import replace

import comfy.utils
import torch

from ...algorithms.layers import parse_layers
from ...algorithms.views import attention_map, heat_overlay, mark_cell, pca_image
from ...sockets import FeatureBank, FeatureKey
from ..networks.adapter import NetworkAdapter
from ..networks.families import find_adapter
from .capture import record

CPU = torch.device("cpu")


def features_at(bank: FeatureBank, key: FeatureKey, share: float) -> torch.Tensor:
    """(B, ...) features at a share of the schedule (0 noisiest, 1 cleanest), float32 on the CPU."""
    steps = bank.trajectory.steps
    step = steps - min(int(share * steps), steps - 1)
    if bank.store is not None:
        return bank.store.read(key, step, CPU).float()
    single = replace(bank.trajectory, sigmas=bank.trajectory.sigmas[[0, step]], latents=bank.trajectory.latents[[0, step]])
    found: list[torch.Tensor] = []
    record(bank.model, single, [key], lambda key, step, tensor: found.append(tensor.float().cpu()))
    return found[0]


def choose_key(bank: FeatureBank, streams: tuple[str, ...], layer: str) -> FeatureKey:
    """The bank's feature of one layer (its last transformer block), of the first stream that it holds."""
    places = parse_layers(layer)
    if len(places) != 1:
        raise ValueError(f'layer: one layer is shown at a time, got "{layer}"; write for example "output 7".')
    for stream in streams:
        keys = [key for key in bank.keys if key.stream == stream and (key.block, key.number) == places[0]]
        if keys:
            return max(keys, key=lambda key: key.depth)
    held = ", ".join(sorted({f"{key.stream} of {key.block} {key.number}" for key in bank.keys})) or "nothing"
    raise ValueError(f'layer: the features hold no {" or ".join(streams)} of "{layer}"; they hold {held}.')


def _as_grid(tensor: torch.Tensor, key: FeatureKey, adapter: NetworkAdapter, bank: FeatureBank) -> torch.Tensor:
    """Tokens (B, T, C) or maps -> (B, C, h, w)."""
    if tensor.ndim == 4:
        return tensor
    grid = adapter.grid((key.block, key.number), *bank.trajectory.latents.shape[-2:])
    return tensor.movedim(-1, 1).unflatten(2, grid)  # BTC -> BCHW


def feature_pca(features: FeatureBank, compare: FeatureBank | None, layer: str, share: float, size: int) -> torch.Tensor:
    """BHWC picture(s) of the top three components; `compare`, if given, in the same basis after them."""
    streams = ("residual", "self_attention", "self_attention_q", "h_space")
    adapter = find_adapter(features.model)
    maps = []
    for bank in (features, compare):
        if bank is not None:
            key = choose_key(bank, streams, layer)
            maps.append(_as_grid(features_at(bank, key, share), key, adapter, bank))
    if compare is not None and maps[0].shape[1:] != maps[1].shape[1:]:
        raise ValueError(f"compare: its features are {tuple(maps[1].shape[1:])}, the first ones {tuple(maps[0].shape[1:])}; "
                         "capture both with one stream, layer and image size.")
    image = pca_image(torch.cat(maps))
    height, width = image.shape[1:3]
    scale = max(1, size // max(height, width))
    return image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def style_similarity(
    content: FeatureBank, style: FeatureBank, layer: str, share: float, x: float, y: float,
    content_image: torch.Tensor, style_image: torch.Tensor,
) -> torch.Tensor:
    """Content with the query's patch marked | style with the attention it pays (BHWC, one picture).

    x, y: the query's place as a share of width and height. Uses the models' own projections.
    """
    adapter = find_adapter(content.model)

    def projected(bank: FeatureBank, name: str) -> tuple[torch.Tensor, FeatureKey]:
        key = choose_key(bank, (f"self_attention_{name}", "self_attention"), layer)
        tensor = features_at(bank, key, share)[0]
        if key.stream == "self_attention":
            tensor = tensor @ adapter.projection_weight("attn1", key[1:], f"to_{name}").T
        return tensor, key

    queries, key = projected(content, "q")
    keys, _ = projected(style, "k")
    rows, columns = adapter.grid((key.block, key.number), *content.trajectory.latents.shape[-2:])
    row, column = min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)
    heat = attention_map(queries[row * columns + column], keys, adapter.heads(key[1:]))
    heat = heat.unflatten(0, adapter.grid((key.block, key.number), *style.trajectory.latents.shape[-2:]))
    left = mark_cell(content_image[0, ..., :3].float().cpu(), row, column, (rows, columns))
    right = heat_overlay(style_image[0, ..., :3].float().cpu(), heat / heat.max())
    right = comfy.utils.common_upscale(
        right[None].movedim(-1, 1), max(1, round(right.shape[1] * left.shape[0] / right.shape[0])), left.shape[0], "bilinear", "disabled"
    ).movedim(1, -1)[0]  # HWC -> BCHW -> HWC
    return torch.cat([left, right], dim=1)[None]
