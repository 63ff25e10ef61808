"""How a MODEL's positions turn its queries and keys."""

from __future__ import annotations

from typing import Any

from ...algorithms.references import RotaryLayout

WITHOUT = ("MMDiT", "UNetModel")  # core's SD3 and AuraFlow transformers, and its U-Nets: positions are no rotations


def rotary_layout(network: Any) -> RotaryLayout | None:
    """The rotary layout of a diffusion model's network; None where it has none, or one that is not known here.

    Most transformers of core make their positions with a module named EmbedND (interleaved pairs, the widths of its
    axes as an attribute); Cosmos-Predict2 and Anima have split halves.
    """
    for module in network.modules():
        if type(module).__name__ == "EmbedND" and len(module.axes_dim) >= 3:
            axes = tuple(int(channels) for channels in module.axes_dim)
            return RotaryLayout(axes, (float(module.theta),) * len(axes), interleaved=True)
        if type(module).__name__ == "VideoRopePosition3DEmb":
            height = 2 * len(module.dim_spatial_range)
            time = 2 * len(module.dim_temporal_range)
            thetas = tuple(10000.0 * factor for factor in (module.t_ntk_factor, module.h_ntk_factor, module.w_ntk_factor))
            return RotaryLayout((time, height, height), thetas, interleaved=False)
    return None


def has_no_rotation(network: Any) -> bool:
    """Whether positions never turn queries and keys, so that their channels can be compared as they are."""
    return any(base.__name__ in WITHOUT for base in type(network).__mro__)
