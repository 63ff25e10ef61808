"""StyleID's style injection as patches on a MODEL's self-attention."""

from __future__ import annotations

from typing import Any

import torch

from ...algorithms.masks import resize_mask
from ...algorithms.styleid import blend, injected_query
from ...sockets import FeatureBank, FeatureKey
from .attention_slots import Attend, AttentionSlots, Slot
from ..networks.fingerprint import fingerprint, require_same_model
from ..networks.unet import Place, attention_block, inspect_model
from .run import attach_banks, check_banks_schedule, current_run, current_sigma, rows_of

HIDDEN = ("self_attention",)
PROJECTED = ("self_attention_q", "self_attention_k", "self_attention_v")


class StyleInjection:
    """The patches of one Style Injection node. Holds settings only; what belongs to a run lives in the run.

    Works on the hidden state before the projections where the bank has it (one tensor a layer, any attention
    kernel), or on projected q, k, v where those were captured.
    """

    def __init__(
        self,
        style: FeatureBank,
        content: FeatureBank | None,
        places: list[Place],
        gamma: float,
        temperature: float,
        strength: float,
        mask: torch.Tensor | None,
        sigmas: tuple[float, float],
    ):
        self.style, self.content = style, content
        self.places = set(places)
        self.gamma, self.temperature, self.strength = gamma, temperature, strength
        self.mask = mask
        self.sigma_high, self.sigma_low = sigmas
        self.projected = not style.keys_of("self_attention")
        self._slots = AttentionSlots()

    @property
    def blends(self) -> bool:
        """Whether the plain attention is needed too."""
        return self.strength != 1.0 or self.mask is not None

    def keys(self, bank: FeatureBank, streams: tuple[str, ...]) -> list[FeatureKey]:
        return [key for stream in streams for key in bank.keys_of(stream) if (key.block, key.number) in self.places]

    def install(self, model: Any, depths: dict[Place, int]) -> None:
        """Adds the patches to `model` (a clone)."""
        banks = [(self.style, self.keys(self.style, PROJECTED[1:] if self.projected else HIDDEN))]
        if self.content is not None:
            banks.append((self.content, self.keys(self.content, PROJECTED[:1] if self.projected else HIDDEN)))
        attach_banks(model, banks, self.check)
        if not self.projected:
            model.set_model_attn1_patch(self.attn1_patch)
            if self.blends:
                model.set_model_attn1_output_patch(self.attn1_output_patch)
            return
        slots = [(*place, depth) for place in self.places for depth in range(depths[place])]
        self._slots.fill(model, "attn1", slots, self.attn1_replace)

    def check(self, guider: Any, noise: torch.Tensor, sigmas: torch.Tensor) -> None:
        """Refuses features that do not fit the sampling about to start."""
        batch = noise.shape[0]
        for name, bank in (("style", self.style), ("content", self.content)):
            if bank is None:
                continue
            check_banks_schedule(bank, sigmas, f"The {name} features", self.sigma_low, self.sigma_high)
            if bank.trajectory.batch not in (1, batch):
                raise ValueError(
                    f"{name}: features of {bank.trajectory.batch} images cannot be shared among {batch} samples; "
                    f"invert one image, or as many as the sampled latent holds."
                )
        if self.content is not None and self.content.trajectory.latents.shape[-2:] != noise.shape[-2:]:
            height, width = self.content.trajectory.latents.shape[-2:]
            raise ValueError(
                f"content: features are of a {width}x{height} latent, the sampled one is "
                f"{noise.shape[-1]}x{noise.shape[-2]}. Invert and sample the content at one size (the style may differ)."
            )
        if self.mask is not None and self.mask.shape[0] not in (1, batch):
            raise ValueError(f"mask: {self.mask.shape[0]} masks for {batch} samples; connect one mask or {batch}.")
        self._slots.warn_of_losses(guider.model_options["transformer_options"], "Style Injection")

    def _run(self, options: dict):
        """The sampling run if this layer and step are to be changed, else None."""
        if options.get("block") not in self.places or not self.sigma_low <= current_sigma(options) <= self.sigma_high:
            return None
        return current_run(options)

    def _feature(self, run: Any, bank: FeatureBank | None, stream: str, options: dict, like: torch.Tensor):
        if bank is None:
            return None
        key = FeatureKey(stream, *options["block"], options["block_index"])
        return rows_of(run.feature(bank, key, current_sigma(options), like), like.shape[0], options)

    def _query(self, query: torch.Tensor, content: torch.Tensor | None) -> torch.Tensor:
        if content is not None and content.shape != query.shape:
            raise ValueError(
                f"content: the sampler asks for {query.shape[1]} tokens, the content's features have {content.shape[1]}. "
                "Conditions with an area cannot be combined with query preservation: use masks, or leave content out."
            )
        return injected_query(query, content, self.gamma, self.temperature)

    def attn1_patch(self, n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, options: dict):
        """(rows, T, C) hidden states before to_q, to_k, to_v."""
        run = self._run(options)
        if run is None:
            return n, context, value
        if self.blends:
            options["pastiche_plain"] = options.get("pastiche_plain", {}) | {id(self): (n, context, value)}
        style = self._feature(run, self.style, "self_attention", options, n)
        query = self._query(n, self._feature(run, self.content, "self_attention", options, n))
        return query, style, style

    def attn1_output_patch(self, out: torch.Tensor, options: dict) -> torch.Tensor:
        """Blends with what the attention gives without this node; `out` is (rows, T, C) after to_out."""
        plain = options.get("pastiche_plain", {}).pop(id(self), None)
        if plain is None:
            return out
        run = current_run(options)
        attn1 = attention_block(run.network, *options["block"], options["block_index"]).attn1
        n, context, value = plain
        replaced = run.replaced_attention("attn1", (*options["block"], options["block_index"]))
        if replaced is None:
            unpatched = attn1(n, context=context, value=value, transformer_options=options)
        else:
            unpatched = attn1.to_out(replaced(attn1.to_q(n), attn1.to_k(context), attn1.to_v(value), options))
        return blend(unpatched, out, self._weight(out, options))

    def attn1_replace(self, slot: Slot, attend: Attend) -> Attend:
        """Replaces projected q, k, v (rows, T, C) before `attend`."""

        def replace(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict) -> torch.Tensor:
            run = self._run(options)
            if run is None:
                return attend(q, k, v, options)
            query = self._query(q, self._feature(run, self.content, "self_attention_q", options, q))
            styled = attend(
                query,
                self._feature(run, self.style, "self_attention_k", options, k),
                self._feature(run, self.style, "self_attention_v", options, v),
                options,
            )
            return blend(attend(q, k, v, options), styled, self._weight(styled, options)) if self.blends else styled

        return replace

    def _weight(self, like: torch.Tensor, options: dict) -> torch.Tensor | float:
        """strength, times the mask on this layer's grid as (rows, T, 1)."""
        if self.mask is None:
            return self.strength
        grid = tuple(options["activations_shape"][-2:])
        tokens = current_run(options).memo(
            (id(self), grid), lambda: self.strength * resize_mask(self.mask, *grid).flatten(1).unsqueeze(-1).to(like)
        )  # BHW -> BT1
        return rows_of(tokens, like.shape[0], options)


