"""Style LoRAs in the style library: core's Load LoRA reads the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import safetensors.torch
import torch
from comfy.model_patcher import ModelPatcher

from ..files import atomic_write
from ..networks.fingerprint import fingerprint, model_name
from .library import free_path
from .shelf import LORA_FORMAT, LORA_PART, LORAS, VERSION, SavedStyle, require_room
from .stores import open_safetensors
from .style_notes import style_notes, thumbnail


def save_lora(lora: dict[str, torch.Tensor], model: ModelPatcher, filename_prefix: str, picture: torch.Tensor | None, notes: str) -> tuple[str, Path]:
    """Writes a LORA_MODEL that was trained on `model` into output/loras/pastiche; returns its key in the library, and the file.

    Raises ValueError for what is no LoRA, a name outside of that folder, no room, and where the file cannot be written.
    """
    tensors = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in lora.items() if isinstance(tensor, torch.Tensor)}
    strange = sorted(name for name in lora if name not in tensors)
    if strange or not tensors:
        raise ValueError(f"lora: expected tensors by name, got {', '.join(strange)[:60] or 'nothing'}. Connect Train Style LoRA.")
    root = Path(folder_paths.get_output_directory()) / LORAS / LORA_PART
    path = free_path(filename_prefix, root, LORAS, Path(folder_paths.get_output_directory()) / LORAS)
    ranks = sorted({min(tensor.shape) for name, tensor in tensors.items() if tensor.ndim == 2 and "alpha" not in name})
    settings: dict[str, Any] = {"rank": ", ".join(map(str, ranks[:4])) or "none", "tensors": len(tensors)}
    weights = fingerprint(model).weights
    about = {"format": LORA_FORMAT, "version": VERSION, "weights": weights}
    about |= style_notes(model, None if picture is None else thumbnail(picture), settings, notes)
    require_room(sum(tensor.nbytes for tensor in tensors.values()))
    try:
        with atomic_write(path) as partial:
            safetensors.torch.save_file(tensors, partial, about)
    except OSError as error:
        raise ValueError(f'filename_prefix: "{path}" cannot be written ({error.strerror or error}). Make room, or the folder writable.') from error
    return f"lora/{path.relative_to(root.parent).as_posix()}", path


def load_lora(style: SavedStyle, model: ModelPatcher) -> dict[str, torch.Tensor]:
    """The LORA_MODEL of a saved style. A LoRA fits other checkpoints of its family; ValueError for another family."""
    ours, theirs = model_name(model), style.family
    if style.weights != fingerprint(model).weights and theirs != ours.family:
        raise ValueError(
            f'style: the LoRA "{style.title}" was trained on {style.model or "a model"} of the family {theirs or "unknown"}; this model is '
            f"{ours.name or 'one'} of {ours.family}. Connect a checkpoint of {theirs or 'that family'}, or choose a style of this model."
        )
    with open_safetensors(style.path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}
