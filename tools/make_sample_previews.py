#!/usr/bin/env python3
"""Writes js/samples/<name>.jpg, what Sample Picture shows in the browser: the samples in their own size, small as files."""

import ast
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def samples() -> dict[str, str]:
    """File in assets/samples by name, read from the source: importing it would need torch."""
    source = ast.parse((ROOT / "nodes" / "host" / "samples.py").read_text(encoding="utf-8"))
    return next(
        ast.literal_eval(node.value) for node in source.body if isinstance(node, ast.Assign) and node.targets[0].id == "SAMPLES"
    )


if __name__ == "__main__":
    for name, file in samples().items():
        target = ROOT / "js" / "samples" / f"{name}.jpg"
        target.parent.mkdir(exist_ok=True)
        with Image.open(ROOT / "assets" / "samples" / file) as picture:
            picture.convert("RGB").save(target, quality=80, optimize=True)
        print(target)
