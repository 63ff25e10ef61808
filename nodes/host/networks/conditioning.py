"""The conditioning that inversion and capture predict with."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from .families import find_adapter


def inversion_conditioning(model: ModelPatcher, positive: list | None) -> list:
    """The CONDITIONING given, or this MODEL's stand-in for the papers' empty prompt.

    Raises ValueError for several prompts, and for networks whose empty prompt is not known.
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
    try:
        return find_adapter(model).empty_prompt()
    except ValueError as error:
        raise ValueError("positive: this model's empty prompt is not known; connect a CLIP Text Encode, empty or not.") from error
