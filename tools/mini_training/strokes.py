"""Paints photos with brush strokes, dots or hatching: pictures with the texture of art that nobody has to license.

Strokes are laid from coarse to fine where the canvas still differs from the photo (Hertzmann 1998), along the edges
or a flow of their own. What one picture keeps and the next changes is its manner: widths, lengths, bristles, colours.
"""
import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

SCALE = 2  # drawn this much larger, then shrunk: smooth edges


def manner(rng):
    """What all strokes of a picture share: a dict of numbers."""
    kind = rng.choice(["brush", "dots", "hatching"], p=[0.7, 0.15, 0.15])
    widths = {"brush": rng.uniform(7, 20), "dots": rng.uniform(4, 9), "hatching": rng.uniform(2, 4)}
    lengths = {"brush": rng.uniform(2.0, 7.0), "dots": 0.0, "hatching": rng.uniform(6, 16)}
    return {
        "kind": kind, "width": widths[kind], "length": lengths[kind],
        "layers": 1 if kind == "dots" else int(rng.integers(2, 4)),
        "bristles": rng.uniform(0.02, 0.16), "jitter": rng.uniform(0.02, 0.13), "saturation": rng.uniform(0.8, 1.7),
        "contrast": rng.uniform(0.9, 1.35), "flow": rng.uniform(0, 1) ** 1.5, "angle": rng.uniform(0, np.pi),
        "swirl": rng.uniform(0, 2.5), "relief": rng.uniform(0, 0.5) if kind == "brush" else 0.0,
        "inks": int(rng.integers(6, 16)) if rng.random() < 0.25 else 0, "paper": rng.uniform(0.55, 1.0, 3) if rng.random() < 0.4 else None,
    }


def smooth(array, radius):
    """Gaussian blur of (H, W) or (H, W, 3) floats."""
    return gaussian_filter(array.astype(np.float32), radius, axes=(0, 1))


def directions(photo, how, rng):
    """(H, W) angles along which strokes run: across the gradient, turned to a flow of the picture's own."""
    grey = smooth(photo.mean(-1), 2)
    dy, dx = np.gradient(grey)
    # The structure tensor's minor axis; its double angle can be averaged, and mixed with the flow's.
    cos2, sin2 = smooth(dy * dy - dx * dx, 4), smooth(-2 * dx * dy, 4)
    height, width = grey.shape
    waves = Image.fromarray(rng.uniform(-1, 1, (5, 5)).astype(np.float32)).resize((width, height), Image.BICUBIC)
    flow = 2 * (how["angle"] + how["swirl"] * np.asarray(waves))
    strength = np.hypot(cos2, sin2) + 1e-6
    cos2 = (1 - how["flow"]) * cos2 / strength + how["flow"] * np.cos(flow)
    sin2 = (1 - how["flow"]) * sin2 / strength + how["flow"] * np.sin(flow)
    return np.arctan2(sin2, cos2) / 2


def tuned(photo, how):
    """The photo (H, W, 3) in 0..1 in the picture's colours."""
    grey = photo.mean(-1, keepdims=True)
    out = (grey + how["saturation"] * (photo - grey) - 0.5) * how["contrast"] + 0.5
    return np.clip(out, 0, 1)


