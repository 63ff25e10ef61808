"""Which attention calls of a network are about the picture, and which of their tokens: found by running it.

Two rows with one prompt and different latents differ, before anything has mixed, in the picture's tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable

from torch import Tensor

from ...algorithms.references import Span, differing_span, grown_tokens, within_padding

ARGUMENTS = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")
SLOT = "optimized_attention_override"
LEAST = 16  # latent cells a side that a layout is looked for on: U-Nets halve it three times


@dataclass(frozen=True)
class Call:
    """One attention call of a forward. span: of the picture's tokens, None where it is not about the picture.

    place: (block, number) in U-Nets.
    """

    tokens: int
    span: Span | None
    place: tuple | None = None


@dataclass(frozen=True)
class Layout:
    """calls: all of one forward, in order; numbers: of the image calls among themselves, by index into `calls`."""

    calls: tuple[Call, ...]

    @property
    def numbers(self) -> dict[int, int]:
        images = [index for index, call in enumerate(self.calls) if call.span is not None]
        return {index: number for number, index in enumerate(images)}

    def grown(self, small: tuple[int, ...], shape: tuple[int, ...]) -> Layout | None:
        """The layout of a latent `shape` ([T,] H, W), from this one of a `small` latent under the same conditions.

        What stands beside the picture's tokens stays. None where no grid explains them.
        """
        calls = []
        for call in self.calls:
            if call.span is not None:
                first, end = call.span
                tokens = grown_tokens(end - first, small, shape)
                if tokens is None:
                    return None
                call = replace(call, tokens=call.tokens - (end - first) + tokens, span=(first, first + tokens))
            calls.append(call)
        return Layout(tuple(calls))


def small_shape(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """A latent much smaller than `shape` ([T,] H, W) whose tokens are padded alike, None where there is none.

    The remainders of 16 cells stay: networks pad to patches, and some to a multiple of tokens.
    """
    height, width = (LEAST + side % LEAST for side in shape[-2:])
    if 2 * height * width > shape[-2] * shape[-1]:
        return None
    return *shape[:-2], height, width


def named(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of an attention call, with those that came by position."""
    return {**dict(zip(ARGUMENTS, args)), **kwargs}


def token_axis(kwargs: dict[str, Any]) -> int:
    """Of q, k and v: (B, H, N, D) when already split into heads, else (B, N, H * D)."""
    return 2 if kwargs.get("skip_reshape") else 1


def chained(previous: Callable | None, func: Callable) -> Callable:
    """The attention as it is without us: another pack's override where there is one."""
    if previous is None:
        return func
    return lambda q, k, v, heads, **kwargs: previous(func, q, k, v, heads, **kwargs)


class Probe:
    """An attention override that changes nothing and remembers what it saw. The forward's batch is two equal halves."""

    def __init__(self, rows: int, previous: Callable | None = None):
        self._rows, self._previous = rows, previous
        self._spans: dict[int, Span] = {}
        self.calls: list[Call] = []

    def __call__(self, func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        kwargs = named(args, kwargs)
        axis = token_axis(kwargs)
        options = kwargs.get("transformer_options") or {}
        self.calls.append(Call(q.shape[axis], self._span(q, k, axis), options.get("block")))
        return chained(self._previous, func)(q, k, v, heads, **kwargs)

    def _span(self, q: Tensor, k: Tensor, axis: int) -> Span | None:
        tokens = q.shape[axis]
        if tokens != k.shape[axis] or q.shape[0] != 2 * self._rows or k.shape[0] != 2 * self._rows:
            return None
        span = differing_span(q[0], q[self._rows], axis)
        # a prompt's keys are equal in both halves however long it is: cross attention, not the picture's own
        if span is None or differing_span(k[0], k[self._rows], axis) is None:
            return None
        if tokens not in self._spans:
            self._spans[tokens] = within_padding(span, self._spans)
        return self._spans[tokens]

    @property
    def layout(self) -> Layout:
        return Layout(tuple(self.calls))
