"""Attention replacements: ComfyUI keeps one function for each block, so ours call the one that they displace."""

from __future__ import annotations

import logging
from typing import Any, Callable, Iterable

from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..networks.adapter import Slot
from .run import current_run

Attend = Callable[[Tensor, Tensor, Tensor, dict], Tensor]


class AttentionSlots:
    """The attn1 and attn2 replacements that one node put into a MODEL."""

    def __init__(self) -> None:
        self._own: dict[tuple[str, Slot], Attend] = {}

    def fill(self, model: ModelPatcher, kind: str, slots: Iterable[Slot], make: Callable[[Slot, Attend], Attend]) -> None:
        """Puts make(slot, attend) at every slot of `model` (a clone); attend(q, k, v, options) is what would have run."""
        taken = model.model_options["transformer_options"].get("patches_replace", {}).get(kind, {})
        for slot in slots:
            replace = make(slot, _chained(kind, slot, taken.get(slot), taken.get(slot[:2])))
            self._own[kind, slot] = replace
            model.set_model_patch_replace(replace, kind, *slot)

    def warn_of_losses(self, options: dict, node: str) -> None:
        """Names the blocks whose replacement of `options` (a run's transformer_options) no longer leads to ours."""
        slots = options.get("patches_replace", {})
        lost = sorted(
            {f"{kind} of {slot[0]} {slot[1]}" for (kind, slot), own in self._own.items()
             if not _reaches(slots.get(kind, {}).get(slot), own)}
        )
        if lost:
            logging.warning(
                "Pastiche: a node after %s replaced %s, so nothing is injected there. "
                "Put %s last: it hands its queries and keys on to the other's replacement.", node, ", ".join(lost), node,
            )


def _chained(kind: str, slot: Slot, displaced: Attend | None, of_block: Attend | None) -> Attend:
    """The attention that a replacement at `slot` stands in front of."""

    def attend(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        inner, run = displaced, current_run(options)
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
