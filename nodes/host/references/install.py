"""Style Reference: from a node's inputs to a patched MODEL."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...algorithms.layers import parse_layers
from ...algorithms.references import SCHEDULES, SHARES
from ...sockets import Trajectory
from ..injections.schedule import Schedule, SigmaRange, sigma_range
from ..networks.fingerprint import fingerprint, require_same_model
from ..networks.marks import mark_injected
from ..networks.rotary import has_no_rotation, rotary_layout
from ..networks.unet import adapt_unet
from .run import KEY, StyleReferences
from .settings import DEFAULT_PRESET, PRESETS, Borrow, Cures, Reference, Source
from .sources import PictureSource, TrajectorySource

NAME = "Style Reference"


def style_reference(
    model: Any,
    style: dict | None,
    style_trajectory: Trajectory | None,
    content: Trajectory | None,
    *,
    share: str,
    gamma: float,
    gamma_end: float,
    schedule: str,
    temperature: float,
    strength: float,
    layers: str,
    start_percent: float,
    end_percent: float,
    mask: Tensor | None = None,
    weights: str = "",
    style_positive: list | None = None,
    noise_seed: int = 0,
    cures: Cures = Cures(),
    row_style: int | None = None,
) -> Any:
    """`model` whose picture tokens also see the keys and values of reference rows that run beside it.

    style: a LATENT of one or several pictures; style_trajectory: their inversion, which then gives the rows.
    row_style: see Reference. Returns an unpatched clone where nothing would change. Raises ValueError for settings that
    do not fit.
    """
    if share not in SHARES:
        raise ValueError(f'share: got "{share}", choose among {", ".join(SHARES)}.')
    if schedule not in SCHEDULES:
        raise ValueError(f'schedule: got "{schedule}", choose among {", ".join(SCHEDULES)}.')
    styles = _styles(model, style, style_trajectory, weights, style_positive)
    network = model.model.diffusion_model
    family = type(model.model.model_config).__name__
    places, numbers = _layers(model, layers)
    if content is not None:
        require_same_model(fingerprint(model), content.fingerprint, "The content's latents")
    patched = model.clone()
    if strength == 0 or start_percent >= end_percent or (mask is not None and not bool(mask.any())):
        return patched
    sampling = model.get_model_object("model_sampling")
    rotary, unrotated = rotary_layout(network), has_no_rotation(network)
    _say_what_has_no_effect(family, cures, rotary is not None, unrotated)
    reference = Reference(
        styles=styles,
        content=None if content is None else TrajectorySource(content, tuple(range(content.batch))),
        share=share, gamma=gamma, gamma_end=gamma_end, schedule=schedule, temperature=temperature, strength=strength,
        mask=mask, places=places, layers=numbers,
        sigmas=sigma_range(sampling, start_percent, end_percent),
        noise_seed=noise_seed, family=family, cures=cures, rotary=rotary, unrotated=unrotated,
        row_style=row_style,
    )
    StyleReferences((*references_of(model), reference)).install(patched)
    mark_injected(patched, NAME)
    return patched


def reference_rows(model: Any, number: int, picture: dict, share: str, temperature: float, layers: str) -> Any:
    """`model` whose rows of the Multi-Style Guider's style `number` see a picture, with Style Reference's defaults."""
    return style_reference(
        model, picture, None, None, share=share, gamma=0.0, gamma_end=0.0, schedule="constant", temperature=temperature, strength=1.0,
        layers=layers, start_percent=0.0, end_percent=1.0, cures=PRESETS[DEFAULT_PRESET], row_style=number,
    )


def borrow_structure(
    model: Any, content: Trajectory, feature_steps: float, attention_steps: float, feature_layers: str, attention_layers: str, mode: str
) -> Any:
    """`model`, a transformer, whose picture tokens take queries and keys, and attention outputs, from the content's own row
    in the first steps. The row runs in `model` itself, LoRAs included.

    Returns an unpatched clone where nothing would change. Raises ValueError for U-Nets and settings that do not fit.
    """
    family = type(model.model.model_config).__name__
    if adapt_unet(model) is not None:
        raise ValueError(f"trajectory: it is for transformers; {family} is a U-Net: connect the features of Capture Features to content.")
    require_same_model(fingerprint(model), content.fingerprint, "The trajectory's latents")
    layers = [frozenset() if text.strip().lower() in ("none", "") else _layers(model, text)[1] for text in (attention_layers, feature_layers)]
    patched = model.clone()
    nowhere = frozenset()
    if (attention_steps <= 0 or layers[0] == nowhere) and (feature_steps <= 0 or layers[1] == nowhere):
        return patched
    borrow = Borrow(Schedule(content.schedule), attention_steps, feature_steps, *layers, mode == "blend")
    reference = Reference(
        styles=(), content=TrajectorySource(content, tuple(range(content.batch))), share="replace", gamma=0.0, gamma_end=0.0,
        schedule="constant", temperature=1.0, strength=1.0, mask=None, places=None, layers=None, sigmas=SigmaRange(), noise_seed=0,
        family=family, borrow=borrow,
    )
    StyleReferences((*references_of(model), reference)).install(patched)
    mark_injected(patched, "Feature Injection")
    return patched


def references_of(model: Any) -> tuple[Reference, ...]:
    """The references that Style Reference nodes have put on a MODEL."""
    wrappers = model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    return wrappers[0].__self__.references if wrappers else ()


def picture_latents(model: Any, latent: dict, name: str) -> Tensor:
    """(N, C, [T,] H, W) of a LATENT in model space. Raises ValueError for latents of another kind of model."""
    samples = latent["samples"]
    if samples.is_nested:
        raise ValueError(f"{name}: packed video and sound latents cannot be a style; encode a picture.")
    wanted = model.get_model_object("latent_format")
    if wanted.latent_dimensions == 3 and samples.ndim == 4:
        samples = samples.unsqueeze(2)  # BCHW -> BCTHW
    if samples.ndim != wanted.latent_dimensions + 2 or samples.shape[1] != wanted.latent_channels:
        raise ValueError(
            f"{name}: its latent is {tuple(latent['samples'].shape)}, this model's have {wanted.latent_channels} channels. "
            "Encode the picture with the VAE of the model that samples."
        )
    if not bool(torch.isfinite(samples).all()):
        raise ValueError(f"{name}: holds NaN or infinite values. Use a VAE in full precision (--fp32-vae).")
    return model.model.process_latent_in(samples).float().cpu()


def _styles(
    model: Any, style: dict | None, trajectory: Trajectory | None, weights: str, positive: list | None
) -> tuple[tuple[Source, float], ...]:
    if trajectory is not None:
        require_same_model(fingerprint(model), trajectory.fingerprint, "The style's latents")
        if style is not None:
            logging.info("Pastiche: style and style_trajectory are both connected; the trajectory gives the reference.")
        sources: list[Source] = [TrajectorySource(trajectory, (row,)) for row in range(trajectory.batch)]
        if positive is not None:
            logging.info("Pastiche: style_positive has no effect on a trajectory, which brings the prompt it was inverted with.")
    elif style is not None:
        if positive is not None and len(positive) != 1:
            raise ValueError(f"style_positive: a reference takes one conditioning, got {len(positive)}.")
        sources = [PictureSource(latent[None], positive) for latent in picture_latents(model, style, "style")]
    else:
        raise ValueError("style: connect the LATENT of a style picture, or the trajectory of its inversion to style_trajectory.")
    return tuple(zip(sources, parse_weights(weights, len(sources))))


def parse_weights(text: str, count: int) -> list[float]:
    """ "1, 2" -> shares that sum to 1; empty text is equal shares. Raises ValueError naming what is wrong."""
    if not text.strip():
        return [1.0 / count] * count
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f'weights: cannot read "{text}"; write one number for each style picture, for example "1, 0.5".') from None
    if len(values) != count:
        raise ValueError(f"weights: {len(values)} for {count} style pictures; write one for each, or leave it empty.")
    if not all(math.isfinite(value) and value >= 0 for value in values) or sum(values) == 0:
        raise ValueError(f'weights: must be finite, not negative, and not all 0; got "{text}".')
    return [value / sum(values) for value in values]


def _layers(model: Any, layers: str) -> tuple[frozenset | None, frozenset[int] | None]:
    """(places of a U-Net, None) or (None, numbers of a transformer's image calls; None is the last two thirds)."""
    unet = adapt_unet(model)
    if unet is not None:
        return frozenset(unet.places(layers)), None
    if layers.strip().lower() == "auto":
        return None, None
    places = parse_layers(layers)
    strange = [f"{block} {number}" for block, number in places if block != "output"]
    if strange or "output" in layers.lower():
        raise ValueError(f'layers: a transformer\'s attention layers have plain numbers, for example "8-23"; got "{layers}".')
    return None, frozenset(number for _, number in places)


def _say_what_has_no_effect(family: str, cures: Cures, rotates: bool, unrotated: bool) -> None:
    if cures.needs_rotation and not rotates:
        reason = "has no rotary positions" if unrotated else "turns its positions in a way that is not known here"
        logging.info("Pastiche: %s %s; untwisting and position shift have no effect on it.", family, reason)
    if cures.token_adain and not rotates and not unrotated:
        logging.info("Pastiche: %s turns its positions in a way that is not known here; token_adain has no effect on it.", family)
    if cures.leak_guard:
        logging.info("Pastiche: leak_guard acts on the negative prompt's rows; at cfg 1 there are none.")
