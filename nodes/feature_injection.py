"""Feature Injection node: the content's structure in a styled model's pass."""

from __future__ import annotations

from .host.checks import checked
from .host.compatibility import io
from .host.injections.content import MODES, inject_features
from .host.references.install import borrow_structure
from .sockets import FeaturesSocket, TrajectorySocket

CATEGORY = "pastiche/diffstyler"


class FeatureInjection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        share = dict(min=0.0, max=1.0, step=0.01)
        return io.Schema(
            node_id="PasticheFeatureInjection",
            display_name="Feature Injection (DiffStyler)",
            category=CATEGORY,
            description="Keeps the content's structure: in the first steps, residual features and attention maps of the "
            "content's own pass override those of this model, which may carry a style LoRA (DiffStyler, plug-and-play).",
            search_aliases=["plug and play", "pnp", "diffstyler", "structure", "attention injection", "keep content"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with; load the style LoRA before this node."),
                FeaturesSocket.Input(
                    "content", optional=True,
                    tooltip='The content\'s features, captured with the model without LoRA: streams "residual, '
                    'self_attention_qk, cross_attention", layers "3-11" (SD1.x).',
                ),
                io.Float.Input(
                    "feature_steps", default=0.6, **share,
                    tooltip="Share of the steps in which residual features are injected. The paper: 30 of 50. 0: none.",
                ),
                io.Float.Input(
                    "attention_steps", default=0.5, **share,
                    tooltip="Share of the steps in which attention is injected. The paper: 25 of 50. 0: none.",
                ),
                io.String.Input(
                    "feature_layers", default="auto",
                    tooltip='Decoder layers whose residual features are injected: "4-11" in the paper (auto), "4" in '
                    "plug-and-play. none: nowhere.",
                ),
                io.String.Input(
                    "self_attention_layers", default="auto",
                    tooltip='Layers whose self-attention is injected: all of the decoder in the paper (auto), "4-11" in '
                    "plug-and-play. none: nowhere.",
                ),
                io.String.Input(
                    "cross_attention_layers", default="auto",
                    tooltip="Layers whose cross-attention is injected: all of the decoder in the paper (auto); the official "
                    "code leaves it out (none). Needs prompts of as many tokens for content and sample.",
                ),
                io.Combo.Input(
                    "mode", options=list(MODES), default="override", advanced=True,
                    tooltip="override: the paper. blend: the official code, queries and keys mixed by min(1, 2t/1000).",
                ),
                TrajectorySocket.Input(
                    "trajectory", optional=True,
                    tooltip="On transformers instead of content: the content's DDIM Inversion, whose row runs beside the sample.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the content's structure in its pass.")],
        )

    @classmethod
    @checked
    def execute(
        cls, model, content=None, feature_steps=0.6, attention_steps=0.5, feature_layers="auto",
        self_attention_layers="auto", cross_attention_layers="auto", mode="override",
        trajectory=None,
    ) -> io.NodeOutput:
        if trajectory is not None:
            return io.NodeOutput(borrow_structure(
                model, trajectory, feature_steps, attention_steps, feature_layers, self_attention_layers, mode
            ))
        if content is None:
            raise ValueError("content: connect the features of Capture Features (U-Nets), or on a transformer a trajectory.")
        return io.NodeOutput(inject_features(
            model, content, feature_steps, attention_steps,
            feature_layers, self_attention_layers, cross_attention_layers, mode,
        ))
