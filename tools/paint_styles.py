#!/usr/bin/env python3
"""Paints the sample style pictures of assets/samples from a seed: no scan, no licence but ours.

    python tools/paint_styles.py [--output assets/samples]

style_impasto.png   dusk over fields in thick brush strokes that follow a swirling flow
style_woodcut.png   waves, hills and a sun cut in wood and printed in four inks
style_glass.png     a tree and a sun in leaded glass
Needs numpy and Pillow. Coordinates are pixels, x to the right, y down.
"""
import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 512


def grid(size):
    """x and y of every pixel, each (size, size), as shares of the side."""
    y, x = np.mgrid[0:size, 0:size] / size
    return x, y


def blend(stops, t):
    """Colours (..., 3) along a gradient: stops [(position, (r, g, b))], t (...)."""
    positions = [p for p, _ in stops]
    return np.stack([np.interp(t, positions, [c[i] for _, c in stops]) for i in range(3)], -1)


def smooth_noise(rng, size, cells):
    """(size, size) noise in -1..1 with features of size/cells pixels."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells + 3, cells + 3)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.BICUBIC))


# Impasto ------------------------------------------------------------------------------------------

def dusk(rng, size):
    """The scene below the strokes, (size, size, 3) in 0..255, and the flow angle (size, size)."""
    x, y = grid(size)
    horizon = 0.60 + 0.03 * np.sin(x * 5) + 0.015 * np.sin(x * 17 + 1)
    picture = blend([(0.0, (22, 34, 92)), (0.25, (42, 88, 160)), (0.45, (120, 160, 190)),
                     (0.55, (245, 190, 90)), (0.62, (240, 120, 50))], y)
    angle = 0.25 * smooth_noise(rng, size, 4)
    for cx, cy, radius, turn, glow, hue in ((0.72, 0.22, 0.16, 1, 1.0, (255, 224, 110)), (0.28, 0.16, 0.10, -1, 0.7, (235, 235, 200)),
                                            (0.45, 0.38, 0.13, 1, 0.35, (200, 220, 235)), (0.08, 0.36, 0.09, -1, 0.5, (250, 230, 150)),
                                            (0.93, 0.46, 0.08, -1, 0.4, (255, 240, 190))):
        dx, dy = x - cx, y - cy
        distance = np.hypot(dx, dy)
        weight = np.exp(-(distance / radius) ** 2)
        ring = 0.6 + 0.4 * np.cos(distance / radius * 9)
        picture += (glow * weight * ring)[..., None] * (np.array(hue) - picture)
        angle += np.clip(1.6 * weight, 0, 1) * (np.arctan2(dx, -dy) * turn - angle)
    field = blend([(0.0, (120, 96, 30)), (0.35, (222, 168, 42)), (1.0, (150, 120, 20))], (y - 0.6) / 0.4)
    furrows = np.sin((x - 0.45) / (y - 0.42) * 16)
    field += furrows[..., None] * np.array((34, 22, 4)) + np.where(smooth_noise(rng, size, 40) > 0.55, 1, 0)[..., None] * np.array((20, -60, -10))
    below = y > horizon
    picture[below] = field[below]
    angle[below] = np.arctan2(y - 0.42, x - 0.45)[below]
    hills = (y > horizon - 0.05 - 0.04 * np.sin(x * 7 + 2)) & ~below
    picture[hills] = blend([(0.0, (38, 60, 88)), (1.0, (52, 84, 70))], x)[hills]
    trunk = (np.abs(x - 0.14 + 0.02 * np.sin(y * 14)) < 0.055 * np.clip((y - 0.22) / 0.5, 0, 1) * (1 + 0.2 * np.sin(y * 40))) & (y < 0.86)
    picture[trunk] = blend([(0.2, (30, 62, 44)), (0.6, (18, 44, 34)), (0.9, (60, 46, 24))], y)[trunk]
    angle[trunk] = (np.pi / 2 + 0.5 * np.sin(y * 30))[trunk]
    return np.clip(picture, 0, 255), angle


def impasto(seed=7, size=SIZE):
    """Strokes from broad to fine; each is a bundle of bristles with its own colour and height, then lit from the upper left."""
    rng = np.random.default_rng(seed)
    scale = 2
    side = size * scale
    scene, angle = dusk(rng, side)
    canvas = Image.fromarray(scene.astype(np.uint8)).filter(ImageFilter.GaussianBlur(12))
    height = Image.new("L", (side, side), 110)
    draw, relief = ImageDraw.Draw(canvas), ImageDraw.Draw(height)
    for count, length, bristles, width in ((1400, 90, 9, 5), (5200, 56, 7, 4), (5200, 34, 5, 3)):
        for _ in range(count):
            px, py = rng.uniform(0, side, 2)
            color = scene[int(py), int(px)] * rng.uniform(0.86, 1.14) + rng.normal(0, 9, 3)
            spine = []
            for _ in range(9):
                ix, iy = min(max(int(px), 0), side - 1), min(max(int(py), 0), side - 1)
                spine.append((px, py, angle[iy, ix]))
                px += np.cos(angle[iy, ix]) * length / 8
                py += np.sin(angle[iy, ix]) * length / 8
            for bristle in range(bristles):
                offset = (bristle - (bristles - 1) / 2) * width * 0.8
                shade = tuple(int(v) for v in np.clip(color + rng.normal(0, 11), 0, 255))
                points = [(sx - np.sin(a) * offset, sy + np.cos(a) * offset) for sx, sy, a in spine]
                draw.line(points, shade, width, joint="curve")
                edge = abs(bristle - (bristles - 1) / 2) / bristles
                relief.line(points, int(np.clip(120 + 150 * (edge - 0.1) + rng.normal(0, 26), 0, 255)), width)
    bumps = np.asarray(height.filter(ImageFilter.GaussianBlur(1.2))).astype(np.float32)
    slope = np.gradient(bumps, axis=1) + np.gradient(bumps, axis=0)
    lit = np.asarray(canvas).astype(np.float32) * (1 + 0.010 * np.clip(slope, -40, 40))[..., None] + np.clip(slope - 18, 0, 40)[..., None]
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8)).resize((size, size), Image.LANCZOS)


# Woodcut ------------------------------------------------------------------------------------------

def woodcut(seed=3, size=SIZE):
    """Tone is carried by carved lines whose width swells with darkness; four flat inks on paper."""
    rng = np.random.default_rng(seed)
    side = size * 2
    x, y = grid(side)
    paper, ink, blue, pale, red = (240, 226, 194), (24, 32, 58), (44, 92, 142), (140, 176, 184), (206, 74, 46)
    picture = np.empty((side, side, 3))
    picture[:] = paper
    wobble = 0.006 * smooth_noise(rng, side, 24)

    def carve(region, color, phase, tone):
        """Lines where sin(phase) falls under tone (-1..1 -> none..solid)."""
        picture[region & (np.sin(phase) < tone)] = color

    sky = np.ones_like(x, bool)
    carve(sky, pale, (y + wobble) * 2 * np.pi * 46, 1.3 - 5.2 * y)
    sun = np.hypot(x - 0.66, y - 0.27) < 0.135
    picture[sun] = red
    carve(sun, paper, (y + wobble) * 2 * np.pi * 46, -1.25 + 3.0 * (y - 0.18))
    cloud = (np.abs(y - 0.30 - 0.02 * np.sin(x * 12)) < 0.020 + 0.018 * np.sin(x * 7 + 1)) & (x > 0.38)
    picture[cloud] = paper
    outline = np.abs(np.abs(y - 0.30 - 0.02 * np.sin(x * 12)) - np.maximum(0.020 + 0.018 * np.sin(x * 7 + 1), 0)) < 0.0028
    picture[outline & (x > 0.38) & (0.020 + 0.018 * np.sin(x * 7 + 1) > 0.003)] = ink

    def ridge(line, body, stroke_color, lines, lean, light):
        region = y > line
        picture[region] = body
        depth = y - line
        carve(region, stroke_color, (x + lean * depth + wobble) * 2 * np.pi * lines, light + 7 * (0.13 - depth) * smooth_noise(rng, side, 7))
        picture[np.abs(depth) < 0.0042] = ink

    peak = 0.56 - 0.30 * np.exp(-((x - 0.24) / 0.14) ** 2) - 0.03 * np.abs(np.sin(x * 9))
    ridge(peak, blue, ink, 60, 0.9, -0.35)
    snow = (y > peak) & (y < 0.375 + 0.03 * np.sin(x * 60) + 0.02 * np.sin(x * 133))
    picture[snow] = paper
    ridge(0.57 - 0.05 * np.sin(x * 6 + 0.6), pale, blue, 48, -1.2, -0.2)

    for row in range(6):  # rows of waves, nearer ones larger
        base = 0.63 + 0.062 * row + 0.010 * row ** 1.3
        waves = 5.5 - 0.55 * row
        u = (x * waves + 0.37 * row + 0.13 * np.sin(7 * row)) % 1
        crest = base - (0.030 + 0.011 * row) * (np.exp(-((u - 0.42) / 0.16) ** 2) + 0.55 * np.exp(-((u - 0.60) / 0.07) ** 2))
        region = y > crest
        picture[region] = blue if row % 2 else (70, 122, 160)
        depth = y - crest
        carve(region, ink, depth * 2 * np.pi * (62 - 5 * row), -0.15 - 3 * depth)
        picture[region & (depth < 0.013 + 0.003 * row + 0.008 * np.sin(u * 60))] = paper
        carve(region & (u > 0.40) & (u < 0.66), paper, (u * 9 + depth * 30) * 2 * np.pi, -0.72)
        picture[np.abs(depth) < 0.0038] = ink
    border = (np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) < 0.022)
    picture[border] = paper
    picture[np.abs(np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) - 0.024) < 0.003] = ink
    grain = smooth_noise(rng, side, 300) * 0.6 + np.repeat(rng.normal(0, 0.5, (side // 4, 1)), 4, 0)
    sheet = Image.fromarray(np.clip(picture + 7 * grain[..., None], 0, 255).astype(np.uint8)).resize((size, size), Image.LANCZOS)
    return sheet.quantize(64, dither=Image.Dither.NONE)


# Leaded glass -------------------------------------------------------------------------------------

def glass(seed=11, size=SIZE):
    """Panes are the cells nearest to scattered points; each takes the colour of the scene at its point."""
    rng = np.random.default_rng(seed)
    x, y = grid(size)
    rings = [(0.60 + r * np.cos(a), 0.34 + r * np.sin(a)) for i, r in enumerate((0.07, 0.16, 0.26, 0.38, 0.52))
             for a in np.linspace(0, 2 * np.pi, 9 + 7 * i, endpoint=False) + 0.2 * i]
    rings = [(px, py) for px, py in rings if py < 0.74]
    points = np.array([(0.60, 0.34), *rings] + [(rng.uniform(0, 1), rng.uniform(0.70, 1)) for _ in range(60)]
                      + [(rng.uniform(0, 0.3), rng.uniform(0.15, 0.7)) for _ in range(36)])
    points = points + rng.normal(0, 0.006, points.shape)
    distances = np.stack([np.hypot(x - px, y - py) for px, py in points])
    order = np.argsort(distances, 0)[:2]
    nearest = order[0]
    gap = np.take_along_axis(distances, order[1:2], 0)[0] - np.take_along_axis(distances, order[:1], 0)[0]
    colors = np.empty((len(points), 3))
    for i, (px, py) in enumerate(points):
        from_sun = np.hypot(px - 0.60, py - 0.34)
        if py > 0.72:
            palette = ((28, 120, 88), (18, 86, 70), (70, 150, 60), (140, 170, 40))
        elif px < 0.3:
            palette = ((176, 30, 48), (214, 74, 38), (150, 24, 70), (226, 130, 40))
        elif from_sun < 0.05:
            palette = ((255, 236, 150),)
        elif from_sun < 0.2:
            palette = ((250, 196, 50), (244, 160, 36), (252, 216, 96))
        elif from_sun < 0.32:
            palette = ((230, 110, 60), (222, 92, 100), (240, 150, 70))
        else:
            palette = ((36, 76, 168), (24, 52, 130), (66, 124, 196), (92, 70, 160))
        colors[i] = np.array(palette[rng.integers(len(palette))]) * rng.uniform(0.85, 1.1)
    light = 1 + 0.16 * smooth_noise(rng, size, 14) + 0.10 * smooth_noise(rng, size, 60)
    glow = 0.78 + 0.34 * np.clip(gap / 0.05, 0, 1)  # panes are brighter in the middle
    picture = colors[nearest] * (light * glow)[..., None]
    trunk = np.abs(x - 0.16 - 0.05 * np.sin(y * 5)) - 0.022 - 0.05 * np.clip(y - 0.62, 0, 1)
    wood = (trunk < 0) & (y > 0.30)
    picture[wood] = np.array((104, 60, 34)) * light[wood][:, None]
    lead = (gap < 0.0095) | ((np.abs(trunk) < 0.007) & (y > 0.295)) | (np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) < 0.014)
    soft = np.asarray(Image.fromarray(lead.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(0.8))) / 255
    shine = np.gradient(np.asarray(Image.fromarray(lead.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(2))).astype(float), axis=0)
    metal = 26 + 0.9 * np.clip(shine, -20, 40)
    picture = picture * (1 - soft[..., None]) + (soft * metal)[..., None]
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent / "assets" / "samples")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name, paint in (("impasto", impasto), ("woodcut", woodcut), ("glass", glass)):
        path = output / f"style_{name}.png"
        paint().save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
