"""What every injection shares: what it reads, what must fit, and how it gets onto a MODEL."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Callable

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...algorithms.masks import as_batch
from ...sockets import FeatureBank, FeatureKey, Trajectory
from ..messages import executing_node, hint
from ..networks.adapter import RUN, parse_streams
from ..networks.fingerprint import fingerprint, require_same_model
from ..networks.marks import mark_injected
from ..networks.neighbours import run_uncompiled
from .hints import Expected, hints
from .run import SamplingRun
from .schedule import SAME_SIGMA, nearest

WRAPPERS = "pastiche"  # the key of our wrappers on a MODEL


@dataclass(frozen=True)
class Source:
    """A trajectory or its features that an injection reads, and what must fit the sampling. Data; `check` words it.

    name:    the input's id, or what the user calls it; begins every sentence.
    what:    the subject of sentences about it: "The style features".
    keys, streams: the features needed, and the setting of Capture Features that gives them.
    size:    where latent sizes must agree, what to do about it; "" where any size will do.
    due:     tells for a sigma whether it must have been captured; None where the nearest one will do.
    beside:  whether features that are not stored may come from rows of the sample's own forward (see beside.py).
    """

    name: str
    what: str
    trajectory: Trajectory
    bank: FeatureBank | None = None
    keys: tuple[FeatureKey, ...] = ()
    streams: str = ""
    size: str = ""
    due: Callable[[float], bool] | None = None
    beside: bool = False

    def require_captured(self) -> None:
        """Raises ValueError for features that the bank does not have."""
        if self.bank is None:
            return
        held = set(self.bank.keys)
        names = {member: name.strip() for name in self.streams.split(",") for member in parse_streams(name)}
        missing: dict[str, dict] = {}
        for key in self.keys:
            if key not in held:
                missing.setdefault(names[key.stream], {})[key.block, key.number] = None
        if missing:
            parts = (f"{name} of {', '.join(f'{block} {number}' for block, number in sorted(places))}" for name, places in missing.items())
            has = ", ".join(dict.fromkeys(key.stream for key in self.bank.keys)) or "nothing"
            raise ValueError(
                f"{self.name}: the features lack {'; '.join(parts)} (they are {has}). "
                f'Set Capture Features to streams "{self.streams}" and to all layers of this node.'
            )

    def check(self, noise: Tensor, sigmas: Tensor) -> None:
        """Raises ValueError where this does not fit a sampling of `noise` (B, C, H, W) along `sigmas`."""
        images, batch = self.trajectory.batch, noise.shape[0]
        if self.due is not None:
            asked = sigmas[:-1].float().cpu().tolist()  # a schedule ends at its last level without evaluating there
            self._check_schedule([sigma for sigma in asked if sigma > 0 and self.due(sigma)])
        if images not in (1, batch):
            raise ValueError(
                f"{self.name}: {images} images cannot be shared among {batch} samples; "
                "invert one image, or as many as the sampled latent holds."
            )
        own, size = self.trajectory.latents.shape[-2:], noise.shape[-2:]
        if self.size and own != size:
            raise ValueError(f"{self.name}: its latent is {own[1]}x{own[0]}, the sampled one {size[1]}x{size[0]}. {self.size}")

    def _check_schedule(self, due: list[float]) -> None:
        captured = self.trajectory.sigmas[1:]
        for sigma in due:
            found = float(captured[nearest(captured, sigma)])
            if abs(found - sigma) > SAME_SIGMA * sigma:
                raise ValueError(
                    f"{self.what} were captured on another schedule ({self.trajectory.steps} steps from sigma "
                    f"{float(captured[-1]):.3f}; sampling asks for sigma {sigma:.3f}, the nearest captured is {found:.3f}). "
                    "Connect the same SIGMAS to DDIM Inversion and to the sampler."
                )


class Injection:
    """What one node changes in a sampling run. Holds settings only; what belongs to a run lives in the `SamplingRun`.

    A subclass sets `sources` and `mask`, says in `changes` whether there is anything to do, and puts its hooks in
    `patch`. `install` is the only way onto a MODEL. `expected` is what hints compare a run with.
    """

    name = ""  # the node's display name, for sentences
    sources: tuple[Source, ...] = ()
    mask: Tensor | None = None  # (B or 1, H, W) of any size
    expected = Expected()
    node_id: str | None = None  # of the node that made it, for hints

    @property
    def changes(self) -> bool:
        """Whether the sampling would be another one with this injection."""
        return True

    def patch(self, model: ModelPatcher) -> None:
        """Puts this injection's hooks on `model` (a clone)."""
        raise NotImplementedError

    def check(self, guider: Any, noise: Tensor, sigmas: Tensor) -> None:
        """Refuses, by ValueError, what sources and mask do not tell; runs when a sampling starts."""

    def warn_of_losses(self, places: list[str]) -> None:
        """Names the places that another node has taken from this injection since it was installed."""
        if places:
            logging.warning(
                "Pastiche: a node after %s replaced %s, so nothing is injected there. Put %s last: it hands its "
                "queries and keys on to the other's replacement.", self.name, ", ".join(sorted(set(places))), self.name,
            )

    def installed_before(self, model: ModelPatcher) -> list["Injection"]:
        """Those that nodes before this one put on a MODEL."""
        installed = [wrapper.__self__ for wrapper in model.get_wrappers(WrappersMP.OUTER_SAMPLE, WRAPPERS)]
        return installed[: installed.index(self)] if self in installed else []

    def install(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of `model` that carries this injection, and says so; an untouched one where nothing would change.

        Raises ValueError for sources of another model or without the features needed.
        """
        own = fingerprint(model)
        for source in self.sources:
            require_same_model(own, source.trajectory.fingerprint, source.what)
        patched = model.clone()
        self.node_id = executing_node()
        if not self.changes:
            return patched
        for source in self.sources:
            source.require_captured()
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPERS, self._outer_sample)
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, WRAPPERS, self._advance)
        self.patch(patched)
        mark_injected(patched, self.name)
        return patched

    def _outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        self._check(guider, noise, sigmas)
        run_uncompiled(guider.model_patcher, guider.model_options)
        options = guider.model_options["transformer_options"]
        owner = RUN not in options
        run = options.setdefault(RUN, SamplingRun(guider))
        run.sampler = sampler
        try:
            for source in self.sources:
                if source.bank is not None:
                    run.use(source.bank, source.keys, source.due, source.beside)
            run.prepare(tuple(noise.shape))
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            if owner:
                del options[RUN]

    def _advance(self, executor, x, timestep, model_options=None, seed=None):
        run = (model_options or {}).get("transformer_options", {}).get(RUN)
        if run is not None:
            run.name_conditions()
            run.advance(float(timestep.flatten()[0]))
            run.memo((id(self), "hints"), lambda: self._hint(run, x, float(timestep.flatten()[0])))
        return executor(x, timestep, model_options or {}, seed)

    def _hint(self, run: SamplingRun, x: Tensor, sigma: float) -> None:
        for sentence in hints(self.expected, run.guider, run.sampler, x, sigma):
            self.say(sentence)

    def say(self, sentence: str) -> None:
        """Tells the user what can hardly be meant."""
        hint(self.node_id, self.name, sentence)

    def _check(self, guider: Any, noise: Tensor, sigmas: Tensor) -> None:
        for source in self.sources:
            source.check(noise, sigmas)
        masks, batch = 1 if self.mask is None else len(as_batch(self.mask)), noise.shape[0]
        if masks not in (1, batch):
            raise ValueError(f"mask: {masks} masks for {batch} samples; connect one mask or {batch}.")
        self.check(guider, noise, sigmas)
