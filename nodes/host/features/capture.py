"""Reading features out of a running U-Net through ComfyUI's patches."""

from __future__ import annotations

import logging
import shutil
from typing import Callable, Hashable, Iterable, Sequence

import comfy.model_management
import comfy.utils
import psutil
import torch
from comfy.model_patcher import ModelPatcher

from ...sockets import FeatureBank, FeatureKey, FeatureStore, Trajectory
from ..networks.fingerprint import fingerprint, require_same_model
from ..networks.adapter import NetworkAdapter
from ..networks.content import digest
from ..networks.families import find_adapter
from ..networks.marks import require_plain
from ..networks.neighbours import shrinks, size_changers
from ..trajectories.found_again import RESULTS
from ..trajectories.inversion import noise_latent, walk_latent
from .stores import FileStore, FileWriter, MemoryStore, Shapes, readable_size, temporary_path

MEMORY = ("recompute", "ram", "vram", "disk")
PRECISION = ("half", "full")


def feature_shapes(adapter: NetworkAdapter, keys: Iterable[FeatureKey], trajectory: Trajectory) -> Shapes:
    """(B, ...) of each tensor of one step."""
    batch, height, width = trajectory.batch, *trajectory.latents.shape[-2:]
    context = trajectory.conditioning[0][0]
    tokens = 77 if context is None else context.shape[1]
    return {key: (batch, *adapter.shape(key, height, width, tokens)) for key in keys}


def storage_dtype(model: ModelPatcher, precision: str) -> torch.dtype:
    if precision == "full":
        return torch.float32
    return torch.bfloat16 if model.model.get_dtype_inference() == torch.bfloat16 else torch.float16


def capture(
    model: ModelPatcher, trajectory: Trajectory, streams: str, layers: str, memory: str = "recompute", precision: str = "half"
) -> FeatureBank:
    """Runs the U-Net at every (latent, sigma) of a trajectory and keeps what it computed.

    `recompute` keeps nothing: the bank remembers the model and evaluates beside the sampling. The size of
    the other modes is logged, and checked against what is free, before anything is computed. What was captured before
    from the same is found again (see found_again.py). Raises ValueError for unknown streams, layers, another model, and too little memory.
    """
    require_plain(model, "would be captured too")
    require_same_model(fingerprint(model), trajectory.fingerprint, "The trajectory's latents")
    adapter = find_adapter(model)
    keys = tuple(adapter.keys(streams, layers))
    if memory == "recompute":
        logging.info(
            "Pastiche: %d features a step are recomputed while sampling; the trajectory takes %s.",
            len(keys), readable_size(trajectory.latents.nbytes),
        )
        return FeatureBank(trajectory, keys, memory, None, model)
    name = None
    if RESULTS.limit:
        made_of = trajectory.latents, trajectory.sigmas, trajectory.conditioning
        name = digest("features", model, *made_of, keys, memory, storage_dtype(model, precision))
    store = recall(name, model)
    if store is not None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        logging.info("Pastiche: found again: %d features of each of %d steps (%s).", len(keys), trajectory.steps, memory)
        comfy.utils.ProgressBar(trajectory.steps).update_absolute(trajectory.steps, trajectory.steps)
        return FeatureBank(trajectory, keys, memory, store, model)
    writer = open_writer(model, keys, trajectory, memory, precision)
    try:
        record(model, trajectory, keys, writer.write)
        store = finished(writer)
    except OSError as error:
        discard(writer)
        raise ValueError(f"memory: the disk took no more features ({error.strerror or error}). Choose ram or recompute, or make room.") from error
    except BaseException:  # Cancel included: no half-written file stays behind
        discard(writer)
        raise
    keep(name, model, store)
    return FeatureBank(trajectory, keys, memory, store, model)


