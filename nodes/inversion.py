"""Inversion nodes: from an image's latent to the noise that reproduces it, and the proof that it does."""

from __future__ import annotations

from comfy_api.latest import ui

from .host.checks import checked
from .host.compatibility import io
from .host.features.capture import MEMORY, PRECISION
from .host.features.on_the_way import invert_several
from .host.trajectories.clean_level import CLEAN_LEVELS
from .host.trajectories.ddim_sampler import ddim_sampler
from .host.trajectories.inversion import DEFAULT_SCHEME, SCHEMES, TOLERANCE, inverted_noise
from .host.trajectories.midpoint_sampler import midpoint_sampler
from .host.trajectories.noise import latent_output, no_output
from .host.trajectories.report import inversion_report
from .sockets import FeaturesSocket, TrajectorySocket

CATEGORY = "pastiche/inversion"


class DDIMInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheDDIMInversion",
            display_name="DDIM Inversion",
            category=CATEGORY,
            description="Finds the noise from which deterministic sampling returns to this image. Connect the same "
            "SIGMAS here and to the sampler, and sample with sampler euler, cfg 1: the noise into SamplerCustomAdvanced, "
            "or the latent into SamplerCustom with add_noise off (not on flow models).",
            search_aliases=["invert", "inversion", "null text", "unsample", "noise", "styleid", "real image editing"],
            inputs=[
                io.Model.Input("model", tooltip="The model to invert with; sample with the same one."),
                io.Latent.Input("latent", tooltip="The encoded image(s) or video, from VAE Encode."),
                io.Sigmas.Input("sigmas", tooltip="The sampling schedule (descending, ending in 0), from Basic Scheduler."),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="What the model is told while inverting; the papers use an empty prompt. "
                    "Left out, a zero context (or the mini model's own empty prompt) is used.",
                ),
                io.Combo.Input(
                    "scheme",
                    options=list(SCHEMES),
                    default=DEFAULT_SCHEME,
                    tooltip="predicted: one evaluation a step, guessed from the step before. fixed_point: goes on until sampling "
                    "undoes each step within the tolerance. next: the entered noise level (diffusers). current: the left one "
                    "(CompVis). midpoint: second order, for the Midpoint Sampler.",
                ),
                io.Int.Input(
                    "iterations",
                    default=5,
                    min=0,
                    max=50,
                    tooltip="fixed_point only: the most evaluations a step after the first; it stops earlier at the tolerance. "
                    "0 is the same as next.",
                ),
                io.Int.Input(
                    "substeps",
                    default=1,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="Forward steps per sampling step; only the schedule's own levels are kept. "
                    "DiffStyler's 1000-step inversion is 50 sampling steps with 20 substeps.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=TOLERANCE,
                    optional=True,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=1e-8,
                    advanced=True,
                    tooltip="fixed_point only: a step is done when what sampling would miss of it, over the latent's length, "
                    "is below this. 0 goes to rounding.",
                ),
                io.String.Input(
                    "streams",
                    default="self_attention",
                    optional=True,
                    advanced=True,
                    tooltip="What the features output holds, as in Capture Features: self_attention (StyleID), h_space "
                    "(InjectFusion), residual, self_attention_qk, cross_attention (DiffStyler).",
                ),
                io.String.Input(
                    "layers", default="auto", optional=True, advanced=True, tooltip='Decoder layers of the features, for example "6-11".'
                ),
                io.Combo.Input(
                    "memory",
                    options=list(MEMORY),
                    default="recompute",
                    optional=True,
                    advanced=True,
                    tooltip="ram, vram, disk: features are kept as the inversion sees them, without evaluating again. "
                    "recompute: nowhere; they are made beside the sampling.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISION),
                    default="half",
                    optional=True,
                    advanced=True,
                    tooltip="Of the kept features: half stores 16-bit numbers, full 32-bit ones.",
                ),
                io.Combo.Input(
                    "clean_level",
                    options=list(CLEAN_LEVELS),
                    default="sigma 0",
                    optional=True,
                    advanced=True,
                    tooltip="The noise level that the encoded picture counts as. sigma 0 is ComfyUI's; the papers' codes begin at a "
                    "timestep, see docs/parity.md.",
                ),
                io.Latent.Input(
                    "style",
                    optional=True,
                    tooltip="A second picture, or several, for the style outputs: inverted in the same batch where the sizes agree, "
                    "otherwise after the first. For one style on many photos use a node of its own, which then runs once.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="noise",
                    tooltip="The latent at the schedule's first sigma: a sampler's latent_image, without added noise. Flow models "
                    "ignore latent_image there: use NOISE.",
                ),
                TrajectorySocket.Output(
                    display_name="trajectory",
                    tooltip="The latent of every step, for Capture Features, Inversion Report and Keep Outside Mask.",
                ),
                io.Noise.Output(
                    display_name="NOISE",
                    tooltip="The same as noise for SamplerCustomAdvanced, on every model: sampling starts from the inverted latent "
                    "whatever latent_image is.",
                ),
                FeaturesSocket.Output(
                    display_name="features",
                    tooltip="What Capture Features would give, kept on the way: for Style Injection and the like.",
                ),
                io.Latent.Output(display_name="style noise", tooltip="noise, of what is connected to style: for Latent AdaIN."),
                TrajectorySocket.Output(display_name="style trajectory", tooltip="trajectory, of what is connected to style."),
                io.Noise.Output(display_name="style NOISE", tooltip="NOISE, of what is connected to style."),
                FeaturesSocket.Output(display_name="style features", tooltip="features, of what is connected to style: for Style Injection."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, model, latent, sigmas, positive=None, scheme=DEFAULT_SCHEME, iterations=5, substeps=1, tolerance=TOLERANCE,
        streams="self_attention", layers="auto", memory="recompute", precision="half", clean_level="sigma 0", style=None,
    ) -> io.NodeOutput:
        outputs = []
        for noise, trajectory, features in invert_several(
            model, [latent] if style is None else [latent, style], sigmas, streams, layers, memory, precision,
            positive=positive, scheme=scheme, iterations=iterations, substeps=substeps, tolerance=tolerance, clean_level=clean_level,
        ):
            sampler_noise = inverted_noise(model, trajectory)
            outputs += [latent_output(sampler_noise, noise), trajectory, sampler_noise, features]
        if style is None:
            outputs += [no_output("DDIM Inversion has no second picture: connect one to its style input.")] * 4
        return io.NodeOutput(*outputs)


class InversionReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheInversionReport",
            display_name="Inversion Report",
            category=CATEGORY,
            description="Samples an inversion back (with euler) and shows original, reconstruction and amplified difference, with "
            "the PSNR in latent and pixel space.",
            search_aliases=["reconstruction", "psnr", "inversion quality", "round trip"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that made the trajectory."),
                TrajectorySocket.Input("trajectory", tooltip="From DDIM Inversion."),
                io.Vae.Input("vae", tooltip="Decodes both latents; the comparison is against its decode of the original."),
                io.Float.Input(
                    "amplify",
                    default=10.0,
                    min=1.0,
                    max=1000.0,
                    step=1.0,
                    advanced=True,
                    tooltip="How many times the difference is enlarged around grey in the third picture.",
                ),
                io.Sampler.Input(
                    "sampler",
                    optional=True,
                    tooltip="What samples back; left out, euler. Midpoint Sampler for the scheme midpoint.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="original | reconstruction | amplified difference"),
                io.Float.Output(display_name="latent PSNR", tooltip="dB between the two latents, over the original's range."),
                io.Float.Output(display_name="pixel PSNR", tooltip="dB between the two decoded images."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, model, trajectory, vae, amplify=10.0, sampler=None) -> io.NodeOutput:
        image, in_latents, in_pixels = inversion_report(model, trajectory, vae, amplify, sampler)
        preview = ui.PreviewImage(image, cls=cls).as_dict()
        preview["text"] = [f"PSNR {in_pixels:.2f} dB in pixels, {in_latents:.2f} dB in latents, {trajectory.steps} steps"]
        return io.NodeOutput(image, in_latents, in_pixels, ui=preview)


class MidpointSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheMidpointSampler",
            display_name="Midpoint Sampler",
            category=CATEGORY,
            description="Samples what DDIM Inversion's scheme midpoint inverted: second order, one evaluation a step.",
            search_aliases=["fireflow", "second order", "flow inversion"],
            inputs=[],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced, with DDIM Inversion's NOISE.")],
        )

    @classmethod
    @checked
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(midpoint_sampler())


class DDIMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheDDIMSampler",
            display_name="DDIM Sampler (as in the papers' code)",
            category=CATEGORY,
            description="Core's euler, which is DDIM, with the last noise level of the papers' codes and the steps that they leave out: "
            "for comparing with published pictures.",
            search_aliases=["ddim", "parity", "official", "set_alpha_to_one", "styleid", "compvis"],
            inputs=[
                io.Combo.Input(
                    "clean_level", options=list(CLEAN_LEVELS), default="sigma 0",
                    tooltip="Where the last step ends. sigma 0 is core's euler; t = 0 is diffusers' set_alpha_to_one=False, and CompVis.",
                ),
                io.Int.Input(
                    "skip_steps", default=0, min=0, max=1000,
                    tooltip="Levels to leave out at the start: the network's latent stays as it is while the timestep moves on. "
                    "CompVis StyleID does it.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom, SamplerCustomAdvanced and Inversion Report.")],
        )

    @classmethod
    @checked
    def execute(cls, clean_level="sigma 0", skip_steps=0) -> io.NodeOutput:
        return io.NodeOutput(ddim_sampler(clean_level, skip_steps))