def paint(photo, rng):
    """uint8 (H, W, 3) -> uint8 of the same shape, in a manner drawn from `rng`."""
    how = manner(rng)
    target = tuned(photo / 255.0, how)
    if how["inks"]:
        flat = Image.fromarray((target * 255).astype(np.uint8)).quantize(how["inks"], Image.Quantize.MEDIANCUT).convert("RGB")
        target = 0.25 * target + 0.75 * np.asarray(flat) / 255.0
    angles = directions(photo / 255.0, how, rng)
    height, width = target.shape[:2]
    paper = target.mean((0, 1)) if how["paper"] is None else how["paper"]
    canvas = Image.new("RGB", (width * SCALE, height * SCALE), tuple(int(255 * c) for c in paper))
    relief = Image.new("L", canvas.size, 128)
    pen, thickness = ImageDraw.Draw(canvas), ImageDraw.Draw(relief)
    radius = how["width"]
    for layer in range(how["layers"]):
        seen = smooth(target, max(1, radius / 4))
        now = np.asarray(canvas.resize((width, height), Image.BOX)) / 255.0
        error = np.abs(now - seen).sum(-1)
        spacing = max(1.5, radius * (1.0 if how["kind"] == "hatching" else 0.55))
        y, x = np.meshgrid(np.arange(0, height, spacing), np.arange(0, width, spacing), indexing="ij")
        places = np.stack([y, x], -1).reshape(-1, 2) + rng.uniform(-0.6, 0.6, (y.size, 2)) * spacing
        places = np.clip(places, 0, [height - 1, width - 1])
        rows, columns = places.astype(int).T
        wanted = error[rows, columns] > (0.0 if layer == 0 else 0.12)
        if how["kind"] == "hatching":  # dark tones take more lines
            wanted = rng.random(len(rows)) < 1.1 - target[rows, columns].mean(-1)
        chosen = np.flatnonzero(wanted)
        rng.shuffle(chosen)
        for i in chosen:
            stroke(pen, thickness, places[i], seen[rows[i], columns[i]], angles, radius, how, rng, seen)
        radius *= 0.5
    picture = np.asarray(canvas.resize((width, height), Image.LANCZOS)).astype(np.float32)
    if how["relief"] > 0.1:
        bumps = np.asarray(relief.resize((width, height), Image.LANCZOS)).astype(np.float32)
        picture += how["relief"] * (bumps - np.roll(bumps, (1, 1), (0, 1)))[..., None]
    return np.clip(picture, 0, 255).astype(np.uint8)


def stroke(pen, thickness, place, colour, angles, radius, how, rng, seen):
    """One stroke from `place` (row, column) along the directions, as parallel bristles of slightly different tones."""
    height, width = angles.shape
    colour = colour + rng.normal(0, how["jitter"], 3) * 0.6 + rng.normal(0, how["jitter"]) * 0.5
    if how["kind"] == "dots":
        r = radius / 2 * SCALE * rng.uniform(0.7, 1.2)
        y, x = place * SCALE
        pen.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(255 * c) for c in np.clip(colour, 0, 1)))
        return
    if how["kind"] == "hatching":
        colour = colour * 0.55
    points, at, heading = [], np.array(place), None
    pieces = 4
    for _ in range(pieces + 1):
        points.append(at.copy())
        row, column = int(np.clip(at[0], 0, height - 1)), int(np.clip(at[1], 0, width - 1))
        # A stroke ends where another colour begins: outlines stay.
        if len(points) > 2 and np.abs(seen[row, column] - seen[int(place[0]), int(place[1])]).sum() > 0.35:
            break
        way = np.array([np.sin(angles[row, column]), np.cos(angles[row, column])])
        heading = way if heading is None or way @ heading > 0 else -way
        at = at + heading * radius * how["length"] / pieces
    if len(points) < 2:
        return
    points = np.array(points)
    along = points[-1] - points[0]
    across = np.array([-along[1], along[0]]) / (np.hypot(*along) + 1e-6)
    count = max(1, int(round(radius * SCALE / 4)))
    for offset in np.linspace(-0.5, 0.5, count) if count > 1 else (0.0,):
        tone = rng.normal(0, how["bristles"])
        line = [(x * SCALE, y * SCALE) for y, x in points + across * offset * radius]
        fill = tuple(int(255 * c) for c in np.clip(colour + tone, 0, 1))
        breadth = max(1, int(np.ceil(radius * SCALE / count)) + 1)
        pen.line(line, fill=fill, width=breadth, joint="curve")
        thickness.line(line, fill=int(np.clip(128 + 700 * tone + 40 * rng.normal(), 0, 255)), width=breadth)
