"""What Compare Pictures sends to the browser."""

from __future__ import annotations

from comfy_api.latest import io, ui

KEY = "pastiche_compare"


def comparison(before, after, node: type[io.ComfyNode]) -> dict:
    """The `ui` part of Compare Pictures' answer: two files in ComfyUI's temp folder, the first of each batch (b, h, w, c)."""
    save = ui.ImageSaveHelper.save_images
    return {KEY: [save(images[:1, ..., :3], "pastiche_compare", io.FolderType.temp, node, compress_level=1)[0] for images in (before, after)]}