def record(
    model: ModelPatcher, trajectory: Trajectory, keys: Iterable[FeatureKey], write: Callable[[FeatureKey, int, torch.Tensor], None]
) -> None:
    """Evaluates every step of the trajectory, noisiest first as sampling goes, and writes (key, step, (B, ...))."""
    patched = model.clone()
    step = 0

    shapes = feature_shapes(find_adapter(patched), keys, trajectory)

    def emit(key: FeatureKey, tensor: torch.Tensor) -> None:
        require_shape(model, key, tensor, shapes[key])
        write(key, step, tensor[: trajectory.batch])

    find_adapter(patched).capture(patched.model_options["transformer_options"], keys, emit)

    def walk(predict, x, report):
        nonlocal step
        for i in range(trajectory.steps):
            step = trajectory.steps - i
            latent = trajectory.latents[step].to(x)
            report(i, latent, predict(latent, trajectory.sigmas[step].to(x)))
        return x

    walk_latent(patched, noise_latent(model, trajectory), trajectory.conditioning, trajectory.schedule, walk)


def require_shape(model: ModelPatcher, key: FeatureKey, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError where a network runs on another grid than its latent's, as some nodes have it do.

    Deep Shrink's smaller grids are those of every pass through the MODEL at that sigma, the sampling's too.
    """
    if tensor.shape[1:] != shape[1:] and key.stream != "cross_attention_k":
        if shrinks(model.model_options) and tensor.shape[1:].numel() < torch.Size(shape[1:]).numel():
            return
        causes = " and ".join(size_changers(model.model_options)) or "Another node on it"
        raise ValueError(
            f"model: {key.stream} of {key.block} {key.number} is {tuple(tensor.shape[1:])} where {tuple(shape[1:])} is expected. "
            f"{causes} changes the grid: connect the model from before that node here."
        )


def require_even(model: ModelPatcher, cure: str) -> None:
    """Raises ValueError where features are to go to a file, and Deep Shrink gives every step sizes of its own."""
    if shrinks(model.model_options):
        raise ValueError(
            "features: with PatchModelAddDownscale (Deep Shrink) their sizes change from step to step, which a file cannot hold. " + cure
        )


def open_writer(
    model: ModelPatcher, keys: Sequence[FeatureKey], trajectory: Trajectory, memory: str, precision: str
) -> MemoryStore | FileWriter:
    """Room for the features of every step, logged and checked against what is free; memory: ram | vram | disk."""
    shapes, steps = feature_shapes(find_adapter(model), keys, trajectory), trajectory.steps
    dtype = storage_dtype(model, precision)
    size = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize * steps
    logging.info("Pastiche: capturing %d tensors x %d steps: %s (%s).", len(keys), steps, readable_size(size), memory)
    _check_room(size, memory, model.load_device)
    if memory == "disk":
        require_even(model, "Choose recompute, ram or vram.")
        named = {str(key): (steps, *shape) for key, shape in shapes.items()}
        return FileWriter(temporary_path(), named, dict.fromkeys(named, dtype), {"format": "pastiche-features"}, durable=False)
    return MemoryStore(shapes, steps, dtype, torch.device("cpu") if memory == "ram" else model.load_device)


def finished(writer: MemoryStore | FileWriter) -> MemoryStore | FileStore:
    """What was written, whole. Raises ValueError where some of it is not finite."""
    if isinstance(writer, FileWriter):
        return FileStore(writer.finish(), temporary=True)
    writer.settle()
    return writer


def keep(key: Hashable | None, model: ModelPatcher, store: MemoryStore | FileStore) -> None:
    """Has `recall` find a finished store, which nobody can write to from now on: itself, or a copy in RAM of what is in VRAM."""
    if key is None or not RESULTS.takes(store.nbytes):
        return
    on_device = isinstance(store, MemoryStore) and store.device.type != "cpu"
    kept = store.copied_to(torch.device("cpu"), pinned=False) if on_device else store
    if isinstance(kept, MemoryStore):
        kept.seal()
    RESULTS.keep(key, model.model, (kept, on_device), kept.nbytes)


def recall(key: Hashable | None, model: ModelPatcher) -> MemoryStore | FileStore | None:
    """The store that was kept under a key, or a new one in VRAM with its content. Raises ValueError for too little VRAM."""
    found = RESULTS.find(key)
    if found is None:
        return None
    kept, on_device = found
    if not on_device:
        return kept
    _check_room(kept.nbytes, "vram", model.load_device)
    return kept.copied_to(model.load_device)


def discard(writer: MemoryStore | FileWriter) -> None:
    """Leaves nothing of an interrupted capture behind."""
    if isinstance(writer, FileWriter):
        writer.discard()


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
