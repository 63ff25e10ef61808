"""Reading features out of a running U-Net through ComfyUI's patches."""

from __future__ import annotations

import logging
import shutil
from typing import Any, Callable, Iterable

import comfy.model_management
import psutil
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.patcher_extension import WrappersMP

from ...sockets import FeatureBank, FeatureKey, Trajectory
from ..networks.fingerprint import fingerprint, require_same_model
from ..networks.unet import UNetLayout, attention_block, inspect_model
from ..trajectories.inversion import walk_latent, noise_latent
from .stores import FileStore, FileWriter, MemoryStore, Shapes, readable_size, temporary_path

MEMORY = ("recompute", "ram", "vram", "disk")
PRECISION = ("half", "full")
WRAPPER_KEY = "pastiche"  # under which the pack's injections register their wrappers on a MODEL

Emit = Callable[[FeatureKey, torch.Tensor], None]


def add_capture(transformer_options: dict, network: Any, keys: Iterable[FeatureKey], emit: Emit) -> None:
    """Adds patches to `transformer_options` that pass each tensor of `keys` to `emit`, whole batches at a time.

    They come after the patches already there and change nothing. `network` is the U-Net the options go to.
    """
    wanted = set(keys)
    streams = {key.stream for key in wanted}
    patches = transformer_options.setdefault("patches", {})

    def add(name: str, patch: Any) -> None:
        patches[name] = patches.get(name, []) + [patch]

    def tell(stream: str, options: dict, compute: Callable[[], torch.Tensor], depth: int | None = None) -> None:
        key = FeatureKey(stream, *options["block"], options["block_index"] if depth is None else depth)
        if key in wanted:
            emit(key, compute())

    def self_attention(n, context, value, options):
        def projection(name: str, source: torch.Tensor):
            return lambda: getattr(attention_block(network, *options["block"], options["block_index"]).attn1, name)(source)

        tell("self_attention", options, lambda: n)
        tell("self_attention_q", options, projection("to_q", n))
        tell("self_attention_k", options, projection("to_k", context))
        tell("self_attention_v", options, projection("to_v", value))
        return n, context, value

    def cross_attention(n, context, value, options):
        def projection(name: str, source: torch.Tensor):
            return lambda: getattr(attention_block(network, *options["block"], options["block_index"]).attn2, name)(source)

        tell("cross_attention_q", options, projection("to_q", n))
        tell("cross_attention_k", options, projection("to_k", context))
        return n, context, value

    def residual(layer, x, emb, context, options, *_):
        out = layer(x, emb)
        tell("residual", options, lambda: out - layer.skip_connection(x), depth=0)
        return out

    def middle(args: dict) -> dict:
        emit(FeatureKey("h_space", "middle", 0), args["h"])
        return args

    if any(stream.startswith("self_attention") for stream in streams):
        add("attn1_patch", self_attention)
    if any(stream.startswith("cross_attention") for stream in streams):
        add("attn2_patch", cross_attention)
    if "residual" in streams:
        if "forward_timestep_embed_patch" in patches:
            raise ValueError(
                "Another node already runs this model's residual blocks in its own way (forward_timestep_embed_patch), "
                "so they cannot be captured: connect Capture Features before that node."
            )
        add("forward_timestep_embed_patch", (ResBlock, residual))
    if "h_space" in streams:
        add("middle_block_after_patch", middle)


def feature_shapes(layout: UNetLayout, keys: Iterable[FeatureKey], trajectory: Trajectory) -> Shapes:
    """(B, ...) of each tensor of one step."""
    batch, height, width = trajectory.batch, *trajectory.latents.shape[-2:]
    context = trajectory.conditioning[0][0]
    tokens = 77 if context is None else context.shape[1]
    return {key: (batch, *layout.shape(key, height, width, tokens)) for key in keys}


def storage_dtype(model: Any, precision: str) -> torch.dtype:
    if precision == "full":
        return torch.float32
    return torch.bfloat16 if model.model.get_dtype_inference() == torch.bfloat16 else torch.float16


