"""The node of the embedded demo model."""

from comfy_api.latest import io

from .host.networks.mini import KINDS, load_mini


class LoadMini(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheLoadMini",
            display_name="Load Mini Model",
            category="pastiche/loaders",
            description="A small latent diffusion model that comes with the pack, for demos and tests: SD1.x's schedule "
            "and block positions, 8x smaller latents of 16 channels, prompts replaced by a kind of picture. "
            "Good enough to invert and restyle pictures, not to invent them.",
            search_aliases=["mini", "demo model", "test model", "embedded model", "tiny diffusion"],
            inputs=[
                io.Combo.Input(
                    "kind", options=list(KINDS), default="photo",
                    tooltip="What the conditioning says the picture is; empty is the unconditional one, for guidance and inversion.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The mini U-Net: layers are numbered as in SD1.5."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder. No other VAE fits its latents."),
                io.Conditioning.Output(display_name="conditioning", tooltip="The chosen kind, where a prompt would go."),
            ],
        )

    @classmethod
    def execute(cls, kind) -> io.NodeOutput:
        model, vae, conditionings = load_mini()
        return io.NodeOutput(model, vae, conditionings[kind])
