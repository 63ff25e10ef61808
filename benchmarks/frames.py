"""Flicker of restyled films: Restyle Frames against frame after frame on its own, on the mini U-Net.

    python benchmarks/frames.py ASSETS [--size 128] [--frames 8] [--steps 10] [--clips 3] [--long 500] [--table FILE] [--sheet FILE]

A film is a picture frame that moves over a photo by whole pixels, so neighbouring frames can be laid on each other exactly: the
warped difference is what is left then. Frame by frame is what one does without the node: each frame is inverted, gets Latent AdaIN with
its own statistics, and is sampled with Style Injection. The first clip is the one that defaults were chosen on.
--long N: memory of the process along a film of N frames of 64 px in place of the table. The sheet shows the first clip's
film, its frames one by one, and what the node's defaults make of it.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import setup_host  # noqa: F401  (before torch and comfy)
import folder_paths
import numpy as np
import psutil
import torch
from metrics import Metrics
from mini_training.data import HELD_OUT_STYLES, square
from pastiche.nodes.algorithms.frames import warped_difference
from pastiche.nodes.algorithms.motion import steadied
from pastiche.nodes.host.features.on_the_way import invert_and_capture
from pastiche.nodes.host.frames import film as film_module
from pastiche.nodes.host.frames.film import FilmSettings, restyle_film
from pastiche.nodes.host.networks.mini import load_mini
from PIL import Image
from report import add_outputs, publish, save_sheet
from support.sampling import schedule

# photo, pixels to the right and down a frame, deviation of the noise that a camera would add
CLIPS = (("skimage_coffee.png", 3, 2, 0.0), ("skimage_chelsea.png", 5, -1, 0.0), ("sunset_by_Aitzol_Berasategi.jpg", -2, 3, 0.01),
         ("skimage_rocket.png", 1, 6, 0.01))
MARGIN = 8  # pixels at the borders, where a network sees other things
STEADY = (0.3, 0.6, 0.9)
SHOWN = 4  # frames of a sheet's rows


def moving_crop(path: Path, size: int, frames: int, right: int, down: int, noise: float) -> torch.Tensor:
    """(F, size, size, 3) in 0..1; the photo is scaled so that the way just fits."""
    picture, way = Image.open(path).convert("RGB"), [abs(step) * (frames - 1) for step in (right, down)]
    scale = max((size + travelled) / side for travelled, side in zip(way, picture.size))
    picture = picture.resize([max(size + travelled, round(side * scale)) for travelled, side in zip(way, picture.size)], Image.LANCZOS)
    pixels = torch.from_numpy(np.asarray(picture).copy()).float() / 255
    left, top = (way[0] if right < 0 else 0), (way[1] if down < 0 else 0)
    film = torch.stack([pixels[top + down * i :, left + right * i :][:size, :size] for i in range(frames)])
    return (film + noise * torch.randn(film.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def detail(frames: torch.Tensor) -> float:
    """Mean difference of neighbouring pixels: falls where a film is smeared."""
    return float(frames.diff(dim=1).abs().mean() + frames.diff(dim=2).abs().mean()) / 2


class Studio:
    def __init__(self, options: argparse.Namespace):
        self.options, self.metrics = options, Metrics(options.assets / "metrics")
        self.model, self.vae, kinds = load_mini()
        self.empty, self.sigmas = kinds["empty"], schedule(self.model, options.steps)

    def style(self, name: str) -> tuple[torch.Tensor, object]:
        """(1, H, W, 3) and its features."""
        picture = (square(self.options.assets / "style" / f"{name}.png", self.options.size) / 2 + 0.5).movedim(0, -1).unsqueeze(0)  # CHW -> BHWC
        latent = {"samples": self.vae.encode(picture)}
        return picture, invert_and_capture(self.model, latent, self.sigmas, "self_attention", "auto", "ram", positive=self.empty)[2]

    def restyle(self, frames: torch.Tensor, bank: object, settings: FilmSettings) -> torch.Tensor:
        return restyle_film(self.model, self.vae, frames, None, bank, settings, 4, "film", False, self.empty)[0]


def measure(studio: Studio, photo: str, right: int, down: int, noise: float, style: str, sheet: Path | None) -> list[tuple]:
    """(setting, warped difference, Gram, detail, seconds a frame) of one clip."""
    options = studio.options
    frames = moving_crop(options.assets / "content" / photo, options.size, options.frames, right, down, noise)
    picture, bank = studio.style(style)
    found, alone = [], FilmSettings(steps=options.steps, steady=0.0)

    def note(name: str, film: torch.Tensor, seconds: float) -> torch.Tensor:
        gram = sum(studio.metrics.gram_distance(frame.movedim(-1, 0)[None], picture.movedim(-1, 1)) for frame in film) / len(film)
        found.append((name, warped_difference(film, right, down, MARGIN), gram, detail(film), seconds / len(film)))
        print(photo, "%s: warped %.4f, Gram %.4f, detail %.4f, %.1f s a frame" % found[-1], flush=True)
        return film

    def made(name: str, make) -> torch.Tensor:
        started = time.perf_counter()
        return note(name, make(), time.perf_counter() - started)

    decoded = studio.vae.decode(studio.vae.encode(frames))[..., :3].float().clamp(0, 1)
    note("the film itself, through the VAE", decoded, 0.0)
    one_by_one = made("frame by frame", lambda: torch.cat([studio.restyle(frame, bank, alone) for frame in frames.split(1)]))
    shared = made("one mean and deviation", lambda: studio.restyle(frames, bank, alone))
    for link in options.links:
        made(f"the same, link {link}", lambda: studio.restyle(frames, bank, replace(alone, link=link)))
    for strength in STEADY:
        def steady() -> torch.Tensor:
            film = [shared[0]]
            for number in range(1, len(shared)):
                film.append(steadied(shared[number], frames[number], film[-1], frames[number - 1], strength))
            return torch.stack(film)

        film = made(f"one mean and deviation, steady {strength}", steady)
        if strength == FilmSettings().steady:
            rows = [torch.cat(list(part[: 2 * SHOWN : 2]), dim=1).movedim(-1, 0)[None] for part in (frames, one_by_one, film)]  # HWC -> 1CHW
            save_sheet(rows, sheet)
    return found


def flicker(options: argparse.Namespace) -> list[str]:
    studio, started = Studio(options), time.process_time()
    text = [
        f"# Flicker of restyled films, mini U-Net, {options.frames} frames of {options.size} px, {options.steps} steps",
        "",
        "Warped difference: mean difference of neighbouring frames (0..1) laid on each other along the known motion. Gram: mean distance of "
        "the frames to the style, lower is nearer. Detail: mean difference of neighbouring pixels; less of it is smear. In brackets the share "
        "of frame by frame, which is each frame inverted and restyled on its own. Seconds for steady are its own alone. "
        f"{setup_host.hardware()}.",
    ]
    for number, (photo, right, down, noise) in enumerate(CLIPS[: options.clips]):
        style = HELD_OUT_STYLES[number % len(HELD_OUT_STYLES)]
        rows = measure(studio, photo, right, down, noise, style, options.sheet if number == 0 else None)
        base = next(row for row in rows if row[0] == "frame by frame")
        text += ["", f"## {photo}, {right} px right and {down} px down a frame, noise {noise}, style {style}"
                 + (" (defaults were chosen on this one)" if number == 0 else ""), "",
                 "| setting | warped difference | Gram | detail | s a frame |", "|---|---|---|---|---|"]
        for name, *values, seconds in rows:
            shown = " | ".join(f"{value:.4f} ({value / one:.2f})" for value, one in zip(values, base[1:]))
            text.append(f"| {name} | {shown} | {seconds:.2f} |")
    return [*text, "", f"{time.process_time() - started:.0f} s of CPU."]


def memory(options: argparse.Namespace) -> list[str]:
    """Resident memory along a long film of small frames, at every hundredth frame."""
    model, vae, kinds = load_mini()
    photo = options.assets / "content" / CLIPS[0][0]
    frames = moving_crop(photo, 64, 50, 1, 1, 0.0)[[abs(49 - i % 98) for i in range(options.long)]]  # there and back
    style = moving_crop(options.assets / "content" / CLIPS[1][0], 64, 1, 0, 0, 0.0)
    process, seen = psutil.Process(), []
    advance = film_module.WrittenFrames.advance

    def watched(self, done, tensors):
        advance(self, done, tensors)
        if done % 100 < 10 and done >= 10 and (not seen or done - seen[-1][0] > 20):
            seen.append((done, process.memory_info().rss / 1e6))
            print("%d frames: %.0f MB" % seen[-1], flush=True)

    film_module.WrittenFrames.advance = watched
    settings = FilmSettings(steps=2, link="first and previous")
    started = time.perf_counter()
    restyle_film(model, vae, frames, style, None, settings, 10, "long", False, kinds["empty"])
    whole = options.long * 64 * 64 * 3 * 4 / 1e6
    return [f"# Memory along a film of {options.long} frames of 64 px, 2 steps, links to the first and the previous frame, chunks of 10", "",
            f"Resident memory of the process. Of it the film itself is {whole:.0f} MB; the result fills as it goes, {whole / options.long * 100:.1f} MB "
            "every hundred frames, which is what it grows by. "
            f"{time.perf_counter() - started:.0f} s, {setup_host.hardware()}.", "",
            "| frames written | MB |", "|---|---|", *(f"| {done} | {size:.0f} |" for done, size in seen)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--links", nargs="*", default=["first and previous"])
    parser.add_argument("--long", type=int, help="frames of a long film, whose memory is measured")
    add_outputs(parser, sheet=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        publish((memory if options.long else flicker)(options), options.table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
