"""Point and box prompts from JSON text or from ComfyUI's box sockets. Coordinates are pixels.

Accepted points: [{"x": 1, "y": 2, "label": 1}], [[1, 2], [3, 4, 0]], [[positives], [negatives]],
{"positive": [...], "negative": [...], "size": [width, height]}, {"points": [...], "labels": [1, 0]}.
Accepted boxes: [{"x", "y", "width", "height"}], [[x1, y1, x2, y2]], {"x1", ..., "y2"},
{"startX", ..., "endY"}, {"boxes": [...], "size": [...]}, and lists of such lists, one for each image.
`size` names the image that the coordinates were picked on; others are scaled to fit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 with x1 < x2, y1 < y2

_CORNERS = (("x1", "y1", "x2", "y2"), ("startX", "startY", "endX", "endY"), ("xmin", "ymin", "xmax", "ymax"))
MOST_POINTS, MOST_BOXES = 100_000, 10_000
LARGEST = 1e9  # pixels; far outside of any picture, and what is computed from it stays finite
_NEGATIVE = (0, -1, "0", "-1", "-", "negative", "neg", "background")


@dataclass(frozen=True)
class Points:
    """Positive and negative points, x to the right and y down."""

    positive: tuple[Point, ...] = ()
    negative: tuple[Point, ...] = ()
    size: tuple[float, float] | None = None

    def on(self, width: int, height: int) -> "Points":
        """The points in pixels of an image of this size."""
        sx, sy = _ratio(self.size, width, height)

        def scale(points):
            return tuple((x * sx, y * sy) for x, y in points)

        return Points(scale(self.positive), scale(self.negative))

    def __add__(self, other: "Points") -> "Points":
        """Both sets; sizes must have been applied with `on`."""
        return Points(self.positive + other.positive, self.negative + other.negative)


@dataclass(frozen=True)
class Boxes:
    """Boxes for all images (one group) or a group for each image (the last one serves further images)."""

    groups: tuple[tuple[Box, ...], ...] = ((),)
    size: tuple[float, float] | None = None

    def on(self, width: int, height: int, image: int = 0) -> tuple[Box, ...]:
        """The boxes of one image of a batch, in pixels of that image."""
        sx, sy = _ratio(self.size, width, height)
        group = self.groups[min(image, len(self.groups) - 1)] if self.groups else ()
        return tuple((x1 * sx, y1 * sy, x2 * sx, y2 * sy) for x1, y1, x2, y2 in group)


def parse_points(value, default_label: int = 1, name: str = "points") -> Points:
    """Points from JSON text or from what it would decode to. Empty text means none.

    default_label: 1 or 0, for points that carry no label. Raises ValueError naming what is wrong.
    """
    value = _decode(value, name)
    size = None
    if isinstance(value, dict) and not _is_point(value):
        size = _size(value.get("size"), name)
        if "points" in value:
            labels = value.get("labels")
            value = _labelled(value["points"], labels, name)
        else:
            unknown = set(value) - {"positive", "negative", "size"}
            if unknown or not set(value) & {"positive", "negative"}:
                raise ValueError(f'{name}: expected "positive" and "negative" lists, found {sorted(value)}.')
            positive = parse_points(value.get("positive") or [], 1, name)
            negative = parse_points(value.get("negative") or [], 0, name)
            return Points(positive.positive, positive.negative + negative.negative, size)
    elif _is_point(value):
        value = [value]
    elif _is_pair_of_lists(value):
        return parse_points({"positive": value[0], "negative": value[1]}, default_label, name)
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a JSON list of points, got {_brief(value)}.")
    if len(value) > MOST_POINTS:
        raise ValueError(f"{name}: {len(value)} points are more than the {MOST_POINTS} that are looked at. A mask tells as much: connect one.")
    positive, negative = [], []
    for item in value:
        x, y, label = _point(item, default_label, name)
        (positive if label else negative).append((x, y))
    return Points(tuple(positive), tuple(negative), size)


def parse_boxes(value, name: str = "boxes") -> Boxes:
    """Boxes from JSON text, a BOUNDING_BOX(ES) or a BBOX socket. Empty text or None means none."""
    value = _decode(value, name)
    size = None
    if isinstance(value, dict) and "boxes" in value:
        size = _size(value.get("size"), name)
        value = value["boxes"]
    if _is_box(value):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a JSON list of boxes, got {_brief(value)}.")
    per_image = bool(value) and all(isinstance(item, list) and not _is_box(item) for item in value)
    groups = value if per_image else [value]
    if max(map(len, groups), default=0) > MOST_BOXES:
        raise ValueError(f"{name}: {max(map(len, groups))} boxes are more than the {MOST_BOXES} that are looked at an image.")
    return Boxes(tuple(tuple(_box(item, name) for item in group) for group in groups), size)


def _decode(value, name: str):
    """JSON text, arrays and tuples as plain lists and dicts."""
    if value is None:
        return []
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:  # beside bad JSON: numbers of thousands of digits, lists thousands deep
            raise ValueError(
                f'{name} is no valid JSON ({error}). Write for example [{{"x": 120, "y": 80}}] or [[120, 80]].'
            ) from error
        return [] if value is None else value
    return _plain(value)


def _plain(value):
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_point(value) -> bool:
    if isinstance(value, dict):
        return "x" in value and "y" in value
    return isinstance(value, list) and len(value) in (2, 3) and all(map(_is_number, value))


def _is_pair_of_lists(value) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(part, list) and not _is_point(part) and all(map(_is_point, part)) for part in value)
    )


def _is_box(value) -> bool:
    if isinstance(value, dict):
        return "boxes" not in value
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _labelled(points, labels, name: str) -> list:
    if labels is None:
        return points
    if not isinstance(points, list) or not isinstance(labels, list) or len(points) != len(labels):
        raise ValueError(f'{name}: "points" and "labels" must be lists of the same length.')
    return [[*_point(point, 1, name)[:2], 0 if label in _NEGATIVE else 1] for point, label in zip(points, labels)]


def _point(item, default_label: int, name: str) -> tuple[float, float, int]:
    if not _is_point(item):
        raise ValueError(f'{name}: {_brief(item)} is no point; expected {{"x": 120, "y": 80}} or [120, 80].')
    if isinstance(item, dict):
        x, y, label = item["x"], item["y"], item.get("label", default_label)
    else:
        x, y, label = item[0], item[1], item[2] if len(item) == 3 else default_label
    x, y = _finite([x, y], item, name)
    return x, y, 0 if label is False or label in _NEGATIVE else 1


def _box(item, name: str) -> Box:
    corners = None
    if isinstance(item, list) and _is_box(item):
        corners = item
    elif isinstance(item, dict) and {"x", "y", "width", "height"} <= set(item):
        x, y, width, height = _finite([item[key] for key in ("x", "y", "width", "height")], item, name)
        corners = [x, y, x + width, y + height]
    elif isinstance(item, dict):
        keys = next((keys for keys in _CORNERS if set(keys) <= set(item)), None)
        corners = [item[key] for key in keys] if keys else None
    if corners is None:
        raise ValueError(
            f'{name}: {_brief(item)} is no box; expected {{"x": 10, "y": 20, "width": 30, "height": 40}} or [x1, y1, x2, y2].'
        )
    x1, y1, x2, y2 = _finite(corners, item, name)
    if x1 == x2 or y1 == y2:
        raise ValueError(f"{name}: {_brief(item)} has no area.")
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)  # dragged from any corner


def _finite(values, item, name: str) -> list[float]:
    if not all(_is_number(value) and abs(value) <= LARGEST for value in values):  # not so for NaN either
        raise ValueError(f"{name}: {_brief(item)} holds a coordinate that is no finite number, or lies beyond {LARGEST:.0e} pixels.")
    return [float(value) for value in values]


def _size(value, name: str) -> tuple[float, float] | None:
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(_is_number(v) and 1 <= v <= LARGEST for v in value)):
        raise ValueError(f'{name}: "size" must be [width, height] of the image that was picked on, got {_brief(value)}.')
    return float(value[0]), float(value[1])


def _ratio(size, width: int, height: int) -> tuple[float, float]:
    return (width / size[0], height / size[1]) if size else (1.0, 1.0)


def _brief(value) -> str:
    try:
        text = json.dumps(value, default=repr)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too deep or too long to show"
    return text if len(text) <= 80 else text[:77] + "..."
