#!/usr/bin/env python3
"""Stylises a photo with a painting, in a real ComfyUI, with the mini model that comes with Pastiche.

    python tools/demo.py
    python tools/demo.py --content photo.jpg --style painting.png --gamma 0.3 --size 512

On first use it makes an environment (a few minutes, about 2 GB in .environment/). COMFYUI_PATH selects a
ComfyUI of yours, run with its own Python (COMFYUI_PYTHON names it if it is not found). Only the standard
library is needed to start. Prints where the result and a contact sheet (content, style, result) are.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from host import environment, graph
from host.comfy import Server, ServerError, make_base
from host.environment import ROOT
from host.files import atomic_write
from pastiche_client import load

WORKFLOW = ROOT / "workflows" / "api" / "styleid_mini.json"


class UserError(Exception):
    """A sentence for the user."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--content", type=Path, help="photo to stylise (default: a sample)")
    parser.add_argument("--style", type=Path, help="picture to take the style from (default: a sample)")
    parser.add_argument("--steps", type=_number(int, 1, 1000), default=20, help="inversion and sampling steps (default: 20)")
    parser.add_argument("--gamma", type=_number(float, 0, 1), default=0.75, help="query preservation: 1 keeps the content most, 0 least (default: 0.75)")
    parser.add_argument("--temperature", type=_number(float, 0.01, 10), default=1.5, help="multiplies the attention logits (default: 1.5)")
    parser.add_argument("--size", type=_number(int, 64, 4096), default=256, help="longer side in pixels (default: 256)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the results (default: output)")
    parser.add_argument("--port", type=_number(int, 1, 65535), help="port for the server (default: a free one)")
    parser.add_argument("--keep-server", action="store_true", help="leave ComfyUI running until Ctrl-C, to look at the graph")
    return parser.parse_args(arguments)


def _number(kind, low, high):
    def convert(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"
    return convert


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    for path in (options.content, options.style):
        if path is not None and not path.is_file():
            raise UserError(f"{path} is not a file.")
    host = environment.prepare()
    code = environment.run_inside(host, __file__, arguments)
    return run(host, options) if code is None else code


def run(host: environment.Host, options: argparse.Namespace) -> int:
    """Inside the host's Python: everything from here may use Pillow and torch."""
    import torch

    content, style = options.content or graph.sample("content"), options.style or graph.sample("style")
    for path in (content, style):
        _check_image(path)
    prompt = load(WORKFLOW)
    settings = [
        ("BasicScheduler", "steps", options.steps), ("PasticheStyleInjection", "gamma", options.gamma),
        ("PasticheStyleInjection", "temperature", options.temperature),
        ("ImageScaleToMaxDimension", "largest_size", options.size),
    ]
    for class_type, name, value in settings:
        if not graph.set_input(prompt, class_type, name, value):
            raise UserError(f"{WORKFLOW.name} has no {class_type} whose {name} could be set.")
    options.output.mkdir(parents=True, exist_ok=True)

    print("starting ComfyUI ...", flush=True)
    server = Server(host, make_base(environment.HOME / "base"), options.port, cpu=not torch.cuda.is_available())
    with server:
        for title, path in (("Content", content), ("Style", style)):
            # a name of our own: two files of one name from different folders must not collide
            prompt.picture(title, server.upload(path, f"demo_{title.lower()}{path.suffix.lower()}"))
        bar = ProgressBar()
        started = time.monotonic()
        try:
            result = server.run(prompt, bar.show)
        finally:
            bar.close()
        saved = [image for image in result.images if image["type"] == "output"]
        if not saved:
            raise UserError(f"The graph ended without an image. {server.log_end()}")
        stem = f"{content.stem}_{style.stem}"
        image = server.download(saved[-1], _unused(options.output / f"{stem}.png"))
        sheet = image.with_name(f"{image.stem}_sheet.png")
        contact_sheet([("content", content), ("style", style), ("result", image)], sheet)
        print(f"finished in {time.monotonic() - started:.0f} s")
        print(f"result         {image.resolve()}")
        print(f"contact sheet  {sheet.resolve()}", flush=True)
        if options.keep_server:
            print(f"ComfyUI runs at {server.url} until you press Ctrl-C", flush=True)
            while True:
                time.sleep(1)
                server.require_alive()
    return 0


def _check_image(path: Path) -> None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from None


def _unused(path: Path) -> Path:
    """`path`, or the same with a number when that exists: results are never overwritten."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.stem}_{number}{path.suffix}"), number + 1
    return free


def contact_sheet(panels: list[tuple[str, Path]], target: Path, height: int | None = None) -> None:
    """Saves captioned pictures side by side at one height, the last one's unless given."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    images = []
    for _, path in panels:
        with Image.open(path) as image:
            images.append(ImageOps.exif_transpose(image).convert("RGB"))
    height = height or max(images[-1].height, 192)
    images = [image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.LANCZOS) for image in images]
    margin, caption = max(6, height // 40), max(18, height // 12)
    sheet = Image.new("RGB", (sum(i.width for i in images) + margin * (len(images) + 1), height + 2 * margin + caption), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(caption * 0.6)
    x = margin
    for (name, _), image in zip(panels, images):
        sheet.paste(image, (x, margin))
        draw.text((x + image.width / 2, height + margin + caption / 2), name, "black", font, anchor="mm")
        x += image.width + margin
    with atomic_write(target) as part:
        sheet.save(part, "PNG")


class ProgressBar:
    """A line that redraws itself on a terminal; elsewhere one line per node."""

    WIDTH = 28

    def __init__(self):
        self._terminal = sys.stdout.isatty()
        self._node = None

    def show(self, progress) -> None:
        done = (progress.finished + progress.value / max(progress.maximum, 1)) / progress.total
        count = f" {progress.value:.0f}/{progress.maximum:.0f}" if progress.maximum > 1 else ""
        if self._terminal:
            filled = round(self.WIDTH * done)
            line = f"[{'#' * filled}{'.' * (self.WIDTH - filled)}] {done:4.0%}  {progress.title}{count}"
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", flush=True)
        elif progress.node != self._node:
            print(f"[{done:4.0%}] {progress.title}", flush=True)
        self._node = progress.node

    def close(self) -> None:
        if self._terminal and self._node is not None:
            print()
            self._node = None


if __name__ == "__main__":
    environment.exit_on_signals()
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except (UserError, ServerError, environment.SetupError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
