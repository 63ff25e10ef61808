"""Frames of a film: what a frame's attention also sees, statistics of all frames, and how much a film flickers."""

from __future__ import annotations

import torch
from torch import Tensor

from .styleid import masked_statistics


def linked_rows(own: Tensor, first: Tensor | None, before: Tensor | None, to_first: bool, to_previous: bool) -> Tensor:
    """Rows of the film's first frame and of the frame before, for every frame.

    Cross-frame attention: Text2Video-Zero (Khachatryan et al., ICCV 2023) lets every frame attend to the first,
    Tune-A-Video (Wu et al., ICCV 2023) to the first and the previous. The first frame of a film is its own first and previous.
    own: (F, T, C) neighbouring frames in order; first, before: (1, T, C) of the film's first frame and of the one before
    own[0], None where own[0] is the film's first. Returns (F, n T, C), n the number of links turned on: the first frame's rows
    before the previous one's.
    """
    parts = []
    if to_first:
        parts.append((own[:1] if first is None else first).expand(len(own), -1, -1))
    if to_previous:
        parts.append(torch.cat([own[:1] if before is None else before, own[:-1]]))
    return torch.cat(parts, dim=1) if parts else own[:, :0]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` frames, evenly over the film, each from the middle of its part: 10 and 2 give [2, 7]."""
    taken = min(count, most)
    return [(2 * i + 1) * count // (2 * taken) for i in range(taken)]


def film_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation of each channel over frames and positions: (F, C, H, W) -> two (1, C, 1, 1)."""
    return masked_statistics(latents.movedim(0, 1).flatten(1, 2).unsqueeze(0))  # FCHW -> 1C(FH)W


def warped_difference(frames: Tensor, right: int, down: int, margin: int = 0) -> float:
    """Mean absolute difference of neighbouring frames where both show the same, for a picture frame that moves over a picture.

    frames: (F, H, W, C), F > 1. The picture frame moves `right` and `down` pixels from frame to frame (may be negative), so that
    pixel (y, x) of one frame is (y - down, x - right) of the next. `margin` pixels at the borders of what both show do not count.
    """
    height, width = frames.shape[1:3]

    def shared(length: int, step: int) -> tuple[slice, slice]:
        count = length - abs(step)
        begin = max(step, 0), max(-step, 0)
        return tuple(slice(start + margin, start + count - margin) for start in begin)

    (top, top_next), (left, left_next) = shared(height, down), shared(width, right)
    return float((frames[:-1, top, left] - frames[1:, top_next, left_next]).abs().mean())
