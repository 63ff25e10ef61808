"""DiffStyler's eq. 7 as a GUIDER: any number of styles, each with its mask, in one forward a step."""

from __future__ import annotations

import logging
from typing import Any

import comfy.samplers
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ...algorithms.masks import resize_mask
from ...sockets import StyleEntry
from ..checks import check_lora, unlike_shapes_told
from ..files import refuse_web_page
from ..networks.neighbours import run_uncompiled
from ..injections.style_rows import RowPatches
from ..references.install import reference_rows
from .lora_batch import BatchedStyles
from .mixture import StyleMixture, cond_name
from .sources import content_of, lora_patches, style_patches


class MultiStyleGuider(comfy.samplers.CFGGuider):
    """CFGGuider whose prediction is sum_i M_i D_i + (1 - sum_i M_i) D: of every style's LoRA and prompt, and of the base.

    Mixing denoised predictions is mixing eps, as both are at the same latent. Guidance, hooks and samplers work
    on the mixture as they would on one model's prediction. overlap: see `normalise_masks`.
    """

    def __init__(self, model: Any, styles: list[StyleEntry], overlap: str = "share"):
        self.styles, self.overlap = styles, overlap
        self.names = [style.name or f"style {number + 1}" for number, style in enumerate(styles)]
        featured = {number: style for number, style in enumerate(styles) if style.features is not None}
        if featured:
            model = RowPatches(model, featured, self.names).install(model)
        for number, style in enumerate(styles):
            if style.picture is not None:
                model = reference_rows(model, number, style.picture, style.share, style.temperature, style.layers)
        self._own_content = set()
        for number, (style, name) in enumerate(zip(styles, self.names)):
            for injection in content_of(model, style.model, name) if style.model is not None else ():
                model = injection.for_style(number).install(model)
                self._own_content.add(number)
        super().__init__(model)
        self._patches = [self._patches_of(style, name) for style, name in zip(styles, self.names)]

    def _patches_of(self, style: StyleEntry, name: str) -> dict:
        if style.model is not None:
            return style_patches(self.model_patcher, style.model, name)
        if style.lora is not None:
            return lora_patches(self.model_patcher, style.lora, name)
        return {}

    def set_conds(self, positive: list, negative: list) -> None:
        own = {cond_name(i): style.conditioning for i, style in enumerate(self.styles) if style.conditioning is not None}
        self.inner_set_conds({"positive": positive, "negative": negative, **own})

    def sample(self, noise: Tensor, latent_image: Tensor, *args, **kwargs) -> Tensor:
        self._check_masks(noise)
        with unlike_shapes_told("positive"):
            return super().sample(noise, latent_image, *args, **kwargs)

    def _check_masks(self, noise: Tensor) -> None:
        for style, name in zip(self.styles, self.names):
            if style.mask is not None and style.mask.ndim == 3 and style.mask.shape[0] not in (1, noise.shape[0]):
                raise ValueError(f"{name}: {style.mask.shape[0]} masks for {noise.shape[0]} samples; connect one, or as many.")

    def inner_sample(self, noise, latent_image, device, sampler, sigmas, *args, **kwargs):
        sampling = self.inner_model.model_sampling
        ranges = [
            (sampling.percent_to_sigma(style.end_percent), sampling.percent_to_sigma(style.start_percent))
            for style in self.styles
        ]
        masks = [self._mask(style, noise).to(device) for style in self.styles]
        for mask, name in zip(masks, self.names):
            if not bool(mask.any()):
                logging.info("Pastiche: the mask of %s is empty, it has no effect.", name)
        batch = BatchedStyles(
            self.inner_model, self._patches, [style.strength for style in self.styles], self.names,
            device, self.inner_model.get_dtype_inference(),
        )
        if self.styles:
            run_uncompiled(self.model_patcher, self.model_options)
            StyleMixture(self, batch, masks, ranges, self.overlap, frozenset(self._own_content)).install(self.model_options)  # the run's own copy
        with batch.attached():
            return super().inner_sample(noise, latent_image, device, sampler, sigmas, *args, **kwargs)

    def _mask(self, style: StyleEntry, noise: Tensor) -> Tensor:
        """(B, H, W) on the latent grid, in [0, 1]. A style of features or a picture has its strength here, a LoRA in its update."""
        batch, (height, width) = noise.shape[0], noise.shape[-2:]
        mask = torch.ones(1, 1, 1) if style.mask is None else resize_mask(style.mask, height, width).clamp(0, 1)
        strength = 1.0 if style.features is None and style.picture is None else min(max(style.strength, 0.0), 1.0)
        return (strength * mask).expand(batch, height, width)


def lora_names() -> list[str]:
    """LoRA files of this ComfyUI, "none" first."""
    return ["none", *folder_paths.get_filename_list("loras")]


def style_entry(lora_name: str, **fields: Any) -> StyleEntry:
    """Style Entry: at most one of a LoRA file, lora, model, features and a picture. Raises ValueError for several, or a bad range."""
    given = [name for name in ("lora", "model", "features", "picture") if fields.get(name) is not None]
    given += ["lora_name"] if lora_name != "none" else []
    if len(given) > 1:
        raise ValueError(f"A style has one source, got {' and '.join(given)}. Use one Style Entry for each.")
    if fields["start_percent"] > fields["end_percent"]:
        raise ValueError(
            f"start_percent {fields['start_percent']} lies after end_percent {fields['end_percent']}: swap them."
        )
    if lora_name != "none":
        return StyleEntry(**{**fields, "lora": _read_lora(lora_name)}, name=lora_name)
    return StyleEntry(**fields)


def _read_lora(name: str) -> dict[str, Tensor]:
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise ValueError(f"lora_name: {ascii(name[:80])} is not in models/loras. Put it there and refresh.")
    refuse_web_page(path)
    try:
        lora = comfy.utils.load_torch_file(path, safe_load=True)
    except Exception as error:  # core and torch raise a different type for each way a file is broken
        raise ValueError(f"lora_name: {name} cannot be read; it may be truncated. Download it again. ({str(error)[:200]})") from error
    check_lora(lora, f"lora_name ({name})")
    return lora


def multi_style_guider(
    model: Any, positive: list, negative: list, cfg: float, styles: list[StyleEntry], overlap: str = "share"
) -> MultiStyleGuider:
    """A guider for SamplerCustomAdvanced. Raises ValueError for LoRAs that do not fit the model."""
    guider = MultiStyleGuider(model, styles, overlap)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider
