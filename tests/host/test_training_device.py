"""Train Style LoRA on a CUDA device, simulated or real: how ComfyUI holds the weights must not change what is learned.

The expected numbers come from the same training on the CPU, where every weight is simply there.
"""

import comfy.model_management
import comfy.sample
import pytest
import torch
from support.models import tiny_cond, tiny_unet

from pastiche.nodes.host.training import loop
from pastiche.nodes.host.training.images import TrainingImages
from pastiche.nodes.host.training.loop import TrainingSettings, train_style_lora

DEVICE = comfy.model_management.get_torch_device()
pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device, simulated or real")
CPU = torch.device("cpu")


def images():
    return TrainingImages(torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))


def gradients(model, cond=None, **settings):
    """Gradients of the first step from LoRAs that are not zero, one per LoRA matrix, in float64 on the CPU."""
    seen = []
    plain = loop._TrainingLoop._step

    def step(self, *args):
        generator = torch.Generator().manual_seed(11)
        for parameter in self._adapters.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
        loss = plain(self, *args)
        if not seen:
            seen.extend(parameter.grad.detach().double().cpu() for parameter in self._adapters.parameters())
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._TrainingLoop, "_step", step)
        settings = {"steps": 1, "rank": 2, "seed": 5, "targets": "qkv+out", **settings}
        train_style_lora(model, images(), cond or tiny_cond(model), TrainingSettings(**settings))
    return seen


def assert_same(found, expected, rtol=1e-4):
    """Every matrix within rtol of its own norm, or of a millionth of the largest (attention over one token has no q, k)."""
    norms = [float(gradient.norm()) for gradient in expected]
    assert len(found) == len(expected) and max(norms) > 1e-3
    for ours, theirs, norm in zip(found, expected, norms):
        assert float((ours - theirs).norm()) <= rtol * norm + 1e-6 * max(norms)


def on(device, model):
    model.load_device = device
    return model


def sample(model, cond):
    """A run of ComfyUI's own, in inference mode."""
    with torch.inference_mode():
        latent = torch.zeros(1, 4, 8, 8)
        comfy.sample.sample(model, torch.randn(1, 4, 8, 8), 1, 1.0, "euler", "normal", cond, cond, latent, seed=0)


@pytest.fixture(scope="module")
def expected():
    return gradients(on(CPU, tiny_unet()))


@pytest.fixture
def half_loaded(monkeypatch):
    """ComfyUI has room for half of a model's weights."""
    plain = comfy.model_management.LoadedModel.model_load

    def load(self, lowvram_model_memory=0, force_patch_weights=False):
        return plain(self, self.model.model_size() // 2, force_patch_weights)

    monkeypatch.setattr(comfy.model_management.LoadedModel, "model_load", load)


def test_first_to_use_the_device_after_an_inference_mode_load(expected):
    with torch.inference_mode():
        model = on(DEVICE, tiny_unet())
        cond = tiny_cond(model)
    assert_same(gradients(model, cond), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_loaded(half_loaded, expected, checkpointing):
    model = on(DEVICE, tiny_unet())
    assert_same(gradients(model, gradient_checkpointing=checkpointing), expected)
    assert model.model.model_lowvram


def test_half_loaded_and_sampled_in_inference_mode_before(half_loaded, expected):
    """What ComfyUI made while sampling (cast buffers, for one) is made in inference mode too."""
    with torch.inference_mode():
        model = on(DEVICE, tiny_unet())
        cond = tiny_cond(model)
    sample(model, cond)
    assert_same(gradients(model, cond), expected)


def test_dynamic_with_float32_weights_of_a_float16_model(monkeypatch):
    """ComfyUI keeps a checkpoint's float32 weights as they are, notes the type they are to have on the device on the
    tensors themselves, and fetches every layer's for each use."""
    if torch.version.cuda is not None:
        pytest.skip("the stand-in for comfy_aimdo needs the simulated device")
    dynamic_vram = pytest.importorskip("support.simulated_cuda.dynamic_vram")
    expected = gradients(on(CPU, tiny_unet(dtype=torch.float16, cast=torch.float32)))
    with torch.inference_mode():
        plain = tiny_unet(dtype=torch.float16, cast=torch.float32)
        dynamic_vram.install(monkeypatch, 1 << 18)
        comfy.model_management.archive_model_dtypes(plain.model)
        plain.model.float()
        model = comfy.model_patcher.CoreModelPatcher(plain.model, DEVICE, CPU)
        cond = tiny_cond(model)
    assert_same(gradients(model, cond), expected)
    assert dynamic_vram.evictions
    sample(model, cond)
    assert_same(gradients(model, cond), expected)
