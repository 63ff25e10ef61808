"""Numbers of objects, written on a picture with Pillow, which comes with ComfyUI."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def number_objects(picture: Tensor, anchors: Iterable[tuple[int, int] | None]) -> Tensor:
    """White numbers from 1 on black plates, centred at each object's (x, y) and kept inside. (H, W, 3) in 0..1 -> the same."""
    height, width = picture.shape[:2]
    font = ImageFont.load_default(max(9, min(height, width) // 30))
    plates, digits = (Image.new("L", (width, height)) for _ in range(2))
    for number, anchor in enumerate(anchors, start=1):
        if anchor is None:
            continue
        left, top, right, bottom = (round(side) for side in font.getbbox(str(number)))
        wide, high = right - left + 4, bottom - top + 4
        x = min(max(0, anchor[0] - wide // 2), max(0, width - wide))
        y = min(max(0, anchor[1] - high // 2), max(0, height - high))
        place = (x, y, x + wide - 1, y + high - 1)
        ImageDraw.Draw(plates).rectangle(place, fill=255)
        pen = ImageDraw.Draw(digits)
        pen.rectangle(place, fill=0)
        pen.text((x + 2 - left, y + 2 - top), str(number), fill=255, font=font)
    plate, digit = (_levels(image, height, width).to(picture) for image in (plates, digits))
    return picture * (1 - plate) + plate * digit


def _levels(image: Image.Image, height: int, width: int) -> Tensor:
    """An 8-bit grey picture as (H, W, 1) in 0..1."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 1) / 255
