"""Tells models apart: a digest of what a MODEL computes with."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...sockets import Fingerprint

SAMPLES = 8  # values read of each tensor: enough to tell any two trained models apart, cheap on any device


def fingerprint(model: ModelPatcher) -> Fingerprint:
    """Digests of the U-Net's own weights and of the weight patches (LoRAs) on this MODEL."""
    weights = hashlib.sha256(type(model.model.model_sampling).__mro__[1].__name__.encode())
    weights.update(str([base.__name__ for base in type(model.model.model_sampling).__bases__]).encode())
    prefix = "diffusion_model."
    for name, parameter in sorted(model.model.diffusion_model.state_dict().items()):
        # While a LoRA is merged into the loaded weights, the originals are in the patcher's backup.
        backup = model.backup.get(prefix + name)
        _digest(weights, name, parameter if backup is None else backup.weight)
    patches = hashlib.sha256()
    for key in sorted(model.patches):
        for strength, patch, strength_model, *_ in model.patches[key]:
            patches.update(f"{key} {strength} {strength_model}".encode())
            for position, tensor in enumerate(_tensors(patch)):
                _digest(patches, str(position), tensor)
    return Fingerprint(weights.hexdigest()[:16], patches.hexdigest()[:16])


def _tensors(patch: Any) -> list[torch.Tensor]:
    """Tensors of a weight patch: a weight adapter (LoRA, LoHa, ...), a tuple, or nested ones."""
    if isinstance(patch, torch.Tensor):
        return [patch]
    if isinstance(patch, (tuple, list)):
        return [tensor for part in patch for tensor in _tensors(part)]
    return _tensors(getattr(patch, "weights", ()))


def _digest(digest: Any, name: str, tensor: torch.Tensor) -> None:
    flat = tensor.detach().reshape(-1)
    stride = max(1, flat.numel() // SAMPLES)
    values = flat[::stride][:SAMPLES].to("cpu", torch.float64)
    digest.update(f"{name} {tuple(tensor.shape)} ".encode())
    digest.update(values.numpy().tobytes())


def require_same_model(ours: Fingerprint, theirs: Fingerprint, what: str) -> None:
    """Raises ValueError when `what` (for example "The style features") came from another checkpoint."""
    if ours.weights != theirs.weights:
        raise ValueError(
            f"{what} were made with another model (fingerprint {theirs.weights}, this one is {ours.weights}). "
            "Connect the same checkpoint to DDIM Inversion, Capture Features and this node; LoRAs may differ."
        )
