"""Small random networks in the layouts of published pixel-space U-Nets, and what the papers say they compute.

Written for the tests from the papers, in float64, without the pack: a state dict is drawn from a `Plan`, and `predict`
walks the same plan over the tensors' names. ADM: Dhariwal and Nichol 2021, appendix A to C (iDDPM and P2 are its special
cases); DDPM: Ho et al. 2020, appendix B, with the names of its PyTorch ports.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Plan:
    ddpm: bool = False
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attended: tuple[int, ...] = (1,)  # levels
    updown: bool = False
    scale_shift: bool = True
    out_channels: int = 6
    heads: int = 0  # 0: by head_channels
    head_channels: int = 64
    heads_first: bool = True  # rows of qkv: q, k, v of a head together
    shortcut: int = 1  # kernel where widths change

    @property
    def embedding(self) -> int:
        return 4 * self.channels


PLANS = {
    # P2 weighting: AFHQ, FFHQ, MetFaces; guided diffusion with attention at more levels: ImageNet
    "p2": Plan(multipliers=(1, 1, 4), attended=(2,), updown=True),
    "adm": Plan(multipliers=(2, 4), blocks=2, attended=(0, 1), updown=True),
    "iddpm": Plan(multipliers=(1, 2, 2), blocks=2, attended=(1, 2), heads=4),
    "iddpm without scale-shift": Plan(attended=(1,), scale_shift=False, heads=1),
    "adm, other order": Plan(updown=True, head_channels=32, heads_first=False),
    "one level": Plan(multipliers=(1,), attended=(0,), heads=4, out_channels=3),
    "ddpm": Plan(ddpm=True, multipliers=(1, 2, 2), blocks=2, attended=(1,), out_channels=3),
    "ddpm, deep": Plan(ddpm=True, multipliers=(1, 1, 2, 2), blocks=1, attended=(2, 3), out_channels=3, shortcut=3),
}


class Drawer:
    """Stands for a state dict that makes its tensors, float32, as they are asked for."""

    def __init__(self, seed: int):
        self.made, self.generator = {}, torch.Generator().manual_seed(seed)

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self.made:
            noise = torch.randn(shape, generator=self.generator)
            if len(shape) == 1:
                centre = 1.0 if name.endswith("weight") else 0.0  # a norm's weight; biases
                self.made[name] = centre + 0.2 * noise
            else:
                self.made[name] = noise / math.sqrt(math.prod(shape[1:]))
        return self.made[name].double()


class Held(Drawer):
    """Tensors of a finished state dict."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self.made = state


