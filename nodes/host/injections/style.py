"""StyleID's style injection as patches on a MODEL's self-attention."""

from __future__ import annotations

from typing import Any, Callable

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...algorithms.masks import resize_mask
from ...algorithms.references import sampling_progress, scheduled
from ...algorithms.styleid import blend, injected_query
from ...sockets import FeatureBank, FeatureKey
from ..networks.adapter import Attend, Attended, NetworkAdapter, Place, Replacement, Slot
from ..networks.families import find_adapter
from .base import WRAPPERS, Injection, Source
from .beside import BESIDE, RowsBeside
from .hints import Expected, Other
from .run import SamplingRun, current_run, rows_of
from .schedule import SigmaRange, current_sigma, sigma_range
from .style_marks import STYLE_INJECTION

HIDDEN = ("self_attention",)
PROJECTED = ("self_attention_q", "self_attention_k", "self_attention_v")
SAME_SIZE = "Invert and sample the content at one size (the style may differ), and see that the two are not swapped."
OTHER_KIND = (
    "another Style Injection changes the same layers with features of the other kind (self_attention, self_attention_qkv). The two are "
    "not blended: self_attention_qkv lies on top whatever the order. Capture both with the same streams."
)
STYLED = "pastiche_styled"  # in options: the attention of another Style Injection's own queries and keys is being computed


