"""Style Library: one entry of the library as what the nodes behind it take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.graph_utils import ExecutionBlocker

from ..networks.fingerprint import fingerprint, model_name
from ..trajectories.inversion import inverted_noise
from ..trajectories.noise import latent_output, no_output
from .library import load_bank
from .on_the_way import invert_and_capture
from .ready_styles import ready_picture
from .shelf import SavedStyle, find_style
from .stores import open_safetensors
from .style_loras import load_lora
from .style_notes import cover_of


@dataclass(frozen=True)
class LoadedStyle:
    """What Style Library gives out; an output that this kind of style does not have stops the nodes behind it with the reason."""

    features: Any
    trajectory: Any
    noise: Any
    lora: Any
    picture: Any


def model_in_hand(model: ModelPatcher) -> dict[str, str]:
    """For the page, which shows what belongs to this model."""
    named = model_name(model)
    return {"weights": fingerprint(model).weights, "model": named.name, "family": named.family}


def load_style(
    key: str, model: ModelPatcher, memory: str, vae: Any | None, sigmas: torch.Tensor | None, positive: list | None, size: int, streams: str,
    layers: str,
) -> LoadedStyle:
    """One style for `model`. vae, sigmas, positive, size, streams, layers: with which a ready style is inverted.

    Raises ValueError for a style of another model, one that cannot be read, and a ready one without vae or sigmas.
    """
    style = find_style(key)
    if style.problem:
        raise ValueError(f'style: "{style.title}" cannot be used: {style.problem.rstrip(".")}. Choose another style, or delete it in the library.')
    if style.kind == "ready":
        return _ready(style, model, memory, vae, sigmas, positive, size, streams, layers)
    if style.kind == "lora":
        nothing = no_output(f'The style "{style.title}" is a LoRA: connect lora to Load LoRA Model or Style Entry.')
        return LoadedStyle(nothing, nothing, nothing, load_lora(style, model), _cover(style))
    bank = load_bank(style.file, memory, model)
    return _of_bank(style, model, bank, bank.trajectory, None, _cover(style))


def _ready(style: SavedStyle, model: ModelPatcher, memory: str, vae: Any, sigmas: Any, positive: Any, size: int, streams: str, layers: str) -> LoadedStyle:
    missing = [name for name, value in (("vae", vae), ("sigmas", sigmas)) if value is None]
    if missing:
        raise ValueError(
            f'{missing[0]}: the ready style "{style.title}" is a picture that is inverted here; connect {" and ".join(missing)}, '
            "the same as the sampler's, or choose a saved style."
        )
    picture = ready_picture(style.title)
    scale = size / max(picture.shape[1:3])
    height, width = (max(64, round(side * scale / 16) * 16) for side in picture.shape[1:3])
    # BHWC -> BCHW and back
    scaled = comfy.utils.common_upscale(picture.movedim(-1, 1), width, height, "lanczos", "disabled").movedim(1, -1)
    noise, trajectory, bank = invert_and_capture(
        model, {"samples": vae.encode(scaled)}, sigmas, streams, layers, memory, positive=positive, scheme="predicted",
    )
    return _of_bank(style, model, bank, trajectory, noise, picture)


def _of_bank(style: SavedStyle, model: ModelPatcher, bank: Any, trajectory: Any, latent: dict | None, picture: Any) -> LoadedStyle:
    noise = inverted_noise(model, trajectory)
    lora = no_output(f'The style "{style.title}" is no LoRA: connect features to Style Injection, noise to Latent AdaIN.')
    return LoadedStyle(bank, trajectory, latent_output(noise, latent or {"samples": noise.as_latent()}), lora, picture)


def _cover(style: SavedStyle) -> torch.Tensor | ExecutionBlocker:
    with open_safetensors(style.path) as file:
        found = cover_of(file.metadata() or {})
    return no_output(f'The style "{style.title}" was saved without a picture.') if found is None else found
