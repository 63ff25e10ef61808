"""A U-Net's residual blocks with other residuals: the one hook that runs a block in its place."""

from __future__ import annotations

from typing import Any, Iterable

from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .adapter import RUN, ChangeResidual, Place

HOOK = "forward_timestep_embed_patch"


class ResidualHandler:
    """Runs the residual blocks of some places: their skip, plus what `change` gives instead of their own output."""

    def __init__(self, places: Iterable[Place], change: ChangeResidual):
        self._places, self._change = set(places), change

    def install(self, model: ModelPatcher) -> None:
        patches = model.model_options["transformer_options"].setdefault("patches", {})
        # The first handler of a class runs; ours comes first and passes on what is not its own.
        patches[HOOK] = [(ResBlock, self), *patches.get(HOOK, [])]

    def __call__(self, layer: Any, x: Tensor, emb: Tensor, context: Any, options: dict, *rest: Any) -> Tensor:
        place, run = tuple(options["block"]), options.get(RUN)
        if run is not None and place in self._places and run.adapter.is_residual(layer, place):
            residual = self._change(place, x, tuple(_resampled(layer, x).shape[-2:]), options)
            if residual is not None:
                return residual_skip(layer, x) + residual
        return self._next(layer, x, emb, context, options, *rest)

    def _next(self, layer: Any, x: Tensor, emb: Tensor, context: Any, options: dict, *rest: Any) -> Tensor:
        handlers = options["patches"][HOOK]
        mine = next(i for i, (_, handler) in enumerate(handlers) if handler is self)
        for kind, handler in handlers[mine + 1 :]:
            if isinstance(layer, kind):
                return handler(layer, x, emb, context, options, *rest)
        return layer(x, emb)


def residual_skip(layer: ResBlock, x: Tensor) -> Tensor:
    """What a residual block adds to its output: its input, resampled and projected as the block does it."""
    return layer.skip_connection(_resampled(layer, x))


def _resampled(layer: ResBlock, x: Tensor) -> Tensor:
    return layer.x_upd(x) if layer.updown else x


def runs_residual_blocks(options: dict) -> bool:
    """Whether another node runs residual blocks in its own way; options are a run's transformer_options."""
    handlers = options.get("patches", {}).get(HOOK, [])
    return any(issubclass(ResBlock, kind) and not isinstance(handler, ResidualHandler) for kind, handler in handlers)
