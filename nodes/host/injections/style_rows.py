"""StyleID's injection for some rows of a batch: the feature-based styles of the Multi-Style Guider."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...sockets import FeatureKey, StyleEntry
from ..networks.adapter import Attended, Replacement
from ..networks.families import find_adapter
from .base import Injection, Source
from .run import current_run
from .schedule import current_sigma, sigma_range
from .style_marks import STYLE_PLAN, STYLE_ROWS

SAME_SIZE = "In the Multi-Style Guider a style image must have the size of the content: scale it before encoding."


class RowPatches(Injection):
    """Gives the rows of each feature style the style's hidden states as keys and values.

    One forward has one number of tokens, so the style must have been encoded at the sample's size.
    """

    name = "Style Entry"

    def __init__(self, model: ModelPatcher, styles: dict[int, StyleEntry], names: list[str]):
        """styles: those with features, by their number; names: of all styles."""
        self.styles, self.names = styles, names
        adapter, sampling = find_adapter(model), model.get_model_object("model_sampling")
        self.keys = {
            number: {FeatureKey("self_attention", *slot) for slot in adapter.slots(adapter.places(style.layers))}
            for number, style in styles.items()
        }
        self.sources = tuple(
            Source(
                names[number], f"The features of {names[number]}", style.features.trajectory, style.features,
                tuple(self.keys[number]), "self_attention", SAME_SIZE,
                sigma_range(sampling, style.start_percent, style.end_percent).holds,
            )
            for number, style in styles.items()
        )

    def patch(self, model: ModelPatcher) -> None:
        find_adapter(model).change_hidden(model, self.change_hidden, blends=True)

    def change_hidden(self, own: Tensor, inputs: Attended, options: dict) -> Replacement | None:
        rows, run = options.get(STYLE_ROWS), current_run(options)
        if not rows or run is None:
            return None
        key = FeatureKey("self_attention", *options["block"], options["block_index"])
        query, keys, values = inputs
        changed: set[int] = set()
        for number, style in self.styles.items():
            index = [row for row, styled in enumerate(rows) if styled == number]
            if not index or key not in self.keys[number]:
                continue
            feature = self._of_rows(run.feature(style.features, key, current_sigma(options), own), index, rows, options)
            if feature.shape[1] != own.shape[1]:
                raise ValueError(
                    f"{self.names[number]}: its features have {feature.shape[1]} tokens, the sampler asks for {own.shape[1]}. "
                    + run.why_other_size("a style's features")
                )
            where = torch.tensor(index, device=own.device)
            query = query.index_copy(0, where, style.temperature * own[where])
            keys, values = keys.index_copy(0, where, feature), values.index_copy(0, where, feature)
            changed.update(index)
        if not changed:
            return None
        weight = own.new_tensor([float(row in changed) for row in range(len(own))]).view(-1, 1, 1)
        return Replacement(Attended(query, keys, values), weight, passes=True)

    @staticmethod
    def _of_rows(feature: Tensor, index: list[int], rows: tuple, options: dict) -> Tensor:
        """(Bf, T, C) -> one for each row of `index`: the features of the row's own sample, or the only ones."""
        batch = len(rows) // len(options["cond_or_uncond"])
        return feature[[row % batch if feature.shape[0] > 1 else 0 for row in index]]
