"""InjectFusion nodes: content injection in h-space, and the sampler that goes with it."""

from __future__ import annotations

from .algorithms.injectfusion import SCHEDULES
from .host.checks import checked
from .host.compatibility import io
from .host.injections.hspace import BRANCHES, inject_content
from .host.injections.injectfusion_sampler import injectfusion_sampler
from .sockets import FeaturesSocket

CATEGORY = "pastiche/injectfusion"


class HSpaceSlerp(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheHSpaceSlerp",
            display_name="h-space Slerp (InjectFusion)",
            category=CATEGORY,
            description="Injects one image's content into another's sampling: the U-Net's bottleneck features turn "
            "towards the content's on an arc that keeps their norm. Chain several with masks to mix several contents.",
            search_aliases=["injectfusion", "diffstyle", "h-space", "bottleneck", "content injection", "slerp"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                FeaturesSocket.Input(
                    "content", tooltip='From Capture Features with streams "h_space": the image whose content goes in.'
                ),
                io.Float.Input(
                    "gamma", default=0.6, min=0.0, max=1.0, step=0.01,
                    tooltip="Share of the angle to turn: 0 changes nothing, 1 replaces h by the content's (norm kept).",
                ),
                io.Int.Input(
                    "t_edit", default=400, min=0, max=1000,
                    tooltip="Inject while the timestep is at least this. 1000 never, 0 at every step.",
                ),
                io.Combo.Input(
                    "branch", options=list(BRANCHES), default="conditional",
                    tooltip="With guidance: inject into the conditional prediction, or into both.",
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Where to inject; resized to the bottleneck's grid, soft edges kept.",
                ),
                io.Combo.Input(
                    "schedule", options=list(SCHEDULES), default="constant", optional=True, advanced=True,
                    tooltip="How gamma runs over the injecting steps; the total stays the same.",
                ),
                io.Boolean.Input(
                    "match_norm", default=True, optional=True, advanced=True,
                    tooltip="With a mask: bring the content to the norm of what it replaces, as without a mask. The paper's code "
                    "does not; switch it off to get its pictures.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For the sampler, best with InjectFusion Sampler.")],
        )

    @classmethod
    @checked
    def execute(cls, model, content, gamma=0.6, t_edit=400, branch="conditional", mask=None, schedule="constant",
                match_norm=True) -> io.NodeOutput:
        return io.NodeOutput(inject_content(model, content, gamma, t_edit, branch, mask, schedule, match_norm))


class InjectFusionSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasticheInjectFusionSampler",
            display_name="InjectFusion Sampler",
            category=CATEGORY,
            description="The sampler of InjectFusion: latent calibration or the asymmetric step while h-space Slerp "
            "injects, quality boosting at the end. Without h-space Slerp on the model it is plain DDIM.",
            search_aliases=["asyrp", "asymmetric", "latent calibration", "quality boosting", "ddim", "diffstyle"],
            inputs=[
                io.Float.Input(
                    "omega", default=0.3, min=0.0, max=1.0, step=0.01,
                    tooltip="Latent calibration: larger keeps more of the original, 1 nearly all of it. "
                    "0 takes the asymmetric step instead.",
                ),
                io.Int.Input(
                    "t_boost", default=200, min=0, max=1000,
                    tooltip="Steps at this timestep and below are stochastic, which sharpens. 0 turns it off: "
                    "better for paintings and other originals unlike the training data.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Noise of the quality boosting; image i of a batch uses seed + i.",
                ),
                io.Float.Input(
                    "dt_lambda", default=1.0, min=0.9, max=1.1, step=0.0005, optional=True, advanced=True,
                    tooltip="With omega 0: scales the direction of injecting steps at timesteps of 950 and more; "
                    "the paper's code uses 0.9985 with masks. With omega above 0 it has no effect, there as here.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom; add no noise to an inverted latent.")],
        )

    @classmethod
    @checked
    def execute(cls, omega=0.3, t_boost=200, seed=0, dt_lambda=1.0) -> io.NodeOutput:
        return io.NodeOutput(injectfusion_sampler(omega, t_boost, seed, dt_lambda))
