"""A diffusers UNet2DModel as ComfyUI's diffusion_model: same network, called block by block with core's hooks."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from .unconditional_pixels import PixelUNet
from .unet import UNet


class UnconditionalUNet(PixelUNet):
    """Runs a diffusers `UNet2DModel` as ComfyUI runs its own U-Nets.

    Fires DIFFUSION_MODEL wrappers and the patches `input_block_patch`, `middle_block_after_patch` (h-space) and
    `output_block_patch`; transformer_options["block"] counts diffusers' blocks: input 0 is conv_in, input i its
    i-th down block, output i its i-th up block, which gets the deepest of its skips as `hsp`.
    """

    def __init__(self, network: Any, dtype: torch.dtype):
        super().__init__()
        self.network = network
        self.dtype = dtype

    @property
    def levels(self) -> int:
        return len(self.network.down_blocks)

    @property
    def blocks(self) -> tuple[int, int]:
        return self.levels + 1, self.levels

    @property
    def h_channels(self) -> int:
        return self.network.config.block_out_channels[-1]

    @property
    def trained_size(self) -> str:
        size = self.network.config.sample_size
        return f"to {size}" if size else super().trained_size

    def _forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **kwargs):
        """x: (B, 3, H, W) in the model's own scale; timesteps: (B,). Returns the prediction, (B, 3, H, W)."""
        self._check(x, control)
        network = self.network
        patches = transformer_options.get("patches", {})
        transformer_options["original_shape"] = list(x.shape)
        transformer_options["transformer_index"] = 0

        emb = network.time_embedding(network.time_proj(timesteps).to(x.dtype))
        h = network.conv_in(2 * x - 1 if network.config.center_input_sample else x)
        h = _input_patches(h, 0, patches, transformer_options)
        skips = [h]
        for number, block in enumerate(network.down_blocks, 1):
            transformer_options["block"] = ("input", number)
            h, outputs = block(hidden_states=h, temb=emb)
            skips += outputs[:-1]
            h = _input_patches(h, number, patches, transformer_options)
            skips.append(h)

        transformer_options["block"] = ("middle", 0)
        h = network.mid_block(h, emb)
        for patch in patches.get("middle_block_after_patch", []):
            h = patch({"h": h, "x": x, "emb": emb, "context": context, "y": y, "timesteps": timesteps,
                       "transformer_options": transformer_options})["h"]

        for number, block in enumerate(network.up_blocks):
            transformer_options["block"] = ("output", number)
            taken, skips = skips[-len(block.resnets):], skips[: -len(block.resnets)]
            for patch in patches.get("output_block_patch", []):
                h, taken[-1] = patch(h, taken[-1], transformer_options)
            h = block(h, tuple(taken), emb)
        return network.conv_out(network.conv_act(network.conv_norm_out(h)))


def adapt_unconditional(model: ModelPatcher) -> UNet | None:
    """The adapter of an unconditional network, of which only h_space can be captured; None for other networks."""
    network = model.model.diffusion_model
    if not isinstance(network, PixelUNet):
        return None
    inputs, outputs = network.blocks
    return UNet(
        model=model.model,
        family="Unconditional DDPM",
        attention={},
        residual={},
        scale={("middle", 0): network.levels - 1},
        counts={"input": inputs, "output": outputs},
        h_channels=network.h_channels,
        context_dim=None,
    )


def with_core_operations(network: nn.Module, operations: Any) -> nn.Module:
    """Rebuilds a network's weighted layers, in place, as ComfyUI's own operations on the same parameters.

    Those know how to cast weights on the fly and to stay on the CPU when video memory is short.
    """
    made: dict[nn.Module, nn.Module] = {}  # diffusers lists some layers under two names
    for module in list(network.modules()):
        for name, child in list(module._modules.items()):
            if child is not None:
                counterpart = made.get(child) or _counterpart(child, operations)
                if counterpart is not None:
                    made[child] = counterpart
                    setattr(module, name, counterpart)
    return network


def _counterpart(layer: nn.Module, operations: Any) -> nn.Module | None:
    bias = getattr(layer, "bias", None) is not None
    if type(layer) is nn.Linear:
        made = operations.Linear(layer.in_features, layer.out_features, bias=bias, device="meta")
    elif type(layer) is nn.Conv2d:
        made = operations.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, bias, layer.padding_mode, device="meta",
        )
    elif type(layer) is nn.GroupNorm:
        made = operations.GroupNorm(layer.num_groups, layer.num_channels, layer.eps, layer.affine, device="meta")
    elif type(layer) is nn.LayerNorm:
        made = operations.LayerNorm(layer.normalized_shape, layer.eps, layer.elementwise_affine, device="meta")
    else:
        return None
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(made, name, parameter)
    return made.train(layer.training)


def _input_patches(h: torch.Tensor, number: int, patches: dict, transformer_options: dict) -> torch.Tensor:
    transformer_options["block"] = ("input", number)
    for patch in patches.get("input_block_patch", []):
        h = patch(h, transformer_options)
    return h
