"""Before and after, under a slider."""

from __future__ import annotations

from .host.checks import checked
from .host.compare import comparison
from .host.compatibility import io


class ComparePictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheCompare",
            display_name="Compare Pictures",
            category="pastiche/views",
            description="Shows two pictures over each other, with a slider between them, in the classic canvas and in Nodes 2.0.",
            search_aliases=["before after", "image compare", "slider", "side by side"],
            is_output_node=True,
            inputs=[
                io.Image.Input("before", tooltip="Left of the slider: the photo. The first of a batch is shown."),
                io.Image.Input("after", tooltip="Right of the slider: the result."),
            ],
            outputs=[],
        )

    @classmethod
    @checked
    def execute(cls, before, after) -> io.NodeOutput:
        return io.NodeOutput(ui=comparison(before, after, cls))
