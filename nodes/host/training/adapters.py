"""Low-rank adapters beside the frozen weights of a loaded model, and what a backward pass through it needs.

Every function here is a context manager: whatever it changes on the shared modules is undone on the way out.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any, Iterator

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...algorithms.lora import apply_low_rank, init_low_rank, select_targets

PREFIX = "diffusion_model."


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """The network's linear layers by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}


class Adapters:
    """Trainable LoRAs of some linear layers, float32, on one device."""

    def __init__(self, network: nn.Module, targets: str, rank: int, alpha: float, generator: torch.Generator):
        layers = linear_layers(network)
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
            down, up = init_low_rank(module.in_features, module.out_features, rank, generator)
            self.down[name], self.up[name] = nn.Parameter(down), nn.Parameter(up)

    def to(self, device: torch.device) -> "Adapters":
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)
        return self

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for name in self._modules for parameter in (self.down[name], self.up[name])]

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
                return output + apply_low_rank(args[0], down, up, scale) if self._on else output

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


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Lets autograd save the weights of a model that was loaded in inference mode.

    A tensor made there may not be saved for a backward pass. While inside, each such parameter and buffer is
    replaced by an ordinary tensor over the same memory, nothing copied. Nothing in the model collects gradients.
    """
    with ExitStack() as stack:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if type(tensor) not in (nn.Parameter, Tensor) or not (tensor.is_inference() or tensor.requires_grad):
                        continue
                    stack.callback(tensors.__setitem__, name, tensor)
                    alias = _alias(tensor)
                    tensors[name] = nn.Parameter(alias, requires_grad=False) if tensors is module._parameters else alias
        yield


def _alias(tensor: Tensor) -> Tensor:
    ordinary = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    tensor = tensor.detach()
    return ordinary.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


class _FrozenCast(torch.autograd.Function):
    """A frozen layer whose weight is cast or uploaded for each use: cast again in backward instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, forward: Any) -> Tensor:
        ctx.module, ctx.shape, ctx.dtype = module, x.shape, x.dtype
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        module = ctx.module
        weight, bias, stream = comfy.ops.cast_bias_weight(
            module, dtype=grad.dtype, device=grad.device, bias_dtype=grad.dtype, offloadable=True
        )
        if isinstance(module, nn.Linear):
            grad_input = grad @ weight
        else:
            geometry = module.stride, module.padding, module.dilation, module.groups
            grad_input = nn.grad.conv2d_input(ctx.shape, weight, grad, *geometry)
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)
        return grad_input.to(ctx.dtype), None, None


@contextmanager
def recast_in_backward(network: nn.Module, everywhere: bool = False) -> Iterator[None]:
    """Frozen linear and convolution layers that ComfyUI casts on the fly (or `everywhere`: under autocast) keep no
    cast weight for backward.

    Offloaded weights pass through a shared buffer that the next layer overwrites, so keeping them would be wrong,
    and keeping a cast copy of every layer would cost a second model.
    """
    with ExitStack() as stack:
        for module in network.modules():
            casts = isinstance(module, comfy.ops.CastWeightBiasOp) and (everywhere or module.comfy_cast_weights)
            if casts and isinstance(module, (nn.Linear, nn.Conv2d)):
                _override_forward(stack, module, lambda forward, module: lambda x: _FrozenCast.apply(x, module, forward))
        yield


@contextmanager
def norms_of_copies(network: nn.Module) -> Iterator[None]:
    """Lets a network add to its residual stream in place, as ComfyUI's transformers do (Flux, for one).

    What keeps the stream for backward are the norms in front of each branch: they get a copy. The U-Net adds
    nothing in place and is left alone.
    """
    with ExitStack() as stack:
        for module in () if isinstance(network, UNetModel) else network.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                stack.callback(module.register_forward_pre_hook(lambda module, args: (args[0].clone(), *args[1:])).remove)
        yield


@contextmanager
def checkpointed(network: nn.Module) -> Iterator[None]:
    """Blocks keep only their inputs and are computed again in backward."""
    with ExitStack() as stack:
        for block in _blocks(network):
            _override_forward(stack, block, _checkpointed_forward)
        yield


def _checkpointed_forward(forward: Any, module: nn.Module) -> Any:
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Options change from block to block: backward must see them as they are now.
        args, kwargs = [_snapshot(a) for a in args], {k: _snapshot(a) for k, a in kwargs.items()}

        def again():
            return forward(*map(_writable, args), **{k: _writable(a) for k, a in kwargs.items()})

        return checkpoint(again, use_reentrant=False, preserve_rng_state=False)

    return run


def _snapshot(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _writable(value: Any) -> Any:
    """What a block may write to without spoiling it for the next computation."""
    return value.clone() if isinstance(value, Tensor) else _snapshot(value)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Residual and transformer blocks: what the network's top-level lists hold, one level deeper for U-Net stages."""
    found: list[nn.Module] = []
    for child in network.children():
        stages = child if isinstance(child, (nn.ModuleList, nn.Sequential)) else ()
        for stage in stages:
            found += stage if isinstance(stage, nn.Sequential) else [stage]
    return [block for block in found if any(True for _ in block.children())]


def _override_forward(stack: ExitStack, module: nn.Module, make: Any) -> None:
    own = module.__dict__.get("forward")  # another override, which this one wraps
    module.forward = make(module.forward, module)
    if own is None:
        stack.callback(module.__dict__.pop, "forward", None)
    else:
        stack.callback(setattr, module, "forward", own)
