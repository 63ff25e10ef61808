"""Low-rank adapters beside the frozen linear and convolution layers of a loaded model."""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from typing import Iterator

import torch
from torch import Tensor, nn

from ...algorithms.lora import apply_low_rank, convolve_low_rank, init_low_rank, select_targets

PREFIX = "diffusion_model."


def target_layers(network: nn.Module, convolutions: bool = False) -> dict[str, nn.Linear | nn.Conv2d]:
    """The network's linear layers by name, on demand its convolutions of pictures too."""
    return {
        name: module for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or convolutions and isinstance(module, nn.Conv2d) and module.groups == 1
    }


class Adapters:
    """Trainable LoRAs of some linear and convolution layers, float32, on one device."""

    def __init__(self, network: nn.Module, targets: str, rank: int, alpha: float, generator: torch.Generator):
        layers = target_layers(network, targets == "all+conv")
        names = select_targets(layers, targets)
        if not names:
            raise ValueError(
                f'targets: "{targets}" finds no attention projection in {type(network).__name__} '
                f'({len(layers)} linear layers); choose "all".'
            )
        self._modules = {name: layers[name] for name in names}
        self.rank, self.alpha = rank, alpha
        self._on = True
        self.down: dict[str, nn.Parameter] = {}
        self.up: dict[str, nn.Parameter] = {}
        for name, module in self._modules.items():
            if isinstance(module, nn.Linear):
                down, up = init_low_rank(module.in_features, module.out_features, rank, generator)
            else:
                down, up = init_low_rank(module.in_channels, module.out_channels, rank, generator, module.kernel_size)
            self.down[name], self.up[name] = nn.Parameter(down), nn.Parameter(up)

    def to(self, device: torch.device) -> "Adapters":
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)
        return self

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for name in self._modules for parameter in (self.down[name], self.up[name])]

    def report_idle(self) -> None:
        """After a backward pass: logs the layers that take no part in the prediction, whose LoRAs stay at nothing."""
        idle = [name for name in self._modules if self.up[name].grad is None]
        if idle:
            few = ", ".join(idle[:3]) + (", ..." if len(idle) > 3 else "")
            logging.info("Pastiche: %d of %d layers take no part and learn nothing: %s.", len(idle), len(self._modules), few)

    def state_dict(self) -> dict[str, Tensor]:
        """Standard LoRA keys: <layer>.lora_down.weight, <layer>.lora_up.weight, <layer>.alpha; float32 on the CPU."""
        tensors: dict[str, Tensor] = {}
        for name in self._modules:
            tensors[f"{PREFIX}{name}.lora_down.weight"] = self.down[name].detach().cpu().clone()
            tensors[f"{PREFIX}{name}.lora_up.weight"] = self.up[name].detach().cpu().clone()
            tensors[f"{PREFIX}{name}.alpha"] = torch.tensor(float(self.alpha))
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        for name in self._modules:
            for part, own in (("down", self.down), ("up", self.up)):
                own[name].data.copy_(tensors[f"{PREFIX}{name}.lora_{part}.weight"])

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While inside, every target computes W x + scale U D x."""
        scale = self.alpha / self.rank

        def beside(name: str):
            down, up = self.down[name], self.up[name]

            def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
                if not self._on:
                    return output
                if isinstance(module, nn.Linear):
                    return output + apply_low_rank(args[0], down, up, scale)
                convolve = lambda x, kernel: module._conv_forward(x, kernel, None)  # as a tiling node may have changed it
                return output + convolve_low_rank(convolve, args[0], down, up, scale)

            return hook

        with ExitStack() as stack:
            for name, module in self._modules.items():
                stack.callback(module.register_forward_hook(beside(name)).remove)
            yield

    @contextmanager
    def detached(self) -> Iterator[None]:
        """While inside, attached adapters do nothing."""
        self._on = False
        try:
            yield
        finally:
            self._on = True
