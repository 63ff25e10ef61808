"""Frames of a film in one style."""

from __future__ import annotations

from .host.checks import checked
from .host.compatibility import io
from .host.features.capture import MEMORY
from .host.frames.film import SCHEDULERS, FilmSettings, restyle_film
from .host.frames.links import LINKS
from .sockets import FeaturesSocket


class RestyleFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheRestyleFrames",
            display_name="Restyle Frames",
            category="pastiche/frames",
            description="Restyles a film's frames with StyleID in one picture's style, without flicker, a few at a time. Every frame is "
            "written as it is done, so a stopped run goes on where it was.",
            search_aliases=["video", "film", "animation", "batch", "flicker", "temporal consistency", "cross-frame attention", "styleid"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x, SDXL or mini model, before any injection."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Image.Input("frames", tooltip="The film, in order: the images of Get Video Components, or any batch."),
                io.Int.Input(
                    "steps", default=20, min=1, max=1000,
                    tooltip="Of inversion and sampling each. Unused with style_features, which have a schedule of their own.",
                ),
                io.Float.Input(
                    "gamma", default=0.75, min=0.0, max=1.0, step=0.01,
                    tooltip="Query preservation: higher keeps more of the frames' structure, and flickers less.",
                ),
                io.Float.Input(
                    "temperature", default=1.5, min=0.1, max=10.0, step=0.05, tooltip="Multiplies the attention logits, as in Style Injection.",
                ),
                io.Boolean.Input(
                    "adain", default=True,
                    tooltip="Gives the film the style's colours and tones: Latent AdaIN with one mean and deviation for all frames.",
                ),
                io.Combo.Input(
                    "link", options=list(LINKS), default="none",
                    tooltip="Which frames' keys and values every frame's attention also sees: the film's first, the previous one's, or both. "
                    "Costs memory for one or two frames' rows, and some of the style.",
                ),
                io.Float.Input(
                    "steady", default=0.6, min=0.0, max=1.0, step=0.01,
                    tooltip="How much of the previous restyled frame, moved as the film moves, goes into a frame where both show the same. "
                    "0 is off; high values keep a brush stroke on its place and may smear.",
                ),
                io.Int.Input(
                    "chunk", default=4, min=1, max=256,
                    tooltip="Frames in memory at once. The pictures do not depend on it; Cancel loses at most one chunk.",
                ),
                io.String.Input(
                    "filename_prefix", default="frames/restyled",
                    tooltip="Folder in ComfyUI's output for frame_00001.png and on; a mark of film, style and settings is added to its name.",
                ),
                io.Boolean.Input(
                    "resume", default=True, tooltip="Goes on after the frames that were written before with the same film, style and settings.",
                ),
                io.Image.Input("style", optional=True, tooltip="The style picture, of any size. Inverted once for the whole film."),
                FeaturesSocket.Input(
                    "style_features", optional=True,
                    tooltip="In place of style: self_attention features, from Load Features or DDIM Inversion. Steps and schedule are theirs.",
                ),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="What the model is told; left out, the empty prompt, as in the paper.",
                ),
                io.String.Input(
                    "layers", default="auto", optional=True, advanced=True, tooltip='Decoder layers, as in Style Injection, for example "6-11".',
                ),
                io.Combo.Input(
                    "scheduler", options=list(SCHEDULERS), default="normal", optional=True, advanced=True,
                    tooltip="Core's schedules; unused with style_features.",
                ),
                io.Int.Input(
                    "statistics_frames", default=8, min=1, max=1024, optional=True, advanced=True,
                    tooltip="adain: over how many frames, spread evenly, the film's mean and deviation are taken. They are inverted first.",
                ),
                io.Combo.Input(
                    "memory", options=list(MEMORY), default="ram", optional=True, advanced=True,
                    tooltip="Where the frames' features of one chunk are kept, as in Capture Features; recompute needs none and is slower.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The restyled frames as they are in the files: for Create Video.")],
        )

    @classmethod
    @checked
    def execute(
        cls, model, vae, frames, steps=20, gamma=0.75, temperature=1.5, adain=True, link="none", steady=0.6, chunk=4,
        filename_prefix="frames/restyled", resume=True, style=None, style_features=None, positive=None, layers="auto", scheduler="normal",
        statistics_frames=8, memory="ram",
    ) -> io.NodeOutput:
        settings = FilmSettings(steps, scheduler, gamma, temperature, adain, link, steady, layers, statistics_frames)
        images, written = restyle_film(
            model, vae, frames, style, style_features, settings, chunk, filename_prefix, resume, positive, memory
        )
        return io.NodeOutput(images, ui={"text": [f"{len(images)} frames: {written.shown}"]})
