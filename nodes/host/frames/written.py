"""Restyled frames on disk: numbered PNG files of one film and one set of settings, and what is needed to go on."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any, Iterable

import folder_paths
import numpy as np
import safetensors.torch
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from ..checks import largest
from ..features.stores import open_safetensors
from ..files import atomic_write

FORMAT = "pastiche-film-1"
STATE = "film.safetensors"


def digest(parts: Iterable[Any]) -> str:
    """Hex digest of tensors, by every byte, and of what else has a text."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            dense = part.detach().to("cpu").contiguous()
            found.update(f"{tuple(dense.shape)} {dense.dtype} ".encode())
            found.update(dense.reshape(-1).view(torch.uint8).numpy().data if dense.numel() else b"")
        else:
            found.update(f"{part!r} ".encode())
    return found.hexdigest()


class WrittenFrames:
    """output/<prefix>_<digest>/frame_00001.png and on, and beside them STATE: how many are whole, and the tensors to go on with.

    The digest is of everything that the pictures depend on, so a folder never mixes settings. The state follows its frames, so after
    a Cancel or a crash it names frames that are there.
    """

    def __init__(self, filename_prefix: str, identity: str, count: int, resume: bool):
        self.folder, self.count, self._identity = _folder(filename_prefix, identity), count, identity
        self.done, self.tensors = self._found() if resume else (0, {})
        if self.done == 0:
            self.tensors = {}
            self._path(STATE).unlink(missing_ok=True)

    @property
    def shown(self) -> str:
        """The folder, from ComfyUI's output folder on."""
        return os.path.relpath(self.folder, folder_paths.get_output_directory())

    def write(self, number: int, frame: Tensor) -> None:
        """frame: (H, W, 3) uint8; numbers count from 0."""
        with self._refused(), atomic_write(self._frame(number), durable=False) as path:
            Image.fromarray(frame.numpy()).save(path, format="PNG", compress_level=4)

    def read(self, number: int) -> Tensor:
        """(H, W, 3) uint8. Raises OSError where it is not there, or no whole picture."""
        with PngImageFile(self._frame(number)) as picture:  # ultralytics exchanges Image.open, and installs packages for broken files
            return torch.from_numpy(np.asarray(picture.convert("RGB")).copy())

    def advance(self, done: int, tensors: dict[str, Tensor]) -> None:
        """Says that the first `done` frames are written, and what the next ones need."""
        about = {"format": FORMAT, "identity": self._identity, "done": str(done), "frames": str(self.count)}
        with self._refused(), atomic_write(self._path(STATE), durable=False) as path:
            safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=about)
        self.done = done

    def _found(self) -> tuple[int, dict[str, Tensor]]:
        path = self._path(STATE)
        if not path.exists():
            return 0, {}
        try:
            with open_safetensors(path) as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT or about.get("identity") != self._identity:
                    raise ValueError("it belongs to another film")
                done, tensors = int(about["done"]), {name: file.get_tensor(name) for name in file.keys()}
            if not 0 < done <= self.count:
                raise ValueError(f"it tells of {done} frames of {self.count}")
            for number in range(done):
                self.read(number)
            if any(not np.isfinite(largest(tensor)) for tensor in tensors.values()):
                raise ValueError("it holds NaN")
        except (OSError, ValueError, KeyError, SyntaxError) as error:  # PIL raises SyntaxError for broken PNG files
            logging.warning("Pastiche: the film in %s begins anew: what is written of it cannot be used (%s).", self.folder, error)
            return 0, {}
        logging.info("Pastiche: %d of %d frames were written before, in %s.", done, self.count, self.folder)
        return done, tensors

    def _frame(self, number: int) -> Path:
        return self._path(f"frame_{number + 1:05}.png")

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _refused(self) -> "_Refused":
        return _Refused(self.folder)


class _Refused:
    """Turns a disk's refusal into a sentence."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise ValueError(
                f'filename_prefix: "{self._folder}" cannot be written ({error.strerror or error}). Make room, or the folder writable.'
            ) from error


def _folder(filename_prefix: str, identity: str) -> Path:
    """The film's folder, made; ValueError for a name outside ComfyUI's output folder or that no folder can have."""
    shown = ascii(filename_prefix[:60])
    if not filename_prefix.strip("./\\ "):
        raise ValueError(f'filename_prefix: got {shown}; give a name, for example "frames/restyled".')
    try:
        folder, name, *_ = folder_paths.get_save_image_path(os.path.normpath(filename_prefix), folder_paths.get_output_directory())
        film = Path(folder) / f"{name}_{identity[:10]}"
        film.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"filename_prefix: no folder can be called {shown} ({getattr(error, 'strerror', None) or error}). Give a plain name.") from error
    except Exception as error:  # core raises no type of its own
        raise ValueError(f"filename_prefix: {shown} leaves ComfyUI's output folder; give a plain name.") from error
    return film
