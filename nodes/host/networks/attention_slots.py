"""Attention replacements: ComfyUI keeps one function for each block, so ours call the one that they displace."""

from __future__ import annotations

from typing import Any, Callable, Iterable

from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .adapter import RUN, Attend, Slot


class AttentionSlots:
    """The replacements of one kind (attn1 or attn2) that one injection puts into a MODEL."""

    def __init__(self, kind: str):
        self._kind = kind
        self._own: dict[Slot, Attend] = {}

    def fill(self, model: ModelPatcher, slots: Iterable[Slot], make: Callable[[Slot, Attend], Attend]) -> None:
        """Puts make(slot, attend) at every slot of `model` (a clone); attend(q, k, v, options) is what would have run."""
        taken = model.model_options["transformer_options"].get("patches_replace", {}).get(self._kind, {})
        for slot in slots:
            self._own[slot] = make(slot, _chained(self._kind, slot, taken.get(slot), taken.get(slot[:2])))
            model.set_model_patch_replace(self._own[slot], self._kind, *slot)

    def lost(self, options: dict) -> list[str]:
        """The places ("attn1 of output 7") whose replacement in a run's transformer_options no longer leads to ours."""
        slots = options.get("patches_replace", {}).get(self._kind, {})
        return [f"{self._kind} of {slot[0]} {slot[1]}" for slot, own in self._own.items() if not _reaches(slots.get(slot), own)]


def _chained(kind: str, slot: Slot, displaced: Attend | None, of_block: Attend | None) -> Attend:
    """The attention that a replacement at `slot` stands in front of."""

    def attend(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        inner, run = displaced, options.get(RUN)
        if inner is None and run is not None:  # a later node's for the whole block, which ours at a depth hides
            inner = run.replaced_attention(kind, slot[:2])
        inner = inner or of_block
        if inner is not None:
            return inner(q, k, v, options)
        return optimized_attention(
            q, k, v, options["n_heads"], attn_precision=options["attn_precision"], transformer_options=options
        )

    return attend


def _reaches(replacement: Any, own: Callable) -> bool:
    """Whether a slot holds our replacement, or a function that chains to it (keeps it in its closure)."""
    if replacement is own:
        return True
    cells = getattr(replacement, "__closure__", None) or ()
    return any(callable(cell.cell_contents) and _reaches(cell.cell_contents, own) for cell in cells)
