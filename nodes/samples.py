"""The node of the sample pictures."""

from __future__ import annotations

from .host.checks import checked
from .host.compatibility import io
from .host.samples import SAMPLES, load_sample


class SamplePicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheSamplePicture",
            display_name="Sample Picture",
            category="pastiche/loaders",
            description="A picture that comes with the pack, so that a workflow runs before you bring your own. "
            "The button below puts Load Image in its place.",
            search_aliases=["example image", "test image", "demo picture", "load image", "photo", "painting"],
            inputs=[
                io.Combo.Input(
                    "picture", options=list(SAMPLES), default="coffee",
                    tooltip="Photos: coffee, astronaut, dandelion. Shapes is drawn. Styles: impasto, woodcut, stained glass.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture."),
                io.Mask.Output(display_name="mask", tooltip="Its subject (the cup of coffee); empty for the other pictures."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, picture) -> io.NodeOutput:
        return io.NodeOutput(*load_sample(picture))
