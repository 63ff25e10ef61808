"""Pictures of segmentations: tinted objects with contours, and flat label maps."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import boundary


@dataclass(frozen=True)
class Layers:
    """N numbered objects painted over each other, later on top.

    labels, contours: (H, W) int64, 0 for none, else the object's number from 1; anchors: N (x, y), a
    pixel of each object for its number, None for an empty one.
    """

    labels: Tensor
    contours: Tensor
    anchors: list[tuple[int, int] | None]

    def colours(self) -> Tensor:
        """(N + 1, 3): black, then each object's colour."""
        return torch.cat([torch.zeros(1, 3), palette(len(self.anchors))])


def palette(count: int) -> Tensor:
    """(count, 3) well-separated colours; the first ones do not depend on count."""
    golden = 0.61803398875
    hues = [colorsys.hsv_to_rgb((0.57 + golden * i) % 1, 0.85 - 0.125 * (i % 3), 1.0 - 0.15 * (i % 2)) for i in range(count)]
    return torch.tensor(hues).reshape(-1, 3)


def paint_layers(masks: Iterable[Tensor], height: int, width: int) -> Layers:
    """Layers of masks (H, W) bool, taken one at a time so that they need not be in memory together."""
    labels = torch.zeros(height, width, dtype=torch.int64)
    contours = torch.zeros(height, width, dtype=torch.int64)
    anchors: list[tuple[int, int] | None] = []
    for number, mask in enumerate(masks, start=1):
        mask = mask.cpu()
        labels[mask] = number
        anchors.append(_anchor(mask))
        contours[mask] = 0  # what an object covers shows no contour of those below
        contours[_outline(mask, _line_width(height, width))] = number
    return Layers(labels, contours, anchors)


def label_map(layers: Layers) -> Tensor:
    """Flat colours of objects, black elsewhere: (H, W, 3)."""
    return layers.colours()[layers.labels]


def draw_overlay(image: Tensor, layers: Layers, final: Tensor) -> Tensor:
    """The image with every object outlined; the final mask is bright, tinted and outlined in white.

    image (H, W, 3) and final (H, W), both in 0..1 -> (H, W, 3).
    """
    height, width = layers.labels.shape
    colours = layers.colours()
    picture = image * (0.5 + 0.5 * final[..., None])
    tinted = ((final > 0.5) & (layers.labels > 0))[..., None]
    picture = torch.where(tinted, 0.65 * picture + 0.35 * colours[layers.labels], picture)
    picture = torch.where((layers.contours > 0)[..., None], colours[layers.contours], picture)
    picture[_outline(final > 0.5, _line_width(height, width))] = 1.0
    return picture.clamp(0, 1)


def tint(final: Tensor) -> Tensor:
    """A see-through picture of a mask, for laying over its image: (H, W) in 0..1 -> (H, W, 4), RGB and opacity."""
    height, width = final.shape
    picture = torch.cat([palette(1).expand(height, width, 3), 0.45 * final[..., None]], dim=-1)
    picture[_outline(final > 0.5, _line_width(height, width))] = 1.0
    return picture


def _line_width(height: int, width: int) -> int:
    return max(1, round(min(height, width) / 350))


def _outline(mask: Tensor, line: int) -> Tensor:
    """Inner contour (H, W) bool, computed within the mask's bounding box."""
    outline = torch.zeros_like(mask)
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    if len(rows):
        window = (
            slice(max(0, int(rows[0]) - 1), int(rows[-1]) + 2),
            slice(max(0, int(columns[0]) - 1), int(columns[-1]) + 2),
        )
        outline[window] = boundary(mask[window][None], line)[0]
    return outline


def _anchor(mask: Tensor) -> tuple[int, int] | None:
    """The mask's pixel nearest to its centroid, so that a crescent's number lies on the crescent."""
    rows, columns = mask.nonzero().unbind(1)
    if not len(rows):
        return None
    distance = (rows - rows.float().mean()) ** 2 + (columns - columns.float().mean()) ** 2
    nearest = distance.argmin()
    return int(columns[nearest]), int(rows[nearest])
