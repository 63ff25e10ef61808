"""Objects of one image as YOLOv8-seg gives them, and their choice by prompt.

Source: Zhao et al., Fast Segment Anything, arXiv 2306.12156, section 3.3 (points, boxes, text);
Bolya et al., YOLACT, arXiv 1904.02689, equation 1 (masks from prototypes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_CANDIDATES = 1000  # before suppression, best first
RENDERED_AT_ONCE = 1 << 25  # logits (objects x pixels) in one piece: 128 MB


@dataclass(frozen=True)
class Segments:
    """N objects of a height x width image, largest first; small until rendered.

    boxes (N, 4) x1, y1, x2, y2 in pixels; scores (N,) in 0..1; areas (N,) in pixels (approximate);
    coefficients (N, C) and prototypes (C, h, w): mask logits = coefficients @ prototypes, a positive
    one is inside; span (height, width): prototype cells that the image covers from the top left.
    """

    height: int
    width: int
    boxes: Tensor
    scores: Tensor
    areas: Tensor
    coefficients: Tensor
    prototypes: Tensor
    span: tuple[float, float]

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def take(self, index: Tensor) -> "Segments":
        return Segments(
            self.height,
            self.width,
            self.boxes[index],
            self.scores[index],
            self.areas[index],
            self.coefficients[index],
            self.prototypes,
            self.span,
        )


def decode_segments(
    prediction: Tensor,
    prototypes: Tensor,
    height: int,
    width: int,
    span: tuple[float, float],
    stride: float = 4.0,
    confidence: float = 0.4,
    overlap: float = 0.7,
    limit: int = 300,
) -> Segments:
    """Objects of one image from the network's output.

    prediction: (5 + C, A), of each anchor: centre x, y, width, height in network pixels, score,
    mask coefficients. prototypes: (C, h, w), `stride` network pixels a cell. Boxes, then masks,
    that overlap a better one by more than `overlap` (IoU) are dropped; at most `limit` stay.
    """
    prediction = prediction[:, prediction[4] > confidence].float().T
    best = prediction[:, 4].argsort(descending=True, stable=True)[:MOST_CANDIDATES]
    prediction = prediction[best]
    scale = torch.tensor([width / span[1], height / span[0]], device=prediction.device) / stride
    centre, half = prediction[:, :2] * scale, prediction[:, 2:4] * scale / 2
    edge = torch.tensor([width, height], dtype=torch.float32, device=prediction.device)
    boxes = torch.cat([(centre - half).clamp(min=0).minimum(edge), (centre + half).clamp(min=0).minimum(edge)], dim=1)
    kept = _suppress(_box_iou(boxes), overlap)[:limit]
    found = Segments(
        height, width, boxes[kept], prediction[kept, 4], prediction[kept, 4], prediction[kept, 5:], prototypes.float(), span
    )
    coarse = coarse_masks(found).flatten(1).float()
    areas = coarse.sum(1)
    shared = coarse @ coarse.T
    union = areas[:, None] + areas - shared
    unique = _suppress(shared / union.clamp(min=1), overlap)
    unique = unique[areas[unique] > 0]
    order = unique[areas[unique].argsort(descending=True, stable=True)]
    pixels = areas * (height * width) / (span[0] * span[1])
    return Segments(
        height, width, found.boxes[order], found.scores[order], pixels[order], found.coefficients[order], found.prototypes, span
    )


def coarse_masks(segments: Segments) -> Tensor:
    """Masks on the prototypes' grid, (N, h, w) bool; cells outside the image are False."""
    _, h, w = segments.prototypes.shape
    logits = torch.einsum("nc,chw->nhw", segments.coefficients, segments.prototypes)
    y, x = _centres(h, logits.device), _centres(w, logits.device)
    inside = _inside(segments.boxes, x * segments.width / segments.span[1], y * segments.height / segments.span[0])
    return (logits > 0) & inside & (y < segments.span[0])[:, None] & (x < segments.span[1])


