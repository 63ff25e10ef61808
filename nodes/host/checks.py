"""What every node asks of its inputs before anything is computed: numbers in range, tensors that hold something, no NaN.

ComfyUI compares widgets with their limits, but not what comes over a link, and looks into no tensor. NaN that gets in
comes out as a black picture many nodes later, where nothing tells whence it came.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import numbers
import re
from typing import Any, Callable, Iterator

import torch
from torch import Tensor

from ..sockets import FeatureBank, Trajectory

HALF = "The usual cause is half precision: use a fp16-fixed VAE, or start ComfyUI with --fp32-vae."
MISFIT = re.compile(r"shapes cannot be multiplied|expected input\[|must match|Expected size|is invalid for input|to have \d+ channels|the size of tensor", re.I)
MOST, BRIGHTEST = 1e9, 1e6  # of any tensor, and of pictures and masks: what is squared and summed stays finite in float32
REMAKE = "Make it again with DDIM Inversion."


def checked(execute: Callable) -> Callable:
    """A node's `execute` that looks at all inputs of its schema first; ValueError names the one that is wrong."""
    names = list(inspect.signature(execute).parameters)[1:]
    inputs: list[Any] = []  # asked for once: some schemas list folders

    @functools.wraps(execute)
    def checking(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args)), **kwargs}
        if not inputs:
            inputs.extend(cls.define_schema().inputs)
        for part in inputs:
            value = given.get(part.id)
            if value is not None:
                check_input(part, value)
        return execute(cls, *args, **kwargs)

    return checking


def check_input(part: Any, value: Any) -> None:
    """part: an input of a schema. Raises ValueError where `value` is nothing a node can compute with."""
    name, kinds = part.id, part.get_io_type().split(",")
    for kind in kinds:
        if kind in ("INT", "FLOAT"):
            check_number(value, name, getattr(part, "min", None), getattr(part, "max", None))
        elif kind == "STRING":
            check_text(value, name)
        elif kind == "IMAGE":
            check_image(value, name)
        elif kind == "MASK":
            check_mask(value, name)
        elif kind == "SIGMAS":
            check_tensor(value, name, "Connect a Basic Scheduler.", (1,))
        elif kind == "CONDITIONING":
            check_conditioning(value, name)
        elif kind == "LORA_MODEL":
            check_lora(value, name)
        elif kind == "LATENT" and isinstance(value, dict):
            check_samples(value, name)
        elif kind == "NOISE" and isinstance(getattr(value, "latent", None), Tensor):
            check_tensor(value.latent, name, REMAKE)
        elif isinstance(value, Trajectory):
            check_trajectory(value, name)
        elif isinstance(value, FeatureBank):
            check_trajectory(value.trajectory, name)


def is_finite(tensor: Tensor) -> bool:
    """Whether a dense tensor holds no NaN and no infinity, in one pass and without a copy."""
    return not tensor.is_floating_point() or math.isfinite(largest(tensor))


def largest(tensor: Tensor) -> float:
    """The largest absolute value, NaN where there is one; 0 for nothing."""
    if not tensor.numel() or tensor.dtype == torch.bool:
        return 0.0
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():  # no kernel for float8
        tensor = tensor.half()
    return float(torch.stack(torch.aminmax(tensor)).double().abs().max())


def kind_of_tensor(tensor: Tensor) -> str:
    """In a word, why there is nothing to compute with; "" for a dense tensor of real numbers."""
    kinds = {
        "nested": tensor.is_nested, "sparse": tensor.layout != torch.strided, "meta": tensor.is_meta,
        "quantised": tensor.is_quantized, "complex": tensor.is_complex(),
    }
    return next((kind for kind, found in kinds.items() if found), "")


