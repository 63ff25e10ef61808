"""What all unconditional pixel networks have in common as ComfyUI's diffusion_model."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
from torch import Tensor, nn


class PixelUNet(nn.Module):
    """Fires DIFFUSION_MODEL wrappers around `_forward`; a subclass fires the patches of the U-Net's blocks there."""

    levels: int  # grids, each half of the one before
    blocks: tuple[int, int]  # of the encoder and the decoder, as they are counted for patches
    h_channels: int
    trained_size = "to the size that the model was trained on"

    def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **kwargs):
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            comfy.patcher_extension.get_all_wrappers(
                comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
            ),
        ).execute(x, timesteps, context, y, control, transformer_options, **kwargs)

    def _check(self, x: Tensor, control: Any) -> None:
        multiple = 2 ** (self.levels - 1)
        height, width = x.shape[-2:]
        if height % multiple or width % multiple:
            raise ValueError(
                f"This model needs a width and height that are multiples of {multiple}, got {width}x{height}. "
                f"Scale the image first, best {self.trained_size}."
            )
        if control is not None:
            raise ValueError("ControlNet does not fit an unconditional pixel model: remove it from the conditioning.")
