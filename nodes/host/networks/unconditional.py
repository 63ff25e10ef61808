"""Loads an unconditional diffusers `UNet2DModel` folder as a ComfyUI MODEL that works on pixels."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any, Callable

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import torch
from safetensors import SafetensorError

from ..checks import is_finite
from .unconditional_checkpoint import LONGEST
from .unconditional_folders import brief, check_sizes, compare_shapes, find_folder, read_json, weight_shapes
from .unconditional_unet import UnconditionalUNet, with_core_operations

DTYPES = {"default": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler",
              "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "clip_sample_range")
WIDEST_SIGMA = 4518.0  # what core gives a schedule that ends at zero signal (alpha_bar 4.9e-8)


class PixelSpace(comfy.latent_formats.LatentFormat):
    """The latent is the image: 3 channels in -1..1, one cell a pixel."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class UnconditionalConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {"disable_unet_model_creation": True, "in_channels": 3}
    latent_format = PixelSpace


class UnconditionalModel(comfy.model_base.BaseModel):
    """A BaseModel around a pixel-space U-Net. It reads no conditioning; whatever is connected changes nothing."""

    def __init__(self, config: UnconditionalConfig, network: torch.nn.Module, sampling: torch.nn.Module):
        super().__init__(config, comfy.model_base.ModelType.EPS)
        self.diffusion_model = network
        self.model_sampling = sampling
        comfy.model_management.archive_model_dtypes(network)

    def extra_conds(self, **kwargs) -> dict:
        return {}


def load_unconditional(name: str, weight_dtype: str = "default", clip_denoised: bool = False) -> tuple:
    """(MODEL, VAE, CONDITIONING) of a diffusers UNet2DModel folder.

    weight_dtype: a key of DTYPES; "default" is float32 unless ComfyUI was started with another.
    clip_denoised: clamp every predicted image to the schedule's clip_sample_range, as DDPM sampling does;
    an inversion cannot be undone with it. Raises ValueError for folders that are not such a model.
    """
    folder = find_folder(name)
    dtype = choose_dtype(weight_dtype)
    with warnings.catch_warnings():  # what diffusers imports adds filters for the whole process
        network = _load_network(folder, dtype)
        sampling = make_sampling(read_json(_scheduler_path(folder), "scheduler_config.json"), clip_denoised)

    def wrap(operations: Any) -> UnconditionalUNet:
        return UnconditionalUNet(with_core_operations(network, operations), dtype)

    reload = _load_patcher, (name, weight_dtype, clip_denoised)
    return assemble(wrap, dtype, sampling, network.config.block_out_channels[0], reload)


def assemble(
    wrap: Callable[[Any], torch.nn.Module], dtype: torch.dtype, sampling: torch.nn.Module, width: int, reload: tuple
) -> tuple:
    """(MODEL, VAE, CONDITIONING) of a pixel-space network.

    wrap: takes comfy.ops operations, gives the diffusion_model; width: channels on the image's own grid;
    reload: (function, arguments) that make the MODEL again.
    """
    device = comfy.model_management.get_torch_device()
    cast = comfy.model_management.unet_manual_cast(dtype, device)
    config = UnconditionalConfig({})
    config.set_inference_dtype(dtype, cast)
    # Relative to SD1.x: its widest level has 320 channels for each latent cell.
    config.memory_usage_factor = width / 320
    model = UnconditionalModel(config, wrap(comfy.ops.pick_operations(dtype, cast)), sampling)
    model.eval().requires_grad_(False)
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )
    patcher.cached_patcher_init = reload
    # Single precision: half would quantise the pixels.
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    return patcher, vae, [[None, {}]]


def _load_patcher(name: str, weight_dtype: str, clip_denoised: bool, disable_dynamic: bool = False) -> Any:
    return load_unconditional(name, weight_dtype, clip_denoised)[0]


def make_sampling(config: dict, clip_denoised: bool = False) -> torch.nn.Module:
    """ComfyUI's model_sampling for a diffusers scheduler_config: its betas and what the network predicts."""
    from diffusers import DDPMScheduler

    kind = config.get("_class_name", "DDPMScheduler")
    prediction = config.get("prediction_type", "epsilon")
    parametrisations = {
        "epsilon": comfy.model_sampling.EPS,
        "v_prediction": comfy.model_sampling.V_PREDICTION,
        "sample": comfy.model_sampling.X0,
    }
    if kind not in SCHEDULERS or str(prediction) not in parametrisations:
        raise ValueError(
            f"scheduler_config.json names {brief(kind)} with prediction_type {brief(prediction)}; this node knows the DDPM family "
            f"({', '.join(SCHEDULERS)}) with {', '.join(parametrisations)}."
        )
    _check_schedule(config)
    try:
        schedule = DDPMScheduler.from_config({key: config[key] for key in SCHEDULE if key in config})
        alphas = schedule.alphas_cumprod.double()
        limit = float(schedule.config.clip_sample_range) if clip_denoised else None
    except Exception as error:  # whatever diffusers' arithmetic says of numbers that are none
        raise ValueError(f"scheduler_config.json: diffusers makes no schedule of it ({error}). Download the folder again.") from error
    if not bool(((alphas >= 0) & (alphas <= 1)).all()) or not bool((alphas.diff() <= 0).all()):
        raise ValueError("scheduler_config.json: its betas are no noise schedule; the signal's share must fall from 1 to 0. Download the folder again.")
    return discrete_sampling(alphas, parametrisations[prediction], limit)


