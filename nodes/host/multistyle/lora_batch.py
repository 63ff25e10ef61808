"""Several LoRAs in one forward: every row of the batch takes its own low-rank update, no weight is swapped."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any, Iterator

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor, nn

from ...algorithms.lora import add_rows
from .sources import Patches

BASE = -1  # the style number of rows that run the model as it is


class BatchedStyles:
    """The updates of S styles, ready to run on one device. `rows` says which style each batch row has."""

    def __init__(self, model: nn.Module, styles: list[Patches], strengths: list[float], names: list[str], device: Any, dtype: Any):
        self._rows: tuple[int, ...] = ()
        self._layers: dict[nn.Module, list] = {}
        grouped: dict[str, dict[int, list]] = {}
        for number, patches in enumerate(styles):
            for key, added in patches.items():
                grouped.setdefault(key, {})[number] = [(strengths[number] * patch[0], *patch[1:]) for patch in added]
        for key, by_style in grouped.items():
            comfy.model_management.throw_exception_if_processing_interrupted()
            module, part = _locate(model, key, names[next(iter(by_style))])
            low = {number: _low_rank(module, part, added) for number, added in by_style.items()}
            for number, pair in low.items():
                if pair is not None:
                    _check_shapes(module, pair, key, names[number])
            layer = self._layers.setdefault(module, [])
            batched = {number: pair for number, pair in low.items() if pair is not None}
            if batched:
                layer.append(_LowRankRows(module, batched, len(styles), device, dtype))
            for number, pair in low.items():
                if pair is None:
                    layer.append(_DenseRows(module, part, number, by_style[number], key, device, dtype))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While inside, the layers look at `running`; outside of that they compute what they always do."""
        with ExitStack() as stack:
            for module, updates in self._layers.items():
                # First of a layer's hooks: those of injections replace what the layer computes, its LoRA included.
                stack.callback(module.register_forward_hook(self._hook(updates), prepend=True).remove)
            yield

    @contextmanager
    def running(self, rows: tuple[int, ...]) -> Iterator[None]:
        """A forward whose batch row i has style rows[i] (BASE: none)."""
        self._rows = rows if any(row != BASE for row in rows) else ()
        try:
            yield
        finally:
            self._rows = ()

    def _rows_of(self, count: int) -> tuple[int, ...]:
        """The style of each of a layer's `count` rows, which patches may have folded frames into, repeated or tiled."""
        if self._rows.count(self._rows[0]) == len(self._rows):
            return self._rows[:1] * count
        repeat, odd = divmod(count, len(self._rows))
        if odd:
            raise ValueError(f"A layer got {count} rows for a batch of {len(self._rows)}: its LoRA rows are unknown.")
        return self._rows if repeat == 1 else tuple(row for row in self._rows for _ in range(repeat))

    def _hook(self, updates: list):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if not self._rows:
                return output
            rows = self._rows_of(args[0].shape[0])
            for update in updates:
                output = update(args[0], output, rows)
            return output

        return hook


class _LowRankRows:
    """Plain LoRAs of one linear or convolution layer. Ranks may differ: they are padded with zeros."""

    def __init__(self, module: nn.Module, pairs: dict[int, tuple[Tensor, Tensor]], styles: int, device: Any, dtype: Any):
        self._module = module
        self._convolution = isinstance(module, nn.Conv2d)
        rank = max(down.shape[0] for down, _ in pairs.values())
        down, up = next(iter(pairs.values()))
        self._down = torch.zeros(styles + 1, rank, *down.shape[1:], device=device, dtype=dtype)  # the last one: BASE
        self._up = torch.zeros(styles + 1, up.shape[0], rank, device=device, dtype=dtype)
        for number, (down, up) in pairs.items():
            self._down[number, : down.shape[0]] = down
            self._up[number, :, : up.shape[1]] = up.flatten(1)
        self._styles = set(pairs)
        self._chosen: tuple = ((), None, None)

    def __call__(self, x: Tensor, output: Tensor, rows: tuple[int, ...]) -> Tensor:
        if not self._styles.intersection(rows):
            return output
        if self._chosen[0] != rows:
            index = torch.tensor(rows, device=self._down.device)
            self._chosen = rows, self._down[index], self._up[index]
        _, down, up = self._chosen
        if self._convolution:
            hidden = self._convolve(x, down)
            return torch.baddbmm(output.flatten(2), up.to(x.dtype), hidden).reshape(output.shape)
        return add_rows(output, x, down, up)

    def _convolve(self, x: Tensor, down: Tensor) -> Tensor:
        """Every row its own kernel: (N, in, h, w) -> (N, r, h' w')."""
        module, n = self._module, x.shape[0]
        if module.kernel_size == module.stride == (1, 1) and module.padding in (0, (0, 0)):
            return torch.bmm(down.flatten(2).to(x.dtype), x.flatten(2))
        hidden = F.conv2d(
            x.reshape(1, -1, *x.shape[2:]), down.reshape(-1, *down.shape[2:]).to(x.dtype), None,
            module.stride, module.padding, module.dilation, n,
        )  # (1, N r, h', w')
        return hidden.reshape(n, down.shape[1], -1)


