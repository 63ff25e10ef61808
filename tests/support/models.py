"""Correctly shaped small models with random weights, made by ComfyUI's own classes.

    tiny_unet("sd15")                 MODEL, 12 decoder blocks, attention in 3..11, 2.4 M parameters
    tiny_unet("sd20", prediction="v") the same with linear transformer projections, v-prediction
    tiny_unet("sdxl")                 MODEL, 9 decoder blocks, attention in 0..5, needs pooled output ("y")
    tiny_cond(model, tokens=7)        a CONDITIONING that fits it (pooled_output included for sdxl)
    smooth_eps(model)                 the same MODEL with a smooth, invertible noise prediction
    real_state_dict("sd15")           a state dict of width 320 that ComfyUI's detection recognises (slow)
    load_real("sd15")                 MODEL through comfy.sd.load_diffusion_model_state_dict (slow)

A random U-Net is chaotic: use it for the exactness of a step. Round trips (inversion, reconstruction)
need `smooth_eps` or the mini model. Model outputs come back as float32 whatever the weights are
(ComfyUI casts them); call `model.model.diffusion_model` itself for float64 comparisons.
"""

from __future__ import annotations

import contextlib
import functools
import math

import comfy.latent_formats
import comfy.memory_management
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch

FAMILIES = ("sd15", "sd20", "sdxl")
PREDICTIONS = {
    "eps": comfy.model_base.ModelType.EPS,
    "v": comfy.model_base.ModelType.V_PREDICTION,
    "flow": comfy.model_base.ModelType.FLOW,
}

# num_res_blocks, transformer depth of each encoder block, of the middle, of each decoder block (in the
# order ComfyUI keeps them: highest resolution first, taken from the end while the decoder is built)
_LAYOUTS = {
    "sd15": ([2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0], 1, [1] * 9 + [0] * 3),
    "sd20": ([2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0], 1, [1] * 9 + [0] * 3),
    "sdxl": ([2, 2, 2], [0, 0, 1, 1, 2, 2], 2, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
}


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Fill every parameter: norms near identity, other weights normal with variance 1/fan_in, small biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if name.endswith("bias"):
            value = 0.02 * noise
        elif parameter.ndim == 1:  # the scale of a norm
            value = 1 + 0.1 * noise
        else:
            value = noise / math.sqrt(parameter[0].numel())
        with torch.no_grad():
            parameter.copy_(value)


def tiny_unet(
    family: str = "sd15",
    prediction: str = "eps",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    channels: int = 32,
    channel_mult: tuple[int, ...] | None = None,
    context_dim: int = 32,
    heads: int = 2,
    in_channels: int = 4,
    out_channels: int | None = None,
    cast: torch.dtype | None = None,
    **options,
) -> comfy.model_patcher.ModelPatcher:
    """A small random U-Net with the block positions of `family` as a MODEL for the device under test.

    Latents are (B, in_channels, h, w) with any h, w >= 8; contexts (B, tokens, context_dim). `channels`
    must be a multiple of 32 (group norm), heads divide it. sdxl takes adm vectors of 2816 through
    SDXL's own `encode_adm`, so its conditioning needs a pooled_output of 1280 (see `tiny_cond`). `options` are more
    of UNetModel's, such as resblock_updown=True.
    """
    res_blocks, depth, middle, depth_output = _LAYOUTS[family]
    mult = channel_mult or (1, 1, 2, 2)[: len(res_blocks)]

    class Config(comfy.supported_models_base.BASE):
        unet_extra_config = {"num_heads": heads, "num_head_channels": -1}
        latent_format = comfy.latent_formats.SDXL if family == "sdxl" else comfy.latent_formats.SD15
        memory_usage_factor = 1.0

        def model_type(self, state_dict, prefix=""):
            return PREDICTIONS[prediction]

        def get_model(self, state_dict, prefix="", device=None):
            make = comfy.model_base.SDXL if family == "sdxl" else comfy.model_base.BaseModel
            return make(self, model_type=self.model_type(state_dict), device=device)

    config = Config(
        {
            "image_size": 32,
            "use_checkpoint": False,
            "use_spatial_transformer": True,
            "legacy": False,
            "in_channels": in_channels,
            "out_channels": out_channels or in_channels,
            "model_channels": channels,
            "num_res_blocks": list(res_blocks),
            "channel_mult": list(mult),
            "transformer_depth": list(depth),
            "transformer_depth_middle": middle,
            "transformer_depth_output": list(depth_output),
            "context_dim": context_dim,
            "use_linear_in_transformer": family != "sd15",
            **({"num_classes": "sequential", "adm_in_channels": 2816} if family == "sdxl" else {"adm_in_channels": None}),
            **options,
        }
    )
    config.set_inference_dtype(dtype, cast)
    with weights_at_once():
        model = config.get_model({}, device=torch.device("cpu"))
    randomize(model.diffusion_model, seed)
    return as_model(model)


def as_model(model: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """The MODEL as core's loaders make it: computing on the device under test, at rest in main memory."""
    return comfy.model_patcher.CoreModelPatcher(
        model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )


@contextlib.contextmanager
def weights_at_once():
    """Under dynamic VRAM core's layers have no weights before a state dict is loaded; within this block they do."""
    enabled = comfy.memory_management.aimdo_enabled
    comfy.memory_management.aimdo_enabled = False
    try:
        yield
    finally:
        comfy.memory_management.aimdo_enabled = enabled


def tiny_cond(model: comfy.model_patcher.ModelPatcher, tokens: int = 7, seed: int = 0, batch: int = 1) -> list:
    """A random CONDITIONING: [[(batch, tokens, context_dim), extras]], with pooled_output for SDXL models."""
    generator = torch.Generator().manual_seed(1000 + seed)
    width = model.model.model_config.unet_config["context_dim"]
    context = torch.randn(batch, tokens, width, generator=generator)
    extras = {}
    if isinstance(model.model, comfy.model_base.SDXL):
        extras["pooled_output"] = torch.randn(batch, 1280, generator=generator)
    return [[context, extras]]


def smooth_eps(model: comfy.model_patcher.ModelPatcher, strength: float = 0.3) -> comfy.model_patcher.ModelPatcher:
    """A clone whose prediction is smooth, non-linear, spatially mixing and conditioned, and never runs the U-Net.

    eps = u * sigma / (0.25 + sigma^2) * sqrt(1 + sigma^2) + strength * tanh(neighbours of u + mean(context)),
    u = x / sqrt(1 + sigma^2). The first term is exact for Gaussian data of standard deviation 0.5, so
    trajectories behave like a real model's; `strength` sets how hard the inversion is. Prediction type
    does not matter: the wrapper returns the denoised latent.
    """

    def predict(apply_model, args):
        x, sigma = args["input"], args["timestep"].view(-1, *[1] * (args["input"].ndim - 1))
        scale = (1 + sigma**2).sqrt()
        u = x / scale
        neighbours = (u.roll(1, -1) - u.roll(-1, -2) + u.roll(1, 1)) * 0.5
        context = args["c"].get("c_crossattn")
        if context is not None:
            neighbours = neighbours + context.mean(dim=(1, 2)).to(x).view(-1, *[1] * (x.ndim - 1))
        eps = u * sigma * scale / (0.25 + sigma**2) + strength * torch.tanh(neighbours)
        return x - sigma * eps

    smooth = model.clone()
    smooth.set_model_unet_function_wrapper(predict)
    return smooth


@functools.lru_cache(maxsize=2)
def real_state_dict(family: str, dtype: torch.dtype = torch.float16, seed: int = 0) -> dict[str, torch.Tensor]:
    """A U-Net state dict of width 320 that comfy.model_detection takes for `family`. Do not modify; cached.

    family: sd15, sd20, sd20-v or sdxl. All resolutions have the base width, and SDXL's middle and decoder
    have transformers of depth 1: 111-160 M parameters instead of 860-2567 M, block ids unchanged. Keys carry
    no prefix: add "model.diffusion_model." for a checkpoint.
    """
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    res_blocks, depth, middle, depth_output = _LAYOUTS[family.removesuffix("-v")]
    options = {"sd15": (768, False), "sd20": (1024, True), "sd20-v": (1024, True), "sdxl": (2048, True)}
    context_dim, linear = options[family]
    adm = {}
    if family == "sdxl":
        depth, middle, depth_output = [0, 0, 2, 2, 10, 10], 1, [0, 0, 0] + [1] * 6
        adm = {"num_classes": "sequential", "adm_in_channels": 2816}
    network = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=list(res_blocks),
        channel_mult=[1] * len(res_blocks), transformer_depth=list(depth), transformer_depth_middle=middle,
        transformer_depth_output=list(depth_output), use_spatial_transformer=True, context_dim=context_dim,
        use_linear_in_transformer=linear, num_head_channels=64, legacy=False, dtype=dtype, **adm,
    )
    randomize(network, seed)
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    if family == "sd20-v":  # how ComfyUI tells v-prediction: this bias has a large spread
        key = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
        state[key] = torch.linspace(-1, 1, state[key].numel()).to(dtype)
    return state


def load_real(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """`real_state_dict(family)` through comfy.sd.load_diffusion_model_state_dict: detection, config and all."""
    model = comfy.sd.load_diffusion_model_state_dict(dict(real_state_dict(family, seed=seed)), {"dtype": dtype})
    if model is None:
        raise RuntimeError(f"ComfyUI did not recognise the {family} state dict")
    return model
