"""Queries and keys of cross-attentions, changed where the network projects them: other nodes' replacements stay in place."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Iterable, Iterator

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..networks.adapter import Slot
from ..networks.families import find_adapter
from .run import current_run

Change = Callable[[Slot, str, Tensor, dict], Tensor]
"""(slot, "q" or "k", projected (rows, T, C), options as patches get them) -> what takes its place."""


class CrossProjections:
    """An attn2_patch (called) that tells forward hooks on to_q and to_k whose turn it is.

    ComfyUI keeps one attn2 replacement for each block; IPAdapter and its like take it. A patch runs before it and
    the projections after the patch, so that whatever replaces the attention gets the changed queries and keys.
    """

    def __init__(self, slots: Iterable[Slot], change: Change):
        self._slots, self._change = tuple(slots), change

    def patch(self, model: ModelPatcher) -> None:
        if self._slots:
            model.set_model_attn2_patch(self)

    def __call__(self, n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        slot, run = (*options["block"], options["block_index"]), current_run(options)
        if run is not None and slot in self._slots:
            due = run.memo(self._key, dict)
            due[slot, "q"] = due[slot, "k"] = options
        return n, context, value

    @property
    def _key(self) -> tuple:
        return id(self), "due"

    @contextmanager
    def attached(self, guider: Any) -> Iterator[None]:
        """While inside, a sampling of `guider`, its network's projections ask for the change of the forward they belong to."""
        adapter = find_adapter(guider.model_patcher) if self._slots else None
        with ExitStack() as stack:
            for slot in self._slots:
                attention = adapter.attention_module("attn2", slot)
                for name in ("q", "k"):
                    hook = getattr(attention, f"to_{name}").register_forward_hook(self._hook(guider, slot, name))
                    stack.callback(hook.remove)
            yield

    def _hook(self, guider: Any, slot: Slot, name: str) -> Callable:
        def hook(module: Any, args: tuple, projected: Tensor) -> Tensor:
            run = current_run(guider.model_options["transformer_options"])
            options = None if run is None else run.memo(self._key, dict).pop((slot, name), None)
            return projected if options is None else self._change(slot, name, projected, options)

        return hook
