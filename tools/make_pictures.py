#!/usr/bin/env python3
"""Makes the pictures of README and of the help pages: dials at three settings, and the methods side by side.

    python tools/make_pictures.py                      all, on the mini model (some minutes on a CPU)
    python tools/make_pictures.py styleid methods      some of them

Writes js/docs/pictures/<name>.jpg, each a labelled sheet of what the API graphs give.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from host import environment
from host.comfy import Server, ServerError, make_base
from host.environment import ROOT
from pastiche_client import ComfyUI, Graph, load

TARGET = ROOT / "js" / "docs" / "pictures"
CELL, MARGIN, CAPTION = 208, 6, 22
SIZE, STEPS = 256, 20


def small(name: str) -> Graph:
    graph = load(name)
    for title, inputs in graph.titles.items():
        if "largest_size" in inputs:
            graph.set(title, largest_size=SIZE)
        if "scheduler" in inputs:
            graph.set(title, steps=STEPS)
    return graph


def result(comfy: ComfyUI, graph: Graph, title: str = "Result"):
    """The saved picture of the node of this title."""
    from PIL import Image

    key = next(key for key, node in graph.items() if node["_meta"]["title"] == title)
    images = [image for image in comfy.run(graph).images if image["node"] == key]
    return Image.open(io.BytesIO(comfy.fetch(images[0]))).convert("RGB")


def sample(file: str):
    from PIL import Image

    return Image.open(ROOT / "assets" / "samples" / file).convert("RGB")


def sheet(rows: list[list[tuple[str, object]]]):
    """Captioned pictures in rows, each filling a square cell."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    width = MARGIN + max(len(row) for row in rows) * (CELL + MARGIN)
    page = Image.new("RGB", (width, MARGIN + len(rows) * (CELL + CAPTION + MARGIN)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for (j, row), y in zip(enumerate(rows), itertools.count(MARGIN, CELL + CAPTION + MARGIN)):
        for i, (caption, picture) in enumerate(row):
            x = MARGIN + i * (CELL + MARGIN)
            page.paste(ImageOps.fit(picture, (CELL, CELL), Image.Resampling.LANCZOS), (x, y))
            draw.text((x + CELL / 2, y + CELL + CAPTION / 2), caption, "black", font, anchor="mm")
    return page


def sweep(comfy: ComfyUI, graph: Graph, down: tuple[str, str, list], across: tuple[str, str, list]):
    """A sheet of a graph over two dials, each (title, input, values)."""
    rows = []
    for a in down[2]:
        graph.set(down[0], **{down[1]: a})
        row = []
        for b in across[2]:
            graph.set(across[0], **{across[1]: b})
            row.append((f"{down[1]} {a}, {across[1]} {b}", result(comfy, graph)))
        rows.append(row)
    return sheet(rows)


def styleid(comfy: ComfyUI):
    return sweep(comfy, small("styleid_mini"), ("Style injection", "gamma", [0.9, 0.6, 0.3]), ("Style injection", "temperature", [1.0, 1.5, 2.5]))


def injectfusion(comfy: ComfyUI):
    return sweep(comfy, small("injectfusion_mini"), ("Inject content", "gamma", [0.2, 0.5, 0.8]), ("Calibrated sampler", "omega", [0.0, 0.3, 0.7]))


def lora_strength(comfy: ComfyUI):
    graph, row = small("diffstyler_train_mini"), []
    for strength in (0.0, 0.5, 1.0):
        graph.set("Use it at once", strength_model=strength)
        row.append((f"strength {strength}", result(comfy, graph)))
    return sheet([row])


def methods(comfy: ComfyUI):
    """One photo, one painting, each method as its template is shipped."""
    return sheet([
        [("photo", sample("content_coffee.jpg")), ("painting", sample("style_impasto.png")), ("StyleID", result(comfy, small("styleid_mini")))],
        [("InjectFusion", result(comfy, small("injectfusion_mini"))), ("DiffStyler, the cup", result(comfy, small("diffstyler_mini"))),
         ("Style Reference", result(comfy, small("style_reference_mini")))],
    ])


PICTURES: dict[str, Callable] = {"styleid": styleid, "injectfusion": injectfusion, "lora_strength": lora_strength, "methods": methods}


def make(comfy: ComfyUI, name: str) -> Path:
    target = TARGET / f"{name}.jpg"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    PICTURES[name](comfy).save(part, "JPEG", quality=88)
    part.replace(target)
    return target


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(PICTURES))
    options = parser.parse_args(arguments)
    if set(options.names) - set(PICTURES):
        parser.error(f"there are {', '.join(PICTURES)}")
    host = environment.prepare()
    code = environment.run_inside(host, __file__, arguments)
    if code is not None:
        return code
    with tempfile.TemporaryDirectory() as folder, Server(host, make_base(Path(folder))) as server:
        for name in options.names or PICTURES:
            print(make(server, name), flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (environment.SetupError, ServerError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
