"""The styles that come with the pack: pictures, which the model in hand turns into features when one is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

# Saved trajectories would take 3 MB each; the same file is what the page shows.
FOLDER = Path(__file__).resolve().parents[3] / "js" / "styles"
# Names are saved in workflows: add, never rename. tools/paint_gallery.py draws them.
READY = (
    "impasto", "woodcut", "stained glass", "watercolour", "pointillism", "pen and ink", "mosaic", "charcoal", "comic", "facets", "cross stitch", "marbling",
)


def ready_file(name: str) -> Path:
    return FOLDER / f"{name}.jpg"


def ready_picture(name: str) -> torch.Tensor:
    """(1, h, w, 3) in 0..1"""
    try:
        with Image.open(ready_file(name)) as picture:
            return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0)[None]
    except FileNotFoundError:
        raise ValueError(f'The picture of the ready style "{name}" is not in the pack\'s js/styles: install the pack again.') from None
