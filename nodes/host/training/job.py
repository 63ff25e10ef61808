"""Train Style LoRA's inputs and outputs: images from what is connected, progress, the named training state."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from ..networks.fingerprint import fingerprint
from .loop import LOSS_WINDOW, TrainedLoRA, TrainingSettings, train_style_lora
from .progress import NodeProgress, TimeLeft
from .images import training_images
from .state import TrainingState, state_path

RESUMABLE = ("rank", "alpha", "learning_rate", "targets", "seed", "batch_size", "flip", "crop", "min_snr_gamma")
"""Settings that a resumed training must share with the one it continues, beside schedule and clean_weight."""


def train_for_node(
    model: Any,
    positive: list,
    latents: dict | None,
    image: Tensor | None,
    vae: Any | None,
    settings: TrainingSettings,
    checkpoint: str = "",
    node_id: str | None = None,
) -> TrainedLoRA:
    """Train Style LoRA: images from whatever is connected, progress under the node, the named training state."""
    images = training_images(latents, image, vae, settings.flip)
    state = TrainingState()
    path = state_path(checkpoint)
    if path is not None:
        state = TrainingState(path, {
            "model": "/".join(fingerprint(model)), "image": images.digest(), "positive": _conditioning_digest(positive),
            **{name: getattr(settings, name) for name in RESUMABLE}, **_newer_settings(settings),
        })
    progress = NodeProgress(settings.steps, model, node_id)
    clock = TimeLeft(settings.steps, state.step)

    def report(step: int, loss: float, preview: Tensor | None) -> None:
        recent = state.losses[-LOSS_WINDOW:]
        mean = f"loss {sum(recent) / len(recent):.4f} (mean of {len(recent)})"
        progress.update(step, f"step {step}/{settings.steps}, {mean}, {clock.text(step)}", preview)

    trained = train_style_lora(model, images, positive, settings, report, state)
    progress.say(trained.summary())
    return trained


def _newer_settings(settings: TrainingSettings) -> dict[str, Any]:
    """Settings that states of earlier versions do not name. A cosine belongs to its number of steps."""
    named = {"schedule": f"cosine over {settings.steps} steps"} if settings.schedule == "cosine" else {}
    return {**named, "clean_weight": settings.clean_weight} if settings.clean_weight else named


def _conditioning_digest(positive: list) -> str:
    content = hashlib.sha256()
    for embedding, _ in positive:
        if embedding is not None:
            content.update(embedding.float().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]
