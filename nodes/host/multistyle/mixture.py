"""Eq. 7 where ComfyUI evaluates conditions: every evaluation of a run becomes the mixture of the styles' and the base's."""

from __future__ import annotations

import uuid
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...algorithms.diffstyler import mix_predictions, normalise_masks
from ...algorithms.masks import resize_mask
from ..injections.content import CONTENT_OF
from ..injections.run import current_run
from ..injections.style_rows import STYLE_PLAN, STYLE_ROWS
from ..networks.neighbours import reads_whole_batch
from ..references.run import KEY as REFERENCES
from .lora_batch import BASE, BatchedStyles

KEY = "pastiche_multistyle"


class StyleMixture:
    """CALC_COND_BATCH wrapper of one run. Whoever evaluates conditions (the guider, perturbed guidance, a sampling
    function of another node) gets sum_i M_i D_i + (1 - sum_i M_i) D for each of them.

    Styles run together in one batch, or one after another where a patch of another node may look at the whole batch:
    each evaluation is then what that node would see with the style's LoRA merged.
    """

    def __init__(self, guider: Any, batch: BatchedStyles, masks: list[Tensor], ranges: list[tuple[float, float]], overlap: str,
                 own_content: frozenset[int] = frozenset()):
        """masks: (B, H, W) each, on the latent grid; ranges: the lowest and highest sigma of each style; own_content: the
        styles that have content features of their own, which need forwards of their own."""
        self._guider, self._batch, self._masks, self._ranges, self._overlap = guider, batch, masks, ranges, overlap
        self._own_content = own_content
        self._used = [bool(mask.any()) for mask in masks]
        self._uuids: dict[tuple, uuid.UUID] = {}
        self._parts_of: dict[tuple, list[tuple[int, Tensor]]] = {}

    def install(self, model_options: dict) -> None:
        """Adds the wrapper, nearest to the model, to the options of a run."""
        wrappers = model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
        wrappers.setdefault(WrappersMP.CALC_COND_BATCH, {})[KEY] = [self]

    def __call__(self, executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict) -> list[Tensor]:
        active = self._active(float(timestep.flatten()[0]))
        asked = [index for index, cond in enumerate(conds) if cond is not None]
        if not active or not asked:
            return executor(model, conds, x, timestep, model_options)
        window = self._window(x, model_options)
        parts = self._parts(active, window, x)
        if self._own_content.intersection(active) or reads_whole_batch(model_options):
            predictions = {}
            for style, _ in parts:
                own = [self._condition(style, cond, window, model_options) for cond in conds]
                marked = self._marked(model_options, style, [(style, index) for index in range(len(conds))])
                outputs = executor(model, own, x, timestep, marked)
                predictions.update(((style, index), outputs[index]) for index in asked)
        else:
            plan = [(style, index) for index in asked for style, _ in parts]
            own = [self._condition(style, conds[index], window, model_options) for style, index in plan]
            outputs = executor(model, own, x, timestep, self._marked(model_options, plan, plan))
            predictions = dict(zip(plan, outputs))
        mixed = [torch.zeros_like(x) for _ in conds]  # as core gives for conditions that are left out
        for index in asked:
            mixed[index] = mix_predictions([(predictions[style, index], weight) for style, weight in parts])
        return mixed

    def _active(self, sigma: float) -> tuple[int, ...]:
        return tuple(i for i, (low, high) in enumerate(self._ranges) if self._used[i] and low <= sigma <= high)

    def _parts(self, active: tuple[int, ...], window: tuple[int, ...], x: Tensor) -> list[tuple[int, Tensor]]:
        """(style or BASE, weight (B, 1, H, W)) of every row that has to run; the weights add up to 1."""
        key = active, window, x.shape[1:], x.dtype, x.device
        if key not in self._parts_of:
            masks = torch.stack([self._masks[number][list(window)] for number in active])
            if masks.shape[-2:] != x.shape[-2:]:
                masks = resize_mask(masks.flatten(0, 1), *x.shape[-2:]).clamp(0, 1).unflatten(0, masks.shape[:2])
            weights, rest = normalise_masks(masks, self._overlap)
            spread = lambda weight: weight.reshape(len(window), *[1] * (x.ndim - 3), *weight.shape[-2:]).to(x)  # BHW -> B1HW
            parts = [(number, spread(weight)) for number, weight in zip(active, weights)]
            if bool(rest.any()):
                parts.append((BASE, spread(rest)))
            self._parts_of[key] = parts
        return self._parts_of[key]

    def _window(self, x: Tensor, model_options: dict) -> tuple[int, ...]:
        """Which samples of the run `x` holds: all, or those of a context window (core's, AnimateDiff-Evolved's)."""
        batch = self._masks[0].shape[0]
        if x.shape[0] == batch:
            return tuple(range(batch))
        options = model_options.get("transformer_options", {})
        frames = getattr(options.get("context_window"), "index_list", None) or options.get("ad_params", {}).get("sub_idxs")
        if frames is not None and len(frames) == x.shape[0] and max(frames) < batch:
            return tuple(frames)
        if all(bool((mask == mask[:1]).all()) for mask in self._masks):
            return (0,) * x.shape[0]
        raise ValueError(
            f"styles: a node evaluates {x.shape[0]} of {batch} samples and does not say which, but the styles' masks differ "
            "from sample to sample. Use one mask for all samples."
        )

    def _condition(self, style: int, cond: list | None, window: tuple[int, ...], model_options: dict) -> list | None:
        """The condition that a style's rows run under: its own in place of the guider's positive, else the same.

        Copies get their own ids, as caches of other nodes (EasyCache) tell predictions by them.
        """
        if cond is None or style == BASE:
            return cond
        own = self._guider.conds.get(cond_name(style))
        if own is not None and self._is_positive(cond):
            return own if len(window) == self._masks[0].shape[0] else [_rows_of(entry, window, self._masks[0].shape[0]) for entry in own]
        run = current_run(model_options.get("transformer_options", {}))
        copies = [{**entry, "uuid": self._uuids.setdefault((style, entry.get("uuid")), uuid.uuid4())} for entry in cond]
        for entry, copy in zip(cond, copies) if run is not None else ():
            run.alias(copy["uuid"], entry.get("uuid"))
        return copies

    def _is_positive(self, cond: list) -> bool:
        positive = self._guider.conds["positive"]
        known = {entry["uuid"] for entry in positive if "uuid" in entry}
        return cond is positive or any(entry.get("uuid") in known for entry in cond)

    def _marked(self, model_options: dict, plan: int | list[tuple[int, int]], numbers: list[tuple[int, int]]) -> dict:
        """Options whose forwards give each row its style. plan: the one style of all rows, or (style, the caller's
        condition number) of each condition number, which other patches are shown the caller's of. numbers: the latter
        in both cases, for references: they lengthen the batch before the rows are told apart."""

        def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
            if isinstance(plan, int):
                rows, seen = (plan,) * x.shape[0], dict(transformer_options)
                if plan in self._own_content:
                    seen[CONTENT_OF] = plan
            else:
                chunks = transformer_options["cond_or_uncond"]
                size = x.shape[0] // len(chunks)
                rows = tuple(plan[chunk][0] for chunk in chunks for _ in range(size))
                seen = {**transformer_options, "cond_or_uncond": [plan[chunk][1] for chunk in chunks]}
            with self._batch.running(rows):
                return executor(x, t, c_concat, c_crossattn, control, {**seen, STYLE_ROWS: rows}, **kwargs)

        options = model_options.get("transformer_options", {})
        wrappers = options.get("wrappers", {})
        others = dict(wrappers.get(WrappersMP.APPLY_MODEL, {}))
        outermost = {name: others.pop(name) for name in (REFERENCES,) if name in others}
        outermost |= {KEY: [apply_model], **others}
        options = {**options, STYLE_PLAN: numbers, "wrappers": {**wrappers, WrappersMP.APPLY_MODEL: outermost}}
        return {**model_options, "transformer_options": options}


def cond_name(number: int) -> str:
    """Name of a style's own conditioning among a guider's conditions."""
    return f"pastiche_style_{number}"


def _rows_of(entry: dict, window: tuple[int, ...], batch: int) -> dict:
    """A processed condition for some samples of the batch: tensors with a row for each sample keep those of the window."""
    index = list(window)
    model_conds = {
        name: cond._copy_with(cond.cond[index]) if torch.is_tensor(getattr(cond, "cond", None)) and cond.cond.shape[0] == batch > 1 else cond
        for name, cond in entry.get("model_conds", {}).items()
    }
    return {**entry, "model_conds": model_conds}