def inject_style(
    model: Any,
    style: FeatureBank,
    content: FeatureBank | None,
    gamma: float,
    temperature: float,
    strength: float,
    layers: str,
    start_percent: float,
    end_percent: float,
    mask: torch.Tensor | None,
) -> Any:
    """`model` with StyleID's injection (methods: K and V of the style, Q mixed with the content's, temperature).

    start_percent, end_percent: share of the schedule, 0..1. mask: (B or 1, H, W) in pixels of any size.
    Returns an unpatched clone where nothing would change. Raises ValueError where the features do not fit.
    """
    layout = inspect_model(model)
    places = layout.places(layers)
    ours = fingerprint(model)
    for name, bank in (("style", style), ("content", content)):
        if bank is not None:
            require_same_model(ours, bank.trajectory.fingerprint, f"The {name} features")
    patched = model.clone()
    if strength == 0 or start_percent >= end_percent or (mask is not None and not bool(mask.any())):
        return patched
    sampling = model.get_model_object("model_sampling")
    sigmas = sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent)
    injection = StyleInjection(style, content, places, gamma, temperature, strength, mask, sigmas)
    depths = {place: len(layout.attention[place]) for place in places}
    _require_features(injection, depths)
    injection.install(patched, depths)
    return patched


def _require_features(injection: StyleInjection, depths: dict[Place, int]) -> None:
    needed = PROJECTED if injection.projected else HIDDEN
    for name, bank, streams in (
        ("style", injection.style, needed[1:] or needed),
        ("content", injection.content, needed[:1]),
    ):
        if bank is None:
            continue
        held = set(bank.keys)
        missing = {
            f"{block} {number}"
            for block, number in injection.places
            for depth in range(depths[block, number])
            for stream in streams
            if FeatureKey(stream, block, number, depth) not in held
        }
        if missing:
            streams_text = "self_attention_qkv" if injection.projected else "self_attention"
            raise ValueError(
                f"{name}: the bank holds no {streams_text} features of {', '.join(sorted(missing))}. "
                f'Set Capture Features to streams "{streams_text}" and the layers of this node.'
            )
