"""Several styles in one picture: entries and the guider that mixes them."""

from __future__ import annotations

from .algorithms.diffstyler import OVERLAPS
from .algorithms.references import SHARES
from .host.checks import checked
from .host.compatibility import io
from .host.multistyle.guider import lora_names, multi_style_guider, style_entry
from .sockets import FeaturesSocket, StyleSocket

CATEGORY = "pastiche/diffstyler"


class StyleEntryNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheStyleEntry",
            display_name="Style Entry",
            category=CATEGORY,
            description="One style for the Multi-Style Guider: a LoRA (trained here, from a file, or on a MODEL) or a style "
            "image's features, with its prompt, its mask and when it acts.",
            search_aliases=["style", "regional lora", "lora mask", "multi style"],
            inputs=[
                io.Custom("LORA_MODEL").Input("lora", optional=True, tooltip="A LoRA from Train Style LoRA."),
                io.Combo.Input(
                    "lora_name", options=lora_names(), default="none",
                    tooltip="A LoRA file instead. Leave at none when lora, model or features is connected.",
                ),
                io.Model.Input(
                    "model", optional=True,
                    tooltip="Or the guider's own model with one or more LoRAs on top, from Load LoRA, and if you like Feature Injection.",
                ),
                FeaturesSocket.Input(
                    "features", optional=True,
                    tooltip="Or a style image's features (self_attention), injected as StyleID does. The style image must have the "
                    "content's size.",
                ),
                io.Latent.Input(
                    "picture", optional=True,
                    tooltip="Or a style picture, encoded at the sampled size, seen by this style's rows as Style Reference does it: any model.",
                ),
                io.Conditioning.Input("positive", optional=True, tooltip="This style's prompt; left out, the guider's."),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Where the style acts, soft edges allowed. Left out: everywhere. An empty mask: nowhere.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-4.0, max=4.0, step=0.05,
                    tooltip="Strength of the LoRA. With features or a picture, 0..1: the style's share inside its mask.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Share of the schedule at which the style sets in.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Share of the schedule at which the style ends.",
                ),
                io.Float.Input(
                    "temperature", default=1.5, min=0.1, max=5.0, step=0.05, advanced=True,
                    tooltip="With features or a picture: sharpness of the injected attention (StyleID's tau; with join 1).",
                ),
                io.String.Input(
                    "layers", default="auto", advanced=True,
                    tooltip='With features: layers to inject, for example "6-11"; auto is what Style Injection takes. With a picture: those of '
                    "Style Reference.",
                ),
                io.Combo.Input(
                    "share", options=list(SHARES), default="join", optional=True, advanced=True,
                    tooltip="With a picture: join its keys and values to the sample's own, or replace those.",
                ),
            ],
            outputs=[StyleSocket.Output(display_name="style", tooltip="For a style input of the Multi-Style Guider.")],
        )

    @classmethod
    @checked
    def execute(cls, lora=None, lora_name="none", model=None, features=None, positive=None, mask=None, strength=1.0,
                start_percent=0.0, end_percent=1.0, temperature=1.5, layers="auto", picture=None, share="join") -> io.NodeOutput:
        return io.NodeOutput(style_entry(
            lora_name, lora=lora, model=model, features=features, conditioning=positive, mask=mask, strength=strength,
            start_percent=start_percent, end_percent=end_percent, temperature=temperature, layers=layers, picture=picture, share=share,
        ))


class MultiStyleGuiderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        styles = io.Autogrow.TemplatePrefix(
            StyleSocket.Input("style", tooltip="A style, from Style Entry."), prefix="style", min=1, max=16
        )
        return io.Schema(
            node_id="PasticheMultiStyleGuider",
            display_name="Multi-Style Guider",
            category=CATEGORY,
            description="Any number of styles in one sampling, each inside its mask; where masks overlap they share, where "
            "none is, the plain model draws. All styles of a step run as one batch of one model: no weights are swapped.",
            search_aliases=["multi style", "regional prompt", "regional lora", "lora mask", "diffstyler", "guider"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, also used outside all masks."),
                io.Conditioning.Input("positive", tooltip="The prompt outside the masks, and of styles without their own."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, of all styles."),
                io.Float.Input(
                    "cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Guidance. DiffStyler uses 10.5; 1 switches it off and halves the work.",
                ),
                io.Autogrow.Input("styles", template=styles, tooltip="The styles."),
                io.Combo.Input(
                    "overlap", options=list(OVERLAPS), default="share", optional=True, advanced=True,
                    tooltip="Where masks overlap: share divides by their sum; with later, a later style covers the earlier ones, as "
                    "in DiffStyler's code.",
                ),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For Sampler Custom Advanced.")],
        )

    @classmethod
    @checked
    def execute(cls, model, positive, negative, cfg, styles: io.Autogrow.Type, overlap="share") -> io.NodeOutput:
        return io.NodeOutput(multi_style_guider(model, positive, negative, cfg, list(styles.values()), overlap))
