"""A training that can be taken up again: weights, optimiser moments and losses, in memory and as one file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import folder_paths
import safetensors
import safetensors.torch
import torch
from torch import Tensor

SAVE_EVERY = 50  # steps
SUFFIX = ".training.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """Where a training stands. Random draws need no state of their own: each step has its own generator.

    path: the file it is kept in, or None. identity: what must agree for the training to go on (names to values).
    """

    def __init__(self, path: Path | None = None, identity: dict[str, Any] | None = None):
        self.path, self.identity = path, {name: str(value) for name, value in (identity or {}).items()}
        self.step = 0
        self.losses: list[float] = []
        self._tensors: dict[str, Tensor] = {}
        self._scaler: dict = {}
        if path is not None and path.exists():
            self._read(path)

    def advance(self, loss: float) -> None:
        self.step += 1
        self.losses.append(loss)

    def restore(self, adapters: Any, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
        """Puts the state into freshly made adapters and optimiser."""
        if self.step == 0:
            return
        adapters.load_state_dict(self._tensors)
        moments = {
            number: {"step": torch.tensor(float(self.step)), **{name: self._tensors[f"{name}.{number}"] for name in MOMENTS}}
            for number in range(len(adapters.parameters()))
        }
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        if self._scaler:
            scaler.load_state_dict(self._scaler)

    def save(self, adapters: Any, optimizer: torch.optim.Optimizer, scaler: Any, force: bool = False) -> None:
        """Writes the file, if there is one, every SAVE_EVERY steps or when forced; a complete file or none."""
        if self.path is None or self.step == 0 or not (force or self.step % SAVE_EVERY == 0):
            return
        tensors = adapters.state_dict()
        for number, parameter in enumerate(adapters.parameters()):
            for name in MOMENTS:
                tensors[f"{name}.{number}"] = optimizer.state[parameter][name].cpu().clone()
        progress = {"step": self.step, "losses": self.losses, "scaler": scaler.state_dict()}
        metadata = {"identity": json.dumps(self.identity), "progress": json.dumps(progress)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        try:
            safetensors.torch.save_file(tensors, str(partial), metadata)
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        try:
            with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}
            identity, progress = json.loads(metadata["identity"]), json.loads(metadata["progress"])
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(f'"{path.name}" is no training state of this node ({error}); choose another checkpoint name.') from error
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise ValueError(
                    f'checkpoint "{path.name}" belongs to another training: its {name} is {identity.get(name)}, '
                    f"this one's is {value}. Choose another checkpoint name, or set {name} back."
                )
        self.step, self.losses, self._scaler = progress["step"], progress["losses"], progress["scaler"]


def state_path(name: str) -> Path | None:
    """The file of a checkpoint name, under ComfyUI's output/loras; None for an empty name."""
    name = name.strip()
    if not name:
        return None
    if any(character in name for character in '/\\:') or name.startswith("."):
        raise ValueError(f'checkpoint: got "{name}"; give a plain name without folders, for example "my_style".')
    return Path(folder_paths.get_output_directory()) / "loras" / f"{name}{SUFFIX}"
