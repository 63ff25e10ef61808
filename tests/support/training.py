"""Tiny models of the families that Train Style LoRA is tested on, in any weight type, and the gradients it computes.

    trainable("flux", torch.float16, cast=torch.float32)     MODEL for the device under test
    on_cpu(model)                                            the same weights as a MODEL on the CPU
    gradients(model)                                         those of the first training step, float64, CPU
    train(model, steps=3)                                    a whole training
"""

from __future__ import annotations

import functools

import comfy.model_patcher
import comfy.supported_models
import pytest
import torch

from pastiche.nodes.host.training import loop
from pastiche.nodes.host.training.images import TrainingImages

from .models import as_model, randomize, tiny_cond, tiny_unet, weights_at_once

FAMILIES = ("sd15", "sdxl", "flux", "sd3")
_TRANSFORMERS = {
    "flux": ("FluxSchnell", {
        "image_model": "flux", "guidance_embed": False, "in_channels": 16, "out_channels": 16, "vec_in_dim": 8,
        "context_in_dim": 16, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
        "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "txt_ids_dims": [],
    }),
    "sd3": ("SD3", {
        "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 8, "context_size": 16,
        "num_patches": 64, "pos_embed_max_size": 8, "pos_embed_scaling_factor": None, "qk_norm": "rms",
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 128}},
    }),
}


def trainable(family: str, dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None) -> comfy.model_patcher.ModelPatcher:
    """dtype: of the weights; cast: what layers compute in where that is another type."""
    if family not in _TRANSFORMERS:
        model = tiny_unet(family, dtype=dtype, cast=cast, channel_mult=(1, 1, 1) if family == "sdxl" else None)
        for module in model.model.diffusion_model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.num_groups = 4  # normalising one channel of 2x2 cells alone blows rounding up
        return model
    name, options = _TRANSFORMERS[family]
    config = getattr(comfy.supported_models, name)(dict(options))
    config.set_inference_dtype(dtype, cast)
    with weights_at_once():
        model = config.get_model({}, device=torch.device("cpu"))
    randomize(model.diffusion_model)
    positions = getattr(model.diffusion_model, "pos_embed", None)
    if isinstance(positions, torch.Tensor):  # a buffer of SD3's checkpoints
        positions.copy_(torch.randn(positions.shape, generator=torch.Generator().manual_seed(0)))
    return as_model(model)


def on_cpu(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    return comfy.model_patcher.ModelPatcher(model.model, torch.device("cpu"), torch.device("cpu"))


def cond_of(model: comfy.model_patcher.ModelPatcher) -> list:
    if "context_dim" in model.model.model_config.unet_config:
        return tiny_cond(model)
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(1, 5, 16, generator=generator), {"pooled_output": torch.randn(1, 8, generator=generator)}]]


def image_of(model: comfy.model_patcher.ModelPatcher, count: int = 1) -> TrainingImages:
    channels = model.model.latent_format.latent_channels
    return TrainingImages(torch.randn(1, count, channels, 8, 8, generator=torch.Generator().manual_seed(0)))


def images(count: int = 1, size: int = 8, seed: int = 0, std: torch.Tensor | None = None) -> TrainingImages:
    """For `tiny_unet`."""
    return TrainingImages(torch.randn(1, count, 4, size, size, generator=torch.Generator().manual_seed(seed)), std)


def train(model, data=None, cond=None, report=lambda *args: None, **settings) -> loop.TrainedLoRA:
    """Three steps on a `tiny_unet`, unless told otherwise."""
    settings = {"steps": 3, "rank": 2, "learning_rate": 1e-2, "seed": 5, **settings}
    return loop.train_style_lora(model, data or images(), cond or tiny_cond(model), loop.TrainingSettings(**settings), report)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def gradients(model: comfy.model_patcher.ModelPatcher, cond: list | None = None, count: int = 1, **settings) -> list[torch.Tensor]:
    """Of the first step, with LoRAs that are not zero: one per LoRA matrix. count: images.

    fp16 starts at a loss scale of 128, so that no gradient overflows.
    """
    seen: list[torch.Tensor] = []
    plain = loop._TrainingLoop._step

    def step(self, number, scaler):
        if scaler is None:
            return plain(self, number, scaler)
        generator = torch.Generator().manual_seed(11)
        for parameter in self._adapters.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
        loss = plain(self, number, scaler)
        scale = scaler.get_scale() if scaler.is_enabled() else 1.0
        seen.extend(parameter.grad.detach().double().cpu() / scale for parameter in self._adapters.parameters())
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._TrainingLoop, "_step", step)
        patch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=128.0))
        settings = {"steps": 1, "rank": 2, "seed": 5, "targets": "qkv+out", "learning_rate": 1e-6, **settings}
        loop.train_style_lora(model, image_of(model, count), cond or cond_of(model), loop.TrainingSettings(**settings))
    return seen


def assert_same_gradients(found, expected, rtol: float = 1e-4, floor: float = 1e-6) -> None:
    """Every matrix within rtol of its own norm, or `floor` of the largest's (q and k of a single token have none)."""
    norms = [float(gradient.norm()) for gradient in expected]
    assert len(found) == len(expected) and max(norms) > 1e-3
    for ours, theirs, norm in zip(found, expected, norms):
        assert float((ours - theirs).norm()) <= rtol * norm + floor * max(norms)
