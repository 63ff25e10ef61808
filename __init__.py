"""Pastiche: diffusion style transfer as native ComfyUI nodes."""

from .nodes.host.version import warn_if_too_old

warn_if_too_old()  # before anything that an old ComfyUI may lack: what stops the import is then explained above its traceback

from .nodes.extension import comfy_entrypoint  # noqa: E402

WEB_DIRECTORY = "./js"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
