"""The pixel-space U-Net of the ADM and DDPM layouts as ComfyUI's diffusion_model, with core's hooks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .unconditional_layouts import GROUPS, Layer, Layout
from .unconditional_pixels import PixelUNet


class FlatUNet(PixelUNet):
    """Encoder blocks, a middle, decoder blocks that take one skip each: numbered as in the ADM layout.

    Fires DIFFUSION_MODEL wrappers and the patches `input_block_patch`, `middle_block_after_patch` (h-space) and
    `output_block_patch`. `step` is what one index of the schedule is on the network's 0..1000 scale of timesteps.
    """

    def __init__(self, layout: Layout, step: float = 1.0):
        super().__init__()
        self.layout, self.step, self.dtype = layout, step, torch.float32
        self.embed = nn.Sequential(nn.Linear(layout.channels, layout.embedding), nn.Linear(layout.embedding, layout.embedding))
        self.inputs, self.outputs = (
            nn.ModuleList(_make_block(block, layout) for block in blocks) for blocks in (layout.inputs, layout.outputs)
        )
        self.middle = _make_block(layout.middle, layout)
        last = layout.outputs[-1][-1].width_out
        self.norm_out = nn.GroupNorm(GROUPS, last, eps=_eps(layout))
        self.conv_out = nn.Conv2d(last, layout.out_channels, 3, padding=1)

    @property
    def h_channels(self) -> int:
        return self.layout.middle[-1].width_out

    @property
    def levels(self) -> int:
        return self.layout.levels

    @property
    def blocks(self) -> tuple[int, int]:
        return len(self.inputs), len(self.outputs)

    def _forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **kwargs):
        """x: (B, 3, H, W) in the model's own scale; timesteps: (B,), indices of the schedule. Returns eps, (B, 3, H, W)."""
        self._check(x, control)
        patches = transformer_options.get("patches", {})
        transformer_options["original_shape"] = list(x.shape)
        transformer_options["transformer_index"] = 0
        waves = sinusoids(timesteps * self.step, self.layout.channels, self.layout.original).to(x.dtype)
        emb = self.embed[1](F.silu(self.embed[0](waves)))

        h, skips = x, []
        for number, block in enumerate(self.inputs):
            transformer_options["block"] = ("input", number)
            h = _run(block, h, emb)
            for patch in patches.get("input_block_patch", []):
                h = patch(h, transformer_options)
            skips.append(h)

        transformer_options["block"] = ("middle", 0)
        h = _run(self.middle, h, emb)
        for patch in patches.get("middle_block_after_patch", []):
            h = patch({"h": h, "x": x, "emb": emb, "context": context, "y": y, "timesteps": timesteps,
                       "transformer_options": transformer_options})["h"]

        for number, block in enumerate(self.outputs):
            transformer_options["block"] = ("output", number)
            skip = skips.pop()
            for patch in patches.get("output_block_patch", []):
                h, skip = patch(h, skip, transformer_options)
            h = _run(block, torch.cat([h, skip], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))[:, :3]


class Convolution(nn.Module):
    """The first layer."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.conv = nn.Conv2d(layer.width_in, layer.width_out, 3, padding=1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return self.conv(h)


class Residual(nn.Module):
    """Norm, SiLU, convolution twice; the timestep is added between them, or scales and shifts the second norm.

    A block that resamples does so to both its branches, in the first after the norm.
    """

    def __init__(self, layer: Layer, layout: Layout):
        super().__init__()
        self.resample, self.scale_shift = layer.resample, layout.scale_shift
        self.norm1 = nn.GroupNorm(GROUPS, layer.width_in, eps=_eps(layout))
        self.conv1 = nn.Conv2d(layer.width_in, layer.width_out, 3, padding=1)
        self.embed = nn.Linear(layout.embedding, layer.width_out * (2 if layout.scale_shift else 1))
        self.norm2 = nn.GroupNorm(GROUPS, layer.width_out, eps=_eps(layout))
        self.conv2 = nn.Conv2d(layer.width_out, layer.width_out, 3, padding=1)
        self.skip = None
        if layer.width_in != layer.width_out:
            self.skip = nn.Conv2d(layer.width_in, layer.width_out, layer.kernel, padding=layer.kernel // 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(_resampled(F.silu(self.norm1(x)), self.resample))
        x = _resampled(x, self.resample)
        told = self.embed(F.silu(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + told)
        return (x if self.skip is None else self.skip(x)) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Self-attention over all pixels, added to its input."""

    def __init__(self, layer: Layer, layout: Layout):
        super().__init__()
        self.heads = layout.heads(layer.width_in)
        self.norm = nn.GroupNorm(GROUPS, layer.width_in, eps=_eps(layout))
        self.qkv = nn.Linear(layer.width_in, 3 * layer.width_in)
        self.out = nn.Linear(layer.width_in, layer.width_in)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        rows = self.norm(x).flatten(2).transpose(1, 2)  # BCHW -> BTC
        q, k, v = self.qkv(rows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # BT3hd -> 3 of BhTd
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # BhTd -> BTC
        return x + self.out(mixed).transpose(1, 2).reshape(x.shape)  # BTC -> BCHW


class Downsample(nn.Module):
    """Halves the grid. The original DDPM pads at the right and lower edges only."""

    def __init__(self, layer: Layer, layout: Layout):
        super().__init__()
        self.far = layout.original
        self.conv = nn.Conv2d(layer.width_in, layer.width_out, 3, stride=2, padding=0 if self.far else 1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.pad(h, (0, 1, 0, 1)) if self.far else h)


class Upsample(nn.Module):
    def __init__(self, layer: Layer):
        super().__init__()
        self.conv = nn.Conv2d(layer.width_in, layer.width_out, 3, padding=1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return self.conv(_resampled(h, "up"))


def sinusoids(t: Tensor, channels: int, original: bool) -> Tensor:
    """(B, channels), float32 or the given float64: cosines then sines; the original DDPM has sines first and ends at 1/10000."""
    half = channels // 2
    dtype = t.dtype if t.dtype == torch.float64 else torch.float32
    powers = torch.arange(half, device=t.device, dtype=dtype) / (half - 1 if original else half)
    angles = t.to(dtype)[:, None] * torch.exp(-math.log(10000) * powers)
    waves = angles.sin(), angles.cos()
    return torch.cat(waves if original else waves[::-1], dim=1)


def _make_block(block: tuple[Layer, ...], layout: Layout) -> nn.ModuleList:
    make = {"conv": Convolution, "up": Upsample, "residual": lambda layer: Residual(layer, layout),
            "attention": lambda layer: Attention(layer, layout), "down": lambda layer: Downsample(layer, layout)}
    return nn.ModuleList(make[layer.kind](layer) for layer in block)


def _run(block: nn.ModuleList, h: Tensor, emb: Tensor) -> Tensor:
    for layer in block:
        h = layer(h, emb)
    return h


def _resampled(h: Tensor, how: str) -> Tensor:
    """Means of 2x2 pixels, or every pixel twice."""
    if how == "down":
        return F.avg_pool2d(h, 2)
    return F.interpolate(h, scale_factor=2, mode="nearest") if how == "up" else h


def _eps(layout: Layout) -> float:
    return 1e-6 if layout.original else 1e-5
