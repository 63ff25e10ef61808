"""StyleID's injection for some rows of a batch: the feature-based styles of the Multi-Style Guider."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...sockets import FeatureBank, FeatureKey, StyleEntry
from ..networks.fingerprint import fingerprint, require_same_model
from ..networks.unet import inspect_model
from .run import attach_banks, check_banks_schedule, current_run, current_sigma

STYLE_ROWS = "pastiche_style_rows"  # in transformer_options: the style number of every batch row


class RowInjection:
    """attn1_patch that gives the rows of each feature style the style's hidden states as keys and values.

    One forward has one number of tokens, so the style must have been encoded at the sample's size.
    """

    def __init__(self, model: Any, styles: dict[int, StyleEntry], names: list[str]):
        layout = inspect_model(model)
        self._styles, self._names = styles, names
        self._keys: dict[int, set[FeatureKey]] = {}
        for number, style in styles.items():
            name, bank = names[number], style.features
            require_same_model(fingerprint(model), bank.trajectory.fingerprint, f"The features of {name}")
            wanted = {
                FeatureKey("self_attention", *place, depth)
                for place in layout.places(style.layers) for depth in range(len(layout.attention[place]))
            }
            missing = sorted({f"{key.block} {key.number}" for key in wanted - set(bank.keys)})
            if missing:
                raise ValueError(
                    f"{name}: the bank holds no self_attention features of {', '.join(missing)}. "
                    'Set Capture Features to streams "self_attention" and the layers of the Style Entry.'
                )
            self._keys[number] = wanted

    def install(self, model: Any) -> None:
        attach_banks(model, [(style.features, self._keys[number]) for number, style in self._styles.items()], self._check)
        model.set_model_attn1_patch(self)

    def _check(self, guider: Any, noise: Tensor, sigmas: Tensor) -> None:
        sampling = guider.model_patcher.get_model_object("model_sampling")
        for number, style in self._styles.items():
            name, trajectory = self._names[number], style.features.trajectory
            low, high = (sampling.percent_to_sigma(percent) for percent in (style.end_percent, style.start_percent))
            check_banks_schedule(style.features, sigmas, f"The features of {name}", low, high)
            if trajectory.latents.shape[-2:] != noise.shape[-2:]:
                height, width = trajectory.latents.shape[-2:]
                raise ValueError(
                    f"{name}: its style's latent is {width}x{height}, the sampled one {noise.shape[-1]}x{noise.shape[-2]}. "
                    "In the Multi-Style Guider a style image must have the size of the content: scale it before encoding."
                )
            if trajectory.batch not in (1, noise.shape[0]):
                raise ValueError(f"{name}: features of {trajectory.batch} images for {noise.shape[0]} samples; use one, or as many.")

    def __call__(self, n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, T, C) hidden states before to_q, to_k, to_v."""
        rows, run = options.get(STYLE_ROWS), current_run(options)
        if not rows or run is None:
            return n, context, value
        key = FeatureKey("self_attention", *options["block"], options["block_index"])
        for number, style in self._styles.items():
            index = [row for row, own in enumerate(rows) if own == number]
            if not index or key not in self._keys[number]:
                continue
            feature = self._of_rows(run.feature(style.features, key, current_sigma(options), n), index, rows, options)
            if feature.shape[1] != n.shape[1]:
                raise ValueError(f"{self._names[number]}: conditions with an area cannot be combined with style features: use masks.")
            where = torch.tensor(index, device=n.device)
            n = n.index_copy(0, where, style.temperature * n[where])
            context, value = context.index_copy(0, where, feature), value.index_copy(0, where, feature)
        return n, context, value

    @staticmethod
    def _of_rows(feature: Tensor, index: list[int], rows: tuple, options: dict) -> Tensor:
        """(Bf, T, C) -> one for each row of `index`: the features of the row's own sample, or the only ones."""
        batch = len(rows) // len(options["cond_or_uncond"])
        return feature[[row % batch if feature.shape[0] > 1 else 0 for row in index]]
