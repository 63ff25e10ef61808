"""A forward's arguments, lengthened by the rows of reference pictures."""

from __future__ import annotations

import math
from typing import Any

import comfy.conds
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor


def lengthen(value: Any, rows: int, copied: list[int]) -> Any:
    """`value` of a forward of `rows` rows, followed by what it has for the rows `copied`.

    Lists (reference latents) are treated element by element; what has no row for each is passed on.
    """
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or value.shape[0] != rows:
            return value
        return torch.cat([value, value[copied]])
    if isinstance(value, list):
        return [lengthen(part, rows, copied) for part in value]
    return value


def without_control(control: Any, rows: int, added: int) -> Any:
    """A ControlNet's residuals for a batch with `added` rows of references: they get none, as when they are run alone."""
    if not isinstance(control, dict):
        return control

    def longer(residual: Any) -> Any:
        if not isinstance(residual, torch.Tensor):
            return residual
        own = residual.expand(rows, *residual.shape[1:]) if residual.shape[0] == 1 else residual
        return torch.cat([own, own.new_zeros(added, *own.shape[1:])])

    return {name: [longer(residual) for residual in residuals] for name, residuals in control.items()}


def own_conditions(kwargs: dict[str, Any], rows: int, places: list[tuple[slice, dict[str, tuple[Any, bool]]]]) -> dict[str, Any]:
    """The longer batch's conditions with those of references that bring their own, row ranges `places`.

    A value that fits a row is put there. Cross-attention contexts of other lengths are repeated to a common one, which
    changes nothing; other contexts are padded with zeros or cut to the batch's tokens.
    """
    changed = dict(kwargs)
    for place, conditions in places:
        for name, (value, repeatable) in conditions.items():
            batch = changed.get(name)
            if not isinstance(value, torch.Tensor) or not isinstance(batch, torch.Tensor) or batch.ndim != value.ndim or batch.ndim == 0:
                continue
            if batch.shape[0] < place.stop:  # a value that all rows share
                continue
            value = value.to(batch)
            if value.ndim == 3 and value.shape[1] != batch.shape[1]:
                if repeatable:
                    tokens = math.lcm(value.shape[1], batch.shape[1])
                    batch, value = (x.repeat(1, tokens // x.shape[1], 1) for x in (batch, value))
                else:
                    value = _fit_tokens(value, batch.shape[1])
            elif value.ndim == 2 and value.shape[1] != batch.shape[1]:
                value = _fit_tokens(value, batch.shape[1])
            if value.shape[1:] != batch.shape[1:]:
                continue
            batch = batch.clone()
            batch[place] = value
            changed[name] = batch
    return changed


def condition_rows(model: Any, conditioning: list, latent: Tensor) -> dict[str, tuple[Any, bool]]:
    """What a forward of one row (1, C, ...) under `conditioning` is given: {name: (value, may be repeated along tokens)}."""
    conds = {"positive": comfy.sampler_helpers.convert_cond(conditioning)}
    processed = comfy.samplers.process_conds(model, latent, conds, latent.device)["positive"][0]["model_conds"]
    return {
        name: (cond.process_cond(batch_size=1, area=None).cond, isinstance(cond, comfy.conds.CONDCrossAttn))
        for name, cond in processed.items()
    }


def _fit_tokens(value: Tensor, tokens: int) -> Tensor:
    """(1, T, ...) -> (1, tokens, ...)."""
    value = value[:, :tokens]
    missing = value.new_zeros(value.shape[0], tokens - value.shape[1], *value.shape[2:])
    return torch.cat([value, missing], 1)
