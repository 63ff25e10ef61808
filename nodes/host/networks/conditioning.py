"""The conditioning that inversion and capture predict with."""

from __future__ import annotations

import logging
from typing import Any

import torch

from .unet import inspect_model


def inversion_conditioning(model: Any, positive: list | None) -> list:
    """The CONDITIONING given, or this MODEL's stand-in for the papers' empty prompt.

    A model that knows its empty prompt (`empty_context`, as the mini model does) supplies it; others get a
    zero context, which is what core's ConditioningZeroOut gives. Raises ValueError for several prompts.
    """
    if positive is not None:
        if len(positive) != 1:
            raise ValueError(
                f"positive: inversion takes one conditioning, got {len(positive)}. "
                "Connect a single CLIP Text Encode without Combine or Set Area."
            )
        if "area" in positive[0][1]:
            raise ValueError("positive: inversion covers the whole image; remove the area from the conditioning.")
        return positive
    empty = getattr(model.model, "empty_context", None)
    if empty is not None:
        return [[empty.float().cpu(), {}]]
    layout = inspect_model(model)
    if layout.context_dim is None:
        return [[None, {}]]
    logging.info("Pastiche: no positive connected; a zero context stands for the empty prompt.")
    extra = {}
    if model.model.adm_channels:
        extra["pooled_output"] = torch.zeros(1, 1280)
    return [[torch.zeros(1, 77, layout.context_dim), extra]]