def discrete_sampling(alphas: torch.Tensor, parametrisation: type, limit: float | None = None) -> torch.nn.Module:
    """ComfyUI's model_sampling of a schedule's alpha_bar, (T); predicted images are clamped to +-limit where one is given."""

    class UnconditionalSampling(comfy.model_sampling.ModelSamplingDiscrete, parametrisation):
        def calculate_denoised(self, sigma, model_output, model_input):
            denoised = super().calculate_denoised(sigma, model_output, model_input)
            return denoised if limit is None else denoised.clamp(-limit, limit)

        def percent_to_sigma(self, percent):  # core's counts to 999 whatever the schedule's length
            return super().percent_to_sigma(1 - (1 - percent) * (self.num_timesteps - 1) / 999)

    sampling = UnconditionalSampling()
    alphas = alphas.double()
    sampling.set_sigmas(((1 - alphas) / alphas).sqrt().clamp(max=WIDEST_SIGMA))
    sampling.num_timesteps = len(alphas)
    return sampling


def _load_network(folder: Path, dtype: torch.dtype) -> Any:
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(
            "Load Unconditional DDPM needs the diffusers package: run `pip install --no-deps diffusers` in "
            f"ComfyUI's Python environment and restart ComfyUI ({error})."
        ) from error
    place = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    config = read_json(place / "config.json", "config.json")
    _check_config(config)
    weights = sorted(place.glob("*.safetensors"))
    if not weights:
        raise ValueError(_no_weights(place))
    for index in place.glob("*.index.json"):
        read_json(index, index.name)
    shapes = weight_shapes(weights)
    check_sizes(config, shapes)
    try:
        with torch.device("meta"):  # names and shapes, no memory
            expected = UNet2DModel.from_config(config).state_dict()
    except Exception as error:  # whatever diffusers' constructors say of settings that do not fit each other
        raise ValueError(f"config.json: diffusers makes no network of it ({error}). Download the folder again.") from error
    compare_shapes({key: tuple(tensor.shape) for key, tensor in expected.items()}, shapes, weights[0].name)
    fp16 = all(".fp16." in file.name for file in weights)
    try:
        network = UNet2DModel.from_pretrained(
            str(place), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False,
            torch_dtype=dtype, variant="fp16" if fp16 else None,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{weights[0].name}: diffusers cannot load it ({error}). Download the folder again.") from error
    ruined = next((key for key, tensor in network.state_dict().items() if not is_finite(tensor)), None)
    if ruined is not None:
        raise ValueError(f"{weights[0].name}: {ruined} holds NaN or infinite values in {str(dtype).removeprefix('torch.')}. Download it again.")
    logging.info("Pastiche: loaded %s, %.1f M parameters.", folder.name, network.num_parameters() / 1e6)
    return network


def _check_schedule(config: dict) -> None:
    """Raises ValueError for a schedule that would take endless memory, before it is made."""
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= LONGEST:
        raise ValueError(f"scheduler_config.json: num_train_timesteps is {brief(steps)}, expected 1 to {LONGEST}.")
    if betas is not None and not (isinstance(betas, list) and 1 <= len(betas) <= LONGEST):
        raise ValueError(f"scheduler_config.json: trained_betas must be a list of 1 to {LONGEST} numbers; it is {brief(betas)}.")
    for key in ("beta_start", "beta_end", "clip_sample_range"):
        value = config.get(key)
        if value is not None and not (isinstance(value, float) and math.isfinite(value) or isinstance(value, int) and abs(value) <= LONGEST):
            raise ValueError(f"scheduler_config.json: {key} is {brief(value)}, expected a number.")


def _check_config(config: dict) -> None:
    expected = {"_class_name": "UNet2DModel", "in_channels": 3, "out_channels": 3, "time_embedding_type": "positional",
                "mid_block_type": "UNetMidBlock2D", "class_embed_type": None, "num_class_embeds": None}
    missing = {"in_channels": 3, "out_channels": 3, "time_embedding_type": "positional",
               "mid_block_type": "UNetMidBlock2D"}
    for key, value in expected.items():
        found = config.get(key, missing.get(key))
        if found != value:
            raise ValueError(
                f"config.json: {key} is {brief(found)}, expected {value}. This node loads unconditional RGB DDPM models "
                "such as google/ddpm-celebahq-256, google/ddpm-church-256 or google/ddpm-cifar10-32."
            )
    blocks = [block for key in ("down_block_types", "up_block_types") if isinstance(config.get(key), list) for block in config[key]]
    skipping = [block for block in blocks if "Skip" in str(block)]
    if skipping:
        raise ValueError(f"config.json: {skipping[0]} belongs to score-SDE models, which this node does not load.")


def _no_weights(place: Path) -> str:
    pickles = sorted(file.name for file in place.glob("*.bin"))
    if not pickles:
        return f"{place.name} holds no .safetensors file. Download diffusion_pytorch_model.safetensors into it."
    return (
        f"{place.name} holds only {pickles[0]}, a pickle file, which can run code when it is read. Convert it once: "
        f"python -c \"from diffusers import UNet2DModel as U; U.from_pretrained('{place.name}', use_safetensors=False)"
        f".save_pretrained('{place.name}')\" in the folder above it, then pick it again."
    )


def _scheduler_path(folder: Path) -> Path:
    inner = folder / "scheduler" / "scheduler_config.json"
    return inner if inner.is_file() else folder / "scheduler_config.json"


def choose_dtype(weight_dtype: str) -> torch.dtype:
    if DTYPES[weight_dtype] is not None:
        return DTYPES[weight_dtype]
    dtype = comfy.model_management.unet_dtype(supported_dtypes=[torch.float32])
    return dtype if dtype in DTYPES.values() else torch.float32
