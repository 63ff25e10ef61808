"""Loads unconditional models by name: diffusers folders, and single files of the ADM and DDPM layouts."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import comfy.model_sampling
import torch

from .unconditional import assemble, choose_dtype, discrete_sampling, load_unconditional
from .unconditional_checkpoint import EXTENSIONS, Reading, Weights, read_weights
from .unconditional_flat import FlatUNet
from .unconditional_folders import lies_inside, list_files, list_folders, roots
from .unconditional_layouts import Layout, check_shapes, recognise, translate
from .unconditional_unet import with_core_operations

SCALE = 1000  # of the timesteps that networks are told, whatever their schedule's length


def list_models() -> list[str]:
    """Names of diffusers folders, then of weight files that lie in models/diffusers or one folder below it."""
    return [*list_folders(), *list_files()]


def find_file(name: str) -> Path | None:
    """The weight file called `name` inside ComfyUI's `diffusers` folders."""
    for root in roots():
        path = root / name
        try:
            if path.suffix.lower() in EXTENSIONS and lies_inside(path, root) and path.is_file():
                return path
        except (OSError, ValueError):  # a name that no file can have
            continue
    return None


def load_model(name: str, weight_dtype: str = "default", clip_denoised: bool = False, reading: Reading = Reading()) -> tuple:
    """(MODEL, VAE, CONDITIONING) of a folder or a file of models/diffusers. Raises ValueError for anything else.

    reading: what a file's tensors do not tell; a folder tells everything. See `load_unconditional` for the others.
    """
    path = find_file(name)
    if path is None:
        if reading != Reading():
            raise ValueError(
                "heads, attention_order, betas, timesteps: a diffusers folder's config.json tells them; leave them at auto and 0."
            )
        return load_unconditional(name, weight_dtype, clip_denoised)
    weights = read_weights(path)
    reading = reading.noted(weights.notes, path.name)
    dtype = choose_dtype(weight_dtype)
    network = build_network(weights, reading, path.name).to(dtype)
    network.dtype = dtype
    layout = network.layout
    logging.info("Pastiche: loaded %s, %s layout%s, %.1f M parameters, %s.", path.name, layout.family,
                 ", moving average" if weights.averaged else "", sum(p.numel() for p in network.parameters()) / 1e6,
                 describe(layout, reading))
    alphas = alphas_bar(*reading.schedule(layout))
    sampling = discrete_sampling(alphas, comfy.model_sampling.EPS, 1.0 if clip_denoised else None)

    def wrap(operations: Any) -> FlatUNet:
        return with_core_operations(network, operations)

    return assemble(wrap, dtype, sampling, layout.channels, (_load_patcher, (name, weight_dtype, clip_denoised, reading)))


def _load_patcher(*arguments: Any, disable_dynamic: bool = False) -> Any:
    return load_model(*arguments)[0]


def build_network(weights: Weights, reading: Reading, name: str) -> FlatUNet:
    """The network with the file's weights, in their own precision. Raises ValueError where anything does not fit."""
    layout = recognise(weights.state, name, reading.heads, reading.attention_order)
    state = translate(weights.state, layout, name)
    with torch.device("meta"):
        network = FlatUNet(layout, SCALE / reading.schedule(layout)[1])
    check_shapes(state, network.state_dict(), layout, name)
    network.load_state_dict({key: tensor.contiguous() for key, tensor in state.items()}, assign=True)
    return network.eval().requires_grad_(False)


def describe(layout: Layout, reading: Reading) -> str:
    """What was taken for granted, for the log."""
    widest = [layer.width_in for _, layer in layout.layers() if layer.kind == "attention"]
    heads = f"{layout.heads(max(widest))} heads at {max(widest)} channels" if widest else "no attention"
    learned = "6 output channels, the first 3 are the noise" if layout.out_channels == 6 else "3 output channels"
    betas, timesteps = reading.schedule(layout)
    return f"{heads}, {betas} betas over {timesteps} timesteps, {learned}"


def alphas_bar(betas: str, timesteps: int) -> torch.Tensor:
    """(T,) float64. linear: betas from 0.1/T to 20/T (Ho et al. 2020 at T = 1000); cosine: Nichol and Dhariwal 2021, eq. 17."""
    if betas == "cosine":
        signal = torch.cos((torch.arange(timesteps + 1, dtype=torch.float64) / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
        steps = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    else:
        steps = torch.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=torch.float64)
    if float(steps.max()) >= 1:
        raise ValueError(
            f"timesteps: {timesteps} are too few for linear betas, whose last would be {20 / timesteps:.2f}; use 21 or more."
        )
    return torch.cumprod(1 - steps, 0)
