"""What the picker in the browser shows after a run: the image, and the mask as a see-through picture."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ...algorithms.overlay import tint
from .prompt import Result

KEY = "pastiche_fastsam"
MOST_SIDE = 1024  # of the map of objects: enough to point with


def picker_preview(images, result: Result, node: type[io.ComfyNode]) -> dict:
    """The `ui` part of FastSAM Prompt's answer: files of the batch's first image in ComfyUI's temp folder."""
    final = result.masks[: result.counts[0]].amax(0).cpu()
    save = ui.ImageSaveHelper.save_images
    image = save(images[:1, ..., :3], "pastiche_picker", io.FolderType.temp, node, compress_level=1)[0]
    mask = save(tint(final)[None], "pastiche_picker", io.FolderType.temp, node, compress_level=1)[0]
    objects = save(_numbers(result.taken)[None], "pastiche_picker", io.FolderType.temp, node, compress_level=1)[0]
    height, width = images.shape[1:3]
    shown = {"image": image, "mask": mask, "map": objects, "width": width, "height": height}
    return {KEY: [{**shown, "objects": result.found[0], "missed": result.missed}]}


def _numbers(objects: Tensor) -> Tensor:
    """(H, W) object numbers -> (h, w, 3) in 0..1, at most MOST_SIDE wide and high: red + 256 green is the number."""
    step = max(1, -(-max(objects.shape) // MOST_SIDE))
    small = objects[step // 2 :: step, step // 2 :: step] if step > 1 else objects
    # a quarter more, as the picture's writer truncates
    return (torch.stack([small % 256, small // 256, torch.zeros_like(small)], dim=-1) + 0.25) / 255