class _DenseRows:
    """Any other patch of one style (LoHa, DoRA, full differences): the weight's change as core computes it."""

    def __init__(self, module: nn.Module, part: str, style: int, patches: list, key: str, device: Any, dtype: Any):
        weight = comfy.model_management.cast_to(getattr(module, part), torch.float32, device)
        change = comfy.lora.calculate_weight(patches, weight.clone(), key) - weight
        self._module, self._part, self._style, self._change = module, part, style, change.to(dtype)

    def __call__(self, x: Tensor, output: Tensor, rows: tuple[int, ...]) -> Tensor:
        index = torch.tensor([i for i, row in enumerate(rows) if row == self._style], device=x.device)
        if not len(index):
            return output
        if self._part == "bias":
            channels = 1 if isinstance(self._module, (nn.Conv2d, nn.GroupNorm)) else output.ndim - 1
            shape = [1] * output.ndim
            shape[channels] = -1
            change = self._change.to(output.dtype).view(shape).expand(len(index), *output.shape[1:])
        else:
            change = _apply(self._module, x[index], self._change.to(x.dtype))
        return output.index_add(0, index, change.to(output.dtype))


def _apply(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight and no bias: every layer here is linear in its weight."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight)
    if isinstance(module, nn.Conv2d):
        return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation, module.groups)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, weight, None, module.eps)
    return F.layer_norm(x, module.normalized_shape, weight, None, module.eps)


def _locate(model: nn.Module, key: str, name: str) -> tuple[nn.Module, str]:
    path, _, part = key.rpartition(".")
    module = comfy.utils.get_attr(model, path) if path else None
    if part not in ("weight", "bias") or not isinstance(module, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)):
        raise ValueError(
            f"{name}: its LoRA changes {key} ({type(module).__name__}), which cannot differ within a batch. "
            "Merge that LoRA into the model with core's loader instead."
        )
    return module, part


def _low_rank(module: nn.Module, part: str, patches: list) -> tuple[Tensor, Tensor] | None:
    """Down (r, in, ...) and up (out, r, ...) with all scales in `up`; None when a patch is anything but plain LoRA."""
    if part != "weight" or not isinstance(module, (nn.Linear, nn.Conv2d)) or getattr(module, "groups", 1) != 1:
        return None
    downs, ups = [], []
    for strength, adapter, strength_model, offset, function in patches:
        if type(adapter) is not LoRAAdapter or strength_model != 1.0 or offset is not None or function is not None:
            return None
        up, down, alpha, middle, dora, reshape = adapter.weights
        if middle is not None or dora is not None or reshape is not None:
            return None
        scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
        if isinstance(module, nn.Linear):
            down, up = down.flatten(1), up.flatten(1)
        elif down.ndim == 2:
            down = down.view(down.shape[0], -1, *module.kernel_size)
        downs.append(down.float())
        ups.append(up.float().flatten(1) * scale)
    return torch.cat(downs), torch.cat(ups, dim=1)


def _check_shapes(module: nn.Module, pair: tuple[Tensor, Tensor], key: str, name: str) -> None:
    down, up = pair
    expected = tuple(module.weight.shape)
    got = (up.shape[0], *down.shape[1:])
    if got != expected:
        raise ValueError(
            f"{name}: the LoRA's {key} is for a weight of {got}, the model's is {expected}. "
            "It was made for another architecture."
        )