def check_tensor(tensor: Any, name: str, cure: str = "", rank: tuple[int, ...] = (), limit: float = MOST) -> Tensor:
    """Raises ValueError for what is no dense tensor of real numbers, for an empty one, for NaN and for values beyond `limit`.

    rank: numbers of dimensions that are allowed.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}. {cure}".rstrip())
    kind = kind_of_tensor(tensor)
    if kind:
        raise ValueError(f"{name}: a {kind} tensor holds nothing to compute with; a dense one of real numbers is needed. {cure}".rstrip())
    if rank and tensor.ndim not in rank:
        raise ValueError(f"{name}: expected {' or '.join(map(str, rank))} dimensions, got shape {tuple(tensor.shape)}. {cure}".rstrip())
    if tensor.ndim and tensor.shape[0] == 0:
        raise ValueError(f"{name}: got a batch of 0, connect at least one.")
    if not tensor.numel():
        raise ValueError(f"{name}: got nothing, its shape is {tuple(tensor.shape)}. {cure}".rstrip())
    reach = largest(tensor)
    if not math.isfinite(reach):
        raise ValueError(f"{name}: holds NaN or infinite values. {cure}".rstrip())
    if reach > limit:
        raise ValueError(f"{name}: holds values up to {reach:.3g}, which overflow; expected at most {limit:g}. {cure}".rstrip())
    return tensor


def check_image(image: Any, name: str) -> None:
    """IMAGE: (B, H, W, C) with C at least 3."""
    check_tensor(image, name, "A picture's values are 0 to 1. " + HALF, (4,), BRIGHTEST)
    if image.shape[-1] < 3:
        raise ValueError(
            f"{name}: got {image.shape[-1]} channels in shape {tuple(image.shape)}, expected 3 (red, green, blue). "
            "A mask becomes a picture with Convert Mask to Image."
        )


def check_mask(mask: Any, name: str) -> None:
    """MASK: (B, H, W) or (H, W)."""
    check_tensor(mask, name, "A mask is 0 outside and 1 inside.", (2, 3), BRIGHTEST)


def check_samples(latent: dict, name: str) -> None:
    """LATENT. Packed video and sound latents pass: who cannot use them says so."""
    samples = latent.get("samples")
    if not getattr(samples, "is_nested", False):
        check_tensor(samples, name, HALF, (3, 4, 5))


def check_conditioning(conditioning: Any, name: str) -> None:
    """CONDITIONING: [[(B, T, C) or None, {...}], ...]."""
    if not isinstance(conditioning, (list, tuple)) or not conditioning:
        raise ValueError(f"{name}: holds no conditioning; connect a CLIP Text Encode.")
    for entry in conditioning:
        for tensor in (entry[0], entry[1].get("pooled_output")):
            if isinstance(tensor, Tensor):
                check_tensor(tensor, name, "The text encoder overflowed (try --fp32-text-enc).")


def check_lora(lora: Any, name: str) -> None:
    """LORA_MODEL: tensors by their names."""
    if not isinstance(lora, dict):
        raise ValueError(f"{name}: expected a LoRA, tensors by name, got {type(lora).__name__}.")
    for key, tensor in lora.items():
        if isinstance(tensor, Tensor):
            check_tensor(tensor, f"{name} ({key})", "That LoRA's training failed, or its file is damaged.")


def check_trajectory(trajectory: Trajectory, name: str) -> None:
    """Levels that ascend from 0, and finite latents for each of them."""
    sigmas, latents = trajectory.sigmas, trajectory.latents
    check_tensor(sigmas, f"{name} (sigmas)", REMAKE, (1,))
    check_tensor(latents, f"{name} (latents)", REMAKE, (5, 6))
    if len(sigmas) != len(latents) or len(sigmas) < 2:
        raise ValueError(f"{name}: {len(sigmas)} noise levels for latents of shape {tuple(latents.shape)}. {REMAKE}")
    if float(sigmas[0]) != 0 or not bool((sigmas[1:] > sigmas[:-1]).all()):
        raise ValueError(f"{name}: its noise levels must ascend from 0 at every step, got {sigmas[:4].tolist()} ... {REMAKE}")


def check_number(value: Any, name: str, low: float | None = None, high: float | None = None) -> None:
    """A finite number of low..high, such as a widget would take."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name}: expected a number, got {type(value).__name__}.")
    if not isinstance(value, numbers.Integral) and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}.")
    if (low is not None and value < low) or (high is not None and value > high):
        limits = f"{low} to {high}" if low is not None and high is not None else f"at least {low}" if high is None else f"at most {high}"
        raise ValueError(f"{name}: got {brief_number(value)}, expected {limits}.")


def brief_number(value: float) -> str:
    """At most 20 characters, also of an integer with 4,000 digits."""
    try:
        return f"{value:.6g}" if isinstance(value, float) or abs(value) >= 1 << 64 else str(value)
    except OverflowError:
        return f"a number of {value.bit_length()} bits"


@contextlib.contextmanager
def unlike_shapes_told(name: str) -> Iterator[None]:
    """Around a run of the user's model: PyTorch's complaint that sizes do not fit becomes a ValueError about input `name`."""
    try:
        yield
    except RuntimeError as error:
        if not MISFIT.search(str(error)):
            raise
        raise ValueError(
            f"{name}: the model cannot compute with it; latent, conditioning and model must be of one kind, and no side too small for "
            f"the network. ({str(error).splitlines()[0]})"
        ) from error


def check_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {type(value).__name__}.")