def render_masks(segments: Segments, index: list[int] | None = None) -> Tensor:
    """Full-size masks (K, H, W) bool of the named objects (all by default), cut at their boxes."""
    chosen = segments if index is None else segments.take(torch.tensor(index, dtype=torch.long, device=segments.boxes.device))
    height, width = segments.height, segments.width
    y, x = _centres(height, segments.boxes.device), _centres(width, segments.boxes.device)
    grid = torch.stack(torch.broadcast_tensors(x[None, :] / width, y[:, None] / height), dim=-1)
    step = max(1, RENDERED_AT_ONCE // (height * width))
    parts = []
    for start in range(0, len(chosen), step):
        part = chosen.take(torch.arange(start, min(start + step, len(chosen)), device=grid.device))
        parts.append((_sample_logits(part, grid) > 0) & _inside(part.boxes, x, y))
    return torch.cat(parts) if parts else torch.zeros(0, height, width, dtype=torch.bool, device=grid.device)


def contains(segments: Segments, points: list[tuple[float, float]]) -> Tensor:
    """(N, P) bool: does the object's mask hold the pixel of point x, y? Nothing is outside the image."""
    at = torch.tensor(points, dtype=torch.float32, device=segments.boxes.device).reshape(-1, 2)
    edge = torch.tensor([segments.width, segments.height], dtype=torch.float32, device=at.device)
    within = ((at >= 0) & (at < edge)).all(1)
    pixel = at.floor() + 0.5
    logits = _sample_logits(segments, (pixel / edge)[None])[:, 0]
    x1, y1, x2, y2 = (side[:, None] for side in segments.boxes.unbind(1))
    boxed = (pixel[:, 0] >= x1) & (pixel[:, 0] < x2) & (pixel[:, 1] >= y1) & (pixel[:, 1] < y2)
    return (logits > 0) & boxed & within


def select_points(
    segments: Segments,
    positive: list[tuple[float, float]],
    negative: list[tuple[float, float]] = (),
    among: str = "best",
    claimed: list[int] | None = None,
) -> tuple[list[int], list[int]]:
    """Objects under positive points, and objects to cut out of them.

    Each positive point takes, of the objects that hold it, the best-scored one ("best"), the
    "smallest", the "largest" or "all". Objects that hold a negative point are passed over, and cut
    out of the result unless a positive point lies in them; where nothing separates the two, the
    negative point wins. `claimed`: objects that other prompts chose, treated as if a positive point
    lay in them. Negative points alone, without `claimed`, keep every object that holds none of them.
    Returns (chosen, removed), claimed ones first, then in the order of the points.
    """
    held, barred = contains(segments, positive), contains(segments, negative)
    vetoed = barred.any(1)
    if not len(positive) and claimed is None:
        return (~vetoed).nonzero()[:, 0].tolist(), vetoed.nonzero()[:, 0].tolist()
    wanted = held.any(1)
    wanted[claimed or []] = True
    removed = vetoed & ~wanted
    # a negative point inside an object is settled if some removed object takes that point out of it
    separable = ~(barred & ~barred[removed].any(0)).any(1)
    chosen = [number for number in claimed or [] if separable[number]]
    free = held & ~vetoed[:, None]
    chosen += _taken(segments, torch.where(free.any(0), free, held & separable[:, None]), among)
    return list(dict.fromkeys(chosen)), removed.nonzero()[:, 0].tolist()


class PointMap:
    """Which object a positive point at each pixel takes (see `select_points`), from masks given one at a time.

    objects: (H, W) int64, 0 for none, else the object's number from 1.
    """

    def __init__(self, segments: Segments, among: str = "best"):
        preference = {"smallest": -segments.areas, "largest": segments.areas}.get(among, segments.scores)
        self._preference = preference.float().tolist()
        self.objects = torch.zeros(segments.height, segments.width, dtype=torch.int64)
        self._taken = torch.full(self.objects.shape, -torch.inf)

    def add(self, number: int, mask: Tensor) -> None:
        """Object `number`, counted from 0, with its mask (H, W) bool."""
        better = mask.cpu() & (self._preference[number] > self._taken)
        self.objects[better] = number + 1
        self._taken[better] = self._preference[number]


def points_without_object(segments: Segments, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no object holds."""
    if not len(points):
        return []
    held = contains(segments, points).any(0).tolist()
    return [point for point, found in zip(points, held) if not found]


def select_boxes(segments: Segments, boxes: list[tuple[float, float, float, float]]) -> list[int]:
    """For each box x1, y1, x2, y2 in pixels the object with the largest mask-to-box IoU, if any overlaps."""
    if not len(segments):
        return []
    masks = coarse_masks(segments).float()
    _, h, w = segments.prototypes.shape
    chosen: list[int] = []
    for x1, y1, x2, y2 in boxes:
        sx, sy = segments.span[1] / segments.width, segments.span[0] / segments.height
        rows = _coverage(max(y1, 0) * sy, min(y2, segments.height) * sy, h, masks.device)
        columns = _coverage(max(x1, 0) * sx, min(x2, segments.width) * sx, w, masks.device)
        shared = torch.einsum("nhw,h,w->n", masks, rows, columns)
        iou = shared / (masks.sum((1, 2)) + rows.sum() * columns.sum() - shared)
        best = int(iou.argmax())
        if shared[best] > 0 and best not in chosen:
            chosen.append(best)
    return chosen


def rank(segments: Segments, by: str, count: int) -> list[int]:
    """The first `count` objects by "largest", "confident" or "central" (distance of box middle to image middle)."""
    if by == "largest":
        key = -segments.areas
    elif by == "confident":
        key = -segments.scores
    elif by == "central":
        middle = torch.tensor([segments.width, segments.height], dtype=torch.float32, device=segments.boxes.device) / 2
        key = ((segments.boxes[:, :2] + segments.boxes[:, 2:]) / 2 - middle).norm(dim=1)
    else:
        raise ValueError(f'Objects are ranked by "largest", "confident" or "central", not "{by}".')
    return key.argsort(stable=True)[:count].tolist()


def rank_by_similarity(images: Tensor, texts: Tensor, count: int) -> list[int]:
    """For each text the `count` most similar images by cosine, without repeats.

    images (N, D) and texts (T, D): embeddings of one CLIP, any length.
    """
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"Image embeddings have {images.shape[1]} numbers and text embeddings {texts.shape[1]}; one CLIP's match.")
    similarity = F.normalize(texts.float(), dim=1) @ F.normalize(images.float(), dim=1).T
    best = similarity.argsort(dim=1, descending=True, stable=True)[:, :count]
    return list(dict.fromkeys(best.flatten().tolist()))


def crop_objects(image: Tensor, masks: Tensor, size: int, fill: Tensor) -> Tensor:
    """Square pictures of single objects for a CLIP: (K, size, size, 3).

    image (H, W, 3); masks (K, H, W) bool, none empty. What is not the object, and the margin that
    makes its bounding box square, is `fill` (3,).
    """
    crops = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        part = torch.where(mask[top:bottom, left:right, None], image[top:bottom, left:right], fill)
        height, width = part.shape[:2]
        side = max(height, width)
        square = fill.expand(side, side, 3).clone()
        y, x = (side - height) // 2, (side - width) // 2
        square[y : y + height, x : x + width] = part
        square = square.permute(2, 0, 1)[None]  # HWC -> BCHW
        square = F.interpolate(square, (size, size), mode="bicubic", antialias=True, align_corners=False)
        crops.append(square[0].permute(1, 2, 0).clamp(0, 1))  # CHW -> HWC
    return torch.stack(crops)


def _sample_logits(segments: Segments, grid: Tensor) -> Tensor:
    """Mask logits (N, P, Q) at relative image positions grid (P, Q, 2) x, y in 0..1, bilinear between cells."""
    _, h, w = segments.prototypes.shape
    cells = grid * torch.tensor([segments.span[1] / w, segments.span[0] / h], device=grid.device)
    logits = torch.einsum("nc,chw->nhw", segments.coefficients, segments.prototypes)
    return F.grid_sample(logits[None], 2 * cells[None] - 1, mode="bilinear", padding_mode="border", align_corners=False)[0]


def _centres(count: int, device) -> Tensor:
    return torch.arange(count, dtype=torch.float32, device=device) + 0.5


def _inside(boxes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(N, len(y), len(x)) bool."""
    x1, y1, x2, y2 = (side[:, None] for side in boxes.unbind(1))
    return ((y >= y1) & (y < y2))[:, :, None] & ((x >= x1) & (x < x2))[:, None, :]


def _coverage(low: float, high: float, count: int, device) -> Tensor:
    """Share of each of `count` unit cells that lies in low..high."""
    cells = torch.arange(count, dtype=torch.float32, device=device)
    return ((cells + 1).clamp(max=high) - cells.clamp(min=low)).clamp(min=0)


def _taken(segments: Segments, pool: Tensor, among: str) -> list[int]:
    """Objects that points take of those they may, pool (N, P) bool, in the order of the points; repeats may be in it."""
    if among == "all":
        objects = pool.any(1).nonzero()[:, 0]
        first = pool[objects].float().argmax(1)  # the point that takes an object first
        return objects[first.argsort(stable=True)].tolist()
    preferences = {"best": segments.scores, "smallest": -segments.areas, "largest": segments.areas}
    if among not in preferences:
        raise ValueError(f'A point takes the "best", "smallest", "largest" or "all" objects, not "{among}".')
    if not len(pool):
        return []
    preference = preferences[among].float()[:, None]
    return torch.where(pool, preference, -torch.inf).argmax(0)[pool.any(0)].tolist()


def _box_iou(boxes: Tensor) -> Tensor:
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return shared / (areas[:, None] + areas - shared).clamp(min=1e-6)


def _suppress(iou: Tensor, most: float) -> Tensor:
    """Indices that survive greedy non-maximum suppression; rows are in order of preference."""
    clash = (iou > most).cpu()
    alive = torch.ones(len(clash), dtype=torch.bool)
    for number in range(len(clash)):
        if alive[number]:
            alive[number + 1 :] &= ~clash[number, number + 1 :]
    return alive.nonzero()[:, 0].to(iou.device)
