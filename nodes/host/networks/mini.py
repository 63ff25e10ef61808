"""Loads the embedded mini model through ComfyUI's own machinery: MODEL, VAE, CONDITIONING by kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch
from safetensors import SafetensorError, safe_open

from ...algorithms.mini_autoencoder import LATENT_CHANNELS, PATCH, MiniAutoencoder

WEIGHTS = Path(__file__).resolve().parents[2] / "assets" / "mini.safetensors"
FORMAT = "pastiche-mini-1"
KINDS = ("empty", "photo", "painting", "drawing")


class MiniLatentFormat(comfy.latent_formats.LatentFormat):
    """Brings each of the 16 channels to mean 0 and the same deviation, 3; the numbers come with the weights.

    SD's latents have deviation 1 for the same sigmas; docs/mini/REPORT.md tells why these have more.
    """

    latent_channels = LATENT_CHANNELS

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, rgb: torch.Tensor, rgb_bias: torch.Tensor):
        """mean, std: (16); rgb (16, 3) and rgb_bias (3) map a scaled latent to a preview in -1..1."""
        self.mean = mean.reshape(1, -1, 1, 1)
        self.std = std.reshape(1, -1, 1, 1)
        self.latent_rgb_factors = rgb.tolist()
        self.latent_rgb_factors_bias = rgb_bias.tolist()

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        return (latent - self.mean.to(latent)) / self.std.to(latent)

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        return latent * self.std.to(latent) + self.mean.to(latent)


class MiniModel(comfy.model_base.BaseModel):
    """SD1.x's noise schedule and block positions. Without a conditioning it takes the empty kind's tokens."""

    def __init__(self, config: MiniConfig, device: Any = None):
        super().__init__(config, comfy.model_base.ModelType.EPS, device=device)
        self.empty_context: torch.Tensor = config.empty_context  # (1, tokens, context_dim), CPU

    def extra_conds(self, **kwargs) -> dict:
        out = super().extra_conds(**kwargs)
        out.setdefault("c_crossattn", comfy.conds.CONDCrossAttn(self.empty_context))
        return out


class MiniConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}

    def __init__(self, unet_config: dict, latent_format: MiniLatentFormat, empty_context: torch.Tensor):
        # BASE instantiates the class attribute `latent_format`; ours needs its numbers.
        super().__init__(unet_config)
        self.latent_format = latent_format
        self.empty_context = empty_context
        # Relative to SD1.x, whose widest level has 320 channels for each latent cell.
        self.memory_usage_factor = unet_config["model_channels"] / 320

    def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> MiniModel:
        return MiniModel(self, device=device)  # core's would take 16 input channels for an inpainting model


class MiniVAE(comfy.sd.VAE):
    """Core's VAE (tiling, batching, offload) around `MiniAutoencoder`, always in float32."""

    def __init__(self, state_dict: dict):
        # Core's constructor finds a network by its keys; its smallest fills in every other attribute.
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
        self.first_stage_model = MiniAutoencoder().eval().requires_grad_(False)
        self.first_stage_model.load_state_dict(state_dict)
        self.downscale_ratio = self.upscale_ratio = PATCH
        self.latent_channels = LATENT_CHANNELS
        self.working_dtypes = [torch.float32]
        self.disable_offload = False
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        # Widest activations: pixels and patches on the way in, a few feature maps of 192 at latent size out.
        self.memory_used_encode = lambda shape, dtype: 32 * shape[2] * shape[3] * comfy.model_management.dtype_size(dtype)
        self.memory_used_decode = lambda shape, dtype: 1024 * shape[2] * shape[3] * comfy.model_management.dtype_size(dtype)
        comfy.model_management.archive_model_dtypes(self.first_stage_model)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=comfy.model_management.vae_offload_device()
        )
        self.patcher.cached_patcher_init = (_load_vae_patcher, ())
        self.size = None
        self.model_size()


def read_weights(path: Path = WEIGHTS) -> tuple[dict, dict]:
    """(tensors, metadata) of the mini model's file. Raises ValueError when it is missing, cut short or another."""
    advice = "Reinstall the pack, or make the file with tools/train_mini.py."
    if not path.is_file():
        raise ValueError(f"The mini model's weights are missing: no {path}. {advice}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The mini model's weights in {path} cannot be read ({path.stat().st_size} bytes: {error}). {advice}"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}. {advice}")
    return tensors, metadata


def load_mini(path: Path = WEIGHTS) -> tuple[comfy.model_patcher.ModelPatcher, MiniVAE, dict[str, list]]:
    """(MODEL, VAE, {kind: CONDITIONING}). Latents are (B, 16, H/8, W/8); H and W multiples of 8.

    Data type, device and offload follow ComfyUI's start options, as for a checkpoint.
    """
    tensors, metadata = read_weights(path)
    model = _load_model(tensors, metadata, path)
    vae = MiniVAE(_part(tensors, "autoencoder."))
    return model, vae, {kind: [[tensors[f"context.{kind}"].clone(), {}]] for kind in KINDS}


def _load_model(tensors: dict, metadata: dict, path: Path) -> comfy.model_patcher.ModelPatcher:
    weights = _part(tensors, "unet.")
    latent = _part(tensors, "latent.")
    config = MiniConfig(json.loads(metadata["unet"]), MiniLatentFormat(**latent), tensors["context.empty"])

    device = comfy.model_management.get_torch_device()
    parameters = sum(tensor.numel() for tensor in weights.values())
    dtype = comfy.model_management.unet_dtype(
        device=device, model_params=parameters, supported_dtypes=config.supported_inference_dtypes
    )
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes))

    offload = comfy.model_management.unet_offload_device()
    model = config.get_model({}, device=offload)
    model.diffusion_model.load_state_dict(weights)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)
    patcher.cached_patcher_init = (_load_model_patcher, (path,))
    return patcher


def _load_model_patcher(path: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return _load_model(*read_weights(path), path)


def _load_vae_patcher(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return MiniVAE(_part(read_weights()[0], "autoencoder.")).patcher


def _part(tensors: dict, prefix: str) -> dict:
    """Tensors whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
