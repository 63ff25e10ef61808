"""The pack's own sample pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "samples"
# What workflows name, by file. Names are saved in workflows: add, never rename. js/samples/<name>.jpg is what the node shows.
SAMPLES = {
    "coffee": "content_coffee.jpg",
    "astronaut": "content_astronaut.jpg",
    "dandelion": "content_dandelion.jpg",
    "shapes": "content_shapes.jpg",
    "impasto": "style_impasto.png",
    "woodcut": "style_woodcut.png",
    "stained glass": "style_glass.png",
}
SUBJECTS = {"coffee": "mask_coffee.png"}


def load_sample(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture (1, h, w, 3) in 0..1, and its subject (1, h, w), 1 inside; all 0 where no subject was marked."""
    if name not in SAMPLES:
        raise ValueError(f"picture: there is no sample {name!r}; there are {', '.join(SAMPLES)}.")
    image = _read(SAMPLES[name], "RGB")
    mask = _read(SUBJECTS[name], "L") if name in SUBJECTS else torch.zeros(image.shape[:2])
    return image[None], mask[None]


def _read(file: str, mode: str) -> torch.Tensor:
    """(h, w, 3) or (h, w)"""
    try:
        with Image.open(FOLDER / file) as picture:
            return torch.from_numpy(np.asarray(picture.convert(mode), dtype=np.float32) / 255.0)
    except FileNotFoundError:
        raise ValueError(f"The sample file {file} is not in the pack's assets/samples: install the pack again, or use Load Image.") from None
