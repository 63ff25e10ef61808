"""A training that can be taken up again: weights, optimiser moments and losses, in memory and as one file."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import folder_paths
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..files import atomic_write

SAVE_EVERY = 50  # steps
SUFFIX = ".training.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
UNNAMED = {"schedule": "constant", "clean_weight": "0.0"}  # what an identity that does not name them has


class TrainingState:
    """Where a training stands. Random draws need no state of their own: each step has its own generator.

    path: the file it is kept in, or None. identity: what must agree for the training to go on (names to values).
    updates: steps that changed the weights; fp16 leaves out those whose gradients overflow. trouble: a sentence
    once the file could not be written.
    """

    def __init__(self, path: Path | None = None, identity: dict[str, Any] | None = None):
        self.path, self.identity = path, {name: str(value) for name, value in (identity or {}).items()}
        self.step = self.updates = 0
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.trouble = ""
        self._tensors: dict[str, Tensor] = {}
        self._scaler: dict = {}
        if path is not None and _exists(path):
            self._read(path)

    def advance(self, loss: float) -> None:
        self.step += 1
        self.losses.append(loss)

    def check(self, adapters: Any) -> None:
        """Raises ValueError where the file could not be written: before the first step, not after the fiftieth."""
        if self.path is None:
            return
        needed = 3 * sum(parameter.numel() * parameter.element_size() for parameter in adapters.parameters())
        try:
            with atomic_write(self.path, replace=False) as partial:
                partial.write_bytes(b"pastiche")
            free = shutil.disk_usage(self.path.parent).free
        except OSError as error:
            raise ValueError(
                f'checkpoint: "{self.path}" cannot be written ({error.strerror or error}). Choose another name, make '
                "ComfyUI's output folder writable, or leave checkpoint empty."
            ) from error
        if free < needed:
            raise ValueError(
                f"checkpoint: needs {needed / 1e6:.0f} MB in {self.path.parent}, which has {free / 1e6:.0f} MB left. "
                "Make room, or leave checkpoint empty."
            )

    def restore(self, adapters: Any, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
        """Puts the state into freshly made adapters and optimiser."""
        if self.step == 0:
            return
        moments = {}
        try:
            adapters.load_state_dict(self._tensors)
            for number, parameter in enumerate(adapters.parameters()):
                if f"{MOMENTS[0]}.{number}" in self._tensors:  # a layer without gradients has none
                    pair = {name: self._tensors[f"{name}.{number}"].reshape(parameter.shape) for name in MOMENTS}
                    moments[number] = {"step": torch.tensor(float(self.updates)), **pair}
        except (KeyError, RuntimeError) as error:
            raise _no_state(self.path, error) from error
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        if self._scaler and scaler.is_enabled():
            try:
                scaler.load_state_dict(self._scaler)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise _no_state(self.path, error) from error

    def save(self, adapters: Any, optimizer: torch.optim.Optimizer, scaler: Any, force: bool = False) -> None:
        """Writes the file, if there is one, every SAVE_EVERY steps or when forced; a complete file or none.

        A failing write costs the file, not the training: it is logged and kept in `trouble`.
        """
        if self.path is None or self.step == 0 or not (force or self.step % SAVE_EVERY == 0):
            return
        tensors, updates = adapters.state_dict(), 0
        for number, parameter in enumerate(adapters.parameters()):
            moments = optimizer.state.get(parameter, {})
            for name in MOMENTS:
                if name in moments:
                    tensors[f"{name}.{number}"] = moments[name].cpu().clone()
                    updates = int(moments["step"])
        progress = {
            "step": self.step, "updates": updates, "losses": self.losses, "validation": self.validation,
            "scaler": scaler.state_dict(),
        }
        metadata = {"identity": json.dumps(self.identity), "progress": json.dumps(progress)}
        try:
            with atomic_write(self.path) as partial:
                safetensors.torch.save_file(tensors, str(partial), metadata)
            self.trouble = ""
        except (OSError, safetensors.SafetensorError) as error:
            self.trouble = f'The training state "{self.path.name}" could not be written after step {self.step} ({error}).'
            logging.warning("Pastiche: %s Training goes on.", self.trouble)

    def _read(self, path: Path) -> None:
        try:
            with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}
            identity, progress = json.loads(metadata["identity"]), json.loads(metadata["progress"])
            step, losses = int(progress["step"]), [float(loss) for loss in progress["losses"]]
            updates, scaler = int(progress.get("updates", step)), dict(progress["scaler"])
            if not 0 <= updates <= step or step < 1 or len(losses) != step or not isinstance(identity, dict):
                raise ValueError(f"{step} steps, {updates} updates, {len(losses)} losses")
            validation = [(int(done), float(loss)) for done, loss in progress.get("validation", [])]
            if not all(map(math.isfinite, [*losses, *scaler.values()])):
                raise ValueError("its losses or its scale are no numbers")
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise _no_state(path, error) from error
        for name in {**self.identity, **UNNAMED} if self.identity else ():
            theirs, ours = (named.get(name, UNNAMED.get(name)) for named in (identity, self.identity))
            if theirs != ours:
                raise ValueError(
                    f'checkpoint "{path.name}" belongs to another training: its {name} is {theirs}, '
                    f"this one's is {ours}. Choose another checkpoint name, or set {name} back."
                )
        ruined = next((name for name, tensor in self._tensors.items() if not bool(tensor.isfinite().all())), None)
        if ruined is not None:
            raise ValueError(
                f'checkpoint "{path.name}" holds NaN or infinite values (in {ruined}): that training failed. Delete the '
                "file, or choose another checkpoint name."
            )
        self.step, self.updates, self.losses, self._scaler = step, updates, losses, scaler
        self.validation = validation


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long: `check` says so
        return False


def _no_state(path: Path | None, error: Exception) -> ValueError:
    name = path.name if path else ""
    return ValueError(f'"{name}" is no training state of this node ({error}); choose another checkpoint name.')


def state_path(name: str) -> Path | None:
    """The file of a checkpoint name, under ComfyUI's output/loras; None for an empty name."""
    name = name.strip()
    if not name:
        return None
    if any(character in name for character in '/\\:\0') or name.startswith(".") or name != name.encode(errors="ignore").decode():
        raise ValueError(f'checkpoint: got {ascii(name[:80])}; give a plain name without folders, for example "my_style".')
    return Path(folder_paths.get_output_directory()) / "loras" / f"{name}{SUFFIX}"
