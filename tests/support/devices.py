"""Which device the tests run on, and ComfyUI's ways of sharing its memory.

PASTICHE_TEST_DEVICE is cpu (default), simulated (support.simulated_cuda) or cuda (a real GPU).

    @pytest.mark.device                           on a device this test runs once in every mode of MODES
    @pytest.mark.device("default", "partial")     in these modes only

On the CPU there is one way to hold a model, and a marked test runs once.

On a device, what a test does itself may mix devices (`own_tensors`): its expected values are on the CPU wherever
the pack's results are. Inside ComfyUI and the pack nothing may.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

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


_entered: list[tuple] = []  # (name, its MonkeyPatch) of the modes that this point of the program is in, innermost last


@contextlib.contextmanager
def memory_mode(name: str) -> Iterator[None]:
    """Runs a block with every model loaded in this mode, whatever mode it stands in; forgets the models that were
    loaded before and in it."""
    import comfy.model_management as management
    import pytest

    if name not in MODES:
        raise ValueError(f"memory mode {name!r} is none of {', '.join(MODES)}")
    if ON_CPU or (name == "default" and not _entered):
        yield
        return
    management.unload_all_models()
    with _left(_entered[-1:]), pytest.MonkeyPatch.context() as patch:
        _enter(name, patch)
        _entered.append((name, patch))
        try:
            yield
        finally:
            management.unload_all_models()
            _entered.pop()


@contextlib.contextmanager
def _left(modes: list[tuple]) -> Iterator[None]:
    """Runs a block outside of modes that have been entered."""
    for _, patch in modes:
        patch.undo()
    yield
    for name, patch in modes:
        _enter(name, patch)


def _enter(name: str, patch) -> None:
    import comfy.model_management as management

    if name == "partial":
        _load_half(patch)
    elif name == "novram":
        patch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    elif name != "default":
        from .simulated_cuda import dynamic_vram

        dynamic_vram.install(patch, 1 << 40 if name == "dynamic" else SMALL)


def _load_half(patch) -> None:
    import comfy.model_management as management

    def partially(self, lowvram_model_memory=0, force_patch_weights=False, load=management.LoadedModel.model_load):
        room = self.model_memory() / 2 - self.model_loaded_memory()
        return load(self, lowvram_model_memory if self.device.type == "cpu" else max(room, 0.1), force_patch_weights)

    patch.setattr(management.LoadedModel, "model_load", partially)


TESTS = str(Path(__file__).resolve().parents[1])


BETWEEN = (f"{os.sep}torch{os.sep}", f"{os.sep}nodes{os.sep}algorithms{os.sep}")


@functools.cache
def _kind(file: str) -> str:
    """Of a source file: "between" a caller and what it asks for, "test", or "other"."""
    if any(part in file for part in BETWEEN):
        return "between"
    return "test" if file.startswith(TESTS) else "other"


def _called_by_test(depth: int) -> bool:
    """Whether the nearest caller outside of PyTorch and of the equations is a file of tests/."""
    frame = sys._getframe(depth)
    while frame is not None and (kind := _kind(frame.f_code.co_filename)) == "between":
        frame = frame.f_back
    return frame is not None and kind == "test"


def _devices(values, found: dict) -> None:
    """Adds the devices of all tensors in `values`, by their kind."""
    import torch

    for value in values:
        if isinstance(value, torch.Tensor):
            device = value.device
            if device.type != "meta":
                found[device.type] = device
        elif isinstance(value, (list, tuple)):
            _devices(value, found)
        elif isinstance(value, dict):
            _devices(value.values(), found)


@contextlib.contextmanager
def own_tensors() -> Iterator[None]:
    """Within it, operators, equations and modules that tests call themselves take CPU tensors beside the device's.

    The simulated device asks for each such operator; on a real one they are moved before it.
    """
    import comfy.model_base
    import pytest
    import torch

    def takes_cpu_tensors(call):
        @functools.wraps(call)
        def wrapped(self, *args, **kwargs):
            if _called_by_test(2):
                device = next((parameter.device for parameter in self.parameters() if parameter.is_cuda), None)
                args, kwargs = _moved((args, kwargs), device) if device is not None else (args, kwargs)
            return call(self, *args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch, _mixing():
        patch.setattr(torch.nn.Module, "__call__", takes_cpu_tensors(torch.nn.Module.__call__))
        for name in ("apply_model", "process_latent_in", "process_latent_out"):
            patch.setattr(comfy.model_base.BaseModel, name, takes_cpu_tensors(getattr(comfy.model_base.BaseModel, name)))
        patch.setattr(torch.testing, "assert_close", functools.partial(torch.testing.assert_close, check_device=False))
        yield


def _moved(values, device):
    """`values` with their CPU tensors on `device`."""
    import torch
    from torch.utils._pytree import tree_map_only

    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device) if tensor.device.type == "cpu" else tensor, values)


def _mixing() -> contextlib.AbstractContextManager:
    if SIMULATED:
        from .simulated_cuda import device

        return device.mixing(lambda: _called_by_test(2))
    from torch.overrides import TorchFunctionMode

    class Mixed(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            found: dict = {}
            _devices((args, kwargs), found)
            if len(found) > 1 and getattr(function, "__name__", "") != "copy_" and _called_by_test(2):
                args, kwargs = _moved((args, kwargs), next(device for kind, device in found.items() if kind != "cpu"))
            return function(*args, **kwargs)

    return Mixed()
