"""The losses of a training as a picture."""

from __future__ import annotations

import math
from typing import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...algorithms.training import window_means

SIZE = (768, 432)  # pixels, width and height
LEFT, TOP, RIGHT, BOTTOM = 72, 40, 16, 48  # margins
PAPER, INK, GRID = (255, 255, 255), (60, 60, 60), (225, 225, 225)
POINT, MEAN, HELD_OUT = (150, 175, 215), (205, 80, 30), (30, 125, 70)


def loss_plot(losses: list[float], window: int, held_out: Sequence[tuple[int, float]] = ()) -> Tensor:
    """IMAGE (1, H, W, 3) in 0 .. 1: every step's loss as a point, the mean of the last `window` steps as a line.

    held_out: (steps done, loss) of draws that training never used, a second line. Single points may lie above the
    picture: its top is what 98 of 100 losses stay below.
    """
    means = window_means(losses, window)
    held_out = [(done, loss) for done, loss in held_out if math.isfinite(loss)]
    picture = Image.new("RGB", SIZE, PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    top = _round_up(max(sorted(losses)[math.ceil(0.98 * len(losses)) - 1], *means, *(loss for _, loss in held_out)))
    for part in range(5):
        value = top * part / 4
        y = _place(0, value, 1, top)[1]
        draw.line([(LEFT, y), (SIZE[0] - RIGHT, y)], fill=GRID)
        draw.text((LEFT - 8, y), f"{value:.3g}", fill=INK, font=font, anchor="rm")
    for step in sorted({0, len(losses) // 2, len(losses) - 1}):
        x = _place(step, 0, len(losses), top)[0]
        draw.text((x, SIZE[1] - BOTTOM + 8), str(step + 1), fill=INK, font=font, anchor="mt")
    for step, loss in enumerate(losses):
        x, y = _place(step, loss, len(losses), top)
        if y >= TOP - 2:
            draw.ellipse([(x - 2, y - 2), (x + 2, y + 2)], fill=POINT)
    draw.line([_place(step, mean, len(losses), top) for step, mean in enumerate(means)], fill=MEAN, width=2)
    if held_out:
        places = [_place(max(done - 1, 0), loss, len(losses), top) for done, loss in held_out]
        draw.line(places, fill=HELD_OUT, width=2)
        for x, y in places:
            draw.ellipse([(x - 3, y - 3), (x + 3, y + 3)], fill=HELD_OUT)
        draw.text((LEFT + 320, 12), "held-out loss", fill=HELD_OUT, font=font)
    draw.text((LEFT, 12), "loss of every step", fill=POINT, font=font)
    draw.text((LEFT + 160, 12), f"mean of the last {window}", fill=MEAN, font=font)
    draw.text((SIZE[0] - RIGHT, SIZE[1] - 10), "step", fill=INK, font=font, anchor="rb")
    return torch.from_numpy(np.asarray(picture).copy())[None].float() / 255


def _place(step: int, loss: float, steps: int, top: float) -> tuple[float, float]:
    """Pixel (x, y) of a loss."""
    x = LEFT + (SIZE[0] - LEFT - RIGHT) * step / max(steps - 1, 1)
    return x, SIZE[1] - BOTTOM - (SIZE[1] - TOP - BOTTOM) * loss / top


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 and 10 times a power of ten."""
    if not (value > 0 and math.isfinite(value)):
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next((factor * unit for factor in (1, 2, 4, 5, 8) if factor * unit >= value), 10 * unit)
