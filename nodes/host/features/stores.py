"""Where captured features live: memory, or one memory-mapped safetensors file."""

from __future__ import annotations

import json
import os
import struct
import weakref
from math import prod
from pathlib import Path

import comfy.model_management
import folder_paths
import safetensors
import torch

from ...sockets import FeatureKey

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Shapes = dict[FeatureKey, tuple[int, ...]]  # one step: (B, ...)


def readable_size(count: int) -> str:
    """1180000000 -> "1.18 GB": three significant digits, decimal units."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


class MemoryStore:
    """Features in RAM (pinned where CUDA is, so that a step's upload does not wait) or on the model's device."""

    def __init__(self, shapes: Shapes, steps: int, dtype: torch.dtype, device: torch.device):
        pinned = device.type == "cpu" and comfy.model_management.is_nvidia()
        self._tensors = {
            key: torch.empty((steps, *shape), dtype=dtype, device=device, pin_memory=pinned)
            for key, shape in shapes.items()
        }
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def write(self, key: FeatureKey, step: int, tensor: torch.Tensor) -> None:
        self._tensors[key][step - 1].copy_(tensor)

    def read(self, key: FeatureKey, step: int, device: torch.device) -> torch.Tensor:
        return self._tensors[key][step - 1].to(device, non_blocking=True)


class FileStore:
    """Features in a safetensors file, of which a read touches one tensor of one step."""

    def __init__(self, path: Path, temporary: bool = False):
        self.path = path
        self._file = open_safetensors(path)
        self.metadata = self._file.metadata() or {}
        self.nbytes = path.stat().st_size
        if temporary:
            weakref.finalize(self, path.unlink, missing_ok=True)

    def read(self, key: FeatureKey, step: int, device: torch.device) -> torch.Tensor:
        return self._file.get_slice(str(key))[step - 1].to(device, non_blocking=True)

    def tensor(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def tensor_names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> list[int]:
        return self._file.get_slice(name).get_shape()

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._file.get_slice(name).get_dtype()]


def open_safetensors(path: Path):
    """Opens a file for reading; ValueError when it is truncated or no safetensors file."""
    try:
        return safetensors.safe_open(str(path), framework="pt", device="cpu")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f'"{path.name}" is not a complete safetensors file ({error}). Save the features again.') from error


class FileWriter:
    """Writes a safetensors file step by step, never holding more than one tensor.

    Tensors have shape (steps, B, ...); the file appears under its name only when `finish` is called,
    and leaves nothing behind otherwise. The layout is that of the safetensors format: a little-endian
    header length, a JSON header, the data.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], metadata: dict):
        self.path = path
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        header: dict = {"__metadata__": metadata}
        offset = 0
        for name, shape in shapes.items():
            end = offset + prod(shape) * dtypes[name].itemsize
            header[name] = {"dtype": NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = 8 + len(encoded)
        self._header, self._dtypes = header, dtypes
        self._handle = open(self._partial, "wb")
        self._handle.write(struct.pack("<Q", len(encoded)) + encoded)
        self._handle.truncate(self._start + offset)

    def write(self, key: FeatureKey | str, step: int, tensor: torch.Tensor) -> None:
        """Fills row `step` - 1 of a tensor; step 0 fills the whole of it."""
        name = str(key)
        begin, end = self._header[name]["data_offsets"]
        data = tensor.detach().to("cpu", self._dtypes[name]).contiguous()
        offset = begin + max(step - 1, 0) * data.nbytes
        if data.nbytes != (end - begin) // (self._header[name]["shape"][0] if step else 1):
            raise ValueError(f"{name}: expected {self._header[name]['shape']}, got {tuple(data.shape)} for step {step}.")
        self._handle.seek(self._start + offset)
        self._handle.write(data.view(torch.uint8).numpy().data if data.numel() else b"")

    def finish(self) -> Path:
        self._handle.close()
        os.replace(self._partial, self.path)
        return self.path

    def discard(self) -> None:
        self._handle.close()
        self._partial.unlink(missing_ok=True)


def temporary_path() -> Path:
    """A new file name for features of the `disk` mode, in ComfyUI's temp folder."""
    folder = Path(folder_paths.get_temp_directory()) / "pastiche"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"features_{os.urandom(8).hex()}.safetensors"
