"""Sharing a reference's attention: joined or replaced keys, query preservation, rotary positions, token statistics.

Keys and queries are (rows, heads, tokens, width) or (rows, tokens, heads * width); `axis` is the tokens' axis, 2 or 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Span = tuple[int, int]  # first image token and the one after the last

SCHEDULES = ("constant", "linear", "cosine", "sqrt")
SHARES = ("join", "replace")
SAME_TOKEN = 1e-2  # relative: half precision rounds equal tokens of two rows apart by a tenth of this


def scheduled(start: float, end: float, progress: float, schedule: str) -> float:
    """Value at `progress` 0..1 of the sampling, on its way from `start` to `end` (Scheduled Style Injection, arXiv 2605.26538)."""
    if schedule == "constant":
        return start
    if schedule == "linear":
        return start + (end - start) * progress
    if schedule == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "sqrt":
        return start + (end - start) * math.sqrt(progress)
    raise ValueError(f'schedule: got "{schedule}", choose among {", ".join(SCHEDULES)}.')


def sampling_progress(sigma: float, sigmas: list[float]) -> float:
    """i / (N - 1) of the step nearest to `sigma` among N = len(sigmas) - 1 steps; `sigmas` descend, the last ends the run."""
    steps = len(sigmas) - 1
    if steps < 2:
        return 0.0
    nearest = min(range(steps), key=lambda step: abs(sigmas[step] - sigma))
    return nearest / (steps - 1)


def differing_span(a: Tensor, b: Tensor, axis: int) -> Span | None:
    """First..last token in which two rows differ by more than rounding; None where no token does.

    a, b: one row each, without its batch axis: (heads, tokens, width) or (tokens, heads * width); `axis` counts the batch axis.
    """
    a, b = (row.movedim(axis - 1, 0).flatten(1).float() for row in (a, b))
    differing = (a - b).norm(dim=1) > SAME_TOKEN * torch.maximum(a.norm(dim=1), b.norm(dim=1))
    where = differing.nonzero().flatten()
    return (int(where[0]), int(where[-1]) + 1) if len(where) else None


def within_padding(span: Span, known: dict[int, Span]) -> Span:
    """The real picture inside `span` when an earlier call had the picture alone, padded to the span's length.

    Padding differs between rows once it has attended to the picture, so only the first call of that length tells.
    """
    inner = known.get(span[1] - span[0])
    return span if inner is None else (span[0] + inner[0], span[0] + inner[1])


def token_grid(tokens: int, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(frames, height, width) that `tokens` are laid out in, row by row; None where no square patch explains them.

    shape: of the latent behind them, (H, W) or (T, H, W).
    """
    frames, (height, width) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
    for patch in (1, 2, 4, 8, 16, 32, 64):
        grid = frames, -(-height // patch), -(-width // patch)
        if math.prod(grid) == tokens:
            return grid
    return None


def grown_tokens(tokens: int, small: tuple[int, ...], shape: tuple[int, ...]) -> int | None:
    """How many tokens a latent `shape` ([T,] H, W) has where `small` has `tokens`; None where no square patch explains them."""
    grid = token_grid(tokens, small)
    if grid is None:
        return None
    patch = 1
    while grid[1:] != (-(-small[-2] // patch), -(-small[-1] // patch)):
        patch *= 2
    return grid[0] * -(-shape[-2] // patch) * -(-shape[-1] // patch)


def fit_latent(latent: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A latent (B, C, [T,] h, w) at `shape` ([T,] H, W): cut around its centre where larger, mirrored where smaller.

    Nothing is resampled, so texture and statistics stay; a still picture is repeated along the time axis.
    """
    for axis, size in enumerate(shape, 2):
        own = latent.shape[axis]
        if own == size:
            continue
        places = torch.arange(size)
        if len(shape) == 3 and axis == 2:
            places = places.clamp(max=own - 1)
        else:
            places = (places + (own - size) // 2) % (2 * own)
            places = torch.where(places < own, places, 2 * own - 1 - places)
        latent = latent.index_select(axis, places.to(latent.device))
    return latent


def share_tokens(own: Tensor, reference: Tensor, span: Span, share: str, axis: int) -> Tensor:
    """Keys or values of the sample with the reference's image tokens: put in place of its own, or added at the end."""
    if share == "join":
        return torch.cat([own, reference], axis)
    first, end = span
    return torch.cat([own.narrow(axis, 0, first), reference, own.narrow(axis, end, own.shape[axis] - end)], axis)


def change_tokens(x: Tensor, span: Span, changed: Tensor, axis: int) -> Tensor:
    """x with the tokens of `span` exchanged for `changed`."""
    if changed.shape[axis] == x.shape[axis]:
        return changed
    return share_tokens(x, changed, span, "replace", axis)


@dataclass(frozen=True)
class RotaryLayout:
    """How positions turn queries and keys: pairs of channels, by axis.

    axes: channels of each axis (text or time, height, width, ...); thetas: base of each axis' frequencies;
    interleaved: pairs are (0, 1), (2, 3), ...; otherwise channel i goes with i + D/2.
    """

    axes: tuple[int, ...]
    thetas: tuple[float, ...]
    interleaved: bool

    HEIGHT, WIDTH = 1, 2

    @property
    def width(self) -> int:
        return sum(self.axes)


def untwist_scales(layout: RotaryLayout, high: float, low: float, beta: float) -> Tensor:
    """(D/2,) factor of every rotary pair of the reference's keys (untwisting RoPE, arXiv 2602.05013).

    s_d = high + (low - high) u^beta, u = d / (pairs of the axis - 1), d = 0 the highest frequency. Axes that are no
    direction of the picture take `low`.
    """
    parts = []
    for axis, channels in enumerate(layout.axes):
        pairs = channels // 2
        if axis not in (layout.HEIGHT, layout.WIDTH):
            parts.append(torch.full((pairs,), low))
            continue
        u = torch.arange(pairs) / max(pairs - 1, 1)
        parts.append(high + (low - high) * u**beta)
    return torch.cat(parts)


def shift_angles(layout: RotaryLayout, columns: float) -> Tensor:
    """(D/2,) angle by which a key turns when it moves `columns` tokens to the right (ShiftPE, arXiv 2509.17088)."""
    parts = [torch.zeros(channels // 2) for channels in layout.axes]
    pairs, theta = layout.axes[layout.WIDTH] // 2, layout.thetas[layout.WIDTH]
    parts[layout.WIDTH] = columns * theta ** (-torch.arange(pairs) / pairs)
    return torch.cat(parts)


def rotary_pairs(x: Tensor, interleaved: bool) -> Tensor:
    """(..., D) -> (..., D/2, 2)."""
    return x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)


def from_pairs(pairs: Tensor, interleaved: bool) -> Tensor:
    """(..., D/2, 2) -> (..., D)."""
    return (pairs if interleaved else pairs.transpose(-1, -2)).flatten(-2)


def scale_pairs(x: Tensor, scales: Tensor, interleaved: bool) -> Tensor:
    """Scales every rotary pair of (..., D); commutes with any rotation of it."""
    return from_pairs(rotary_pairs(x, interleaved) * scales.to(x).unsqueeze(-1), interleaved)


def rotate_pairs(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Turns every rotary pair of (..., D) by its angle: R_a applied to R_p x is R_(a+p) x."""
    real, imaginary = rotary_pairs(x.float(), interleaved).unbind(-1)
    cos, sin = angles.to(real).cos(), angles.to(real).sin()
    return from_pairs(torch.stack([cos * real - sin * imaginary, sin * real + cos * imaginary], -1), interleaved).to(x)


def match_pairs(x: Tensor, reference: Tensor, axis: int, interleaved: bool) -> Tensor:
    """Gives every rotary pair the reference's RMS length over its tokens. (..., D), token axis `axis`.

    The lengths of pairs do not change under rotation, so the positions stay as they are: AdaIN that RoPE allows.
    """
    lengths = [
        rotary_pairs(tensor.float(), interleaved).square().sum(-1).mean(axis, keepdim=True).sqrt() for tensor in (x, reference)
    ]
    return scale_pairs_by_token(x, lengths[1] / lengths[0].clamp_min(1e-12), interleaved)


def scale_pairs_by_token(x: Tensor, scales: Tensor, interleaved: bool) -> Tensor:
    """scale_pairs with scales of shape (..., D/2) that may differ between rows and heads."""
    return from_pairs(rotary_pairs(x, interleaved) * scales.to(x).unsqueeze(-1), interleaved)


def match_channels(x: Tensor, reference: Tensor, axis: int) -> Tensor:
    """AdaIN over tokens (StyleAligned): every channel takes the reference's mean and deviation. For models without RoPE."""
    x32, reference = x.float(), reference.float()
    mean, std = x32.mean(axis, keepdim=True), x32.std(axis, keepdim=True, correction=0)
    other, spread = reference.mean(axis, keepdim=True), reference.std(axis, keepdim=True, correction=0)
    return ((x32 - mean) / std.clamp_min(1e-6) * spread + other).to(x)


def mix_styles(plain: Tensor | None, styled: list[Tensor], weights: list[Tensor | float]) -> Tensor:
    """plain + sum_i w_i (styled_i - plain), exactly `plain` where all weights are 0; without `plain`, weights that sum to 1."""
    if plain is None:
        return styled[0] if len(styled) == 1 else sum(weight * out for weight, out in zip(weights, styled))
    return plain + sum(weight * (out - plain) for weight, out in zip(weights, styled))
