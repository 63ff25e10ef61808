"""Attention between the frames of a film."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...algorithms.frames import linked_rows
from ...sockets import FeatureKey
from ..injections.base import Injection
from ..injections.run import current_run
from ..injections.schedule import current_sigma
from ..networks.adapter import Attended, NetworkAdapter, Place, Replacement
from ..networks.families import find_adapter

LINKS = {"none": (False, False), "first": (True, False), "previous": (False, True), "first and previous": (True, True)}
"""Name -> whether frames see the film's first frame, and the one before."""

Rows = dict[str, Tensor]  # hidden state (1, T, C) on the CPU by "stream/place/step/condition"


@dataclass
class CarriedRows:
    """Of the film's first frame and of the last one so far: what a chunk takes from those before it, whatever the film's length."""

    first: Rows = field(default_factory=dict)
    last: Rows = field(default_factory=dict)


class FrameLinks(Injection):
    """The batch's samples are neighbouring frames: each one's self-attention also sees the rows of the film's first frame and of
    the previous one, of the same layer and step, behind the rows that it would see without (algorithms.frames.linked_rows).

    The rows are the hidden states before the projections, of the restyled frames as they are being sampled. Every frame depends on
    itself and these two alone, so chunks of any size give the same film: `before` is what the chunks before this one left (None for
    the film's first), `after` is filled with what the next one needs.
    """

    name = "Frame links"

    def __init__(self, adapter: NetworkAdapter, places: list[Place], link: str, before: CarriedRows | None, after: CarriedRows):
        if link not in LINKS:
            raise ValueError(f'link: got "{link}", choose among {", ".join(LINKS)}.')
        self.places, self.to_first, self.to_previous = places, *LINKS[link]
        self.slots = adapter.slots(places)
        self.before, self.after = before, after

    @property
    def changes(self) -> bool:
        return self.to_first or self.to_previous

    def patch(self, model: ModelPatcher) -> None:
        find_adapter(model).change_hidden(model, self.change_hidden, blends=False)

    def change_hidden(self, own: Tensor, inputs: Attended, options: dict) -> Replacement | None:
        run = current_run(options)
        if run is None or options.get("block") not in self.places:
            return None
        key = FeatureKey("self_attention", *options["block"], options["block_index"])
        step = run.schedule(options).step(current_sigma(options))
        conditions = options["cond_or_uncond"]
        linked = torch.cat([
            self._linked(f"{key}/{step}/{condition}", frames) for condition, frames in zip(conditions, own.chunk(len(conditions)))
        ])
        return Replacement(Attended(inputs.query, *(torch.cat([rows, linked.to(rows)], dim=1) for rows in inputs[1:])))

    def _linked(self, name: str, frames: Tensor) -> Tensor:
        first, last = (None, None) if self.before is None else (self._carried(rows, name, frames) for rows in (self.before.first, self.before.last))
        if self.to_first:
            self.after.first[name] = frames[:1].to("cpu", copy=True) if self.before is None else self.before.first[name]
        if self.to_previous:
            self.after.last[name] = frames[-1:].to("cpu", copy=True)
        return linked_rows(frames, first, last, self.to_first, self.to_previous)

    @staticmethod
    def _carried(rows: Rows, name: str, like: Tensor) -> Tensor | None:
        found = rows.get(name)
        return None if found is None else found.to(like)
