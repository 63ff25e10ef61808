"""Finds the adapter of a MODEL's network. A new family is a file of its own and a line here."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from .adapter import NetworkAdapter
from .unconditional_unet import adapt_unconditional
from .unet import adapt_unet

FAMILIES = (adapt_unconditional, adapt_unet)
"""Each takes a MODEL and gives its NetworkAdapter, or None when the network is of another kind."""


def find_adapter(model: ModelPatcher) -> NetworkAdapter:
    """The adapter of a MODEL. Raises ValueError for networks of no known kind."""
    for adapt in FAMILIES:
        adapter = adapt(model)
        if adapter is not None:
            return adapter
    network = type(model.model.diffusion_model).__name__
    raise ValueError(
        f"{type(model.model.model_config).__name__} has no U-Net ({network}), whose features this node works with: "
        "connect an SD1.x, SD2.x, SDXL, Pastiche mini or unconditional model."
    )
