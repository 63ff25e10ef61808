"""One progress bar over a film, whose inversions and samplings each have one of their own in ComfyUI."""

from __future__ import annotations

import contextlib
from typing import Iterator

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from PIL import Image

from ..messages import executing_node, say_on_node

STEPS = 1000  # of the whole bar


class FilmProgress:
    """Work is counted in frames that go through the network once along the schedule."""

    def __init__(self, total: float):
        self._total, self._done = max(total, 1), 0.0
        self._node = executing_node()

    @contextlib.contextmanager
    def stage(self, frames: float) -> Iterator[None]:
        """Within it, bars from 0 to 1 of their own are this much of the film's; Cancel is looked at whenever one moves."""
        hook = comfy.utils.PROGRESS_BAR_HOOK

        def shown(value, total, preview_image=None, **kwargs):
            comfy.model_management.throw_exception_if_processing_interrupted()
            if hook is not None:
                done = self._done + frames * min(value / max(total, 1), 1.0)
                hook(round(STEPS * min(done / self._total, 1.0)), STEPS, preview_image, **kwargs)

        comfy.model_management.throw_exception_if_processing_interrupted()
        comfy.utils.set_progress_bar_global_hook(shown)
        try:
            yield
        finally:
            comfy.utils.set_progress_bar_global_hook(hook)
        self._done += frames

    def written(self, done: int, count: int, frame: torch.Tensor) -> None:
        """Shows the last written frame, (H, W, 3) uint8."""
        picture = ("JPEG", Image.fromarray(frame.numpy()), latent_preview.MAX_PREVIEW_RESOLUTION)
        comfy.utils.ProgressBar(STEPS).update_absolute(round(STEPS * min(self._done / self._total, 1.0)), preview=picture)
        say_on_node(self._node, f"{done} of {count} frames written")
