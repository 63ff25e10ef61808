"""The node of the embedded demo models."""

from __future__ import annotations

from .host.checks import checked
from .host.compatibility import io
from .host.networks.mini import ARCHITECTURES, KINDS, load_mini


class LoadMini(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheLoadMini",
            display_name="Load Mini Model",
            category="pastiche/loaders",
            description="A small latent diffusion model that comes with the pack, for demos and tests: SD1.x's schedule "
            "and block positions or a small Flux, 8x smaller latents of 16 channels, prompts replaced by a kind of picture. "
            "Good enough to invert and restyle pictures, not to invent them.",
            search_aliases=["mini", "demo model", "test model", "embedded model", "tiny diffusion", "flow transformer"],
            inputs=[
                io.Combo.Input(
                    "kind", options=list(KINDS), default="photo",
                    tooltip="What the conditioning says the picture is; empty is the unconditional one, for guidance and inversion.",
                ),
                io.Combo.Input(
                    "architecture", options=list(ARCHITECTURES), default="unet", optional=True,
                    tooltip="unet: as SD1.5, predicts noise. transformer: as Flux, rectified flow, at its best at 128 px. "
                    "Both use the same VAE.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The mini U-Net, layers numbered as in SD1.5, or the mini transformer, blocks as in Flux."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder. No other VAE fits its latents."),
                io.Conditioning.Output(display_name="conditioning", tooltip="The chosen kind, where a prompt would go."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, kind, architecture="unet") -> io.NodeOutput:
        model, vae, conditionings = load_mini(architecture=architecture)
        return io.NodeOutput(model, vae, conditionings[kind])
