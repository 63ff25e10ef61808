"""Loads unconditional pixel-space diffusion models."""

from __future__ import annotations

from .host.checks import checked
from .host.compatibility import io
from .host.networks.unconditional import DTYPES
from .host.networks.unconditional_checkpoint import BETAS, LONGEST, Reading
from .host.networks.unconditional_files import list_models, load_model
from .host.networks.unconditional_layouts import HEADS, ORDERS


class LoadUnconditional(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheLoadUnconditional",
            display_name="Load Unconditional DDPM",
            category="pastiche/loaders",
            description="Loads from models/diffusers, as a model that works on pixels: a diffusers UNet2DModel folder "
            "(google/ddpm-celebahq-256, ddpm-church-256, ddpm-bedroom-256, ...), or one file of ADM, P2, iDDPM or the original "
            "DDPM.",
            search_aliases=["ddpm", "unet2dmodel", "unconditional", "diffusers", "pixel space", "injectfusion", "adm",
                            "guided diffusion", "improved diffusion", "p2 weighting", "afhq", "ffhq", "metfaces"],
            inputs=[
                io.Combo.Input(
                    "folder", options=list_models(),
                    tooltip="In models/diffusers: a folder (config.json, .safetensors, scheduler_config.json), or a file of "
                    "weights, .safetensors or .pt, in the layout of ADM/P2/iDDPM or the original DDPM.",
                ),
                io.Combo.Input(
                    "weight_dtype", options=list(DTYPES), default="default", optional=True, advanced=True,
                    tooltip="Default is single precision; half precision saves memory.",
                ),
                io.Boolean.Input(
                    "clip_denoised", default=False, optional=True, advanced=True,
                    tooltip="Clamp every predicted image to the valid range, as DDPM sampling does. "
                    "Leave off for inversion, which it makes irreversible.",
                ),
                io.Combo.Input(
                    "heads", options=list(HEADS), default="auto", optional=True, advanced=True,
                    tooltip="Files only: attention heads, which weights do not tell. auto: as the file notes, else 64 channels "
                    "each for ADM and P2, 4 heads for iDDPM (1 for its LSUN models).",
                ),
                io.Combo.Input(
                    "betas", options=list(BETAS), default="auto", optional=True, advanced=True,
                    tooltip="Files only: noise schedule. auto: as the file notes, else linear, cosine for iDDPM's ImageNet and "
                    "CIFAR models.",
                ),
                io.Int.Input(
                    "timesteps", default=0, min=0, max=LONGEST, optional=True, advanced=True,
                    tooltip="Files only: length of the schedule. 0: as the file notes, else 1000, 4000 for iDDPM's ImageNet and "
                    "CIFAR models.",
                ),
                io.Combo.Input(
                    "attention_order", options=list(ORDERS), default="auto", optional=True, advanced=True,
                    tooltip="Files only: how rows of the attention's weights are sorted. auto: as the file notes, else by head; "
                    "the other is guided-diffusion's use_new_attention_order.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Its latents are images: 3 channels in -1..1, full size."),
                io.Vae.Output(display_name="vae", tooltip="Passes pixels through, for VAE Encode and VAE Decode."),
                io.Conditioning.Output(display_name="conditioning", tooltip="Empty; for every conditioning input, at cfg 1."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, folder, weight_dtype="default", clip_denoised=False, heads="auto", betas="auto", timesteps=0,
                attention_order="auto") -> io.NodeOutput:
        return io.NodeOutput(*load_model(folder, weight_dtype, clip_denoised, Reading(heads, attention_order, betas, timesteps)))
