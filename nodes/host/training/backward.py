"""What a backward pass through a model that ComfyUI loaded needs.

Every function here is a context manager: whatever it changes on the shared modules is undone on the way out.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any, Iterator

import comfy.model_management
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Lets autograd save the weights of a model that was made in inference mode.

    A tensor made there may not be saved for a backward pass, and gains no version counter when it is moved to a
    device later, though it then counts as an ordinary one. While inside, each such parameter and buffer is
    replaced by an ordinary tensor over the same memory, nothing copied, with the attributes that ComfyUI keeps on
    it. Nothing in the model collects gradients.
    """
    with ExitStack() as stack:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if type(tensor) not in (nn.Parameter, Tensor) or tensor.is_meta:
                        continue
                    if _has_version(tensor) and not tensor.requires_grad:
                        continue
                    stack.callback(tensors.__setitem__, name, tensor)
                    alias = _alias(tensor)
                    tensors[name] = nn.Parameter(alias, requires_grad=False) if tensors is module._parameters else alias
                    tensors[name].__dict__.update(tensor.__dict__)
        yield


def _has_version(tensor: Tensor) -> bool:
    try:
        tensor._version
    except RuntimeError:  # "Inference tensors do not track version counter"
        return False
    return True


def _alias(tensor: Tensor) -> Tensor:
    ordinary = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    tensor = tensor.detach()
    return ordinary.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


class _FrozenCast(torch.autograd.Function):
    """A frozen layer whose weight is cast or uploaded for each use: cast again in backward instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, forward: Any) -> Tensor:
        ctx.module, ctx.shape, ctx.dtype = module, x.shape, x.dtype
        output = forward(x)
        # A view made in here could not be added to in place, as transformers do with their residual stream.
        return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        module = ctx.module
        weight, bias, stream = comfy.ops.cast_bias_weight(
            module, dtype=grad.dtype, device=grad.device, bias_dtype=grad.dtype, offloadable=True
        )
        if isinstance(module, nn.Linear):
            grad_input = grad @ weight
        else:
            grad_input = _conv_input_gradient(module, weight, grad, ctx.shape)
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)
        return grad_input.to(ctx.dtype), None, None


CONVOLUTIONS = {nn.Conv1d: nn.grad.conv1d_input, nn.Conv2d: nn.grad.conv2d_input, nn.Conv3d: nn.grad.conv3d_input}


def _conv_input_gradient(module: nn.Module, weight: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        gradient = next(function for kind, function in CONVOLUTIONS.items() if isinstance(module, kind))
        return gradient(shape, weight, grad, module.stride, module.padding, module.dilation, module.groups)
    # Tiling nodes wrap the picture around: whatever the layer does with its border, it is linear in its input.
    with torch.enable_grad():
        anywhere = grad.new_zeros(shape, requires_grad=True)
        return torch.autograd.grad(module._conv_forward(anywhere, weight, None), anywhere, grad)[0]


@contextmanager
def recast_in_backward(network: nn.Module, everywhere: bool = False) -> Iterator[None]:
    """Frozen linear and convolution layers that ComfyUI casts on the fly (or `everywhere`: under autocast) keep no
    cast weight for backward.

    Offloaded weights pass through a shared buffer that the next layer overwrites, so keeping them would be wrong,
    and keeping a cast copy of every layer would cost a second model.
    """
    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, (nn.Linear, *CONVOLUTIONS)) and (_casts(module) or everywhere and _may_cast(module)):
                _override_forward(stack, module, lambda forward, module: lambda x: _FrozenCast.apply(x, module, forward))
        yield


@contextmanager
def norm_weights_kept(network: nn.Module) -> Iterator[None]:
    """Norms whose weights ComfyUI casts on the fly keep a cast copy on the device: a few numbers per channel.

    A norm's backward needs its weight, and autograd would keep the one in ComfyUI's shared buffer, which by then
    holds another layer's.
    """
    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, tuple(NORMS)) and _casts(module) and module.weight is not None:
                _override_forward(stack, module, _norm_with_kept_weights)
        yield


def _norm_with_kept_weights(forward: Any, module: nn.Module) -> Any:
    norm = next(function for kind, function in NORMS.items() if isinstance(module, kind))
    kept: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor | None]] = {}

    def run(x: Tensor) -> Tensor:
        key = x.dtype, x.device
        if key not in kept:
            with torch.no_grad():
                weight, bias, stream = comfy.ops.cast_bias_weight(module, x, offloadable=True)
                kept[key] = weight.clone(), None if bias is None else bias.clone()
                comfy.ops.uncast_bias_weight(module, weight, bias, stream)
        return norm(module, x, *kept[key])

    return run


NORMS = {
    nn.GroupNorm: lambda module, x, weight, bias: F.group_norm(x, module.num_groups, weight, bias, module.eps),
    nn.LayerNorm: lambda module, x, weight, bias: F.layer_norm(x, module.normalized_shape, weight, bias, module.eps),
    nn.RMSNorm: lambda module, x, weight, bias: F.rms_norm(x, module.normalized_shape, weight, module.eps),
}


def _may_cast(module: nn.Module) -> bool:
    return isinstance(module, comfy.ops.CastWeightBiasOp)


def _casts(module: nn.Module) -> bool:
    """Whether ComfyUI makes the weight of each use: offloaded, of another type, or patched on the way."""
    return _may_cast(module) and bool(module.comfy_cast_weights or module.weight_function or module.bias_function)


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


@contextmanager
def kernels_with_gradients() -> Iterator[None]:
    """ComfyUI's own switch for training: its fused kernels (rotary embeddings, for one) have no backward pass."""
    before = getattr(comfy.model_management, "in_training", False)
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """CUDA's kernels in their deterministic form, so that the same seed gives the same file; the CPU's always are."""
    if device.type != "cuda":
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
