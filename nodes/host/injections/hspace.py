"""InjectFusion's content injection: a patch on the output of the U-Net's middle block (h-space)."""

from __future__ import annotations

import logging
from typing import Any, Sequence

import torch
from comfy.model_patcher import ModelPatcher

from ...algorithms.injectfusion import Ramp, gamma_schedule, injecting_steps
from ...algorithms.masks import resize_mask
from ...algorithms.slerp import masked_slerp, resize_features, slerp
from ...sockets import FeatureBank, FeatureKey
from ..networks.families import find_adapter
from ..networks.neighbours import CACHES, leave_out
from .base import Injection, Source
from .hints import Expected, Other
from .run import SamplingRun, current_run
from .schedule import Schedule, current_sigma

BRANCHES = ("conditional", "both")
INJECT = "pastiche_inject"
"""transformer_options key: False injects nowhere, a tuple of bools into those chunks of the batch; absent, everywhere."""

H_SPACE = FeatureKey("h_space", "middle", 0)


class HSpacePatches(Injection):
    """Turns h towards the content's. Several of them chain, each with its mask."""

    name = "h-space Slerp"

    def __init__(
        self, content: FeatureBank, gamma: float, t_edit: float, branch: str, mask: torch.Tensor | None, ramp: Ramp,
        match_norm: bool = True,
    ):
        self.content, self.match_norm = content, match_norm
        self.gamma, self.t_edit, self.branch, self.ramp = gamma, t_edit, branch, ramp
        self.mask = mask
        self.sources = (Source("content", "The content features", content.trajectory, content, (H_SPACE,), "h_space"),)

    @property
    def expected(self) -> Expected:
        advice = "The sampler gets the original's, whose look the result has; the content comes in through h-space alone."
        return Expected(None, (Other("content", self.content.trajectory, advice),), sampler=("InjectFusion Sampler", "sample_injectfusion"))

    @property
    def changes(self) -> bool:
        return self.gamma != 0 and self.t_edit < 1000 and (self.mask is None or bool(self.mask.any()))

    def patch(self, model: ModelPatcher) -> None:
        find_adapter(model).change_h_space(model, self)

    def check(self, guider: Any, noise: torch.Tensor, sigmas: torch.Tensor) -> None:
        """Steps over core's caches: what they keep is of steps with another share injected, or of none."""
        left = leave_out(guider.model_options, CACHES)
        if left:
            logging.warning("Pastiche: %s skips no steps in a run with h-space Slerp, whose injection it would lose.", " and ".join(left))

    def share(self, options: dict) -> float:
        """The gamma of the step that `options` (a forward's transformer_options) belongs to; 0 where nothing is due."""
        run = current_run(options)
        if run is None:
            return 0.0
        schedule, plan = run.memo((id(self), "plan"), lambda: self._plan(run.model_sampling, run.schedule(options)))
        return plan.get(schedule.step(current_sigma(options)), 0.0)

    def _plan(self, model_sampling: Any, sampled: Schedule) -> tuple[Schedule, dict[int, float]]:
        """(schedule, its steps that inject -> gamma): of the run, or of the whole one where the run is a part of it."""
        captured = Schedule(self.content.trajectory.schedule)
        schedule = captured if sampled.is_part_of(captured) else sampled
        steps = injecting_steps(schedule.tolist(), captured.tolist(), sigma_of_timestep(model_sampling, self.t_edit))
        return schedule, dict(zip(steps, gamma_schedule(self.gamma, len(steps), self.ramp)))

    def __call__(self, args: dict) -> dict:
        """middle_block_after_patch: args["h"] is (chunks * B, C, h, w)."""
        h, options = args["h"], args["transformer_options"]
        run = current_run(options)
        chunks = [] if run is None else self._chunks(run, options)
        gamma = self.share(options) if any(chunks) else 0.0
        if gamma == 0:
            return args
        feature = run.feature(self.content, H_SPACE, current_sigma(options), h)
        parts = list(h.chunk(len(chunks)))
        grid = h.shape[-2:]
        content = resize_features(feature, *grid)
        mask = None
        if self.mask is not None:
            mask = run.memo(
                (id(self), tuple(grid)), lambda: resize_mask(self.mask, *grid).unsqueeze(1).to(h.device)
            )  # BHW -> B1hw
        for number, chosen in enumerate(chunks):
            if chosen:
                parts[number] = self.mix(parts[number], content, gamma, mask)
        return {**args, "h": torch.cat(parts)}

    def mix(self, h: torch.Tensor, content: torch.Tensor, gamma: float, mask: torch.Tensor | None) -> torch.Tensor:
        """h~ of one condition's samples: h (B, C, h, w), content (B or 1, C, h, w), mask (B or 1, 1, h, w)."""
        return slerp(h, content, gamma) if mask is None else masked_slerp(h, content, gamma, mask, self.match_norm)

    def _chunks(self, run: SamplingRun, options: dict) -> list[bool]:
        """Which chunks of the batch this node changes."""
        conditions = list(zip(options["uuids"], options["cond_or_uncond"]))
        asked = options.get(INJECT, (True,) * len(conditions))
        if asked is False:
            return [False] * len(conditions)
        return [flag and (self.branch == "both" or run.conditional(*condition)) for flag, condition in zip(asked, conditions)]


def inject_content(
    model: ModelPatcher,
    content: FeatureBank,
    gamma: float,
    t_edit: float,
    branch: str = "conditional",
    mask: torch.Tensor | None = None,
    schedule: Ramp = "constant",
    match_norm: bool = True,
) -> ModelPatcher:
    """`model` whose h turns towards the content's by `gamma` while the timestep is at least `t_edit` (0..1000).

    mask: (B or 1, H, W) or (H, W) of any size, where to inject; match_norm: see `masked_slerp`. Returns an unpatched clone where nothing would change.
    Raises ValueError for features of another model or without h_space, and unknown settings.
    """
    if branch not in BRANCHES:
        raise ValueError(f'branch: got "{branch}", choose among {", ".join(BRANCHES)}.')
    gamma_schedule(gamma, 1, schedule)
    find_adapter(model)
    return HSpacePatches(content, gamma, t_edit, branch, mask, schedule, match_norm).install(model)


def due_injections(options: dict, sigma: torch.Tensor) -> list[HSpacePatches]:
    """The h-space Slerp patches among a run's transformer_options that change the step at `sigma`."""
    return [patch for patch in installed(options) if patch.share({**options, "sigmas": sigma}) != 0]


def installed(options: dict) -> list[HSpacePatches]:
    patches: Sequence[Any] = options.get("patches", {}).get("middle_block_after_patch", ())
    return [patch for patch in patches if isinstance(patch, HSpacePatches)]


def sigma_of_timestep(model_sampling: Any, timestep: float) -> float:
    """The sigma of a timestep on the papers' 0..1000 scale, whatever the model's own: 0 at 0, infinite at 1000."""
    if timestep >= 1000:
        return float("inf")
    if timestep <= 0:
        return 0.0
    if timestep >= 999:
        return float(model_sampling.sigma_max)
    return float(model_sampling.percent_to_sigma(1 - timestep / 999))