def capture(
    model: Any, trajectory: Trajectory, streams: str, layers: str, memory: str = "recompute", precision: str = "half"
) -> FeatureBank:
    """Runs the U-Net at every (latent, sigma) of a trajectory and keeps what it computed.

    `recompute` keeps nothing: the bank remembers the model and evaluates beside the sampling. The size of
    the other modes is logged, and checked against what is free, before anything is computed.
    Raises ValueError for unknown streams, layers, another model, and too little memory.
    """
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY):
        raise ValueError(
            "model: it already carries an injection, which would be captured too. "
            "Connect the model from before Style Injection, h-space Slerp or Feature Injection."
        )
    require_same_model(fingerprint(model), trajectory.fingerprint, "The trajectory's latents")
    layout = inspect_model(model)
    keys = tuple(layout.keys(streams, layers))
    if memory == "recompute":
        logging.info(
            "Pastiche: %d features a step are recomputed while sampling; the trajectory takes %s.",
            len(keys), readable_size(trajectory.latents.nbytes),
        )
        return FeatureBank(trajectory, keys, memory, None, model)
    shapes = feature_shapes(layout, keys, trajectory)
    dtype = storage_dtype(model, precision)
    size = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize * trajectory.steps
    logging.info("Pastiche: capturing %d tensors x %d steps: %s (%s).", len(keys), trajectory.steps, readable_size(size), memory)
    _check_room(size, memory, model.load_device)
    writer = _open_writer(shapes, trajectory.steps, dtype, memory, model.load_device)
    try:
        record(model, trajectory, keys, writer.write)
    except BaseException:  # Cancel included: no half-written file stays behind
        if isinstance(writer, FileWriter):
            writer.discard()
        raise
    store = FileStore(writer.finish(), temporary=True) if isinstance(writer, FileWriter) else writer
    return FeatureBank(trajectory, keys, memory, store, model)


def record(
    model: Any, trajectory: Trajectory, keys: Iterable[FeatureKey], write: Callable[[FeatureKey, int, torch.Tensor], None]
) -> None:
    """Evaluates every step of the trajectory, noisiest first as sampling goes, and writes (key, step, (B, ...))."""
    patched = model.clone()
    step = 0

    def emit(key: FeatureKey, tensor: torch.Tensor) -> None:
        write(key, step, tensor[: trajectory.batch])

    add_capture(patched.model_options["transformer_options"], model.model.diffusion_model, keys, emit)

    def walk(predict, x, report):
        nonlocal step
        for i in range(trajectory.steps):
            step = trajectory.steps - i
            latent = trajectory.latents[step].to(x)
            report(i, latent, predict(latent, trajectory.sigmas[step].to(x)))
        return x

    walk_latent(patched, noise_latent(model, trajectory), trajectory.conditioning, trajectory.schedule, walk)


def _open_writer(shapes: Shapes, steps: int, dtype: torch.dtype, memory: str, device: torch.device):
    if memory == "disk":
        named = {str(key): (steps, *shape) for key, shape in shapes.items()}
        return FileWriter(temporary_path(), named, dict.fromkeys(named, dtype), {"format": "pastiche-features"})
    return MemoryStore(shapes, steps, dtype, torch.device("cpu") if memory == "ram" else device)


def _check_room(size: int, memory: str, device: torch.device) -> None:
    if memory == "disk":
        free = shutil.disk_usage(temporary_path().parent).free
    elif memory == "vram" and not comfy.model_management.is_device_cpu(device):
        free = comfy.model_management.get_free_memory(device)
    else:
        free = psutil.virtual_memory().available
    if size > free:
        raise ValueError(
            f"memory: {memory} needs {readable_size(size)} for these features, {readable_size(free)} are free. "
            "Choose recompute (needs almost nothing), fewer layers, or fewer steps."
        )
