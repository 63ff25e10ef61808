"""Drawn scenes with known masks: coloured shapes over muted textures.

The demo segmenter is trained on them (`train_mini_fastsam.py`), and tests and benchmarks use
seeds that training never saw: training takes seeds below `HELD_OUT`, everything else the rest.
"""

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

HELD_OUT = 1_000_000
OVERSAMPLING = 2
LEAST_VISIBLE = 0.75  # share of a shape that later shapes must leave uncovered


@dataclass
class Scene:
    """image: (H, W, 3) float32 in 0..1; masks: (N, H, W) bool, visible parts, disjoint."""

    image: np.ndarray
    masks: np.ndarray

    def boxes(self) -> np.ndarray:
        """(N, 4) float32 x1, y1, x2, y2 in pixels, upper ends exclusive."""
        found = []
        for mask in self.masks:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            found.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        return np.array(found, np.float32).reshape(-1, 4)


def draw_scene(seed: int, height: int = 256, width: int = 256, objects: tuple[int, int] = (2, 7)) -> Scene:
    """One scene; the same arguments give the same pixels."""
    rng = np.random.default_rng(seed)
    image, base = _background(rng, height, width)
    masks: list[np.ndarray] = []
    full_areas: list[int] = []
    for _ in range(rng.integers(objects[0], objects[1] + 1)):
        for _attempt in range(8):
            coverage = _rasterise(_outline(rng, height, width), height, width)
            shape = coverage > 0.5
            kept = [mask & ~shape for mask in masks]
            fits = all(part.sum() >= LEAST_VISIBLE * area for part, area in zip(kept, full_areas))
            if shape.sum() >= 0.004 * height * width and fits:
                break
        else:
            continue
        masks = [*kept, shape]
        full_areas.append(int(shape.sum()))
        image = image + coverage[..., None] * (_fill(rng, height, width, base) - image)
    image = image + rng.normal(0, rng.uniform(0, 0.025), image.shape)
    return Scene(image.clip(0, 1).astype(np.float32), np.stack(masks))


def inner_point(mask: np.ndarray) -> tuple[int, int]:
    """(x, y) of the pixel of a mask that lies farthest from its outside, by repeated erosion."""
    padded = np.pad(mask, 1)
    while True:
        smaller = padded.copy()
        smaller[1:-1, 1:-1] &= padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        if not smaller.any():
            rows, columns = np.nonzero(padded)
            middle = len(rows) // 2
            return int(columns[middle]) - 1, int(rows[middle]) - 1
        padded = smaller


def _outline(rng, height: int, width: int) -> np.ndarray:
    """(K, 2) vertices x, y in pixels of an ellipse, polygon, rectangle, star or blob."""
    side = min(height, width)
    kind = rng.choice(["ellipse", "polygon", "rectangle", "star", "blob"])
    turn = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    reach = np.ones_like(turn)
    if kind in ("polygon", "rectangle"):
        corners = 4 if kind == "rectangle" else int(rng.integers(3, 8))
        turn = np.linspace(0, 2 * np.pi, corners, endpoint=False) + np.pi / corners
        reach = np.ones_like(turn)
    elif kind == "star":
        spikes = int(rng.integers(4, 8))
        turn = np.linspace(0, 2 * np.pi, 2 * spikes, endpoint=False)
        reach = np.where(np.arange(2 * spikes) % 2, rng.uniform(0.45, 0.7), 1.0)
    elif kind == "blob":
        for wave in range(2, 6):
            reach = reach + rng.normal(0, 0.22 / wave) * np.cos(wave * turn + rng.uniform(0, 2 * np.pi))
    radius = side * rng.uniform(0.07, 0.24) * reach
    points = np.stack([radius * np.cos(turn), radius * np.sin(turn) * rng.uniform(0.55, 1.0)], axis=1)
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = rng.uniform([0.08 * width, 0.08 * height], [0.92 * width, 0.92 * height])
    return points @ rotation.T + centre


def _rasterise(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased coverage (H, W) of a polygon."""
    k = OVERSAMPLING
    canvas = Image.new("L", (width * k, height * k))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in points * k], fill=255)
    fine = np.asarray(canvas, np.float32) / 255
    return fine.reshape(height, k, width, k).mean((1, 3))


def _fill(rng, height: int, width: int, base: np.ndarray) -> np.ndarray:
    """(H, W, 3) paint for a shape: a vivid colour off the background's, shaded or lightly striped."""
    while True:
        colour = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.5, 1), rng.uniform(0.35, 1)))
        if np.linalg.norm(colour - base) > 0.4:
            break
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    shade = rng.uniform(0, 0.25) * along / max(height, width)
    if rng.random() < 0.3:
        shade = shade + rng.uniform(0.03, 0.1) * np.sign(np.sin(along * rng.uniform(0.3, 1.2)))
    return colour + shade[..., None]


def _background(rng, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A muted texture (H, W, 3) and its base colour."""
    base = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.2, 0.9)))
    other = base + rng.normal(0, 0.08, 3)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    kind = rng.choice(["clouds", "stripes", "checks", "gradient"])
    if kind == "clouds":
        mix = np.zeros((height, width), np.float32)
        for cells in (3, 7, 15, 40):
            grid = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
            mix += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) / 4
    else:
        angle, wave = rng.uniform(0, np.pi), rng.uniform(0.08, 0.6)
        across = x * np.cos(angle) + y * np.sin(angle)
        along = y * np.cos(angle) - x * np.sin(angle)
        if kind == "stripes":
            mix = 0.5 + 0.5 * np.sin(across * wave)
        elif kind == "checks":
            mix = (np.sin(across * wave) * np.sin(along * wave) > 0).astype(np.float32)
        else:
            mix = (across - across.min()) / np.ptp(across)
    return base + mix[..., None] * (other - base), base
