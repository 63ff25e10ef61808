"""Feature nodes: capture what the U-Net computed along a trajectory, and keep it on disk."""

from __future__ import annotations

from .host.checks import checked
from .host.compatibility import io
from .host.features.capture import MEMORY, PRECISION, capture
from .host.features.library import list_files, load_bank, save_bank, saved_name
from .host.trajectories.inversion import inverted_noise
from .host.trajectories.noise import latent_output
from .host.features.stores import readable_size
from .sockets import FeaturesSocket, TrajectorySocket

CATEGORY = "pastiche/features"
MEMORY_TOOLTIP = (
    "Where features live. recompute: nowhere, the reference runs beside the sample at each step (needs almost no "
    "memory). ram, vram: fastest. disk: a memory-mapped file."
)


class CaptureFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheCaptureFeatures",
            display_name="Capture Features",
            category=CATEGORY,
            description="Collects what the model computes at every step of an inversion: the raw material of Style "
            "Injection, h-space Slerp and Feature Injection.",
            search_aliases=["attention features", "feature bank", "styleid", "h-space", "plug and play"],
            inputs=[
                io.Model.Input("model", tooltip="The model that made the trajectory, before any Pastiche injection."),
                TrajectorySocket.Input("trajectory", tooltip="From DDIM Inversion."),
                io.String.Input(
                    "streams",
                    default="self_attention",
                    tooltip="Comma-separated: self_attention (StyleID), self_attention_qkv (explicit projections), "
                    "h_space (InjectFusion), residual, self_attention_qk and cross_attention (DiffStyler).",
                ),
                io.String.Input(
                    "layers",
                    default="auto",
                    tooltip='Decoder layers, for example "6-11" or "middle, output 4-11"; auto suits Style Injection. '
                    "h_space ignores it.",
                ),
                io.Combo.Input("memory", options=list(MEMORY), default="recompute", tooltip=MEMORY_TOOLTIP),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISION),
                    default="half",
                    advanced=True,
                    tooltip="half stores 16-bit numbers, full 32-bit ones; recompute uses the model's own.",
                ),
            ],
            outputs=[FeaturesSocket.Output(display_name="features", tooltip="The features of every step.")],
        )

    @classmethod
    @checked
    def execute(cls, model, trajectory, streams="self_attention", layers="auto", memory="recompute", precision="half") -> io.NodeOutput:
        return io.NodeOutput(capture(model, trajectory, streams, layers, memory, precision))


class SaveFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheSaveFeatures",
            display_name="Save Features",
            category=CATEGORY,
            description="Writes features and their trajectory to output/pastiche_features as safetensors: a style to use "
            "again without inverting it.",
            search_aliases=["style library", "export features"],
            is_output_node=True,
            inputs=[
                FeaturesSocket.Input("features", tooltip="From Capture Features. In recompute mode only the small trajectory is written."),
                io.String.Input("filename_prefix", default="style", tooltip="File name; may name a subfolder."),
                io.Image.Input(
                    "picture", optional=True,
                    tooltip="Shown small in the Style Library; left out, a coarse picture is made of the latent.",
                ),
                io.String.Input("notes", default="", optional=True, advanced=True, tooltip="Kept in the file and shown in the Style Library."),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The file's name, for Load Features.")],
        )

    @classmethod
    @checked
    def execute(cls, features, filename_prefix="style", picture=None, notes="") -> io.NodeOutput:
        path = save_bank(features, filename_prefix, picture, notes)
        return io.NodeOutput(saved_name(path), ui={"text": [f"{saved_name(path)}: {readable_size(path.stat().st_size)}"], "pastiche_saved": [True]})


class LoadFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheLoadFeatures",
            display_name="Load Features",
            category=CATEGORY,
            description="Reads features from models/pastiche_features or output/pastiche_features.",
            search_aliases=["style library", "import features"],
            inputs=[
                io.Combo.Input("file", options=list_files(), tooltip="A file written by Save Features."),
                io.Model.Input("model", tooltip="The model that made the features; checked, and used by recompute."),
                io.Combo.Input("memory", options=list(MEMORY), default="disk", tooltip=MEMORY_TOOLTIP),
            ],
            outputs=[
                FeaturesSocket.Output(display_name="features", tooltip="As Capture Features gave them."),
                TrajectorySocket.Output(display_name="trajectory", tooltip="The inversion they were captured from."),
                io.Latent.Output(display_name="noise", tooltip="The trajectory's noise: the style side of Latent AdaIN."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, file, model, memory="disk") -> io.NodeOutput:
        bank = load_bank(file, memory, model)
        noise = inverted_noise(model, bank.trajectory)
        return io.NodeOutput(bank, bank.trajectory, latent_output(noise, {"samples": noise.as_latent()}))