class StylePatches(Injection, RowsBeside):
    """Works on the hidden state before the projections where the bank has it (one tensor a layer, any attention
    kernel), or on projected q, k, v where those were captured.

    Several on one MODEL nest: each blends its own injection into the sample's attention with what came before.
    """

    name = STYLE_INJECTION

    def __init__(
        self,
        adapter: NetworkAdapter,
        style: FeatureBank,
        content: FeatureBank | None,
        places: list[Place],
        gamma: float,
        temperature: float,
        strength: float,
        mask: torch.Tensor | None,
        sigmas: SigmaRange,
        gamma_end: float = 0.0,
        schedule: str = "constant",
    ):
        self.gamma_end, self.schedule = gamma_end, schedule
        self.style, self.content, self.places, self.slots = style, content, places, adapter.slots(places)
        self.gamma, self.temperature, self.strength = gamma, temperature, strength
        self.mask, self.sigmas = mask, sigmas
        self.projected = not style.keys_of("self_attention")
        self._lost: Callable[[dict], list[str]] = lambda options: []
        needed, streams = (PROJECTED, "self_attention_qkv") if self.projected else (HIDDEN, "self_attention")
        self.sources = (self._source("style", style, needed[1:] or needed, streams, ""),)
        if content is not None:
            self.sources += (self._source("content", content, needed[:1], streams, SAME_SIZE),)

    @property
    def expected(self) -> Expected:
        advice = "Content and style look swapped: the sampler gets the content's." if self.content is not None else (
            "It will return to that picture: give the sampler the content's inverted latent, or noise of its own."
        )
        start = None if self.content is None else ("content", self.content.trajectory)
        return Expected(start, (Other("style", self.style.trajectory, advice),), unguided=True)

    def _source(self, name: str, bank: FeatureBank, needed: tuple[str, ...], streams: str, size: str) -> Source:
        keys = tuple(FeatureKey(stream, *slot) for stream in needed for slot in self.slots)
        return Source(
            name, f"The {name} features", bank.trajectory, bank, keys, streams, size, self.sigmas.holds, beside=not self.projected
        )

    @property
    def changes(self) -> bool:
        nowhere = self.mask is not None and not bool(self.mask.any())
        return self.strength != 0 and self.sigmas.high > self.sigmas.low and not nowhere

    @property
    def blends(self) -> bool:
        """Whether the plain attention is needed too."""
        return self.strength != 1.0 or self.mask is not None

    def patch(self, model: ModelPatcher) -> None:
        adapter = find_adapter(model)
        if self.projected:
            self._lost = adapter.replace_attention(model, "attn1", self.slots, self.attn1_replace)
        else:
            adapter.change_hidden(model, self.change_hidden, self.blends)
            model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPERS, self.apply_model)
            model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, WRAPPERS, self.prepare_sampling)

    @property
    def rows_beside(self) -> int:
        return sum(source.trajectory.batch for source in self.sources if source.beside and source.bank.store is None)

    def check(self, guider: Any, noise: torch.Tensor, sigmas: torch.Tensor) -> None:
        self.warn_of_losses(self._lost(guider.model_options["transformer_options"]))
        if any(self._is_of_other_kind(earlier) for earlier in self.installed_before(guider.model_patcher)):
            self.say(OTHER_KIND)

    def _is_of_other_kind(self, other: Injection) -> bool:
        return isinstance(other, StylePatches) and other.projected != self.projected and not {*other.slots}.isdisjoint(self.slots)

    def _run(self, options: dict) -> SamplingRun | None:
        """The sampling run if this layer and step are to be changed, else None."""
        if options.get("block") not in self.places or not self.sigmas.holds(current_sigma(options)):
            return None
        return current_run(options)

    def _feature(self, run: SamplingRun, bank: FeatureBank | None, stream: str, options: dict, like: torch.Tensor):
        if bank is None:
            return None
        key = FeatureKey(stream, *options["block"], options["block_index"])
        return rows_of(run.feature(bank, key, current_sigma(options), like), like.shape[0], options)

    def _query(self, run: SamplingRun, query: torch.Tensor, content: torch.Tensor | None, options: dict) -> torch.Tensor:
        if content is not None and content.shape != query.shape:
            raise ValueError(
                f"content: the sampler asks for {query.shape[1]} tokens, the content's features have {content.shape[1]}. "
                f"{run.why_other_size('query preservation')} Or leave content out."
            )
        return injected_query(query, content, self._gamma(run, options), self.temperature)

    def _gamma(self, run: SamplingRun, options: dict) -> float:
        if self.schedule == "constant":
            return self.gamma
        levels = run.memo("sample_sigmas", lambda: options["sample_sigmas"].tolist())
        return scheduled(self.gamma, self.gamma_end, sampling_progress(current_sigma(options), levels), self.schedule)

    def change_hidden(self, own: torch.Tensor, inputs: Attended, options: dict) -> Replacement | None:
        run, beside = self._run(options), options.get(BESIDE)
        if run is None:
            return None
        if beside is not None:
            beside.keep(FeatureKey("self_attention", *options["block"], options["block_index"]), own)
            own = own[: beside.rows]
        style = self._feature(run, self.style, "self_attention", options, own)
        query = self._query(run, own, self._feature(run, self.content, "self_attention", options, own), options)
        changed, weight = Attended(query, style, style), self._weight(run, own, options) if self.blends else None
        if beside is None:
            return Replacement(changed, weight)
        if isinstance(weight, torch.Tensor):
            weight = beside.joined(weight, weight.new_zeros(inputs.query.shape[0], *weight.shape[1:]))
        return Replacement(Attended(*(beside.joined(*pair) for pair in zip(changed, inputs))), weight)

    def attn1_replace(self, slot: Slot, attend: Attend) -> Attend:
        """Replaces projected q, k, v (rows, T, C) before `attend`."""

        def replace(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict) -> torch.Tensor:
            run = self._run(options)
            if run is None or options.get(STYLED):
                return attend(q, k, v, options)
            styled = attend(
                self._query(run, q, self._feature(run, self.content, "self_attention_q", options, q), options),
                self._feature(run, self.style, "self_attention_k", options, k),
                self._feature(run, self.style, "self_attention_v", options, v),
                {**options, STYLED: True},
            )
            return blend(attend(q, k, v, options), styled, self._weight(run, styled, options)) if self.blends else styled

        return replace

    def _weight(self, run: SamplingRun, like: torch.Tensor, options: dict) -> torch.Tensor | float:
        """strength, times the mask on this layer's grid as (rows, T, 1)."""
        if self.mask is None:
            return self.strength
        grid = tuple(options["activations_shape"][-2:])
        tokens = run.memo(
            (id(self), grid), lambda: self.strength * resize_mask(self.mask, *grid).flatten(1).unsqueeze(-1).to(like)
        )  # BHW -> BT1
        return rows_of(tokens, like.shape[0], options)


def inject_style(
    model: ModelPatcher,
    style: FeatureBank,
    content: FeatureBank | None,
    gamma: float,
    temperature: float,
    strength: float,
    layers: str,
    start_percent: float,
    end_percent: float,
    mask: torch.Tensor | None,
    gamma_end: float = 0.0,
    schedule: str = "constant",
) -> ModelPatcher:
    """`model` with StyleID's injection (methods: K and V of the style, Q mixed with the content's, temperature).

    schedule: how gamma goes to gamma_end along the sampling steps; "constant" leaves it as it is. start_percent, end_percent: share of the schedule, 0..1. mask: (B or 1, H, W) or (H, W) in pixels of any size.
    Returns an unpatched clone where nothing would change. Raises ValueError where the features do not fit.
    """
    adapter = find_adapter(model)
    sigmas = sigma_range(model.get_model_object("model_sampling"), start_percent, end_percent)
    return StylePatches(
        adapter, style, content, adapter.places(layers), gamma, temperature, strength, mask, sigmas, gamma_end, schedule
    ).install(model)
