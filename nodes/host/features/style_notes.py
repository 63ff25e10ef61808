"""What a saved style says about itself: its picture, its model and its settings, as text in the file's metadata."""

from __future__ import annotations

import base64
import binascii
import io
import json
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image

from ..networks.fingerprint import ModelName, model_name

SIDE = 192  # pixels, the longest side of a thumbnail
COVERS = "ssmd_cover_images"
"""A JSON list of pictures in base64: where core's model library, and its route for previews, look for them."""


def style_notes(model: ModelPatcher | None, cover: bytes | None, settings: dict[str, Any], notes: str = "") -> dict[str, str]:
    """Metadata of a saved style beside what its format needs. model: that it belongs to; cover: a JPEG's bytes."""
    named = ModelName("", "") if model is None else model_name(model)
    found = {"model": named.name, "family": named.family, "settings": json.dumps(settings), "notes": notes.strip()[:2000]}
    found = {name: text.encode("utf-8", "replace").decode() for name, text in found.items()}  # half a character would spoil the file
    if cover is not None:
        found[COVERS] = json.dumps([base64.b64encode(cover).decode()])
    return found


def named_model(metadata: dict[str, str]) -> ModelName:
    """The model that `style_notes` named; empty for files from before."""
    return ModelName(metadata.get("model", ""), metadata.get("family", ""))


def thumbnail(image: torch.Tensor) -> bytes:
    """A small JPEG of the first picture of an IMAGE (B, H, W, C)."""
    pixels = image[0, ..., :3].detach().to("cpu", torch.float32).clamp(0, 1)
    picture = Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82, optimize=True)
    return buffer.getvalue()


def latent_thumbnail(model: ModelPatcher, latent: torch.Tensor) -> bytes | None:
    """A coarse one of a clean latent (B, C, H, W) or (B, C, T, H, W) in the model's own space, coloured as ComfyUI's previews are.

    None where the model's latent format has no colours for it.
    """
    form = model.model.latent_format
    factors = getattr(form, "latent_rgb_factors", None)
    first = latent[0].detach().to("cpu", torch.float32)
    first = first if first.ndim == 3 else first[:, 0]
    if factors is None or len(factors) != first.shape[0]:
        return None
    bias = getattr(form, "latent_rgb_factors_bias", None)
    # CHW -> HWC
    colours = first.movedim(0, -1) @ torch.tensor(factors, dtype=torch.float32) + torch.tensor(bias or [0.0] * 3)
    return thumbnail((colours[None] + 1) / 2)


def cover_of(metadata: dict[str, str]) -> torch.Tensor | None:
    """The thumbnail as an IMAGE (1, h, w, 3); None where there is none, or it is damaged."""
    try:
        first = base64.b64decode(json.loads(metadata[COVERS])[0], validate=True)
        with Image.open(io.BytesIO(first), formats=("JPEG", "PNG", "WEBP")) as picture:
            if max(picture.size) > 4096:
                return None
            pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
            return pixels.view(1, picture.height, picture.width, 3).float() / 255
    # Import: ultralytics exchanges Image.open, and looks for a package where a picture is broken
    except (KeyError, IndexError, TypeError, ValueError, RecursionError, OSError, ImportError, binascii.Error, Image.DecompressionBombError):
        return None


def settings_of(metadata: dict[str, str]) -> dict[str, str]:
    """What the file says it was made with, as words; of old files what their format tells."""
    try:
        told = json.loads(metadata["settings"])
        return {str(name)[:40]: str(value)[:200] for name, value in list(told.items())[:20]}
    except (KeyError, AttributeError, TypeError, ValueError, RecursionError):
        old = ("scheme", "steps", "latent_size", "batch")
        return {name.replace("_", " "): metadata[name][:200] for name in old if name in metadata}
