"""What cannot be trained, said before anything is loaded."""

from __future__ import annotations

from typing import Any

from ..networks.marks import require_plain
from .images import TrainingImages


def check_inputs(model: Any, positive: list, images: TrainingImages, settings: Any) -> None:
    """Raises ValueError for inputs that do not fit each other. model: a MODEL; settings: TrainingSettings."""
    require_plain(model, "would be trained into the LoRA")
    if settings.steps < 1 or settings.rank < 1 or settings.batch_size < 1:
        raise ValueError(
            "steps, rank and batch_size must be at least 1, got "
            f"{settings.steps}, {settings.rank} and {settings.batch_size}."
        )
    channels = model.model.latent_format.latent_channels
    if images.shape[1] != channels:
        raise ValueError(
            f"latents: got {images.shape[1]} channels, but {type(model.model).__name__} works on latents of {channels}. "
            "Encode the image with the VAE of this model."
        )
    if len(positive) not in (1, len(images)):
        raise ValueError(
            f"positive: got {len(positive)} conditionings for {len(images)} image(s); "
            "connect one for all of them, or one each (in order, with Conditioning Combine)."
        )
    if any(entry[0] is not None and not bool(entry[0].isfinite().all()) for entry in positive):
        raise ValueError("positive: holds NaN or infinite values; the text encoder overflowed (try --fp32-text-enc).")


def check_conditioning(conds: list[dict], crop: float) -> None:
    """conds: as ComfyUI hands them to the model. Raises ValueError for what the training loop cannot follow."""
    if crop < 1 and any("c_concat" in cond["model_conds"] for cond in conds):
        raise ValueError(
            f"crop: got {crop:g}, but this model reads a picture beside the latent (an inpainting or editing model), "
            "which is not cropped along. Set crop to 1, or train its base model."
        )
