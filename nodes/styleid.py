"""StyleID nodes (Chung, Hyun, Heo 2024): latent AdaIN and style injection."""

from __future__ import annotations

from .algorithms.references import SCHEDULES
from .host.checks import checked
from .host.compatibility import io
from .host.trajectories.latent_adain import EACH, STATISTICS, latent_adain, noise_adain
from .host.trajectories.noise import latent_output, no_output
from .host.injections.style import inject_style
from .sockets import FeaturesSocket

CATEGORY = "pastiche/styleid"


class LatentAdaIN(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheLatentAdaIN",
            display_name="Latent AdaIN",
            category=CATEGORY,
            description="Gives one latent the channel means and deviations of another. Between the inverted latents of "
            "a photo and a painting it carries over colour and tone.",
            search_aliases=["adain", "adaptive instance normalization", "color transfer", "styleid"],
            inputs=[
                io.MultiType.Input(
                    "content",
                    [io.Latent, io.Noise],
                    tooltip="The latent that keeps its shapes: the content's noise from DDIM Inversion, or its NOISE.",
                ),
                io.MultiType.Input(
                    "style",
                    [io.Latent, io.Noise],
                    tooltip="The latent whose statistics are taken: the style's noise, or its NOISE if content is one. Any size.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="0 leaves the content as it is, 1 is the paper's."
                ),
                io.Mask.Input("content_mask", optional=True, tooltip="Restyle only here, with statistics of this region."),
                io.Mask.Input("style_mask", optional=True, tooltip="Take the style's statistics from this region only."),
                io.Float.Input(
                    "epsilon", default=0.0, min=0.0, max=1.0, step=1e-6, round=1e-8, optional=True, advanced=True,
                    tooltip="Added to the content's deviations before dividing by them, in the latents' own units: StyleID's diffusers code does.",
                ),
                io.Combo.Input(
                    "statistics", options=list(STATISTICS), default=EACH, optional=True, advanced=True,
                    tooltip="each: every picture of the batch has its own. batch: one mean and deviation for all of them, so that the "
                    "frames of a film keep their differences and do not flicker.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The sampler's latent_image for StyleID."),
                io.Noise.Output(display_name="NOISE", tooltip="For SamplerCustomAdvanced, where content and style are NOISE."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, content, style, strength=1.0, content_mask=None, style_mask=None, epsilon=0.0, statistics=EACH
    ) -> io.NodeOutput:
        if isinstance(content, dict) and isinstance(style, dict):
            missing = no_output("There is no NOISE where content and style are latents: connect DDIM Inversion's NOISE to both.")
            return io.NodeOutput(latent_adain(content, style, strength, content_mask, style_mask, epsilon, statistics), missing)
        noise = noise_adain(content, style, strength, content_mask, style_mask, epsilon, statistics)
        return io.NodeOutput(latent_output(noise, {"samples": noise.as_latent()}), noise)


class StyleInjection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheStyleInjection",
            display_name="Style Injection (StyleID)",
            category=CATEGORY,
            description="Lets self-attention look at the style image instead of itself: keys and values come from the "
            "style, queries stay near the content's. Sample the content's noise with it, no prompt, cfg 1.",
            search_aliases=["styleid", "style transfer", "style reference", "kv injection", "attention", "style injection in diffusion"],
            inputs=[
                io.Model.Input("model", tooltip="The model that sampling uses; the checkpoint that the features came from."),
                FeaturesSocket.Input("style", tooltip="Self-attention features of the style's trajectory. Its size may differ."),
                FeaturesSocket.Input(
                    "content",
                    optional=True,
                    tooltip="Self-attention features of the content, for query preservation; left out, gamma has no effect.",
                ),
                io.Float.Input(
                    "gamma",
                    default=0.75,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Query preservation: higher keeps more of the content's structure; 0.3 is the paper's high-style setting.",
                ),
                io.Float.Input(
                    "temperature",
                    default=1.5,
                    min=0.1,
                    max=10.0,
                    step=0.05,
                    tooltip="Multiplies the attention logits; above 1 sharpens what injection blurs.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Blends with the model's own attention. 1 is the paper's and the fastest: any other value "
                    "computes the attention twice.",
                ),
                io.String.Input(
                    "layers",
                    default="auto",
                    tooltip='Decoder layers to inject into, for example "6-11" or "7-11"; auto is the paper\'s 6-11 on SD1/SD2 '
                    "and the finest attention level elsewhere.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True, tooltip="Share of the schedule at which injection begins."
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True, tooltip="Share of the schedule at which injection ends."
                ),
                io.Float.Input(
                    "gamma_end", default=0.375, min=0.0, max=1.0, step=0.005, optional=True, advanced=True,
                    tooltip="gamma at the last step, when schedule is not constant: structure first, style later.",
                ),
                io.Combo.Input(
                    "schedule", options=list(SCHEDULES), default="constant", optional=True, advanced=True,
                    tooltip="How gamma goes to gamma_end along the sampling steps; constant is StyleID.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Restyle only here, softly; computes the attention twice. One mask, or one for each sample."
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The patched model, for any core sampler.")],
        )

    @classmethod
    @checked
    def execute(
        cls, model, style, content=None, gamma=0.75, temperature=1.5, strength=1.0, layers="auto",
        start_percent=0.0, end_percent=1.0, mask=None, gamma_end=0.375, schedule="constant",
    ) -> io.NodeOutput:
        return io.NodeOutput(
            inject_style(
                model, style, content, gamma, temperature, strength, layers, start_percent, end_percent, mask, gamma_end, schedule
            )
        )
