"""From prompts to masks: segments each image of a batch, chooses objects, finishes the masks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...algorithms.masks import feather_mask, grow_mask
from ...algorithms.overlay import draw_overlay, label_map, paint_layers
from ...algorithms.prompts import Boxes, Points
from ...algorithms.segments import (
    PointMap,
    Segments,
    points_without_object,
    rank,
    render_masks,
    select_boxes,
    select_points,
)
from .model import FastSAM
from .numbers import number_objects
from .text import PairEncoder, choose_by_text

AUTO, EVERYTHING, POINTS, BOXES, TEXT = "auto", "everything", "points", "boxes", "text"
RANKS = {"largest": "largest", "most confident": "confident", "most central": "central"}
BOXES_AT_ONCE = 32  # between two looks at Cancel
MODES = [AUTO, EVERYTHING, POINTS, BOXES, TEXT, *RANKS]


@dataclass(frozen=True)
class Prompt:
    """What to look for. points: one set for each JSON input, as their sizes may differ."""

    points: tuple[Points, ...] = ()
    boxes: tuple[Boxes, ...] = ()
    phrases: tuple[str, ...] = ()
    mode: str = AUTO
    among: str = "best"
    count: int = 1


@dataclass(frozen=True)
class Finish:
    """What becomes of the chosen objects. grow and feather in pixels."""

    merge: bool = True
    invert: bool = False
    grow: int = 0
    feather: float = 0.0


@dataclass(frozen=True)
class Result:
    """masks (M, H, W), `counts` of them an image (1 where merged); overlay, labels (B, H, W, 3).

    boxes: of each image those of its chosen objects; found: of each image the number of all objects.
    For the picker, of the first image: what a point at each pixel takes (see `PointMap`), and the positive points
    that lie on no object.
    """

    masks: Tensor
    counts: list[int]
    overlay: Tensor
    labels: Tensor
    boxes: list[list[dict]]
    found: list[int]
    taken: Tensor
    missed: list[tuple[float, float]]


def prompt_masks(
    fastsam: FastSAM,
    images: Tensor,
    prompt: Prompt,
    finish: Finish,
    resolution: int = 0,
    confidence: float = 0.4,
    overlap: float = 0.7,
    encoder: Callable[[], PairEncoder] | None = None,
) -> Result:
    """Masks of images (B, H, W, 3) in 0..1. encoder: gives the CLIP for phrases, called only if there are any."""
    progress = comfy.utils.ProgressBar(images.shape[0])
    masks, overlays, labels, boxes, found = [], [], [], [], []
    taken, missed = torch.zeros(0, 0, dtype=torch.int64), []
    for number, image in enumerate(images[..., :3].float().cpu()):
        comfy.model_management.throw_exception_if_processing_interrupted()
        segments = fastsam.segment(image, resolution, confidence, overlap)
        chosen, removed = choose(segments, image, number, prompt, encoder)
        if not chosen:
            logging.info("Pastiche: FastSAM found %d objects in image %d; none fits the prompt, its mask is empty.", len(segments), number)
        parts = _finish(_objects(segments, chosen, removed), finish)
        masks.append(parts)
        under = PointMap(segments, prompt.among)
        layers = paint_layers(_watched(segments, under), segments.height, segments.width)
        if number == 0:
            taken, missed = under.objects, points_without_object(segments, _positive(prompt, segments))
        overlays.append(number_objects(draw_overlay(image, layers, parts.amax(0)), layers.anchors))
        labels.append(label_map(layers))
        boxes.append([_box(segments, i) for i in chosen])
        found.append(len(segments))
        progress.update(1)
    keep = comfy.model_management.intermediate_device()
    counts = [len(parts) for parts in masks]
    return Result(
        torch.cat(masks).to(keep), counts, torch.stack(overlays).to(keep), torch.stack(labels).to(keep), boxes, found, taken, missed
    )


def _watched(segments: Segments, under: PointMap) -> Iterator[Tensor]:
    """Every object's (H, W) mask, one in memory at a time, shown to `under` on the way."""
    for number in range(len(segments)):
        comfy.model_management.throw_exception_if_processing_interrupted()
        mask = render_masks(segments, [number])[0]
        under.add(number, mask)
        yield mask


