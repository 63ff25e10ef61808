"""A style library on disk: feature banks as safetensors files inside ComfyUI's folders."""

from __future__ import annotations

import contextlib
import json
import os
from math import prod
from pathlib import Path

import comfy.model_management
import folder_paths
import safetensors
import torch
from comfy.model_patcher import ModelPatcher

from ...sockets import STREAMS, FeatureBank, FeatureKey, Fingerprint, Trajectory
from ..checks import check_conditioning, check_trajectory
from ..files import register_models_folder
from ..networks.families import find_adapter
from ..networks.fingerprint import fingerprint, model_name, require_same_model
from ..networks.marks import require_plain
from .capture import feature_shapes, record, require_even, storage_dtype
from .shelf import FOLDER, FORMAT, LORAS, VERSION, require_room
from .stores import FileStore, FileWriter, MemoryStore
from .style_notes import latent_thumbnail, named_model, style_notes, thumbnail

TRAJECTORY = ("trajectory.sigmas", "trajectory.latents")
CONTEXT, POOLED = "conditioning.context", "conditioning.pooled_output"


def register_folder() -> None:
    """Makes models/pastiche_features and output/pastiche_features known to ComfyUI, .safetensors only."""
    roots = (folder_paths.models_dir, folder_paths.get_output_directory())
    register_models_folder(FOLDER, {".safetensors"}, *(os.path.join(root, FOLDER) for root in roots))
    folder_paths.add_model_folder_path(LORAS, os.path.join(folder_paths.get_output_directory(), LORAS))  # as core's own start does


def list_files() -> list[str]:
    return folder_paths.get_filename_list(FOLDER) if FOLDER in folder_paths.folder_names_and_paths else []


def save_bank(bank: FeatureBank, filename_prefix: str, picture: torch.Tensor | None = None, notes: str = "") -> Path:
    """Writes a bank, its trajectory and its conditioning into output/pastiche_features; returns the file.

    A `recompute` bank is written with its trajectory alone and needs a MODEL when loaded. picture: IMAGE for the thumbnail,
    else a coarse one is made of the clean latent.
    Raises ValueError for a name outside that folder (core's own check) or that no file can have, for conditioning beyond
    a prompt, where the style library's limit leaves no room, and where the file cannot be written.
    """
    path = free_path(filename_prefix, Path(folder_paths.get_output_directory()) / FOLDER, FOLDER)
    trajectory = bank.trajectory
    context, extra = trajectory.conditioning[0]
    unsaved = [name for name, value in extra.items() if name != "pooled_output" and value is not None]
    if unsaved:
        raise ValueError(f"features: their conditioning carries {', '.join(unsaved)}, which a file cannot; use a plain prompt.")
    whole = {TRAJECTORY[0]: trajectory.sigmas, TRAJECTORY[1]: trajectory.latents, CONTEXT: context,
             POOLED: extra.get("pooled_output")}
    whole = {name: tensor.float() for name, tensor in whole.items() if tensor is not None}
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    dtypes = dict.fromkeys(whole, torch.float32)
    device = torch.device("cpu")
    if bank.store is not None:
        require_even(bank.model, "Save them from Capture Features set to recompute.")
        for key in bank.keys:
            sample = bank.store.read(key, 1, device)
            shapes[str(key)] = (trajectory.steps, *sample.shape)
            dtypes[str(key)] = sample.dtype
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "method": "capture" if bank.store is not None else "recompute",
        "scheme": trajectory.scheme,
        "weights": trajectory.fingerprint.weights,
        "patches": trajectory.fingerprint.patches,
        "keys": json.dumps([str(key) for key in bank.keys]),
        "steps": str(trajectory.steps),
        "latent_size": json.dumps(list(trajectory.latents.shape[-2:])),
        "batch": str(trajectory.batch),
    }
    cover = latent_thumbnail(bank.model, trajectory.latents[0]) if picture is None else thumbnail(picture)
    metadata |= style_notes(bank.model, cover, _settings(bank), notes)
    require_room(sum(prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()))
    try:
        writer = FileWriter(path, shapes, dtypes, metadata)
        try:
            for name, tensor in whole.items():
                writer.write(name, 0, tensor)
            if bank.store is not None:
                for step in range(1, trajectory.steps + 1):
                    comfy.model_management.throw_exception_if_processing_interrupted()
                    for key in bank.keys:
                        writer.write(key, step, bank.store.read(key, step, device))
        except BaseException:
            writer.discard()
            raise
        return writer.finish()
    except OSError as error:
        raise ValueError(f'filename_prefix: "{path}" cannot be written ({error.strerror or error}). Make room, or the folder writable.') from error


def saved_name(path: Path) -> str:
    """The name under which Load Features lists a file that `save_bank` wrote."""
    return os.path.relpath(path, os.path.join(folder_paths.get_output_directory(), FOLDER))


def _settings(bank: FeatureBank) -> dict[str, str]:
    """What a style was made with, for its reader."""
    trajectory = bank.trajectory
    layers = sorted({f"{key.block} {key.number}" for key in bank.keys}, key=lambda layer: (layer.split()[0], int(layer.split()[1])))
    return {
        "scheme": trajectory.scheme,
        "steps": str(trajectory.steps),
        "latent": "x".join(map(str, trajectory.latents.shape[-2:])),
        "pictures": str(trajectory.batch),
        "streams": ", ".join(sorted({key.stream for key in bank.keys})),
        "layers": ", ".join(layers),
    }


