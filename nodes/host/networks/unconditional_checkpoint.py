"""Reads a file of bare U-Net weights without running anything in it: .safetensors, or torch's .pt, .pth and .ckpt.

A pickle goes through torch's weights_only reader, which makes tensors, numbers, strings and containers only.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checks import is_finite, kind_of_tensor
from ..files import refuse_web_page
from ..safe_pickles import only_these
from .unconditional_layouts import HEADS, ORDERS, Layout

PICKLES = (".pt", ".pth", ".ckpt")
EXTENSIONS = (".safetensors", *PICKLES)
BETAS = ("auto", "linear", "cosine")
LONGEST = 100_000  # timesteps
NOTE = "pastiche."  # prefix of our entries in a .safetensors file's metadata
# where trainers keep weights; averaged ones first
_AVERAGED = ("ema", "ema_state_dict", "model_ema", "ema_model", "shadow", "averaged")
_PLACES = (*_AVERAGED, "state_dict", "model_state_dict", "model", "module", "net", "unet", "params")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "diffusion_model.", "unet.", "net.", "ema_model.")


@dataclass(frozen=True)
class Reading:
    """What a file's tensors do not tell. "auto" and 0 take what the file notes, else what the published models of its layout have."""

    heads: str = "auto"
    attention_order: str = "auto"
    betas: str = "auto"
    timesteps: int = 0

    def __post_init__(self) -> None:
        known = self.heads in HEADS and self.attention_order in ORDERS and self.betas in BETAS
        if not known or not 0 <= self.timesteps <= LONGEST:
            raise ValueError(
                f"heads, attention_order, betas, timesteps: got {self.heads}, {self.attention_order}, {self.betas}, "
                f"{self.timesteps}; choose among {', '.join(HEADS)}; {'; '.join(ORDERS)}; {', '.join(BETAS)}; 0 to {LONGEST}."
            )

    def noted(self, notes: dict[str, str], name: str) -> Reading:
        """Its automatic values from a file's metadata. Raises ValueError for notes that mean nothing."""
        found = {}
        for field in fields(self):
            note = notes.get(NOTE + field.name)
            if note is not None and getattr(self, field.name) == field.default:
                found[field.name] = int(note) if field.name == "timesteps" and note.isdecimal() and len(note) < 7 else note
        try:
            return replace(self, **found)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: its notes are not those of tools/convert_unconditional.py ({error}).") from error

    def schedule(self, layout: Layout) -> tuple[str, int]:
        """(betas, number of timesteps)."""
        betas, timesteps = layout.schedule
        return betas if self.betas == "auto" else self.betas, self.timesteps or timesteps

    def notes(self) -> dict[str, str]:
        """What `noted` reads: entries that are not automatic."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) != field.default}
        return {NOTE + name: str(value) for name, value in values.items()}


@dataclass(frozen=True)
class Weights:
    """A state dict under the names that its layout uses."""

    state: dict[str, Tensor]
    notes: dict[str, str]
    averaged: bool  # taken from an entry that holds a moving average of the weights


def read_weights(path: Path) -> Weights:
    """Raises ValueError, in a sentence with the file's name, for files that are broken, dangerous or hold no weights."""
    name = path.name
    refuse_web_page(path)
    if path.suffix.lower() == ".safetensors":
        state, notes, averaged = *_read_safetensors(path), False
    elif path.suffix.lower() in PICKLES:
        state, averaged = _choose(_read_pickle(path), name)
        notes = {}
    else:
        raise ValueError(f"{name}: unconditional weights are read from {', '.join(EXTENSIONS)} files.")
    state = _unwrapped(state)
    for key, tensor in state.items():
        if not tensor.is_floating_point() or kind_of_tensor(tensor):
            raise ValueError(f"{name}: {key[:80]} is {tensor.dtype}, expected plain floating-point weights.")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(f"{name}: {key[:80]} claims {tuple(tensor.shape)}, more than the file holds of it.")
        if not is_finite(tensor):
            raise ValueError(f"{name}: {key[:80]} holds NaN or infinite values; the file is damaged. Download it again.")
    return Weights(state, notes, averaged)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} cannot be read; it may be truncated. Download it again. ({error})") from error


def _read_pickle(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                    raise ValueError(f"{path.name} is a compressed archive, which PyTorch never writes.")
        with only_these():
            return torch.load(path, map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except Exception as error:  # torch raises a different type for each way a file is broken
        if "GLOBAL" in str(error):
            raise ValueError(
                f"{path.name} was refused, and nothing in it was run: it names objects other than tensors, numbers and texts. "
                "Take the file that the model's authors published, or save its state dict alone."
            ) from error
        raise ValueError(f"{path.name} cannot be read; it may be truncated, or a web page. Download it again.") from error


def _choose(content: Any, name: str, depth: int = 0) -> tuple[dict[str, Tensor], bool]:
    """(state dict, whether it is a moving average) among what a trainer saved."""
    if isinstance(content, dict):
        tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if any(key.endswith(".weight") for key in tensors):
            return tensors, False
        for place in _PLACES:
            if depth < 3 and isinstance(content.get(place), (dict, list, tuple)):
                state, averaged = _choose(content[place], name, depth + 1)
                return state, averaged or place in _AVERAGED
    elif isinstance(content, (list, tuple)):  # the original DDPM's port: weights, optimizer, epoch, step, average
        states = [entry for entry in content if isinstance(entry, dict) and any(
            isinstance(key, str) and key.endswith(".weight") and isinstance(value, Tensor) for key, value in entry.items())]
        if states:
            return _choose(states[-1], name, depth + 1)[0], len(states) > 1
    raise ValueError(f"{name} holds no state dict (a dictionary of tensors, at its top or under {', '.join(_PLACES[:8])}, ...).")


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that wrappers put before every name."""
    while state:
        prefix = next((wrapper for wrapper in _WRAPPERS if all(key.startswith(wrapper) for key in state)), None)
        if prefix is None:
            break
        state = {key[len(prefix):]: value for key, value in state.items()}
    return state