@functools.lru_cache(maxsize=None)
def draw(plan: Plan, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict with the plan's names and shapes, float32. Not to be changed."""
    drawer = Drawer(seed)
    size = 2 ** (len(plan.multipliers) - 1)
    _walk(plan, drawer, torch.zeros(1, 3, size, size).double(), torch.zeros(1).double())
    return drawer.made


def predict(plan: Plan, state: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, change_h=lambda h: h) -> torch.Tensor:
    """The network's output, (B, out_channels, H, W) float64; t is on the scale of 0..1000."""
    return _walk(plan, Held(state), x.double(), t.double(), change_h)


def _walk(plan, d, x, t, change_h=lambda h: h):
    names = ("temb.dense.0", "temb.dense.1") if plan.ddpm else ("time_embed.0", "time_embed.2")
    half = plan.channels // 2
    spacing = half - 1 if plan.ddpm else half
    angle = torch.stack([t * 10000.0 ** (-i / spacing) for i in range(half)], 1)
    waves = torch.cat([angle.sin(), angle.cos()] if plan.ddpm else [angle.cos(), angle.sin()], 1)
    emb = _linear(d, names[1], _silu(_linear(d, names[0], waves, plan.embedding)), plan.embedding)

    levels, skips = len(plan.multipliers), []
    h = _conv(d, "conv_in" if plan.ddpm else "input_blocks.0.0", x, plan.channels, 3)
    skips.append(h)
    number = 1
    for level, multiplier in enumerate(plan.multipliers):
        for j in range(plan.blocks):
            block, attention = (f"down.{level}.block.{j}", f"down.{level}.attn.{j}") if plan.ddpm else (f"input_blocks.{number}.0", f"input_blocks.{number}.1")
            h = _residual(plan, d, block, h, emb, plan.channels * multiplier)
            if level in plan.attended:
                h = _attention(plan, d, attention, h)
            skips.append(h)
            number += 1
        if level < levels - 1:
            if plan.ddpm:  # one row and column of zeros at the far side
                h = _conv(d, f"down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), h.shape[1], 3, stride=2, padding=0)
            elif plan.updown:
                h = _residual(plan, d, f"input_blocks.{number}.0", h, emb, h.shape[1], _halve)
            else:
                h = _conv(d, f"input_blocks.{number}.0.op", h, h.shape[1], 3, stride=2)
            skips.append(h)
            number += 1

    middle = ("mid.block_1", "mid.attn_1", "mid.block_2") if plan.ddpm else ("middle_block.0", "middle_block.1", "middle_block.2")
    h = _residual(plan, d, middle[0], h, emb, h.shape[1])
    h = _attention(plan, d, middle[1], h)
    h = change_h(_residual(plan, d, middle[2], h, emb, h.shape[1]))

    number = 0
    for level in reversed(range(levels)):
        for j in range(plan.blocks + 1):
            prefix = f"output_blocks.{number}"
            block, attention = (f"up.{level}.block.{j}", f"up.{level}.attn.{j}") if plan.ddpm else (f"{prefix}.0", f"{prefix}.1")
            h = _residual(plan, d, block, torch.cat([h, skips.pop()], 1), emb, plan.channels * plan.multipliers[level])
            if level in plan.attended:
                h = _attention(plan, d, attention, h)
            if level > 0 and j == plan.blocks:
                last = f"{prefix}.{2 if level in plan.attended else 1}"
                if plan.ddpm:
                    h = _conv(d, f"up.{level}.upsample.conv", _double(h), h.shape[1], 3)
                elif plan.updown:
                    h = _residual(plan, d, last, h, emb, h.shape[1], _double)
                else:
                    h = _conv(d, f"{last}.conv", _double(h), h.shape[1], 3)
            number += 1
    assert not skips
    norm, last = ("norm_out", "conv_out") if plan.ddpm else ("out.0", "out.2")
    return _conv(d, last, _silu(_norm(plan, d, norm, h)), plan.out_channels, 3)


def _residual(plan, d, name, x, emb, width, resample=lambda h: h):
    """Ho et al.: norm, swish, conv, + time, norm, swish, conv, + input. ADM: the time gives (scale, shift) of the second norm."""
    if plan.ddpm:
        norm1, conv1, time, norm2, conv2, skip = ("norm1", "conv1", "temb_proj", "norm2", "conv2", "conv_shortcut")
        skip = "nin_shortcut" if plan.shortcut == 1 else skip
    else:
        norm1, conv1, time, norm2, conv2, skip = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
    double = plan.scale_shift and not plan.ddpm
    h = _conv(d, f"{name}.{conv1}", resample(_silu(_norm(plan, d, f"{name}.{norm1}", x))), width, 3)
    x = resample(x)
    told = _linear(d, f"{name}.{time}", _silu(emb), width * (2 if double else 1))[:, :, None, None]
    if double:
        h = _norm(plan, d, f"{name}.{norm2}", h) * (1 + told[:, :width]) + told[:, width:]
    else:
        h = _norm(plan, d, f"{name}.{norm2}", h + told)
    h = _conv(d, f"{name}.{conv2}", _silu(h), width, 3)
    return h + (x if x.shape[1] == width else _conv(d, f"{name}.{skip}", x, width, plan.shortcut))


def _attention(plan, d, name, x):
    batch, width, *grid = x.shape
    h = _norm(plan, d, f"{name}.norm", x).reshape(batch, width, -1)
    heads = 1 if plan.ddpm else plan.heads or width // plan.head_channels
    each = width // heads
    if plan.ddpm:
        q, k, v = (_conv(d, f"{name}.{part}", h.reshape(x.shape), width, 1).reshape(batch, width, -1) for part in "qkv")
        rows = [(q, k, v)]
    else:
        weight, bias = d.tensor(f"{name}.qkv.weight", 3 * width, width, 1), d.tensor(f"{name}.qkv.bias", 3 * width)
        qkv = torch.einsum("oc,bct->bot", weight[:, :, 0], h) + bias[:, None]
        starts = [(3 * i * each, (3 * i + 1) * each, (3 * i + 2) * each) if plan.heads_first else
                  (i * each, width + i * each, 2 * width + i * each) for i in range(heads)]
        rows = [tuple(qkv[:, start : start + each] for start in three) for three in starts]
    mixed = []
    for q, k, v in rows:
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(each), -1)
        mixed.append(torch.einsum("bts,bcs->bct", weights, v))
    mixed = torch.cat(mixed, 1)
    if plan.ddpm:
        return x + _conv(d, f"{name}.proj_out", mixed.reshape(x.shape), width, 1)
    weight, bias = d.tensor(f"{name}.proj_out.weight", width, width, 1), d.tensor(f"{name}.proj_out.bias", width)
    return x + (torch.einsum("oc,bct->bot", weight[:, :, 0], mixed) + bias[:, None]).reshape(x.shape)


def _norm(plan, d, name, x):
    """32 groups, each brought to mean 0 and variance 1."""
    width = x.shape[1]
    groups = x.reshape(x.shape[0], 32, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + (1e-6 if plan.ddpm else 1e-5)).sqrt()
    return unit.reshape(x.shape) * d.tensor(f"{name}.weight", width)[:, None, None] + d.tensor(f"{name}.bias", width)[:, None, None]


def _conv(d, name, x, width, kernel, stride=1, padding=None):
    weight = d.tensor(f"{name}.weight", width, x.shape[1], kernel, kernel)
    return F.conv2d(x, weight, d.tensor(f"{name}.bias", width), stride, kernel // 2 if padding is None else padding)


def _linear(d, name, x, width):
    return x @ d.tensor(f"{name}.weight", width, x.shape[1]).T + d.tensor(f"{name}.bias", width)


def _silu(x):
    return x * torch.sigmoid(x)


def _halve(x):
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def _double(x):
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)
