"""Style Reference: a style picture's rows run beside the sample and lend it their keys and values, on any MODEL."""

from __future__ import annotations

import logging

from .algorithms.references import SCHEDULES, SHARES
from .host.checks import checked
from .host.compatibility import io
from .host.references.install import style_reference
from .host.references.settings import DEFAULT_PRESET, PRESETS, Cures
from .sockets import TrajectorySocket

CUSTOM = "custom"
NEUTRAL = Cures()


def _cure(name: str, tooltip: str, low: float, high: float) -> io.Float.Input:
    return io.Float.Input(
        name, default=getattr(NEUTRAL, name), min=low, max=high, step=0.01, advanced=True, tooltip=f'{tooltip} Read when preset is "custom".'
    )


class StyleReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheStyleReference",
            display_name="Style Reference",
            category="pastiche/reference",
            description="Paints in the style of one picture, on any model: Flux, SD3.5, Qwen-Image, Z-Image, Chroma, Wan, U-Nets. "
            "The picture runs beside the sample in one batch, and the sample's attention sees its keys and values.",
            search_aliases=["style transfer", "style aligned", "shared attention", "reference only", "ip adapter", "flux style"],
            inputs=[
                io.Model.Input("model", tooltip="The model that sampling uses. Nothing on it is replaced."),
                io.Latent.Input(
                    "style", optional=True,
                    tooltip="The style picture, VAE-encoded at the sampled size (else its middle is cut out, or mirrored outwards). "
                    "Several pictures in one batch are several styles.",
                ),
                TrajectorySocket.Input(
                    "style_trajectory", optional=True,
                    tooltip="The style's DDIM Inversion instead of the noised picture: closer to it on long schedules, not on 4-8 steps.",
                ),
                TrajectorySocket.Input(
                    "content", optional=True,
                    tooltip="DDIM Inversion of a picture whose structure is to stay: its queries are mixed into the sample's (gamma).",
                ),
                io.Combo.Input(
                    "share", options=list(SHARES), default="join",
                    tooltip="join: the sample sees its own picture and the style's. replace: only the style's (StyleID); strongest, for restyling.",
                ),
                io.Float.Input(
                    "gamma", default=0.75, min=0.0, max=1.0, step=0.01,
                    tooltip="Query preservation: higher keeps more of the content's structure. Without content it has no effect.",
                ),
                io.Float.Input(
                    "gamma_end", default=0.375, min=0.0, max=1.0, step=0.005,
                    tooltip="gamma at the last step, when schedule is not constant.",
                ),
                io.Combo.Input(
                    "schedule", options=list(SCHEDULES), default="cosine", tooltip="How gamma goes to gamma_end along the sampling steps."
                ),
                io.Float.Input(
                    "temperature", default=1.0, min=0.1, max=10.0, step=0.05,
                    tooltip="Multiplies the attention logits of the picture; with replace 1.5 sharpens what sharing blurs.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Blends with the model's own attention; 0 is the plain model. Any value but 1 computes the attention twice.",
                ),
                io.String.Input(
                    "layers", default="auto",
                    tooltip='Attention layers, counted from 0 among those about the picture, for example "8-23"; on U-Nets blocks such as '
                    '"6-11". auto: the last two thirds; on U-Nets what Style Injection takes.',
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True, tooltip="Share of the schedule at which sharing begins."
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Share of the schedule at which sharing ends; steps outside the range cost nothing extra.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Restyle only here, softly; computes the attention twice. One mask, or one for each sample."
                ),
                io.Conditioning.Input(
                    "style_positive", optional=True,
                    tooltip="A prompt that describes the style picture; left out, its rows read the sample's prompt.",
                ),
                io.Combo.Input(
                    "preset", options=[*PRESETS, CUSTOM], default=DEFAULT_PRESET,
                    tooltip="Against copying the picture's layout: balanced loosens its positions and brings statistics half way to its own, more "
                    "style does more of both, plain nothing, custom reads the values below.",
                ),
                io.String.Input(
                    "weights", default="", advanced=True, tooltip='One number for each style picture, for example "1, 0.5"; empty: equal.'
                ),
                io.Int.Input(
                    "noise_seed", default=0, min=0, max=2**63 - 1, advanced=True, control_after_generate=False,
                    tooltip="Of the one noise that the style picture gets at every step; it never equals the sampler's.",
                ),
                _cure("key_scale", "Multiplies the style's keys: above 1 the sample looks at it more.", 0.0, 3.0),
                _cure("untwist_high", "Factor of the finest position frequencies of the style's keys; below 1 loosens the layout.", 0.0, 2.0),
                _cure("untwist_low", "Factor of the coarsest position frequencies, reached at the last step; above 1 strengthens the style.", 0.0, 3.0),
                _cure("untwist_beta", "Curve between the two: above 1 more frequencies count as fine.", 0.1, 8.0),
                _cure("position_shift", "Picture widths that the style stands to the right of the sample.", -2.0, 2.0),
                _cure("token_adain", "How far queries and keys take the style's statistics.", 0.0, 1.0),
                _cure("leak_guard", "How far the negative rows look as the style does, so that guidance moves away from its content.", 0.0, 1.0),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The patched model, for any core sampler. Chain nodes for more styles.")],
        )

    @classmethod
    @checked
    def execute(
        cls, model, style=None, style_trajectory=None, content=None, share="join", gamma=0.75, gamma_end=0.375, schedule="cosine",
        temperature=1.0, strength=1.0, layers="auto", start_percent=0.0, end_percent=1.0, mask=None, style_positive=None,
        preset=DEFAULT_PRESET, weights="", noise_seed=0, **advanced,
    ) -> io.NodeOutput:
        if preset == CUSTOM:
            cures = Cures(**advanced)
        else:
            cures = PRESETS[preset]
            ignored = sorted(name for name, value in advanced.items() if value != getattr(NEUTRAL, name))
            if ignored:
                logging.warning('Pastiche: preset "%s" sets %s; choose "custom" to use the values given.', preset, ", ".join(ignored))
        return io.NodeOutput(
            style_reference(
                model, style, style_trajectory, content, share=share, gamma=gamma, gamma_end=gamma_end, schedule=schedule,
                temperature=temperature, strength=strength, layers=layers, start_percent=start_percent, end_percent=end_percent,
                mask=mask, weights=weights, style_positive=style_positive, noise_seed=noise_seed, cures=cures,
            )
        )
