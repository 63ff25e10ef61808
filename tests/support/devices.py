"""Which device the tests run on, and ComfyUI's ways of sharing its memory.

PASTICHE_TEST_DEVICE is cpu (default), simulated (support.simulated_cuda) or cuda (a real GPU).

    @pytest.mark.device                           on a device this test runs once in every mode of MODES
    @pytest.mark.device("default", "partial")     in these modes only

On the CPU there is one way to hold a model, and a marked test runs once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

TEST_DEVICE = os.environ.get("PASTICHE_TEST_DEVICE", "cpu")
ON_CPU, SIMULATED = TEST_DEVICE == "cpu", TEST_DEVICE == "simulated"
MODES = {
    "default": "models are loaded whole",
    "partial": "half of each model's weights stay in main memory (too little free VRAM)",
    "novram": "--novram: nothing stays on the device",
    "dynamic": "dynamic VRAM: each layer fetches its weights, all of them stay",
    "dynamic-small": "dynamic VRAM with room for almost nothing: all weights pass through shared buffers",
}
SMALL = 64 << 10  # bytes that stay resident in "dynamic-small"


def available_modes() -> list[str]:
    """Modes that this run can show."""
    if ON_CPU:
        return ["default"]
    return list(MODES) if SIMULATED else ["default", "partial", "novram"]


@contextlib.contextmanager
def memory_mode(name: str) -> Iterator[None]:
    """Runs a block with every model loaded in this mode; forgets the models that were loaded before and in it."""
    import comfy.model_management as management
    import pytest

    if name not in MODES:
        raise ValueError(f"memory mode {name!r} is none of {', '.join(MODES)}")
    if ON_CPU or name == "default":
        yield
        return
    management.unload_all_models()
    with pytest.MonkeyPatch.context() as patch:
        if name == "partial":
            _load_half(patch)
        elif name == "novram":
            patch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
        else:
            from .simulated_cuda import dynamic_vram

            dynamic_vram.install(patch, 1 << 40 if name == "dynamic" else SMALL)
        yield
        management.unload_all_models()


def _load_half(patch) -> None:
    import comfy.model_management as management

    def partially(self, lowvram_model_memory=0, force_patch_weights=False, load=management.LoadedModel.model_load):
        room = self.model_memory() / 2 - self.model_loaded_memory()
        return load(self, lowvram_model_memory if self.device.type == "cpu" else max(room, 0.1), force_patch_weights)

    patch.setattr(management.LoadedModel, "model_load", partially)
