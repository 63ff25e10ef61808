"""Networks of plain PyTorch layers under ComfyUI's model management."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher


class WholeModelPatcher(ModelPatcher):
    """A model that is loaded whole or not at all, also with --novram or little free VRAM.

    Core leaves weights in main memory where VRAM is short and fetches them layer by layer, which only its own layers
    (comfy.ops) can do; a plain one then computes with weights of the CPU.
    """

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        return super().partially_load(device_to, 1e32, force_patch_weights)

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False) -> int:
        """Frees nothing, after which core unloads the whole model."""
        return 0
