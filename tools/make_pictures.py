#!/usr/bin/env python3
"""Makes the pictures of README and of the help pages: dials at three settings, on and off, right wiring.

    python tools/make_pictures.py                      all of tools/pictures.py and tools/canvases.py, on the mini model (an hour on a CPU)
    python tools/make_pictures.py styleid methods      some of them
    python tools/make_pictures.py --preview            at 128 pixels and 4 steps into .environment/artifacts: is it the right picture?

Writes js/docs/pictures/<name>.jpg.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from host import environment, graph
from host.comfy import Server, ServerError, make_base
from host.environment import ROOT
from host.files import atomic_write

TARGET = ROOT / "js" / "docs" / "pictures"
PREVIEWS = ROOT / ".environment" / "artifacts" / "pictures"
LARGEST_FILE = 120_000  # bytes


def save(picture, folder: Path, name: str) -> Path:
    """As JPEG, at the best quality that keeps the file small."""
    target = folder / f"{name}.jpg"
    with atomic_write(target) as part:
        for quality in (88, 80, 72, 60):
            picture.save(part, "JPEG", quality=quality, optimize=True)
            if part.stat().st_size < LARGEST_FILE:
                break
    return target


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--preview", action="store_true")
    options = parser.parse_args(arguments)
    host = environment.prepare()
    code = environment.run_inside(host, __file__, arguments)
    if code is not None:
        return code
    import canvases
    import pictures

    known = [*pictures.SHEETS, *canvases.CANVASES]
    if set(options.names) - set(known):
        parser.error(f"there are {', '.join(known)}")
    names, folder = options.names or known, PREVIEWS if options.preview else TARGET
    if options.preview:
        pictures.SIZE, pictures.STEPS = 128, 4
    alone = [name for name in names if name == "style_gallery"]  # it lists what is in the folders, stand-ins too
    for group in filter(None, (alone, [name for name in names if name not in alone])):
        with tempfile.TemporaryDirectory() as base:
            make_base(Path(base))
            for prompt, _, _ in (canvases.CANVASES[name] for name in group if name in canvases.CANVASES):
                graph.provide_files(prompt, Path(base))
            make(host, Path(base), group, folder)
    return 0


def make(host: environment.Host, base: Path, names: list[str], folder: Path) -> None:
    import canvases
    import pictures
    from host.browser import Browser
    from host.frontend import Frontend
    from pastiche_client import ComfyUI

    with Server(host, base) as server:
        comfy = ComfyUI(server.url)
        for name in (name for name in names if name in pictures.SHEETS):
            print(save(pictures.SHEETS[name](comfy), folder, name), flush=True)
        wanted = [name for name in names if name in canvases.CANVASES]
        if wanted:
            with Browser((1920, 1080)) as page:
                ui = Frontend(page, server)
                for name in wanted:
                    print(save(canvases.canvas(ui, name), folder, name), flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (environment.SetupError, ServerError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
