"""Loads the embedded mini models through ComfyUI's own machinery: MODEL, VAE, CONDITIONING by kind.

Two networks share one autoencoder: a U-Net as SD1.x's and a flow transformer as Flux's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.sd
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError, safe_open

from ...algorithms.mini_autoencoder import LATENT_CHANNELS, PATCH, MiniAutoencoder
from ..whole_models import WholeModelPatcher

WEIGHTS = Path(__file__).resolve().parents[2] / "assets" / "mini.safetensors"
TRANSFORMER_WEIGHTS = WEIGHTS.with_name("mini_transformer.safetensors")
FORMAT = "pastiche-mini-1"
TRANSFORMER_FORMAT = "pastiche-mini-transformer-1"
ARCHITECTURES = ("unet", "transformer")
KINDS = ("empty", "photo", "painting", "drawing")


class MiniLatentFormat(comfy.latent_formats.LatentFormat):
    """Brings each of the 16 channels to mean 0 and the same deviation; the numbers come with the weights.

    1 for the transformer, 1.5 for the U-Net: docs/mini/REPORT.md tells why.
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


class MiniTransformer(comfy.model_base.Flux):
    """Flux with rectified flow. Without a conditioning it takes the empty kind's tokens, and without a pooled vector zeros."""

    def __init__(self, config: MiniTransformerConfig, device: Any = None):
        super().__init__(config, comfy.model_base.ModelType.FLUX, device=device)
        self.empty_context: torch.Tensor = config.empty_context  # (1, tokens, context_dim), CPU

    def extra_conds(self, **kwargs) -> dict:
        out = super().extra_conds(**kwargs)
        out.setdefault("c_crossattn", comfy.conds.CONDRegular(self.empty_context))
        return out


class MiniTransformerConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}
    # flux_time_shift's mu: Flux's own value for a picture of 256 tokens, that is 128 px here.
    sampling_settings = {"shift": 0.5}
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]

    def __init__(self, unet_config: dict, latent_format: MiniLatentFormat, empty_context: torch.Tensor):
        super().__init__(unet_config)
        self.latent_format = latent_format
        self.empty_context = empty_context
        # Relative to Flux, which has 3072 features for each 2x2 cells of its latent.
        self.memory_usage_factor = 3.1 * unet_config["hidden_size"] / 3072 * (2 / unet_config["patch_size"]) ** 2

    def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> MiniTransformer:
        return MiniTransformer(self, device=device)


class MiniVAE(comfy.sd.VAE):
    """Core's VAE (tiling, batching, offload) around `MiniAutoencoder`, always in float32."""

    def __init__(self, state_dict: dict):
        # Core's constructor finds a network by its keys; its smallest fills in every other attribute.
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
        self.first_stage_model = MiniAutoencoder.from_state(state_dict).eval().requires_grad_(False)
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
        self.patcher = WholeModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=comfy.model_management.vae_offload_device()
        )
        self.patcher.cached_patcher_init = (_load_vae_patcher, ())
        self.size = None
        self.model_size()


def read_weights(path: Path = WEIGHTS, expected: str = FORMAT) -> tuple[dict, dict]:
    """(tensors, metadata) of a mini model's file. Raises ValueError when it is missing, cut short or another."""
    advice = "Reinstall the pack, or make the file with tools/train_mini.py."
    if expected == TRANSFORMER_FORMAT:
        advice = 'Reinstall the pack, make the file with tools/train_mini.py (stages transformer, then export), or choose architecture "unet".'
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
    if metadata.get("format") != expected:
        raise ValueError(f"{path} has format {metadata.get('format')!r}, expected {expected!r}. {advice}")
    return tensors, metadata


def load_mini(
    path: Path = WEIGHTS, architecture: str = "unet", transformer: Path = TRANSFORMER_WEIGHTS
) -> tuple[ModelPatcher, MiniVAE, dict[str, list]]:
    """(MODEL, VAE, {kind: CONDITIONING}). Latents are (B, 16, H/8, W/8); H and W multiples of 8.

    path holds the U-Net and the VAE, transformer the other network, which is read only for that architecture.
    Data type, device and offload follow ComfyUI's start options, as for a checkpoint.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture: got {architecture!r}, expected one of {', '.join(ARCHITECTURES)}.")
    tensors, metadata = read_weights(path)
    vae = MiniVAE(_part(tensors, "autoencoder."))
    if architecture == "transformer":
        tensors, metadata = read_weights(transformer, TRANSFORMER_FORMAT)
        model = _load_transformer(tensors, metadata, transformer)
        pooled = {kind: {"pooled_output": tensors[f"pooled.{kind}"].clone()} for kind in KINDS}
        return model, vae, {kind: [[tensors[f"context.{kind}"].clone(), pooled[kind]]] for kind in KINDS}
    return _load_model(tensors, metadata, path), vae, {kind: [[tensors[f"context.{kind}"].clone(), {}]] for kind in KINDS}


def _load_model(tensors: dict, metadata: dict, path: Path) -> ModelPatcher:
    config = MiniConfig(json.loads(metadata["unet"]), MiniLatentFormat(**_part(tensors, "latent.")), tensors["context.empty"])
    return _patcher(config, _part(tensors, "unet."), (_load_model_patcher, (path,)))


def _load_transformer(tensors: dict, metadata: dict, path: Path) -> ModelPatcher:
    latent = MiniLatentFormat(**_part(tensors, "latent."))
    config = MiniTransformerConfig(json.loads(metadata["transformer"]), latent, tensors["context.empty"])
    return _patcher(config, _part(tensors, "transformer."), (_load_transformer_patcher, (path,)))


def _patcher(config: MiniConfig | MiniTransformerConfig, weights: dict, again: tuple) -> ModelPatcher:
    """The network of `config` with `weights` in the data type that the device likes; `again`: how core reloads it."""
    device = comfy.model_management.get_torch_device()
    parameters = sum(tensor.numel() for tensor in weights.values())
    dtype = comfy.model_management.unet_dtype(
        device=device, model_params=parameters, supported_dtypes=config.supported_inference_dtypes
    )
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes))

    offload = comfy.model_management.unet_offload_device()
    model = config.get_model({}, device=offload)
    model.diffusion_model.load_state_dict(weights)
    patcher = ModelPatcher(model, load_device=device, offload_device=offload)
    patcher.cached_patcher_init = again
    return patcher


def _load_model_patcher(path: Path, disable_dynamic: bool = False) -> ModelPatcher:
    return _load_model(*read_weights(path), path)


def _load_transformer_patcher(path: Path, disable_dynamic: bool = False) -> ModelPatcher:
    return _load_transformer(*read_weights(path, TRANSFORMER_FORMAT), path)


def _load_vae_patcher(disable_dynamic: bool = False) -> ModelPatcher:
    return MiniVAE(_part(read_weights()[0], "autoencoder.")).patcher


def _part(tensors: dict, prefix: str) -> dict:
    """Tensors whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
