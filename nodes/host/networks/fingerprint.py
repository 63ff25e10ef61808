"""Tells models apart: a digest of what a MODEL computes with."""

from __future__ import annotations

import hashlib
import os
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

from ...sockets import Fingerprint

SAMPLES = 8  # values read of each tensor: enough to tell any two trained models apart, cheap on any device


class ModelName(NamedTuple):
    """A MODEL in words: `name` is its file's, "" where the loader does not tell; `family` ComfyUI's name of its kind."""

    name: str
    family: str

    def __str__(self) -> str:
        return f"{self.name} ({self.family})" if self.name and self.family else self.name or self.family


def model_name(model: ModelPatcher) -> ModelName:
    """The file that a MODEL was loaded from, as far as core's loaders leave it on the patcher, and its kind, such as SDXL."""
    family = type(getattr(model.model, "model_config", None)).__name__.removesuffix("Config")
    again = getattr(model, "cached_patcher_init", None)  # (loader, its arguments, ...), the path is the first
    paths = [part for part in (again[1] if again else ()) if isinstance(part, (str, os.PathLike))]
    return ModelName(os.path.basename(os.fspath(paths[0])) if paths else "", family if family not in ("", "NoneType") else type(model.model).__name__)


def fingerprint(model: ModelPatcher) -> Fingerprint:
    """Digests of the U-Net's own weights and of the weight patches (LoRAs) on this MODEL."""
    # While another node's is in its place in the loaded model, the checkpoint's own is in the patcher's backup.
    sampling = type(model.object_patches_backup.get("model_sampling", model.model.model_sampling))
    weights = hashlib.sha256(sampling.__mro__[1].__name__.encode())
    weights.update(str([base.__name__ for base in sampling.__bases__]).encode())
    prefix = "diffusion_model."
    for name, parameter in sorted(model.model.diffusion_model.state_dict().items()):
        # While a LoRA is merged into the loaded weights, the originals are in the patcher's backup.
        backup = model.backup.get(prefix + name)
        _digest(weights, name, parameter if backup is None else backup.weight)
    patches = hashlib.sha256()
    for key in sorted(model.patches):
        for strength, patch, strength_model, *_ in model.patches[key]:
            patches.update(f"{key} {strength} {strength_model}".encode())
            for position, tensor in enumerate(tensors_of(patch)):
                _digest(patches, str(position), tensor)
    return Fingerprint(weights.hexdigest()[:16], patches.hexdigest()[:16])


def weights_digest(vae: Any) -> str:
    """Hex digest of a VAE's weights; of its kind alone where it has none."""
    found = hashlib.sha256(type(vae).__name__.encode())
    network = getattr(vae, "first_stage_model", None)
    for name, parameter in sorted(network.state_dict().items()) if isinstance(network, torch.nn.Module) else ():
        _digest(found, name, parameter)
    return found.hexdigest()[:16]


def tensors_of(patch: Any) -> list[torch.Tensor]:
    """Tensors of a weight patch: a weight adapter (LoRA, LoHa, ...), a tuple, or nested ones."""
    if isinstance(patch, torch.Tensor):
        return [patch]
    if isinstance(patch, (tuple, list)):
        return [tensor for part in patch for tensor in tensors_of(part)]
    return tensors_of(getattr(patch, "weights", ()))


def _digest(digest: Any, name: str, tensor: torch.Tensor) -> None:
    flat = tensor.detach().reshape(-1)
    stride = max(1, flat.numel() // SAMPLES)
    values = flat[::stride][:SAMPLES].to("cpu", torch.float64)
    digest.update(f"{name} {tuple(tensor.shape)} ".encode())
    digest.update(values.numpy().tobytes())


def require_same_model(ours: Fingerprint, theirs: Fingerprint, what: str, our_name: str = "", their_name: str = "") -> None:
    """Raises ValueError when `what` (for example "The style features") came from another checkpoint; names: of both models."""
    if ours.weights != theirs.weights:
        raise ValueError(
            f"{what} were made with another model ({_named(their_name)}fingerprint {theirs.weights}, this one is "
            f"{_named(our_name)}{ours.weights}). "
            "Connect the same checkpoint to DDIM Inversion, Capture Features and this node; LoRAs may differ."
        )


def _named(name: str) -> str:
    return f"{name}, " if name else ""
