"""Features kept while an inversion runs, so that nothing is evaluated twice."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...sockets import FeatureBank, FeatureKey, Trajectory
from ..networks.families import find_adapter
from ..trajectories.inversion import invert
from ..trajectories.noise import no_output
from .capture import discard, feature_shapes, finished, open_writer, require_shape


class OnTheWay:
    """Writes what the network computes for every step of an inversion; a step asked about again is written again."""

    def __init__(self, streams: str, layers: str, memory: str, precision: str):
        self._settings = streams, layers, memory, precision
        self.keys: tuple[FeatureKey, ...] = ()
        self.writer = None
        self._batch = self._step = 0
        self._missing: dict[int, None] = {}

    def begin(self, model: ModelPatcher, start: Trajectory) -> None:
        streams, layers, memory, precision = self._settings
        adapter = find_adapter(model)
        self.keys = tuple(adapter.keys(streams, layers))
        self._batch, self._missing = start.batch, dict.fromkeys(range(1, start.steps + 1))
        self._model, self._shapes = model, feature_shapes(adapter, self.keys, start)
        self.writer = open_writer(model, self.keys, start, memory, precision)
        adapter.capture(model.model_options["transformer_options"], self.keys, self._emit)

    def at(self, step: int) -> None:
        self._step = step
        self._missing.pop(step, None)

    def missing(self) -> list[int]:
        return list(self._missing)

    def _emit(self, key: FeatureKey, tensor: torch.Tensor) -> None:
        if self._step:
            require_shape(self._model, key, tensor, self._shapes[key])
            self.writer.write(key, self._step, tensor[: self._batch])


def invert_and_capture(
    model: ModelPatcher, latent: dict, sigmas: torch.Tensor, streams: str, layers: str, memory: str, precision: str = "half",
    **settings: Any,
) -> tuple[dict, Trajectory, Any]:
    """`invert(model, latent, sigmas, **settings)` and the FeatureBank of what it evaluated on the way.

    `recompute` keeps nothing, as in `capture`; a network whose features are unknown then has no bank but an output
    that stops the graph with the reason. Raises what `invert` and, for kept features, `capture` raise.
    """
    if memory == "recompute":
        noise, trajectory = invert(model, latent, sigmas, **settings)
        try:
            keys = tuple(find_adapter(model).keys(streams, layers))
        except ValueError as error:
            return noise, trajectory, no_output(f"features: {error}")
        return noise, trajectory, FeatureBank(trajectory, keys, memory, None, model)
    witness = OnTheWay(streams, layers, memory, precision)
    try:
        noise, trajectory = invert(model, latent, sigmas, **settings, witness=witness)
    except BaseException:  # Cancel included: no half-written file stays behind
        if witness.writer is not None:
            discard(witness.writer)
        raise
    return noise, trajectory, FeatureBank(trajectory, witness.keys, memory, finished(witness.writer), model)
