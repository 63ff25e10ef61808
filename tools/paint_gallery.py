#!/usr/bin/env python3
"""Paints the dozen ready styles of Style Library into js/styles from seeds: no scan, no licence but ours.

    python tools/paint_gallery.py [--output js/styles] [--only NAME ...]

Three are the samples of paint_styles.py; the others draw one of four scenes in a manner of their own.
Needs numpy and Pillow. Coordinates are pixels, x to the right, y down; colours 0..255.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import paint_styles
from paint_styles import blend, grid, smooth_noise
from PIL import Image, ImageDraw, ImageFilter

SIZE, SCALE = 320, 2  # of the file; drawn this much larger
SIDE = SIZE * SCALE


# Scenes: (SIDE, SIDE, 3) ----------------------------------------------------------------------------

def put(picture, region, colour):
    picture[region] = colour if np.ndim(colour) == 1 else np.broadcast_to(colour, picture.shape)[region]


def ball(picture, cx, cy, radius, colour):
    """A sphere lit from the upper left."""
    x, y = grid(SIDE)
    dx, dy = (x - cx) / radius, (y - cy) / radius
    depth = np.sqrt(np.clip(1 - dx**2 - dy**2, 0, 1))
    light = np.clip(0.35 + 0.75 * (-0.5 * dx - 0.55 * dy + 0.67 * depth), 0.2, 1.15)[..., None]
    put(picture, dx**2 + dy**2 < 1, np.clip(np.array(colour) * light, 0, 255))


def still_life():
    """A bowl with fruit and a bottle on a cloth."""
    x, y = grid(SIDE)
    picture = blend([(0, (92, 74, 66)), (0.5, (168, 128, 92)), (1, (120, 86, 70))], x * 0.6 + y * 0.4)
    cloth = y > 0.62 + 0.03 * np.sin(x * 5)
    put(picture, cloth, blend([(0, (206, 214, 220)), (1, (120, 146, 176))], (x + 0.1 * np.sin(y * 30)) % 1))
    bottle = (np.abs(x - 0.22) < np.where(y < 0.34, 0.035, 0.035 + 0.055 * np.clip((y - 0.34) / 0.1, 0, 1))) & (y > 0.14) & (y < 0.76)
    put(picture, bottle, blend([(0, (18, 52, 44)), (0.45, (84, 150, 110)), (1, (10, 34, 30))], np.clip((x - 0.13) / 0.18, 0, 1)))
    for cx, cy, radius, colour in ((0.50, 0.50, 0.105, (214, 62, 48)), (0.66, 0.52, 0.095, (236, 164, 44)), (0.79, 0.54, 0.075, (124, 160, 56)),
                                   (0.58, 0.40, 0.085, (240, 196, 70)), (0.70, 0.41, 0.07, (176, 44, 70))):
        ball(picture, cx, cy, radius, colour)
    bowl = ((x - 0.64) / 0.27) ** 2 + ((y - 0.56) / 0.24) ** 2 < 1
    put(picture, bowl & (y > 0.57), blend([(0, (60, 92, 140)), (0.4, (150, 186, 214)), (1, (32, 52, 96))], np.clip((x - 0.37) / 0.54, 0, 1)))
    for cx, cy, radius, colour in ((0.16, 0.84, 0.075, (232, 130, 40)), (0.33, 0.88, 0.06, (200, 48, 56))):
        ball(picture, cx, cy, radius, colour)
    return picture


def harbour():
    """Sails before a town on a hill."""
    x, y = grid(SIDE)
    picture = blend([(0, (104, 164, 214)), (0.4, (226, 226, 206)), (0.5, (250, 214, 160))], y)
    put(picture, y > 0.50 - 0.16 * np.exp(-((x - 0.75) / 0.3) ** 2), (116, 138, 108))
    rng = np.random.default_rng(4)
    for _ in range(34):
        px = rng.uniform(0.42, 0.98)
        base = 0.50 - 0.16 * np.exp(-((px - 0.75) / 0.3) ** 2) * rng.uniform(0.0, 0.9) + 0.03
        width, height = rng.uniform(0.03, 0.055), rng.uniform(0.04, 0.075)
        house = (np.abs(x - px) < width / 2) & (y < base) & (y > base - height)
        put(picture, house, np.array(((240, 226, 200), (226, 180, 140), (244, 240, 232), (210, 150, 120))[rng.integers(4)]))
        roof = (y > base - height * 1.6) & (y <= base - height) & (np.abs(x - px) < (y - (base - height * 1.6)) / height / 0.6 * width * 0.6)
        put(picture, roof, (176, 70, 50))
    sea = y > 0.53
    waves = np.sin(np.sqrt(np.clip(y - 0.5, 0, 1)) * 160 + 3 * np.sin(x * 9) + smooth_noise(rng, SIDE, 10))
    put(picture, sea, blend([(0, (28, 84, 128)), (0.6, (70, 140, 168)), (1, (200, 220, 206))], 0.45 + 0.35 * waves * np.clip(y, 0, 1)))
    for px, base, tall, colour in ((0.26, 0.80, 0.56, (246, 240, 222)), (0.58, 0.68, 0.34, (214, 92, 60)), (0.84, 0.74, 0.28, (240, 200, 110))):
        rise = (base - 0.03 - y) / tall
        put(picture, (rise > 0) & (rise < 1) & (x > px + 0.006) & (x < px + 0.006 + 0.36 * tall * np.clip(1 - rise, 0, 1) ** 0.9), colour)
        put(picture, (rise > 0.06) & (rise < 0.86) & (x < px - 0.006) & (x > px - 0.006 - 0.26 * tall * (1 - rise / 0.86)), np.array(colour) * 0.86)
        put(picture, (rise > 0) & (rise < 1.04) & (np.abs(x - px) < 0.005), (60, 40, 30))
        hull = (y > base - 0.02) & (y < base + 0.035 * tall / 0.4) & (np.abs(x - px - 0.02) < 0.34 * tall * (1 - 0.35 * np.clip((y - base) / 0.05, 0, 1)))
        put(picture, hull, (74, 44, 38))
    return picture


def orchard():
    """Round trees along a path over hills."""
    x, y = grid(SIDE)
    picture = blend([(0, (120, 176, 226)), (0.35, (204, 222, 226)), (0.48, (250, 226, 190))], y)
    for line, near, far in ((0.40 + 0.05 * np.sin(x * 5 + 1), (126, 160, 170), (140, 176, 150)), (0.50 + 0.05 * np.sin(x * 4 + 4), (112, 156, 84), (150, 180, 90)),
                            (0.62 + 0.04 * np.sin(x * 6), (94, 142, 54), (176, 190, 80))):
        put(picture, y > line, blend([(0, near), (1, far)], x))
    path = np.abs(x - 0.52 - 0.12 * np.sin(y * 9)) < 0.03 + 0.22 * (y - 0.6)
    put(picture, path & (y > 0.60), (232, 206, 160))
    rng = np.random.default_rng(2)
    for py in np.sort(rng.uniform(0.5, 0.92, 20)):
        px, radius = rng.uniform(0, 1), 0.02 + 0.14 * (py - 0.42)
        put(picture, (np.abs(x - px) < radius * 0.16) & (y > py - radius) & (y < py + radius * 0.6), (92, 62, 44))
        put(picture, ((x - px - radius) / radius / 1.5) ** 2 + ((y - py - radius * 0.6) / radius / 0.3) ** 2 < 1, (66, 96, 70))
        ball(picture, px, py - radius * 1.1, radius, ((90, 150, 56), (196, 106, 60), (226, 176, 60), (60, 122, 76))[rng.integers(4)])
    return picture


def flow_of(picture):
    """The direction along edges, (SIDE, SIDE) radians."""
    grey = np.asarray(Image.fromarray(picture.astype(np.uint8)).convert("L").filter(ImageFilter.GaussianBlur(6))).astype(float)
    return np.arctan2(np.gradient(grey, axis=0), np.gradient(grey, axis=1)) + np.pi / 2


def grey_of(picture, blur=0.0):
    """0..1"""
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).convert("L")
    return np.asarray(image.filter(ImageFilter.GaussianBlur(blur)) if blur else image) / 255.0


def edges_of(picture, blur=2.0):
    grey = grey_of(picture, blur)
    return np.hypot(np.gradient(grey, axis=0), np.gradient(grey, axis=1))


# Manners: each gives a picture of SIDE ------------------------------------------------------------

def watercolour(rng):
    scene = harbour()
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    shifts = [np.clip(axis + 9 * smooth_noise(rng, SIDE, 26) + 4 * smooth_noise(rng, SIDE, 90), 0, SIDE - 1).astype(int) for axis in (y, x)]
    washed = np.asarray(Image.fromarray(scene[tuple(shifts)].astype(np.uint8)).filter(ImageFilter.MedianFilter(9)).filter(ImageFilter.GaussianBlur(1.5))).astype(float)
    pools = 1 + 0.22 * smooth_noise(rng, SIDE, 9) + 0.10 * smooth_noise(rng, SIDE, 40)
    rim = np.clip(edges_of(washed, 1.5) * 9, 0, 1)  # pigment gathers where a wash ends
    paper = np.array((250, 246, 236))
    ink = (paper - washed) * (0.62 * pools + 0.55 * rim)[..., None]
    margin = np.minimum.reduce([x, SIDE - x, y, SIDE - y]) + 14 * smooth_noise(rng, SIDE, 30)
    ink *= np.clip((margin - 26) / 8, 0, 1)[..., None]
    return paper - ink + 5 * rng.normal(size=(SIDE, SIDE, 1)) + 5 * smooth_noise(rng, SIDE, 160)[..., None]


def pointillism(rng):
    scene = orchard()
    canvas = Image.new("RGB", (SIDE, SIDE), (240, 228, 200))
    draw = ImageDraw.Draw(canvas)
    for radius, count in ((7.5, 5200), (5.5, 9000), (4.0, 9000)):
        for px, py in rng.uniform(0, SIDE, (count, 2)):
            colour = scene[int(py), int(px)]
            swing = (colour - colour.mean()) * rng.uniform(0.9, 2.1) + colour.mean() + rng.normal(0, 20, 3)
            size = radius * rng.uniform(0.8, 1.15)
            draw.ellipse((px - size, py - size, px + size, py + size), tuple(int(v) for v in np.clip(swing, 0, 255)))
    return np.asarray(canvas).astype(float)


def charcoal(rng):
    scene = still_life()
    grey, flow = grey_of(scene, 3), flow_of(scene)
    dark = np.clip((0.72 - grey) * 1.5, 0, 1)
    layer = Image.new("L", (SIDE, SIDE), 0)
    draw = ImageDraw.Draw(layer)
    for px, py in rng.uniform(0, SIDE, (9000, 2)):
        depth = dark[int(py), int(px)]
        if rng.uniform() < depth:
            angle = 0.5 * flow[int(py), int(px)] + 0.4 + rng.normal(0, 0.12)
            reach = rng.uniform(12, 30)
            ends = (px - reach * np.cos(angle), py - reach * np.sin(angle), px + reach * np.cos(angle), py + reach * np.sin(angle))
            draw.line(ends, int(90 + 165 * depth * rng.uniform(0.5, 1)), int(rng.integers(2, 6)))
    strokes = np.asarray(layer.filter(ImageFilter.GaussianBlur(1))) / 255
    smudge = np.asarray(Image.fromarray((dark * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(14))) / 255
    outline = np.clip(edges_of(scene, 2.5) * 24 - 0.25, 0, 1)
    tooth = np.clip(0.75 + 0.5 * rng.normal(size=(SIDE, SIDE)) * 0.5 + 0.25 * smooth_noise(rng, SIDE, 200), 0, 1.2)
    coal = np.clip((0.55 * strokes + 0.75 * outline) * tooth + 0.42 * smudge, 0, 1)
    return np.array((234, 226, 210)) * (1 - coal[..., None]) + np.array((26, 24, 26)) * coal[..., None]


def pen(rng):
    """Hatching in up to four directions, more the darker it is."""
    scene = harbour()
    grey = grey_of(scene, 2)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(float)
    wobble = 2.5 * smooth_noise(rng, SIDE, 18)
    ink = np.clip(edges_of(scene, 1.2) * 22 - 0.35, 0, 1)
    for angle, level in ((0.8, 0.80), (-0.7, 0.62), (0.1, 0.47), (1.5, 0.34)):
        across = x * np.sin(angle) + y * np.cos(angle) + wobble
        width = np.clip((level - grey) * 5, 0, 1) * 0.55
        line = np.abs((across / 7.5) % 1 - 0.5) < 0.5 * np.clip(width * (1 + 0.35 * smooth_noise(rng, SIDE, 60)), 0, 0.62)
        ink = np.maximum(ink, line)
    ink = np.asarray(Image.fromarray((ink * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.9))) / 255
    paper = blend([(0, (244, 234, 208)), (1, (230, 214, 180))], np.hypot(x / SIDE - 0.5, y / SIDE - 0.5)) + 4 * smooth_noise(rng, SIDE, 120)[..., None]
    return paper * (1 - ink[..., None]) + np.array((52, 34, 26)) * ink[..., None]


def mosaic(rng):
    scene, tile = orchard(), 17
    flow = flow_of(scene)
    canvas = Image.new("RGB", (SIDE, SIDE), (60, 54, 50))
    draw = ImageDraw.Draw(canvas)
    for row in range(-1, SIDE // tile + 2):
        for column in range(-1, SIDE // tile + 2):
            px, py = (column + 0.5 * (row % 2)) * tile + rng.normal(0, 1), row * tile + rng.normal(0, 1)
            ix, iy = (int(np.clip(v, 0, SIDE - 1)) for v in (px, py))
            turn = 0.35 * np.sin(2 * flow[iy, ix]) + rng.normal(0, 0.06)
            half = tile * 0.46 * rng.uniform(0.92, 1.06)
            corners = [(px + half * (cx * np.cos(turn) - cy * np.sin(turn)), py + half * (cx * np.sin(turn) + cy * np.cos(turn)))
                       for cx, cy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
            colour = scene[iy, ix]
            colour = (colour - 128) * 1.3 + 128 + rng.normal(0, 16)
            draw.polygon(corners, tuple(int(v) for v in np.clip(colour, 0, 255)))
            draw.line(corners[:2], tuple(int(v) for v in np.clip(colour + 36, 0, 255)), 2)
            draw.line(corners[2:], tuple(int(v) for v in np.clip(colour - 40, 0, 255)), 2)
    return np.asarray(canvas).astype(float) * (1 + 0.05 * smooth_noise(rng, SIDE, 60))[..., None]


def facets(rng):
    """Planes of ochre, grey and green that cut the things apart."""
    scene = still_life()
    x, y = grid(SIDE)
    picture, edge = scene.copy(), np.zeros((SIDE, SIDE), bool)
    side = np.zeros((SIDE, SIDE), int)
    for number in range(15):
        angle, place = rng.uniform(0, np.pi), rng.uniform(-0.35, 0.35)
        distance = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) - place
        side += (distance > 0).astype(int) << number
        edge |= np.abs(distance) < 0.0022
    for inverse, label in enumerate(np.unique(side)):
        region = side == label
        shift = rng.integers(-26, 27, 2)
        moved = np.roll(scene, tuple(shift), (0, 1))
        slope = (x * np.cos(inverse) + y * np.sin(inverse))
        slope = (slope - slope[region].min()) / (np.ptp(slope[region]) + 1e-6)
        tint = np.array(((206, 170, 110), (120, 124, 110), (84, 92, 74), (190, 140, 92), (216, 206, 180))[rng.integers(5)])
        mixed = 0.5 * (moved * 0.5 + moved.mean(-1, keepdims=True) * 0.5) + 0.5 * tint
        picture[region] = (mixed * (0.72 + 0.5 * slope[..., None]))[region]
    lines = np.clip(edges_of(scene, 2) * 16 - 0.35, 0, 1)
    picture *= (1 - 0.75 * lines)[..., None]
    picture[edge] *= 0.35
    return picture + 9 * smooth_noise(rng, SIDE, 130)[..., None] + 4 * rng.normal(size=(SIDE, SIDE, 1))


def comic(rng):
    """Flat inks with dots and black outlines."""
    scene = still_life()
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(float)
    flat = np.asarray(Image.fromarray(scene.astype(np.uint8)).filter(ImageFilter.MedianFilter(9))).astype(float)
    inks = np.array(((252, 248, 232), (250, 206, 40), (228, 48, 48), (38, 92, 190), (110, 190, 226), (246, 164, 130), (60, 150, 80), (30, 30, 60)))
    lively = (flat - flat.mean(-1, keepdims=True)) * 2.0 + (flat.mean(-1, keepdims=True) - 110) * 1.4 + 140
    nearest = np.argsort(((lively[..., None, :] - inks) ** 2).sum(-1), -1)[..., :2]
    across, down = (x + y) / 9, (x - y) / 9
    dot = np.hypot(across % 1 - 0.5, down % 1 - 0.5)
    tone = np.clip(1 - grey_of(scene, 2), 0, 1)
    picture = np.where((dot < 0.2 + 0.36 * tone)[..., None], inks[nearest[..., 0]], 0.5 * inks[nearest[..., 0]] + 0.5 * inks[0])
    ink = edges_of(flat, 2.2) > 0.022
    picture[ink] = (20, 18, 26)
    return picture


def cross_stitch(rng):
    scene, cells = orchard(), 64
    small = Image.fromarray(scene.astype(np.uint8)).resize((cells, cells), Image.BOX).quantize(22, dither=Image.Dither.NONE).convert("RGB")
    colours, step = np.asarray(small).astype(float), SIDE / cells
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(float)
    weave = 0.5 * np.sin(x * 2 * np.pi / (step / 2)) + 0.5 * np.sin(y * 2 * np.pi / (step / 2))
    linen = np.array((226, 214, 190)) + 12 * weave[..., None] + 6 * rng.normal(size=(SIDE, SIDE, 1))
    canvas = Image.fromarray(np.clip(linen, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for row in range(2, cells - 2):
        for column in range(2, cells - 2):
            colour, left, top = colours[row, column] + rng.normal(0, 7), column * step, row * step
            for ends, shade in (((left + 1, top + 1, left + step - 1, top + step - 1), -34), ((left + 1, top + step - 1, left + step - 1, top + 1), 8)):
                draw.line(ends, tuple(int(v) for v in np.clip(colour + shade - 22, 0, 255)), 6)
                draw.line(ends, tuple(int(v) for v in np.clip(colour + shade, 0, 255)), 4)
    return np.asarray(canvas).astype(float)


def marbling(rng):
    """Inks on water, drawn with a comb."""
    x, y = grid(SIDE)
    u, v = x.copy(), y.copy()
    for cells, reach in ((3, 0.16), (5, 0.09), (9, 0.035)):
        u, v = u + reach * smooth_noise(rng, SIDE, cells), v + reach * smooth_noise(rng, SIDE, cells)
    v = v + 0.05 * (1 - np.abs(((u * 9) % 1) * 2 - 1)) ** 2 * np.where((u * 9).astype(int) % 2, 1, -1)
    inks = np.array(((34, 48, 92), (196, 58, 48), (238, 206, 140), (44, 116, 120), (246, 240, 224), (120, 40, 60), (226, 150, 60)))
    order = rng.integers(0, len(inks), 64)
    order[1:][order[1:] == order[:-1]] = (order[1:][order[1:] == order[:-1]] + 1) % len(inks)
    bands = v * 30 + 1.5 * np.sin(u * 17)
    number = np.floor(bands).astype(int) % len(order)
    picture = inks[order[number]].astype(float)
    picture[np.abs(bands % 1) < 0.06] = (28, 30, 46)
    return picture * (1 + 0.04 * smooth_noise(rng, SIDE, 120))[..., None]


MANNERS = {
    "watercolour": watercolour, "pointillism": pointillism, "charcoal": charcoal, "pen and ink": pen, "mosaic": mosaic, "facets": facets,
    "comic": comic, "cross stitch": cross_stitch, "marbling": marbling,
}
SAMPLES = {"impasto": paint_styles.impasto, "woodcut": paint_styles.woodcut, "stained glass": paint_styles.glass}


def paint(name: str) -> Image.Image:
    if name in SAMPLES:
        picture = SAMPLES[name]().convert("RGB")
    else:
        seed = list(MANNERS).index(name) + 20
        picture = Image.fromarray(np.clip(MANNERS[name](np.random.default_rng(seed)), 0, 255).astype(np.uint8))
    return picture.resize((SIZE, SIZE), Image.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent / "js" / "styles")
    parser.add_argument("--only", nargs="*", choices=[*SAMPLES, *MANNERS])
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.only or [*SAMPLES, *MANNERS]:
        path = options.output / f"{name}.jpg"
        paint(name).save(path, quality=84, optimize=True)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
