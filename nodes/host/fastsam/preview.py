"""What the picker in the browser shows after a run: the image, and the mask as a see-through picture."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ...algorithms.overlay import tint
from .prompt import Result

KEY = "pastiche_fastsam"


def picker_preview(images, result: Result, node: type[io.ComfyNode]) -> dict:
    """The `ui` part of FastSAM Prompt's answer: files of the batch's first image in ComfyUI's temp folder."""
    final = result.masks[: result.counts[0]].amax(0).cpu()
    save = ui.ImageSaveHelper.save_images
    image = save(images[:1, ..., :3], "pastiche_picker", io.FolderType.temp, node, compress_level=1)[0]
    mask = save(tint(final)[None], "pastiche_picker", io.FolderType.temp, node, compress_level=1)[0]
    height, width = images.shape[1:3]
    return {KEY: [{"image": image, "mask": mask, "width": width, "height": height, "objects": result.found[0]}]}
