"""Changes of a U-Net's self-attention before its projections, each blended with the attention below it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...algorithms.styleid import blend
from .adapter import RUN, Attended, ChangeHidden
from .neighbours import has_tiles, why_other_size

CHANGES = "pastiche_changes"  # in the options of one transformer block's forward: the changes made to it so far


class _Change(NamedTuple):
    before: Attended
    weight: Tensor | float | None
    passes: bool


class HiddenPatch:
    """The attn1_patch (called) and attn1_output_patch (`settle`) of one change."""

    def __init__(self, change: ChangeHidden):
        self._change = change

    def __call__(self, n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, T, C) hidden states before to_q, to_k, to_v."""
        inputs, changes = Attended(n, context, value), options.get(CHANGES, ())
        own = changes[0].before.query if changes and changes[0].before.query.shape == n.shape else n
        replacement = self._change(own, inputs, options)
        if replacement is None:
            return inputs
        _require_tokens(replacement.weight, own.shape[1], options)
        _require_tiles(replacement.inputs.keys, own.shape[1], options)
        options[CHANGES] = (*changes, _Change(inputs, replacement.weight, replacement.passes))
        return replacement.inputs

    def settle(self, out: Tensor, options: dict) -> Tensor:
        """Blends for all changes of this block; `out` is (rows, T, C) after to_out. The first one called does it."""
        changes = options.pop(CHANGES, ())
        if not changes:
            return out
        run, slot = options[RUN], (*options["block"], options["block_index"])
        attn1, replaced = run.adapter.attention_module("attn1", slot), run.replaced_attention("attn1", slot)

        def attend(inputs: Attended) -> Tensor:
            if replaced is None:
                return attn1(inputs.query, context=inputs.keys, value=inputs.values, transformer_options=options)
            projected = attn1.to_q(inputs.query), attn1.to_k(inputs.keys), attn1.to_v(inputs.values)
            return attn1.to_out(replaced(*projected, options))

        def result(count: int, out: Tensor) -> Tensor:
            """The output under the first `count` changes; `out` is the attention with the inputs that the last of them made."""
            if count == 0:
                return out
            before, weight, passes = changes[count - 1]
            if weight is not None:
                _require_tokens(before.query, out.shape[1], options)
            if weight is None or (passes and all(change.weight is None for change in changes[: count - 1])):
                return out
            return blend(result(count - 1, attend(before)), out, weight)

        return result(len(changes), out)


def _require_tiles(keys: Tensor, tokens: int, options: dict) -> None:
    """Raises ValueError where HyperTile would cut (rows, T, C) keys into tiles of another picture size than the sample's."""
    if keys.shape[1] != tokens and has_tiles(options[RUN].model_options):
        cause = why_other_size(options[RUN].model_options, "a style of another size")
        raise ValueError(f"style: it has {keys.shape[1]} tokens, the sample {tokens}. {cause}")


def _require_tokens(blended: Tensor | float | None, tokens: int, options: dict) -> None:
    """Raises ValueError where a blend, of (rows, T or 1, ...), meets another number of tokens."""
    if isinstance(blended, Tensor) and blended.ndim == 3 and blended.shape[1] not in (1, tokens):
        cause = why_other_size(options[RUN].model_options, "strength below 1 or a mask")
        raise ValueError(f"strength, mask: a blend on {blended.shape[1]} tokens meets {tokens}. {cause}")
