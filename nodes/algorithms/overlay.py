"""Pictures of segmentations: tinted objects with contours and numbers, and flat label maps."""

import colorsys

import torch
from torch import Tensor

from .masks import boundary

# 3 x 5 dots a digit, row by row
_DIGITS = {
    "0": "111101101101111",
    "1": "010110010010111",
    "2": "111001111100111",
    "3": "111001011001111",
    "4": "101101111001001",
    "5": "111100111001111",
    "6": "111100111101111",
    "7": "111001010010010",
    "8": "111101111101111",
    "9": "111101111001111",
}


def palette(count: int) -> Tensor:
    """(count, 3) well-separated colours; the first ones do not depend on count."""
    golden = 0.61803398875
    return torch.tensor(
        [colorsys.hsv_to_rgb((0.57 + golden * i) % 1, 0.85 - 0.25 * (i % 3) / 2, 1.0 - 0.15 * (i % 2)) for i in range(count)]
    ).reshape(-1, 3)


def label_map(masks: Tensor) -> Tensor:
    """Flat colours of objects, black elsewhere: (N, H, W) bool -> (H, W, 3). Later, smaller ones lie on top."""
    flat = torch.zeros(*masks.shape[1:], 3)
    for mask, colour in zip(masks, palette(len(masks))):
        flat[mask] = colour
    return flat


def draw_overlay(image: Tensor, objects: Tensor, final: Tensor) -> Tensor:
    """The image with every object outlined and numbered, and the final mask tinted with a white contour.

    image (H, W, 3) in 0..1; objects (N, H, W) bool; final (H, W) in 0..1 -> (H, W, 3). Numbers start at 1.
    """
    height, width = image.shape[:2]
    line = max(1, round(min(height, width) / 400))
    picture = image * (0.55 + 0.45 * final[..., None])
    for mask, colour in zip(objects, palette(len(objects))):
        inside = (mask & (final > 0.5))[..., None]
        picture = torch.where(inside, picture * 0.6 + colour * 0.4, picture)
    for mask, colour in zip(objects, palette(len(objects))):
        picture[boundary(mask[None], line)[0]] = colour
    picture[boundary(final[None] > 0.5, line)[0]] = 1.0
    for number, mask in enumerate(objects, start=1):
        _write(picture, str(number), *_anchor(mask), scale=max(1, round(min(height, width) / 160)))
    return picture.clamp(0, 1)


def _anchor(mask: Tensor) -> tuple[int, int]:
    """(x, y) of the mask's pixel nearest to its centroid, so that a crescent's number lies on it."""
    rows, columns = mask.nonzero().unbind(1)
    if not len(rows):
        return 0, 0
    distance = (rows - rows.float().mean()) ** 2 + (columns - columns.float().mean()) ** 2
    nearest = distance.argmin()
    return int(columns[nearest]), int(rows[nearest])


def _write(picture: Tensor, text: str, x: int, y: int, scale: int) -> None:
    """White digits on a black plate, centred at x, y and kept inside; in place."""
    height, width = picture.shape[:2]
    dots = torch.zeros(7, 4 * len(text) + 1)
    for place, digit in enumerate(text):
        dots[1:6, 4 * place + 1 : 4 * place + 4] = torch.tensor([float(bit) for bit in _DIGITS[digit]]).view(5, 3)
    plate = dots.repeat_interleave(scale, 0).repeat_interleave(scale, 1)[:height, :width]
    top = min(max(0, y - plate.shape[0] // 2), height - plate.shape[0])
    left = min(max(0, x - plate.shape[1] // 2), width - plate.shape[1])
    picture[top : top + plate.shape[0], left : left + plate.shape[1]] = plate[..., None]
