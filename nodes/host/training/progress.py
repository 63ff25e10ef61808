"""Progress of long work that is no sampling: bar, text under the node, latent previews."""

from __future__ import annotations

import time
from typing import Any, Callable

import comfy.utils
import latent_preview
import torch

from ..messages import say_on_node

TEXT_INTERVAL = 0.5  # seconds between texts: the browser needs no more


class TimeLeft:
    """What is left of work in equal steps, by the pace of those done so far, the first one (warming up) left out."""

    def __init__(self, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic):
        self._total, self._done, self._clock = total, done, clock
        self._since: float | None = None

    def text(self, step: int) -> str:
        """After step number `step`: "1:05 left", or "timing" where nothing is known yet."""
        if self._since is None:
            self._since, self._done = self._clock(), step
        if step >= self._total:
            return "done"
        if step == self._done:
            return "timing"
        seconds = round((self._clock() - self._since) / (step - self._done) * (self._total - step))
        hours, minutes = divmod(seconds // 60, 60)
        clock = f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
        return f"{clock} left"


class NodeProgress:
    """Bar, preview and a line of text of one node."""

    def __init__(self, total: int, model: Any, node_id: str | None):
        self._bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self._format, self._node_id = model.model.latent_format, node_id
        self._spoken = 0.0

    def update(self, step: int, text: str, latent: torch.Tensor | None = None) -> None:
        """latent: (1, C, H, W) in model space, shown as a small picture."""
        self._bar.update_absolute(step, preview=None if latent is None else self._picture(latent))
        if time.monotonic() - self._spoken > TEXT_INTERVAL:
            self.say(text)

    def say(self, text: str) -> None:
        self._spoken = time.monotonic()
        say_on_node(self._node_id, text)

    def _picture(self, latent: torch.Tensor) -> tuple | None:
        previewer = latent_preview.get_previewer(latent.device, self._format)
        if previewer is None and self._format.latent_rgb_factors is not None:  # asked for, whatever --preview-method is
            previewer = latent_preview.Latent2RGBPreviewer(
                self._format.latent_rgb_factors, self._format.latent_rgb_factors_bias, self._format.latent_rgb_factors_reshape
            )
        return previewer and previewer.decode_latent_to_preview_image("JPEG", latent)
