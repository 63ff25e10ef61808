"""The attention override of one forward: the sample's rows see the references' keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor

from ...algorithms.diffstyler import blend_share, override_or_blend
from ...algorithms.masks import resize_mask
from ...algorithms.references import (
    Span,
    change_tokens,
    match_channels,
    match_pairs,
    mix_styles,
    rotate_pairs,
    scale_pairs,
    scheduled,
    share_tokens,
    shift_angles,
    token_grid,
    untwist_scales,
)
from ...algorithms.styleid import injected_query
from .layout import Call, Layout, chained, named, token_axis
from .settings import Reference

UNCONDITIONAL = 1  # in cond_or_uncond


@dataclass(frozen=True)
class Part:
    """A reference in one forward: the sample's rows that it acts on, where its own are, and which calls it acts in.

    rows: indices, None for all of the sample's. kinds: conditional or not, of each chunk of those rows.
    """

    reference: Reference
    rows: tuple[int, ...] | None
    kinds: tuple[int, ...]
    styles: tuple[slice, ...]
    content: slice | None
    calls: frozenset[int]
    attention: frozenset[int] = frozenset()  # of these, where the content's queries and keys are borrowed
    features: frozenset[int] = frozenset()  # and where its outputs are


class Sharing:
    """Called for every attention of a forward of `rows` sample rows followed by the references' rows.

    latent: ([T,] H, W) of the forward; full: whether that is the whole picture.
    """

    def __init__(
        self, layout: Layout, parts: list[Part], rows: int, latent: tuple[int, ...], full: bool,
        progress: float, previous: Callable | None, memo: Callable[[Any, Callable], Any],
    ):
        self._layout, self._parts, self._rows = layout, parts, rows
        self._latent, self._full = latent, full
        self._progress, self._previous, self._memo = progress, previous, memo
        self.count = 0
        self.strayed = False

    def __call__(self, func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        kwargs = named(args, kwargs)
        attend = chained(self._previous, func)
        index, axis = self.count, token_axis(kwargs)
        self.count += 1
        parts = [part for part in self._parts if index in part.calls]
        if not parts:
            return attend(q, k, v, heads, **kwargs)
        call = self._layout.calls[index]
        if call.tokens != q.shape[axis] or call.tokens != k.shape[axis] or q.shape[0] <= self._rows:
            self.strayed = True
            return attend(q, k, v, heads, **kwargs)
        own, others = slice(0, self._rows), slice(self._rows, None)
        mask, batch = kwargs.pop("mask", None), q.shape[0]
        borrowing = [part for part in parts if part.reference.borrow is not None]
        parts = [part for part in parts if part.reference.borrow is None]
        for part in borrowing:
            if index in part.attention:
                q, k = (self._borrowed(x, part, call.span, axis) for x in (q, k))

        def plain() -> Tensor:
            return attend(q[own], k[own], v[own], heads, **kwargs, mask=_rows_of(mask, own, batch, heads))

        out = None
        for rows in dict.fromkeys(part.rows for part in parts):  # those on all rows together, styles of some rows apart
            styled, weights = [], []
            for part in (part for part in parts if part.rows == rows):
                for number, place in enumerate(part.styles):
                    styled.append(self._styled(attend, q, k, v, heads, kwargs, mask, part, place, call, axis))
                    weights.append(self._weight(part, number, call, styled[-1], bool(kwargs.get("skip_output_reshape"))))
            weights, complete = _normalised(weights)
            if rows is None:
                out = mix_styles(None if complete else plain(), styled, weights)
                continue
            out = plain() if out is None else out
            where = list(rows)
            out = out.index_copy(0, torch.tensor(where, device=out.device), mix_styles(out[where], styled, weights))
        out = plain() if out is None else out
        out = torch.cat([out, attend(q[others], k[others], v[others], heads, **kwargs, mask=_rows_of(mask, others, batch, heads))])
        for part in borrowing:
            if index in part.features:
                out = self._borrowed(out, part, call.span, 2 if kwargs.get("skip_output_reshape") else 1)
        return out

    def _borrowed(self, x: Tensor, part: Part, span: Span, axis: int) -> Tensor:
        """The batch with the content's picture tokens on the sample's rows."""
        first, end = span
        own, content = (x[rows].narrow(axis, first, end - first) for rows in (slice(0, self._rows), part.content))
        share = blend_share(1000 * (1 - self._progress)) if part.reference.borrow.blends else 1.0
        changed = change_tokens(x[: self._rows], span, override_or_blend(own, content, share), axis)
        return torch.cat([changed, x[self._rows :]])

    def _styled(
        self, attend: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, kwargs: dict, mask: Tensor | None,
        part: Part, place: slice, call: Call, axis: int,
    ) -> Tensor:
        """The sample rows' attention output with one style shared."""
        reference, (first, end) = part.reference, call.span

        def picture(x: Tensor, rows: slice | list[int]) -> Tensor:
            return x[rows].narrow(axis, first, end - first)

        own = slice(0, self._rows) if part.rows is None else list(part.rows)
        query, key = picture(q, own), picture(k, own)
        depth = q.shape[-1] if axis == 2 else q.shape[-1] // heads
        query, key = self._adain(reference, query, key, picture(q, place), picture(k, place), depth, axis)
        content = None if part.content is None else picture(q, part.content)
        gamma = scheduled(reference.gamma, reference.gamma_end, self._progress, reference.schedule)
        query = injected_query(query, content, gamma, reference.temperature)
        guard = reference.cures.leak_guard
        if guard and UNCONDITIONAL in part.kinds:
            query = torch.lerp(query, reference.temperature * picture(q, place), guard * _unconditional(part.kinds, query))
        shared = self._cured(reference, picture(k, place), call.span, depth, axis)
        keys = share_tokens(change_tokens(k[own], call.span, key, axis), shared, call.span, reference.share, axis)
        values = share_tokens(v[own], picture(v, place), call.span, reference.share, axis)
        own_mask = _rows_of(mask, own, q.shape[0], heads)
        if own_mask is not None and reference.share == "join":
            own_mask = _lengthened(own_mask, end - first)
        return attend(change_tokens(q[own], call.span, query, axis), keys, values, heads, **kwargs, mask=own_mask)

    @staticmethod
    def _adain(
        reference: Reference, query: Tensor, key: Tensor, style_query: Tensor, style_key: Tensor, depth: int, axis: int
    ) -> tuple[Tensor, Tensor]:
        """The sample's queries and keys on their way to the reference's token statistics."""
        amount, rotary = reference.cures.token_adain, reference.rotary
        if not amount:
            return query, key
        matched = []
        for own, style in ((query, style_query), (key, style_key)):
            if rotary is not None and rotary.width == depth:
                own_heads, style_heads = (x.unflatten(-1, (-1, depth)) for x in (own, style))
                other = match_pairs(own_heads, style_heads, axis, rotary.interleaved).flatten(-2)
            elif reference.unrotated:
                other = match_channels(own, style, axis)
            else:
                return query, key
            matched.append(torch.lerp(own, other, amount))
        return matched[0], matched[1]

    def _cured(self, reference: Reference, key: Tensor, span: Span, depth: int, axis: int) -> Tensor:
        """The reference's keys (rows, [heads,] tokens, width), scaled, untwisted and moved aside."""
        cures, rotary = reference.cures, reference.rotary
        if cures.key_scale != 1.0:
            key = cures.key_scale * key
        if rotary is None or rotary.width != depth or not cures.needs_rotation:
            return key
        heads = key.unflatten(-1, (-1, depth))
        if cures.untwist_high != 1.0 or cures.untwist_low != 1.0:
            low = 1.0 + (cures.untwist_low - 1.0) * self._progress  # the style's strength grows along the sampling
            heads = scale_pairs(heads, untwist_scales(rotary, cures.untwist_high, low, cures.untwist_beta), rotary.interleaved)
        grid = token_grid(span[1] - span[0], self._latent)
        if cures.position_shift and grid is not None:
            heads = rotate_pairs(heads, shift_angles(rotary, cures.position_shift * grid[2]), rotary.interleaved)
        return heads.flatten(-2)

    def _weight(self, part: Part, number: int, call: Call, out: Tensor, in_heads: bool) -> Tensor | float:
        """strength, weight and mask of one style: a number, or one for each token of `out`."""
        reference = part.reference
        share = reference.strength * reference.styles[number][1]
        if reference.mask is None:
            return share
        if not self._full:
            raise ValueError("mask: a condition with an area cannot be combined with a masked reference: use masks for both.")

        def tokens() -> Tensor:
            first, end = call.span
            grid = token_grid(end - first, self._latent)
            if grid is None:
                raise ValueError(
                    f"mask: {reference.family} has {end - first} picture tokens for a latent of {'x'.join(map(str, self._latent))}; "
                    "no grid explains them, so a mask cannot be laid over them. Leave the mask out."
                )
            small = resize_mask(reference.mask, *grid[1:]).clamp(0, 1).flatten(1).repeat(1, grid[0])  # BHW -> BT
            whole = small.mean(1, keepdim=True).repeat(1, call.tokens)
            whole[:, first:end] = small
            return whole.unsqueeze(-1).to(out)  # BT1

        weight = share * self._memo((id(reference), call.tokens, call.span, tuple(self._latent)), tokens)
        if weight.shape[0] > 1:
            weight = weight.repeat(len(part.kinds), 1, 1)
        return weight.unsqueeze(1) if in_heads else weight


