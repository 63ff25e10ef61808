"""Features kept while an inversion runs, so that nothing is evaluated twice."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Hashable

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...sockets import FeatureBank, FeatureKey, FeatureStore, Trajectory
from ..networks.families import find_adapter
from ..networks.neighbours import reads_whole_batch
from ..trajectories.inversion import Witness, check_latent, invert, inverted_latent
from ..trajectories.noise import no_output
from .capture import discard, feature_shapes, finished, keep, open_writer, recall, require_shape


class OnTheWay:
    """Writes what the network computes for every step of an inversion; a step asked about again is written again.

    rows: of the batch, that it is about; None for all.
    """

    def __init__(self, streams: str, layers: str, memory: str, precision: str, rows: slice | None = None):
        self._settings, self._rows = (streams, layers, memory, precision), rows
        self.keys: tuple[FeatureKey, ...] = ()
        self.writer = None
        self._store: FeatureStore | None = None  # when all is there
        self._step = 0
        self._missing: dict[int, None] = {}

    def begin(self, model: ModelPatcher, start: Trajectory) -> None:
        streams, layers, memory, precision = self._settings
        if self._rows is None:
            self._rows = slice(0, start.batch)
        start = part_of(start, self._rows)
        adapter = find_adapter(model)
        self.keys = tuple(adapter.keys(streams, layers))
        self._missing = dict.fromkeys(range(1, len(start.sigmas)))
        self._model, self._shapes = model, feature_shapes(adapter, self.keys, start)
        self.writer = open_writer(model, self.keys, start, memory, precision)
        adapter.capture(model.model_options["transformer_options"], self.keys, self._emit)

    def at(self, step: int) -> None:
        self._step = step
        self._missing.pop(step, None)

    def missing(self) -> list[int]:
        return list(self._missing)

    def recall(self, key: Hashable, model: ModelPatcher) -> bool:
        self._store = recall(self._name(key), model)
        if self._store is not None:
            self.keys = tuple(find_adapter(model).keys(*self._settings[:2]))
        return self._store is not None

    def keep(self, key: Hashable | None, model: ModelPatcher) -> None:
        self._store = finished(self.writer)
        keep(None if key is None else self._name(key), model, self._store)

    def take(self) -> FeatureStore | None:
        """What was seen, which is the caller's now: this object goes late, as it and its model know each other."""
        store, self._store, self.writer = self._store, None, None
        return store

    def _name(self, key: Hashable) -> Hashable:
        rows = self._rows
        return (key, *self._settings, None if rows is None else (rows.start, rows.stop))

    def _emit(self, key: FeatureKey, tensor: torch.Tensor) -> None:
        if self._step:
            require_shape(self._model, key, tensor, self._shapes[key])
            self.writer.write(key, self._step, tensor[self._rows])


class Several:
    """Witnesses of one inversion, each of its own rows."""

    def __init__(self, witnesses: list[Witness]):
        self._witnesses = witnesses

    def begin(self, model: ModelPatcher, start: Trajectory) -> None:
        for witness in self._witnesses:
            witness.begin(model, start)

    def at(self, step: int) -> None:
        for witness in self._witnesses:
            witness.at(step)

    def missing(self) -> list[int]:
        return list(dict.fromkeys(step for witness in self._witnesses for step in witness.missing()))

    def recall(self, key: Hashable, model: ModelPatcher) -> bool:
        return all(witness.recall(key, model) for witness in self._witnesses)

    def keep(self, key: Hashable | None, model: ModelPatcher) -> None:
        for witness in self._witnesses:
            witness.keep(key, model)


def invert_and_capture(
    model: ModelPatcher, latent: dict, sigmas: torch.Tensor, streams: str, layers: str, memory: str, precision: str = "half",
    **settings: Any,
) -> tuple[dict, Trajectory, Any]:
    """`invert(model, latent, sigmas, **settings)` and the FeatureBank of what it evaluated on the way.

    `recompute` keeps nothing, as in `capture`; a network whose features are unknown then has no bank but an output
    that stops the graph with the reason. Raises what `invert` and, for kept features, `capture` raise.
    """
    return _invert_batch(model, [latent], latent, sigmas, streams, layers, memory, precision, settings)[0]


def invert_several(
    model: ModelPatcher, latents: list[dict], sigmas: torch.Tensor, streams: str, layers: str, memory: str, precision: str = "half",
    **settings: Any,
) -> list[tuple[dict, Trajectory, Any]]:
    """`invert_and_capture` of each LATENT: in one batch where their sizes agree and memory allows, else one after another."""
    if len(latents) > 1 and _go_together(model, latents, settings.get("positive")):
        samples = torch.cat([latent["samples"] for latent in latents])
        try:
            return _invert_batch(model, latents, {"samples": samples}, sigmas, streams, layers, memory, precision, settings)
        except Exception as error:
            comfy.model_management.raise_non_oom(error)
        comfy.model_management.soft_empty_cache()
        logging.warning("Pastiche: %d latents are too many for one batch, so they are inverted one after another.", len(samples))
    return [invert_and_capture(model, latent, sigmas, streams, layers, memory, precision, **settings) for latent in latents]


def _go_together(model: ModelPatcher, latents: list[dict], positive: list | None) -> bool:
    """Whether one batch gives each latent what it gets alone: one size, a prompt for all, nobody who looks at other rows."""
    shapes = {tuple(check_latent(latent).shape[1:]) for latent in latents}
    context = positive[0][0] if positive else None
    return len(shapes) == 1 and (context is None or context.shape[0] == 1) and not reads_whole_batch(model.model_options)


def _invert_batch(
    model: ModelPatcher, latents: list[dict], batch: dict, sigmas: torch.Tensor, streams: str, layers: str, memory: str, precision: str,
    settings: dict,
) -> list[tuple[dict, Trajectory, Any]]:
    """Inverts `batch`, the rows of all `latents`; one result for each of them."""
    ends = torch.tensor([len(latent["samples"]) for latent in latents]).cumsum(0).tolist()
    rows = [slice(begin, end) for begin, end in zip([0, *ends], ends)]
    witnesses = [] if memory == "recompute" else [OnTheWay(streams, layers, memory, precision, part) for part in rows]
    try:
        noise, whole = invert(model, batch, sigmas, **settings, witness=Several(witnesses) if witnesses else None)
    except BaseException:  # Cancel included: no half-written file stays behind
        for witness in witnesses:
            if witness.writer is not None:
                discard(witness.writer)
        raise
    if len(latents) == 1:
        inverted = [(noise, whole)]
    else:
        parts = [part_of(whole, part) for part in rows]
        inverted = [(inverted_latent(model, latent, part), part) for latent, part in zip(latents, parts)]
    if witnesses:
        banks = [
            FeatureBank(trajectory, witness.keys, memory, witness.take(), model)
            for (_, trajectory), witness in zip(inverted, witnesses)
        ]
    else:
        banks = [_recomputed(model, trajectory, streams, layers) for _, trajectory in inverted]
    return [(*pair, bank) for pair, bank in zip(inverted, banks)]


def part_of(trajectory: Trajectory, rows: slice) -> Trajectory:
    """The trajectory of some pictures of a batch."""
    return replace(trajectory, latents=trajectory.latents[:, rows])


def _recomputed(model: ModelPatcher, trajectory: Trajectory, streams: str, layers: str) -> Any:
    try:
        keys = tuple(find_adapter(model).keys(streams, layers))
    except ValueError as error:
        return no_output(f"features: {error}")
    return FeatureBank(trajectory, keys, "recompute", None, model)
