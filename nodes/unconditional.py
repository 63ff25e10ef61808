"""Loads unconditional pixel-space diffusion models."""

from __future__ import annotations

from comfy_api.latest import io

from .host.networks.unconditional import DTYPES, list_folders, load_unconditional


class LoadUnconditional(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheLoadUnconditional",
            display_name="Load Unconditional DDPM (diffusers)",
            category="pastiche/loaders",
            description="Loads a diffusers UNet2DModel folder from models/diffusers (google/ddpm-celebahq-256, "
            "ddpm-church-256, ddpm-bedroom-256, ddpm-cifar10-32, ...) as a model that works on pixels.",
            search_aliases=["ddpm", "unet2dmodel", "unconditional", "diffusers", "pixel space", "injectfusion"],
            inputs=[
                io.Combo.Input(
                    "folder", options=list_folders(),
                    tooltip="A folder in models/diffusers: config.json, .safetensors, scheduler_config.json.",
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
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Its latents are images: 3 channels in -1..1, full size."),
                io.Vae.Output(display_name="vae", tooltip="Passes pixels through, for VAE Encode and VAE Decode."),
                io.Conditioning.Output(display_name="conditioning", tooltip="Empty; for every conditioning input, at cfg 1."),
            ],
        )

    @classmethod
    def execute(cls, folder, weight_dtype="default", clip_denoised=False) -> io.NodeOutput:
        return io.NodeOutput(*load_unconditional(folder, weight_dtype, clip_denoised))