def free_path(filename_prefix: str, root: Path, listed_as: str, listed_root: Path | None = None) -> Path:
    """A numbered file in `root` whose name no folder that ComfyUI lists as `listed_as` has yet, as loaders take the first they find.

    listed_root: the listed folder that `root` lies in, where it is not `root` itself.
    """
    shown = ascii(filename_prefix[:60])
    if not filename_prefix.strip("./\\ "):
        raise ValueError(f'filename_prefix: got {shown}; give a name, for example "style" or "paintings/style".')
    try:
        os.makedirs(root, exist_ok=True)
        folder, name, counter, *_ = folder_paths.get_save_image_path(os.path.normpath(filename_prefix), os.fspath(root))
        while True:
            path = Path(folder) / f"{name}_{counter:05}_.safetensors"
            with contextlib.suppress(FileNotFoundError):
                os.lstat(path)  # a name too long or not allowed: now, not when the work is done
            if not os.path.lexists(path) and _listed(os.path.relpath(path, listed_root or root), listed_as) is None:
                return path
            counter += 1
    except (OSError, ValueError) as error:
        raise ValueError(f"filename_prefix: no file can be called {shown} ({getattr(error, 'strerror', None) or error}). Give a plain name.") from error
    except Exception as error:  # core raises no type of its own
        raise ValueError(f"filename_prefix: {shown} leaves ComfyUI's output folder; give a plain name.") from error


def _listed(name: str, folder: str = FOLDER) -> str | None:
    """Full path of a file in the listed folders; None for names that are not there, or cannot be."""
    try:
        return folder_paths.get_full_path(folder, name) if folder in folder_paths.folder_names_and_paths else None
    except (OSError, ValueError):
        return None


def load_bank(name: str, memory: str, model: ModelPatcher) -> FeatureBank:
    """Reads a bank written by `save_bank` from MODEL `model`; memory: ram | vram | disk | recompute.

    A file without features (written in `recompute` mode) has them captured now for ram and vram, and
    recomputed while sampling otherwise. Raises ValueError for truncated or foreign files and another model.
    """
    require_plain(model, "would be in features that are made again with this model")
    path = _listed(name)
    if path is None or not _inside_folders(path):
        raise ValueError(f'file: {ascii(name[:60])} is not in {FOLDER} under ComfyUI\'s models or output folder.')
    store = FileStore(Path(path))
    about = store.metadata
    if about.get("format") != FORMAT or about.get("version") != VERSION or not set(TRAJECTORY) <= set(store.tensor_names()):
        found = f'format "{about.get("format", "none")}" version {about.get("version", "none")}'
        raise ValueError(f'file: "{name}" was not written by Save Features (expected {FORMAT} version {VERSION}, got {found}).')
    try:
        trajectory = _read_trajectory(store)
        keys = tuple(FeatureKey.parse(text) for text in json.loads(about["keys"]))
        stored = about["method"] == "capture"
        strange = [str(key) for key in keys if key.stream not in STREAMS]
        if strange or not keys:
            raise ValueError(f"it names the features {', '.join(strange)[:60] or 'of no layer'}")
        shapes = {key: _read_shape(store, key, trajectory) for key in keys} if stored else {}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(f'file: "{name}" is damaged: {error}. Save the features again.') from error
    names = str(model_name(model)), str(named_model(about))
    require_same_model(fingerprint(model), trajectory.fingerprint, f'The features in "{name}"', *names)
    if memory == "recompute" or not stored:
        return _recomputed(trajectory, keys, memory, model)
    if memory == "disk":
        return FeatureBank(trajectory, keys, memory, store, model)
    device = torch.device("cpu") if memory == "ram" else model.load_device
    held = MemoryStore(shapes, trajectory.steps, store.dtype(str(keys[0])), device)
    for step in range(1, trajectory.steps + 1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        for key in keys:
            held.write(key, step, store.read(key, step, device))
    return FeatureBank(trajectory, keys, memory, held, model)


def _read_trajectory(store: FileStore) -> Trajectory:
    about, names = store.metadata, store.tensor_names()
    sigmas, latents = (store.tensor(name) for name in TRAJECTORY)
    if sigmas.ndim != 1 or latents.ndim not in (5, 6) or len(sigmas) != len(latents):
        raise ValueError(f"{len(sigmas)} sigmas for latents of shape {tuple(latents.shape)}")
    context = store.tensor(CONTEXT) if CONTEXT in names else None
    extra = {"pooled_output": store.tensor(POOLED)} if POOLED in names else {}
    trajectory = Trajectory(sigmas, latents, [[context, extra]], about["scheme"], Fingerprint(about["weights"], about["patches"]))
    check_trajectory(trajectory, "trajectory")
    check_conditioning(trajectory.conditioning, "conditioning")
    return trajectory


def _read_shape(store: FileStore, key: FeatureKey, trajectory: Trajectory) -> tuple[int, ...]:
    """(B, ...) of one step of a stored feature."""
    steps, *shape = store.shape(str(key))
    if steps != trajectory.steps or shape[0] != trajectory.batch:
        raise ValueError(f"{key} holds {steps} steps of {shape[0]} images, its trajectory {trajectory.steps} of {trajectory.batch}")
    return tuple(shape)


def _recomputed(trajectory: Trajectory, keys: tuple[FeatureKey, ...], memory: str, model: ModelPatcher) -> FeatureBank:
    if memory in ("recompute", "disk"):
        return FeatureBank(trajectory, keys, "recompute", None, model)
    device = torch.device("cpu") if memory == "ram" else model.load_device
    shapes = feature_shapes(find_adapter(model), keys, trajectory)
    store = MemoryStore(shapes, trajectory.steps, storage_dtype(model, "half"), device)
    record(model, trajectory, keys, store.write)
    return FeatureBank(trajectory, keys, memory, store, model)


def _inside_folders(path: str) -> bool:
    roots = folder_paths.get_folder_paths(FOLDER)
    real = os.path.realpath(path)
    return any(os.path.commonpath([real, os.path.realpath(root)]) == os.path.realpath(root) for root in roots)