def _positive(prompt: Prompt, segments: Segments) -> list[tuple[float, float]]:
    """The positive points that the mode uses, in the image's pixels."""
    if prompt.mode not in (AUTO, POINTS):
        return []
    return [point for part in prompt.points for point in part.on(segments.width, segments.height).positive]


def choose(segments: Segments, image: Tensor, number: int, prompt: Prompt, encoder=None) -> tuple[list[int], list[int]]:
    """(chosen, removed) objects of one image, the batch's `number`. Raises ValueError where the mode lacks its prompt."""
    height, width = segments.height, segments.width
    points = sum((part.on(width, height) for part in prompt.points), Points())
    boxes = [box for part in prompt.boxes for box in part.on(width, height, number)]
    given = {POINTS: bool(points.positive or points.negative), BOXES: bool(boxes), TEXT: bool(prompt.phrases)}
    if prompt.mode in RANKS:
        return rank(segments, RANKS[prompt.mode], prompt.count), []
    if prompt.mode == EVERYTHING or (prompt.mode == AUTO and not _any_prompt(prompt)):
        return list(range(len(segments))), []
    if prompt.mode not in MODES:
        raise ValueError(f'mode "{prompt.mode}" is none of {", ".join(MODES)}.')
    if prompt.mode in (POINTS, TEXT) and not given[prompt.mode]:
        raise ValueError(f'mode is "{prompt.mode}", but none are given. Give some, or set mode to "{AUTO}".')
    if prompt.mode == BOXES and not any(group for part in prompt.boxes for group in part.groups):
        raise ValueError(f'mode is "{BOXES}", but none are given. Give some, or set mode to "{AUTO}".')
    used = [kind for kind in (POINTS, BOXES, TEXT) if given[kind] and prompt.mode in (AUTO, kind)]
    chosen: list[int] = []
    if BOXES in used:
        for start in range(0, len(boxes), BOXES_AT_ONCE):
            comfy.model_management.throw_exception_if_processing_interrupted()
            chosen += select_boxes(segments, boxes[start : start + BOXES_AT_ONCE])
        chosen = list(dict.fromkeys(chosen))
    if TEXT in used:
        if encoder is None:
            raise ValueError("text needs a CLIP: connect clip_vision and clip of one CLIP, or choose a clip_folder.")
        chosen += choose_by_text(segments, image, list(prompt.phrases), encoder(), prompt.count)
    if POINTS in used:
        claimed = None if used == [POINTS] else chosen
        return select_points(segments, list(points.positive), list(points.negative), prompt.among, claimed)
    return list(dict.fromkeys(chosen)), []


def _any_prompt(prompt: Prompt) -> bool:
    points = any(part.positive or part.negative for part in prompt.points)
    return points or bool(prompt.phrases) or any(group for part in prompt.boxes for group in part.groups)


def _objects(segments: Segments, chosen: list[int], removed: list[int]) -> Tensor:
    """(K, H, W) float masks of chosen objects with the removed ones cut out; one empty mask for none."""
    if not chosen:
        return torch.zeros(1, segments.height, segments.width)
    masks = render_masks(segments, chosen)
    for number in removed:
        comfy.model_management.throw_exception_if_processing_interrupted()
        masks &= ~render_masks(segments, [number])
    return masks.float().cpu()


def _finish(masks: Tensor, finish: Finish) -> Tensor:
    if finish.merge:
        masks = masks.amax(0, keepdim=True)
    masks = feather_mask(grow_mask(masks, finish.grow, comfy.model_management.throw_exception_if_processing_interrupted), finish.feather)
    return 1 - masks if finish.invert else masks


def _box(segments: Segments, number: int) -> dict:
    x1, y1, x2, y2 = segments.boxes[number].tolist()
    return {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1, "score": float(segments.scores[number])}
