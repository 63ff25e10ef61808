"""A stand-in for comfy_aimdo, ComfyUI's dynamic video memory, on the simulated device.

On an NVIDIA card ComfyUI 0.30 loads checkpoints as ModelPatcherDynamic: weights stay in main memory, every layer
fetches its own into a slot of reserved video memory (`fault`) and lets go of it after use (`unpin`). Here a slot
is a device tensor. `budget` is how many bytes may be resident: further slots evict the longest unused unpinned
one, whose bytes become NaN at once, as if another model had taken the pages. With budget 0 nothing stays
resident, so that all weights pass through the shared cast buffers.
"""

from __future__ import annotations

import ctypes

import safetensors
import torch

budget = 1 << 40
resident: dict[int, "Slot"] = {}  # in order of use
evictions = 0


class Slot:
    """One allocation of a ModelVBAR: (vbar, slot, size) is what ComfyUI carries around."""

    def __init__(self, size: int):
        self.size, self.pins, self.generation = size, 0, 0
        with torch.inference_mode(False):
            self.memory = torch.empty(size, dtype=torch.uint8, device="cuda")

    def evict(self) -> None:
        global evictions
        evictions += 1
        self.generation += 1
        with torch.inference_mode(False), torch.no_grad():
            self.memory.fill_(0xFF)
        resident.pop(id(self), None)


class ModelVBAR:
    def __init__(self, size, device):
        self.max_size, self.device, self.slots = size, device, []

    def prioritize(self, *_) -> None:
        pass

    deprioritize = set_watermark = set_watermark_limit = prioritize

    def alloc(self, size):
        slot = Slot(int(size))
        self.slots.append(slot)
        return (self, slot, int(size))

    def loaded_size(self) -> int:
        return sum(slot.size for slot in self.slots if id(slot) in resident)

    def free_memory(self, size) -> int:
        freed = 0
        for slot in self.slots:
            if freed < size and id(slot) in resident and not slot.pins:
                slot.evict()
                freed += slot.size
        return freed


def vbar_fault(allocation):
    _, slot, size = allocation
    if id(slot) in resident:
        resident[id(slot)] = resident.pop(id(slot))
    else:
        for other in list(resident.values()):
            if sum(one.size for one in resident.values()) + size <= budget:
                break
            if not other.pins:
                other.evict()
        if sum(one.size for one in resident.values()) + size > budget:
            return None
        slot.generation += 1
        resident[id(slot)] = slot
    slot.pins += 1
    return (ctypes.c_uint32 * 1)(slot.generation)


def vbar_unpin(allocation) -> None:
    if allocation is not None:
        allocation[1].pins = max(0, allocation[1].pins - 1)


def vbar_signature_compare(a, b) -> bool:
    return a is not None and b is not None and list(a) == list(b)


class VRAMBuffer:
    """A growing device buffer that casts of one stream share."""

    def __init__(self, max_size, device):
        self._grow(0)

    def _grow(self, size):
        with torch.inference_mode(False):
            self.memory = torch.empty(size, dtype=torch.uint8, device="cuda")

    def size(self) -> int:
        return self.memory.numel()

    def get(self, size, offset=0):
        if offset + size > self.memory.numel():
            self._grow(int(offset + size))
        return (self, self.memory[int(offset) : int(offset + size)], int(size))


class HostBuffer:
    def __init__(self, *_):
        self.size, self.memory = 0, torch.empty(0, dtype=torch.uint8)

    def extend(self, size, register=False, **_):
        self.size += int(size)

    def truncate(self, offset, do_unregister=True, **_):
        self.size = int(offset)

    def get_raw_address(self) -> int:
        return self.memory.data_ptr()


def aimdo_to_tensor(allocation, device):
    """A new tensor over the bytes, as from a raw pointer: no version counter or autograd state is shared."""
    place = allocation[1]
    memory = place.memory if isinstance(place, Slot) else place
    bare = torch.empty(0, dtype=torch.uint8, device=device)
    return bare.set_(memory.untyped_storage(), memory.storage_offset(), (allocation[2],), (1,))


def hostbuf_to_tensor(hostbuf):
    return torch.empty(hostbuf.size, dtype=torch.uint8)


def _load_safetensors(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def install(patch, resident_bytes: int = 1 << 40) -> None:
    """Makes core's loaders build dynamic models until `patch` (a pytest.MonkeyPatch) is undone."""
    import comfy.memory_management
    import comfy.model_patcher
    import comfy.utils
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    import comfy_aimdo.vram_buffer

    resident.clear()
    replaced = {
        comfy_aimdo.model_vbar: {
            "ModelVBAR": ModelVBAR, "vbar_fault": vbar_fault, "vbar_unpin": vbar_unpin,
            "vbar_signature_compare": vbar_signature_compare,
            "vbars_analyze": lambda *_: sum(slot.size for slot in resident.values()),
            "vbars_reset_watermark_limits": lambda *_: None,
        },
        comfy_aimdo.vram_buffer: {"VRAMBuffer": VRAMBuffer},
        comfy_aimdo.host_buffer: {"HostBuffer": HostBuffer},
        comfy_aimdo.torch: {"aimdo_to_tensor": aimdo_to_tensor, "hostbuf_to_tensor": hostbuf_to_tensor},
        comfy.utils: {"load_safetensors": _load_safetensors},
        comfy.model_patcher: {"CoreModelPatcher": comfy.model_patcher.ModelPatcherDynamic},
        comfy.memory_management: {"aimdo_enabled": True},
    }
    for module, names in replaced.items():
        for name, value in names.items():
            patch.setattr(module, name, value)
    patch.setitem(globals(), "budget", resident_bytes)
