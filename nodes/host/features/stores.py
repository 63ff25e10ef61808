"""Where captured features live: memory, or one safetensors file."""

from __future__ import annotations

import json
import math
import os
import struct
import threading
import weakref
from math import prod
from pathlib import Path
from typing import BinaryIO

import comfy.model_management
import folder_paths
import safetensors
import torch

from ...sockets import FeatureKey
from ..checks import is_finite
from ..files import PartialFile, refuse_web_page

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
    """Features in RAM (pinned by ComfyUI where it pins, so that a step's upload does not wait) or on the model's device.

    All tensors lie in one buffer of exactly their size: pinning takes whole pages, and PyTorch's own allocator powers of two.
    On a device nobody waits for what is written: whether it was finite is asked once, before the first read.
    """

    def __init__(self, shapes: Shapes, steps: int, dtype: torch.dtype, device: torch.device, pinned: bool = True):
        sizes = {key: steps * prod(shape) * dtype.itemsize for key, shape in shapes.items()}
        self.nbytes = sum(sizes.values())
        buffer = torch.empty(sum(map(_aligned, sizes.values())), dtype=torch.uint8, device=device)
        self._buffer, self._steps, self._shapes, self._dtype = buffer, steps, shapes, dtype
        self._sealed = False
        self._tensors, offset = {}, 0
        for key, shape in shapes.items():
            self._tensors[key] = buffer[offset : offset + sizes[key]].view(dtype).view(steps, *shape)
            offset += _aligned(sizes[key])
        self._smaller: dict[tuple[FeatureKey, int], torch.Size] = {}
        waits = device.type != "cpu"
        self._reach = {key: torch.zeros((), dtype=dtype, device=device) for key in shapes} if waits else {}
        self._asked = True
        if pinned and device.type == "cpu" and comfy.model_management.pin_memory(buffer):
            weakref.finalize(self, comfy.model_management.unpin_memory, buffer).atexit = False

    def write(self, key: FeatureKey, step: int, tensor: torch.Tensor) -> None:
        """A tensor may have fewer elements than its place, as some steps of Deep Shrink do; it is read in its own shape."""
        if self._sealed:
            raise ValueError(f"features: {key} of step {step} is kept for later and cannot be written. Capture the features again.")
        place = self._tensors[key][step - 1]
        if tensor.numel() < place.numel():
            self._smaller[key, step] = tensor.shape
            place = place.view(-1)[: tensor.numel()].view(tensor.shape)
        place.copy_(tensor)
        if key not in self._reach:
            _require_finite(place, key)
        elif place.numel():
            low, high = torch.aminmax(place)
            torch.maximum(self._reach[key], torch.maximum(-low, high), out=self._reach[key])  # NaN wins
            self._asked = False

    def settle(self) -> None:
        """Raises ValueError where what was written is not finite: for what lies on a device, whose writes do not tell."""
        if self._asked:
            return
        for key, reach in zip(self._reach, torch.stack(list(self._reach.values())).tolist()):
            if not math.isfinite(reach):
                raise _not_finite(key, self._dtype)
        self._asked = True

    def read(self, key: FeatureKey, step: int, device: torch.device) -> torch.Tensor:
        self.settle()
        place, shape = self._tensors[key][step - 1], self._smaller.get((key, step))
        found = _upload(place if shape is None else place.view(-1)[: shape.numel()].view(shape), device)
        return found.clone() if self._sealed and found.device == place.device else found

    def seal(self) -> None:
        """From now on nobody changes what is in here: it cannot be written, and what is read is the reader's own."""
        self._sealed = True

    @property
    def device(self) -> torch.device:
        return self._buffer.device

    def copied_to(self, device: torch.device, pinned: bool = True) -> MemoryStore:
        """The same features on another device."""
        self.settle()
        copy = MemoryStore(self._shapes, self._steps, self._dtype, device, pinned)
        copy._buffer.copy_(self._buffer)
        copy._smaller = dict(self._smaller)
        return copy


