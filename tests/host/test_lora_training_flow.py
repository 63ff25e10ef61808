"""Train Style LoRA on flow models: a small Flux with random weights, made by ComfyUI's own classes."""

from contextlib import ExitStack

import comfy.lora
import comfy.sd
import pytest
import torch
from support.families import FAMILIES, family_cond, family_latent, tiny_model
from support.training import assert_same_gradients, cond_of, gradients, image_of, on_cpu, trainable

from pastiche.nodes.algorithms.training import step_generator
from pastiche.nodes.host.training.adapters import Adapters
from pastiche.nodes.host.training.backward import checkpointed, differentiable, norms_of_copies
from pastiche.nodes.host.training.loop import TrainingSettings, train_style_lora
from pastiche.nodes.host.training.images import TrainingImages

UNTRAINABLE = ("ltxv", "cosmos_predict2")


@pytest.fixture
def flux():
    return on_cpu(trainable("flux"))


@pytest.fixture
def cond(flux):
    return cond_of(flux)


@pytest.fixture
def data(flux):
    return image_of(flux)


def test_loss_is_the_velocity_error(flux, cond, data):
    """The first loss is |v - (noise - x0)|^2 of the network itself at x = (1 - t) x0 + t noise."""
    trained = train_style_lora(flux, data, cond, TrainingSettings(steps=1, rank=2, seed=3, learning_rate=1e-6))
    sampling, generator = flux.model.model_sampling, step_generator(3, 0)
    torch.rand(1, generator=generator)  # whether to mirror
    t = sampling.sigmas[(torch.rand(1, generator=generator) * len(sampling.sigmas)).long()]
    noise = torch.randn(1, 16, 8, 8, generator=generator)
    clean = flux.model.process_latent_in(data.mean[0])
    with torch.no_grad():
        velocity = flux.model.diffusion_model(
            (1 - t) * clean + t * noise, sampling.timestep(t).float(), cond[0][0], y=cond[0][1]["pooled_output"]
        )
    assert trained.losses[0] == pytest.approx(float((velocity - (noise - clean)).square().mean()), rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_finite_differences(flux, cond, checkpointing, monkeypatch):
    """Flux adds to its residual stream in place: what backward needs of it must survive, with and without checkpoints."""
    monkeypatch.setattr("comfy.model_management.in_training", True)
    network, generator = flux.model.diffusion_model, torch.Generator().manual_seed(4)
    adapters = Adapters(network, "all", 2, 8.0, generator)
    for parameter in adapters.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    x = torch.randn(1, 16, 8, 8, generator=generator)
    with ExitStack() as stack:
        stack.enter_context(differentiable(flux.model))
        stack.enter_context(norms_of_copies(network))
        stack.enter_context(adapters.attached())
        if checkpointing:
            stack.enter_context(checkpointed(network))

        def loss():
            return network(x, torch.tensor([0.6]), cond[0][0].clone(), y=cond[0][1]["pooled_output"].clone()).square().mean()

        gradients = torch.autograd.grad(loss(), adapters.parameters())
        with torch.no_grad():
            for _ in range(5):
                step = [1e-3 * torch.randn(p.shape, generator=generator) for p in adapters.parameters()]
                expected = sum(float((g * d).sum()) for g, d in zip(gradients, step))
                torch._foreach_add_(adapters.parameters(), step)
                above = float(loss())
                torch._foreach_sub_(adapters.parameters(), [2 * d for d in step])
                below = float(loss())
                torch._foreach_add_(adapters.parameters(), step)
                assert (above - below) / 2 == pytest.approx(expected, rel=2e-2, abs=2e-5 * above)


def test_checkpointing_changes_nothing_but_memory(flux):
    assert_same_gradients(gradients(flux, gradient_checkpointing=True, targets="all"), gradients(flux, targets="all"))


def test_trains_and_loads_in_core(cond, data):
    flux = trainable("flux")
    weights = {name: tensor.clone() for name, tensor in flux.model.state_dict().items()}
    settings = dict(rank=4, seed=3)
    trained = train_style_lora(flux, data, cond, TrainingSettings(steps=60, learning_rate=3e-3, **settings))
    assert all(torch.equal(tensor.cpu(), weights[name]) for name, tensor in flux.model.state_dict().items())
    assert any("single" in name for name in trained.lora) and any("double" in name for name in trained.lora)
    keys = comfy.lora.model_lora_keys_unet(flux.model, {})
    assert len(comfy.lora.load_lora(dict(trained.lora), keys)) == len(trained.lora) // 3
    merged, _ = comfy.sd.load_lora_for_models(flux, None, trained.lora, 1.0, 0.0)
    probe = TrainingSettings(steps=20, learning_rate=1e-12, **settings)  # a rate that changes nothing
    losses = [sum(train_style_lora(model, data, cond, probe).losses) for model in (flux, merged)]
    assert losses[1] < 0.98 * losses[0], losses


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in UNTRAINABLE])
def test_other_families_train(name):
    """Transformers of ComfyUI, image and video: the layers of `qkv` are found, learn, and are read back by core."""
    model = tiny_model(name)
    data, cond = TrainingImages(family_latent(name)[None]), family_cond(name, model=model)
    settings = dict(steps=1, rank=2, seed=3, learning_rate=1e-3)
    trained = train_style_lora(model, data, cond, TrainingSettings(**settings))
    saved = train_style_lora(model, data, cond, TrainingSettings(**settings, gradient_checkpointing=True))
    ups = [tensor for key, tensor in trained.lora.items() if "lora_up" in key]
    assert all(bool(tensor.isfinite().all()) for tensor in ups)
    # Some have layers that nothing reads here: of reference images, of the text in the last block.
    assert sum(bool(tensor.any()) for tensor in ups) >= 0.75 * len(ups)
    assert saved.losses[0] == pytest.approx(trained.losses[0], rel=1e-4)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    assert len(comfy.lora.load_lora(dict(trained.lora), keys)) == len(trained.lora) // 3


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_families_without_a_gradient_are_refused(name):
    """LTX-Video adds in place to what its attention needs; Cosmos computes rotary embeddings in a kernel without gradient."""
    model = tiny_model(name)
    with pytest.raises(ValueError, match="model: it, or a patch of another node on it, cannot be trained through"):
        train_style_lora(
            model, TrainingImages(family_latent(name)[None]), family_cond(name, model=model), TrainingSettings(steps=1, rank=2)
        )
