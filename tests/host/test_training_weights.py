"""Train Style LoRA on every way in which ComfyUI holds weights: their type, where they are, who loaded them.

None of it may change what is learned; the truth is the same training in float32 on the CPU.
"""

import functools

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import pytest
import torch
from support.devices import ON_CPU
from support.training import FAMILIES, assert_same_gradients, cond_of, gradients, on_cpu, trainable

from pastiche.nodes.host.training.backward import recast_in_backward

FP8 = torch.float8_e4m3fn
HALF = [
    (torch.bfloat16, None, "model"), (torch.float16, None, "model"), (FP8, torch.bfloat16, "model"),
    (torch.float32, None, "bf16"), (torch.float32, None, "fp16"),
]


@functools.cache
def in_float32(family, dtype):
    """Gradients of a float32 model on the CPU with the weights of one of `dtype`."""
    model = trainable(family)
    for tensor in (*model.model.diffusion_model.parameters(), *model.model.diffusion_model.buffers()):
        tensor.data = tensor.data.to(dtype).float()
    return gradients(on_cpu(model))


def sample(model, cond):
    """A run of ComfyUI's own."""
    shape = (1, model.model.latent_format.latent_channels, 8, 8)
    comfy.sample.sample(model, torch.randn(shape), 1, 1.0, "euler", "normal", cond, cond, torch.zeros(shape), seed=0)


@pytest.mark.skipif(not ON_CPU, reason="the arithmetic is the CPU's; test_any_memory has the device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FP8])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_weight_type(family, dtype):
    """Weights of a smaller type, cast on the fly to float32: the gradients of a float32 model with these weights."""
    expected = in_float32(family, dtype)
    for checkpointing in (False, True):
        found = gradients(trainable(family, dtype, torch.float32), gradient_checkpointing=checkpointing)
        assert_same_gradients(found, expected)


@pytest.mark.skipif(not ON_CPU, reason="the arithmetic is the CPU's; test_any_memory has the device")
@pytest.mark.parametrize("dtype, cast, precision", HALF)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_points_the_same_way(family, dtype, cast, precision):
    """Layers that compute in bf16 or fp16: rounded gradients, in the direction of float32's."""
    expected = torch.cat([gradient.flatten() for gradient in in_float32(family, dtype)])
    for checkpointing in (False, True):
        found = gradients(trainable(family, dtype, cast), precision=precision, gradient_checkpointing=checkpointing)
        found = torch.cat([gradient.flatten() for gradient in found])
        assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99


@pytest.mark.device
@pytest.mark.parametrize("family", FAMILIES)
def test_any_memory(family, request):
    """Offloaded weights and shared cast buffers, on models that a run in inference mode was the first to load."""
    expected = in_float32(family, torch.float16)
    mode = "default" if ON_CPU else request.getfixturevalue("memory")
    with torch.inference_mode():
        model = trainable(family, torch.float16, torch.float32)
        cond = cond_of(model)
        sample(model, cond)
    assert model.is_dynamic() == mode.startswith("dynamic") and model.model.model_lowvram == (mode in ("partial", "novram"))
    assert_same_gradients(gradients(model, cond), expected)
    assert_same_gradients(gradients(model, cond, gradient_checkpointing=True), expected)


@pytest.mark.skipif(ON_CPU, reason="nothing is offloaded there")
@pytest.mark.device("partial")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_offloaded_weights_of_any_type(family, dtype):
    """float32 weights are not cast: what autograd kept of them would be ComfyUI's shared buffer itself."""
    model = trainable(family, dtype, torch.float32)
    assert_same_gradients(gradients(model, gradient_checkpointing=dtype != torch.float32), in_float32(family, dtype))
    assert model.model.model_lowvram


@pytest.mark.device
def test_training_loads_the_model_first():
    """Weights made in inference mode and moved outside of it have no version counter, though they count as ordinary."""
    with torch.inference_mode():
        model = trainable("sd15")
        cond = cond_of(model)
    assert_same_gradients(gradients(model, cond), in_float32("sd15", torch.float32))


@pytest.mark.skipif(ON_CPU, reason="dynamic VRAM is for devices")
@pytest.mark.device("dynamic", "dynamic-small")
def test_float32_weights_of_a_float16_model():
    """Dynamic VRAM keeps a checkpoint's own weights and notes on each tensor which type it has on the device."""
    expected = in_float32("sd15", torch.float16)
    with torch.inference_mode():
        made = trainable("sd15", torch.float16, torch.float32).model
        comfy.model_management.archive_model_dtypes(made)
        made.float()
        model = comfy.model_patcher.CoreModelPatcher(
            made, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
        )
        cond = cond_of(model)
    assert_same_gradients(gradients(model, cond), expected)


LAYERS = {
    "linear": (lambda ops: ops.Linear(4, 6), (2, 5, 4)),
    "conv1d": (lambda ops: ops.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (lambda ops: ops.Conv2d(4, 6, 3, padding=2, dilation=2), (2, 4, 7, 6)),
    "conv2d same": (lambda ops: ops.Conv2d(4, 6, (3, 2), padding="same"), (2, 4, 7, 6)),
    "conv2d wrapped around": (lambda ops: ops.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 6)),
    "conv3d": (lambda ops: ops.Conv3d(4, 6, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), (2, 4, 3, 7, 6)),
}


@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
def test_layers_cast_again_in_backward_keep_no_weight_and_have_autograds_gradient(make, shape):
    """Offloaded weights lie in a buffer that the next layer overwrites; here it is overwritten after each use."""
    layer, generator = make(comfy.ops.manual_cast), torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(shape, generator=generator).double().requires_grad_()
    plain = make(torch.nn).double().requires_grad_(False)
    plain.load_state_dict({name: tensor.double() for name, tensor in layer.state_dict().items()})
    expected = plain(x)
    weights = torch.randn(expected.shape, generator=generator).double()
    used = []
    layer.weight_function = [lambda weight: used.append(weight.clone()) or used[-1]]
    with recast_in_backward(torch.nn.ModuleList([layer])):
        found = layer(x)
        used[-1].fill_(float("nan"))
        (gradient,) = torch.autograd.grad((weights * found).sum(), x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad((weights * expected).sum(), x)[0])
