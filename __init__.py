"""Pastiche: diffusion style transfer as native ComfyUI nodes."""

from .nodes.extension import comfy_entrypoint

WEB_DIRECTORY = "./js"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
