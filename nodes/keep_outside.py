"""Keep Outside Mask node: style inside a mask, the untouched content elsewhere."""

from __future__ import annotations

from .host.checks import checked
from .host.compatibility import io
from .host.injections.keep_outside import keep_content_outside
from .sockets import TrajectorySocket

CATEGORY = "pastiche/diffstyler"


class KeepOutside(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheTrajectoryBlend",
            display_name="Keep Outside Mask",
            category=CATEGORY,
            description="Outside the mask the sample follows the content's own trajectory at every step, so that there the "
            "finished image is the content; inside the model samples freely (DiffStyler, eq. 6).",
            search_aliases=["local style", "masked style", "inpaint", "background", "preserve", "diffstyler"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, LoRAs and injections included."),
                TrajectorySocket.Input("trajectory", tooltip="The content's, from DDIM Inversion."),
                io.Mask.Input(
                    "mask", tooltip="1 where the style goes, 0 where the content stays; soft edges blend. Any size."
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model that leaves the outside alone.")],
        )

    @classmethod
    @checked
    def execute(cls, model, trajectory, mask) -> io.NodeOutput:
        return io.NodeOutput(keep_content_outside(model, trajectory, mask))
