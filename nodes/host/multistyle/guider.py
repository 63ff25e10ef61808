"""DiffStyler's eq. 7 as a GUIDER: any number of styles, each with its mask, in one forward a step."""

from __future__ import annotations

import logging
from typing import Any

import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...algorithms.diffstyler import mix_predictions, normalise_masks
from ...algorithms.masks import resize_mask
from ...sockets import StyleEntry
from .lora_batch import BASE, BatchedStyles, lora_patches, style_patches
from ..injections.style_rows import STYLE_ROWS, RowPatches

CONDITIONAL, UNCONDITIONAL = 0, 1  # what cond_or_uncond tells patches


class MultiStyleGuider(comfy.samplers.CFGGuider):
    """CFGGuider whose prediction is sum_i M_i D_i + (1 - sum_i M_i) D: of every style's LoRA and prompt, and of the base.

    Mixing denoised predictions is mixing eps, as both are at the same latent. Guidance, hooks and samplers work
    on the mixture as they would on one model's prediction.
    """

    def __init__(self, model: Any, styles: list[StyleEntry]):
        self.styles = styles
        self.names = [style.name or f"style {number + 1}" for number, style in enumerate(styles)]
        featured = {number: style for number, style in enumerate(styles) if style.features is not None}
        if featured:
            model = RowPatches(model, featured, self.names).install(model)
        super().__init__(model)
        self._patches = [self._patches_of(style, name) for style, name in zip(styles, self.names)]

    def _patches_of(self, style: StyleEntry, name: str) -> dict:
        if style.model is not None:
            return style_patches(self.model_patcher, style.model, name)
        if style.lora is not None:
            return lora_patches(self.model_patcher, style.lora, name)
        return {}

    def set_conds(self, positive: list, negative: list) -> None:
        conds = {"positive": positive, "negative": negative}
        for number, style in enumerate(self.styles):
            conds[_cond_name(number)] = positive if style.conditioning is None else style.conditioning
        self.inner_set_conds(conds)

    def sample(self, noise: Tensor, latent_image: Tensor, *args, **kwargs) -> Tensor:
        self._check_masks(noise)
        return super().sample(noise, latent_image, *args, **kwargs)

    def _check_masks(self, noise: Tensor) -> None:
        for style, name in zip(self.styles, self.names):
            if style.mask is not None and style.mask.ndim == 3 and style.mask.shape[0] not in (1, noise.shape[0]):
                raise ValueError(f"{name}: {style.mask.shape[0]} masks for {noise.shape[0]} samples; connect one, or as many.")

    def inner_sample(self, noise, latent_image, device, sampler, sigmas, *args, **kwargs):
        sampling = self.inner_model.model_sampling
        self._ranges = [
            (sampling.percent_to_sigma(style.start_percent), sampling.percent_to_sigma(style.end_percent))
            for style in self.styles
        ]
        self._masks = [self._mask(style, noise).to(device) for style in self.styles]
        for mask, name in zip(self._masks, self.names):
            if not bool(mask.any()):
                logging.info("Pastiche: the mask of %s is empty, it has no effect.", name)
        self._batch = BatchedStyles(
            self.inner_model, self._patches, [style.strength for style in self.styles], self.names,
            device, self.inner_model.get_dtype_inference(),
        )
        try:
            with self._batch.attached():
                return super().inner_sample(noise, latent_image, device, sampler, sigmas, *args, **kwargs)
        finally:
            del self._batch, self._masks, self._ranges

    def _mask(self, style: StyleEntry, noise: Tensor) -> Tensor:
        """(B, H, W) on the latent grid, in [0, 1]. A style of features has its strength here, a LoRA in its update."""
        batch, (height, width) = noise.shape[0], noise.shape[-2:]
        mask = torch.ones(1, 1, 1) if style.mask is None else resize_mask(style.mask, height, width).clamp(0, 1)
        strength = 1.0 if style.features is None else min(max(style.strength, 0.0), 1.0)
        return (strength * mask).expand(batch, height, width)

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        sigma = float(timestep.flatten()[0])
        active = [
            number for number, (high, low) in enumerate(self._ranges)
            if low <= sigma <= high and bool(self._masks[number].any())
        ]
        if not active:
            return super().predict_noise(x, timestep, model_options, seed)
        return super().predict_noise(x, timestep, self._mixing(active, model_options), seed)

    def _mixing(self, active: list[int], model_options: dict) -> dict:
        """Options under which the model's [cond, uncond] are the mixtures of the active styles' and the base's."""
        evaluate = model_options.get("sampler_calc_cond_batch_function") or _evaluate
        weights, rest = normalise_masks(torch.stack([self._masks[number] for number in active]))
        parts = list(zip(active, weights.unsqueeze(2)))  # BHW -> B1HW
        if bool(rest.any()):
            parts.append((BASE, rest.unsqueeze(1)))

        def mixture(args: dict) -> list[Tensor]:
            cond, uncond = args["conds"]
            kinds = (CONDITIONAL,) if uncond is None else (CONDITIONAL, UNCONDITIONAL)
            plan = [(style, kind) for kind in kinds for style, _ in parts]
            conds = [
                uncond if kind == UNCONDITIONAL else cond if style == BASE else self.conds[_cond_name(style)]
                for style, kind in plan
            ]
            options = self._in_rows(plan, args["model_options"])
            predictions = evaluate({**args, "conds": conds, "model_options": options})
            mixed = [
                mix_predictions([(predictions[plan.index((style, kind))], weight.to(predictions[0])) for style, weight in parts])
                for kind in kinds
            ]
            return mixed if len(mixed) == 2 else [*mixed, torch.zeros_like(mixed[0])]

        return {**model_options, "sampler_calc_cond_batch_function": mixture}

    def _in_rows(self, plan: list[tuple[int, int]], model_options: dict) -> dict:
        """Options whose forwards give each row its style, and show other patches plain conditional and unconditional rows."""

        def apply_model(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
            chunks = transformer_options["cond_or_uncond"]
            size = x.shape[0] // len(chunks)
            rows = tuple(plan[chunk][0] for chunk in chunks for _ in range(size))
            seen = {**transformer_options, "cond_or_uncond": [plan[chunk][1] for chunk in chunks], STYLE_ROWS: rows}
            with self._batch.running(rows):
                return executor(x, t, c_concat, c_crossattn, control, seen, **kwargs)

        options = model_options.get("transformer_options", {})
        wrappers = options.get("wrappers", {})
        outermost = {"pastiche_multistyle": [apply_model], **wrappers.get(WrappersMP.APPLY_MODEL, {})}
        options = {**options, "wrappers": {**wrappers, WrappersMP.APPLY_MODEL: outermost}}
        return {**model_options, "transformer_options": options}


def _cond_name(number: int) -> str:
    return f"pastiche_style_{number}"


def _evaluate(args: dict) -> list[Tensor]:
    return comfy.samplers.calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"], args["model_options"])


def lora_names() -> list[str]:
    """LoRA files of this ComfyUI, "none" first."""
    return ["none", *folder_paths.get_filename_list("loras")]


def style_entry(lora_name: str, **fields: Any) -> StyleEntry:
    """Style Entry: at most one of a LoRA file, lora, model and features. Raises ValueError for several, or a bad range."""
    given = [name for name in ("lora", "model", "features") if fields[name] is not None]
    given += ["lora_name"] if lora_name != "none" else []
    if len(given) > 1:
        raise ValueError(f"A style has one source, got {' and '.join(given)}. Use one Style Entry for each.")
    if fields["start_percent"] > fields["end_percent"]:
        raise ValueError(
            f"start_percent {fields['start_percent']} lies after end_percent {fields['end_percent']}: swap them."
        )
    if lora_name != "none":
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        return StyleEntry(**{**fields, "lora": comfy.utils.load_torch_file(path, safe_load=True)}, name=lora_name)
    return StyleEntry(**fields)


def multi_style_guider(model: Any, positive: list, negative: list, cfg: float, styles: list[StyleEntry]) -> MultiStyleGuider:
    """A guider for SamplerCustomAdvanced. Raises ValueError for LoRAs that do not fit the model."""
    guider = MultiStyleGuider(model, styles)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider
