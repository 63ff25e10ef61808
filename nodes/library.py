"""The style library: saved and ready styles to choose by their pictures, style LoRAs in it, and what is let go of."""

from __future__ import annotations

from typing import Any

from .host.checks import checked
from .host.compatibility import io
from .host.features.capture import MEMORY
from .host.features.shelf import delete_style, find_style, listing, set_size_limit
from .host.features.stores import readable_size
from .host.features.style_library import load_style, model_in_hand
from .host.features.style_loras import save_lora
from .host.messages import say_to_page
from .sockets import FeaturesSocket, TrajectorySocket

CATEGORY = "pastiche/features"
PAGE = "pastiche_library"  # this node's part of an `executed` message, and of /object_info
ACTIONS = ("delete", "limit")


class StyleLibrary(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        shown = listing()
        return io.Schema(
            node_id="PasticheStyleLibrary",
            display_name="Style Library",
            category=CATEGORY,
            description="Ready and saved styles to choose by their pictures: features, trajectories and style LoRAs, each with the "
            "model it belongs to. Deleting and the library's size limit are here, too.",
            search_aliases=["style gallery", "style presets", "load features", "style picker", "saved styles", "load style lora"],
            inputs=[
                io.Combo.Input(
                    "style", options=[style["key"] for style in shown["styles"]], extra_dict={PAGE: shown},
                    tooltip="ready: pictures that come with the pack and fit any model; saved: from Save Features; lora: from Save Style LoRA.",
                ),
                io.Model.Input("model", tooltip="The model that draws. A style of another one is refused, and greyed in the gallery after a run."),
                io.Combo.Input(
                    "memory", options=list(MEMORY), default="ram",
                    tooltip="Where features live. recompute: nowhere, they are made while sampling. ram, vram: fastest. disk: a file.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Encodes a ready style's picture; saved styles do not need it."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="The sampler's own SIGMAS, with which a ready style is inverted; saved styles bring theirs."),
                io.Conditioning.Input("positive", optional=True, tooltip="What the model reads while a ready style is inverted: the empty prompt."),
                io.Int.Input(
                    "size", default=256, min=64, max=2048, step=16, optional=True, advanced=True,
                    tooltip="Longest side in pixels to which a ready style's picture is scaled before it is inverted.",
                ),
                io.String.Input(
                    "streams", default="self_attention", optional=True, advanced=True,
                    tooltip="Of a ready style: as in Capture Features. self_attention is for Style Injection.",
                ),
                io.String.Input(
                    "layers", default="auto", optional=True, advanced=True, tooltip='Of a ready style: as in Capture Features, for example "6-11".',
                ),
            ],
            outputs=[
                FeaturesSocket.Output(display_name="features", tooltip="For Style Injection and Style Entry."),
                TrajectorySocket.Output(display_name="trajectory", tooltip="The style's inversion: for Style Reference and Capture Features."),
                io.Latent.Output(display_name="noise", tooltip="The style's noise: the style side of Latent AdaIN."),
                io.Custom("LORA_MODEL").Output(display_name="lora", tooltip="Of a style LoRA: for Load LoRA Model or Style Entry."),
                io.Image.Output(display_name="picture", tooltip="The style's picture; a thumbnail of what was saved."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, style="", **others: Any) -> str:
        """A style that was saved anew under the same name is another."""
        try:
            found = find_style(style)
        except ValueError:
            return style
        return f"{found.key} {found.size} {found.modified}"

    @classmethod
    @checked
    def execute(
        cls, style, model, memory="ram", vae=None, sigmas=None, positive=None, size=256, streams="self_attention", layers="auto",
    ) -> io.NodeOutput:
        hand = model_in_hand(model)
        say_to_page(PAGE, {"node": cls.hidden.unique_id, **hand})  # also where the style is refused
        loaded = load_style(style, model, memory, vae, sigmas, positive, size, streams, layers)
        return io.NodeOutput(loaded.features, loaded.trajectory, loaded.noise, loaded.lora, loaded.picture, ui={PAGE: [hand]})


class SaveStyleLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheSaveStyleLoRA",
            display_name="Save Style LoRA",
            category=CATEGORY,
            description="Writes a style LoRA to output/loras/pastiche with its picture and the model it was trained on: for the Style "
            "Library, and for Load LoRA.",
            search_aliases=["save lora", "style library", "export lora"],
            is_output_node=True,
            inputs=[
                io.Custom("LORA_MODEL").Input("lora", tooltip="From Train Style LoRA."),
                io.Model.Input("model", tooltip="The model it was trained on."),
                io.String.Input("filename_prefix", default="style", tooltip="File name; may name a subfolder."),
                io.Image.Input("picture", optional=True, tooltip="Shown small in the Style Library: the style picture, or what the LoRA draws."),
                io.String.Input(
                    "notes", default="", optional=True, tooltip="Kept in the file and shown in the Style Library: for example the prompt it was trained with.",
                ),
            ],
            outputs=[io.String.Output(display_name="style", tooltip="The entry's name in the Style Library.")],
        )

    @classmethod
    @checked
    def execute(cls, lora, model, filename_prefix="style", picture=None, notes="") -> io.NodeOutput:
        key, path = save_lora(lora, model, filename_prefix, picture, notes)
        return io.NodeOutput(key, ui={"text": [f"{key}: {readable_size(path.stat().st_size)}"], "pastiche_saved": [True]})


class ManageStyles(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheManageStyles",
            display_name="Manage Style Library",
            category=CATEGORY,
            description="What the Style Library's buttons run: deletes one saved style for good, or sets the limit of all. "
            "Deletes only the file whose size and time are given, so that nobody's workflow can.",
            is_output_node=True,
            is_dev_only=True,
            inputs=[
                io.Combo.Input("action", options=list(ACTIONS), tooltip="delete: the style named below. limit: of the whole library."),
                io.String.Input("style", default="", tooltip="The entry's name in the Style Library; read by delete."),
                io.Int.Input("size", default=0, min=0, max=1 << 53, tooltip="The file's size in bytes, as the library shows it; read by delete."),
                io.Float.Input(
                    "modified", default=0.0, min=0.0, max=1e12, step=0.001, round=False,
                    tooltip="When the file was written, in seconds since 1970; read by delete.",
                ),
                io.Int.Input(
                    "limit_mb", default=0, min=0, max=1 << 30,
                    tooltip="Megabytes that saved styles may take altogether, 0 for any; read by limit. Nothing is deleted for it: saving beyond is refused.",
                ),
            ],
            outputs=[io.String.Output(display_name="done", tooltip="What was done, in a sentence.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        return float("nan")  # never from the cache

    @classmethod
    @checked
    def execute(cls, action, style="", size=0, modified=0.0, limit_mb=0) -> io.NodeOutput:
        if action == "limit":
            set_size_limit(limit_mb * 1_000_000)
            done = f"The style library may take {limit_mb} MB." if limit_mb else "The style library has no limit."
        elif action == "delete":
            gone = delete_style(style, size, modified)
            done = f"Deleted {gone.title} ({readable_size(gone.size)})."
        else:
            raise ValueError(f"action: got {ascii(action)[:40]}, expected one of {', '.join(ACTIONS)}.")
        return io.NodeOutput(done, ui={"text": [done]})
