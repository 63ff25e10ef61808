"""Nodes that draw features: what a layer sees, and where a query looks in the style."""

from __future__ import annotations

from comfy_api.latest import ui

from .host.checks import checked
from .host.compatibility import io
from .host.features.views import feature_pca, style_similarity
from .sockets import FeaturesSocket

CATEGORY = "pastiche/pictures"


def _layer() -> io.String.Input:
    return io.String.Input("layer", default="output 7", tooltip='One captured layer, for example "output 7".')


def _percent() -> io.Float.Input:
    return io.Float.Input(
        "percent", default=0.6, min=0.0, max=1.0, step=0.01, tooltip="Share of the schedule: 0 is the noisiest step, 1 the cleanest."
    )


class FeaturePCA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheFeaturePCA",
            display_name="Feature PCA",
            category=CATEGORY,
            description="Shows the top three principal components of a layer's features as colours.",
            search_aliases=["visualize features", "principal components", "attention map"],
            is_output_node=True,
            inputs=[
                FeaturesSocket.Input("features", tooltip="From Capture Features: residual, self_attention or h_space."),
                FeaturesSocket.Input("compare", optional=True, tooltip="Other features, shown in the same colours."),
                _layer(),
                _percent(),
                io.Int.Input("size", default=512, min=16, max=4096, advanced=True, tooltip="Longer side of the picture in pixels, about."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="One picture for each image of the features.")],
        )

    @classmethod
    @checked
    def execute(cls, features, compare=None, layer="output 7", percent=0.6, size=512) -> io.NodeOutput:
        image = feature_pca(features, compare, layer, percent, size)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


class StyleSimilarity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheStyleSimilarity",
            display_name="Style Similarity Map",
            category=CATEGORY,
            description="Marks one patch of the content and shows which parts of the style its query attends to.",
            search_aliases=["attention map", "visualize", "styleid", "correspondence"],
            is_output_node=True,
            inputs=[
                FeaturesSocket.Input("content", tooltip="Self-attention features of the content."),
                FeaturesSocket.Input("style", tooltip="Self-attention features of the style."),
                io.Image.Input("content_image", tooltip="The content's picture, to draw on."),
                io.Image.Input("style_image", tooltip="The style's picture, to draw on."),
                _layer(),
                _percent(),
                io.Float.Input("x", default=0.5, min=0.0, max=1.0, step=0.01, tooltip="The patch, as a share of the content's width."),
                io.Float.Input("y", default=0.5, min=0.0, max=1.0, step=0.01, tooltip="The patch, as a share of the content's height."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="content with the patch | style with the attention on it")],
        )

    @classmethod
    @checked
    def execute(cls, content, style, content_image, style_image, layer="output 7", percent=0.6, x=0.5, y=0.5) -> io.NodeOutput:
        image = style_similarity(content, style, layer, percent, x, y, content_image, style_image)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