class FileStore:
    """Features in a safetensors file, of which a read touches one tensor of one step.

    Read through a handle, not mapped into memory: a mapped file that is cut short ends the process.
    """

    def __init__(self, path: Path, temporary: bool = False):
        self.path = path
        with open_safetensors(path) as file:
            self.metadata = file.metadata() or {}
        self._handle = open(path, "rb")
        header = int.from_bytes(self._handle.read(8), "little")
        entries = json.loads(self._handle.read(header))
        self._places = {
            name: (8 + header + entry["data_offsets"][0], entry["dtype"], entry["shape"])
            for name, entry in entries.items()
            if name != "__metadata__"
        }
        self._written = self._state()
        self.nbytes = path.stat().st_size
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._handle, path if temporary else None)

    def read(self, key: FeatureKey, step: int, device: torch.device) -> torch.Tensor:
        start, _, shape = self._places[str(key)]
        size = prod(shape[1:]) * self.dtype(str(key)).itemsize
        found = self._load(start + (step - 1) * size, size).view(self.dtype(str(key))).view(shape[1:])
        if not is_finite(found):
            raise ValueError(f'"{self.path.name}": {key} holds NaN or infinite values at step {step}. Save the features again.')
        return _upload(found, device)

    def tensor(self, name: str) -> torch.Tensor:
        start, _, shape = self._places[name]
        return self._load(start, prod(shape) * self.dtype(name).itemsize).view(self.dtype(name)).view(shape)

    def tensor_names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> list[int]:
        return list(self._places[name][2])

    def dtype(self, name: str) -> torch.dtype:
        """Raises ValueError for a type that features are never saved in."""
        kind = self._places[name][1]
        if kind not in DTYPES:
            raise ValueError(f'"{self.path.name}": {name} is {kind}; features are {", ".join(DTYPES)}. Save the features again.')
        return DTYPES[kind]

    def _load(self, start: int, size: int) -> torch.Tensor:
        data = torch.empty(size, dtype=torch.uint8)
        with self._lock:
            self._handle.seek(start)
            found = self._handle.readinto(data.numpy().data) if size else 0
            if found != size or self._state() != self._written:
                raise ValueError(f'"{self.path.name}" has changed on the disk since it was loaded. Load the features again.')
        return data

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._handle.fileno())
        return found.st_size, found.st_mtime_ns


def _require_finite(stored: torch.Tensor, name: FeatureKey | str) -> None:
    if not is_finite(stored):
        raise _not_finite(name, stored.dtype)


def _not_finite(name: FeatureKey | str, dtype: torch.dtype) -> ValueError:
    kind = str(dtype).removeprefix("torch.")
    return ValueError(
        f"features: {name} is NaN or beyond what {kind} holds. Set precision to full; if it stays so, the model itself computes "
        "NaN: start ComfyUI with --force-fp32."
    )


def _aligned(size: int) -> int:
    """The next multiple of 64 bytes, as PyTorch aligns memory."""
    return -(-size // 64) * 64


def _upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without waiting towards a device; towards the CPU the bytes must be there when this returns."""
    return tensor.to(device, non_blocking=device.type != "cpu" and comfy.model_management.device_supports_non_blocking(device))


def _close(handle: BinaryIO, path: Path | None) -> None:
    handle.close()
    if path is not None:
        path.unlink(missing_ok=True)


def open_safetensors(path: Path):
    """Opens a file for reading; ValueError when it is truncated or no safetensors file."""
    refuse_web_page(path)
    try:
        return safetensors.safe_open(str(path), framework="pt", device="cpu")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f'"{path.name}" is not a complete safetensors file ({error}). Save the features again.') from error


class FileWriter:
    """Writes a safetensors file step by step, never holding more than one tensor.

    Tensors have shape (steps, B, ...); the file appears under its name only when `finish` is called,
    and leaves nothing behind otherwise. The layout is that of the safetensors format: a little-endian
    header length, a JSON header, the data. durable: see PartialFile.commit.
    """

    def __init__(
        self, path: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], metadata: dict, durable: bool = True
    ):
        self.path, self._durable = path, durable
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
        self._partial = PartialFile(path)
        self._handle = self._partial.handle
        try:
            self._handle.write(struct.pack("<Q", len(encoded)) + encoded)
            self._handle.truncate(self._start + offset)
        except BaseException:
            self.discard()
            raise

    def write(self, key: FeatureKey | str, step: int, tensor: torch.Tensor) -> None:
        """Fills row `step` - 1 of a tensor; step 0 fills the whole of it."""
        name = str(key)
        begin, end = self._header[name]["data_offsets"]
        data = tensor.detach().to("cpu", self._dtypes[name]).contiguous()
        _require_finite(data, name)
        offset = begin + max(step - 1, 0) * data.nbytes
        if data.nbytes != (end - begin) // (self._header[name]["shape"][0] if step else 1):
            raise ValueError(f"{name}: expected {self._header[name]['shape']}, got {tuple(data.shape)} for step {step}.")
        self._handle.seek(self._start + offset)
        self._handle.write(data.view(torch.uint8).numpy().data if data.numel() else b"")

    def finish(self) -> Path:
        return self._partial.commit(self._durable)

    def discard(self) -> None:
        self._partial.discard()


def temporary_path() -> Path:
    """A new file name for features of the `disk` mode, in ComfyUI's temp folder."""
    folder = Path(folder_paths.get_temp_directory()) / "pastiche"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"features_{os.urandom(8).hex()}.safetensors"