def _normalised(weights: list[Tensor | float]) -> tuple[list[Tensor | float], bool]:
    """Weights that nowhere sum to more than 1, and whether they sum to 1 everywhere without masks."""
    total = sum(weights)
    if not isinstance(total, torch.Tensor):
        if total > 1.0 - 1e-6:
            return [weight / total for weight in weights], True
        return weights, False
    total = total.clamp_min(1.0)
    return [weight / total for weight in weights], False


def _unconditional(kinds: tuple[int, ...], like: Tensor) -> Tensor:
    """(rows, 1, ...): 1 for rows of unconditional chunks."""
    batch = like.shape[0] // len(kinds)
    return like.new_tensor([float(kind == UNCONDITIONAL) for kind in kinds for _ in range(batch)]).view(-1, *[1] * (like.ndim - 1))


def _rows_of(mask: Tensor | None, rows: slice | list[int], batch: int, heads: int) -> Tensor | None:
    """An attention mask's part for some rows of the batch; masks that rows share stay whole."""
    if mask is None or mask.ndim < 3 and mask.shape[0] != batch:
        return mask
    if mask.shape[0] == batch:
        return mask[rows]
    if mask.ndim == 3 and mask.shape[0] == batch * heads:
        return mask.unflatten(0, (batch, heads))[rows].flatten(0, 1)
    return mask


def _lengthened(mask: Tensor, tokens: int) -> Tensor:
    """A mask that lets every query see `tokens` more keys."""
    more = mask.new_ones(*mask.shape[:-1], tokens) if mask.dtype == torch.bool else mask.new_zeros(*mask.shape[:-1], tokens)
    return torch.cat([mask, more], -1)
