import comfy.lora
import comfy.model_management
import comfy.sd
import pytest
import safetensors.torch
import torch
from support.devices import ON_CPU
from support.models import tiny_cond, tiny_unet
from support.training import assert_same_gradients, gradients, images, on_cpu, same, train, trainable

from pastiche.nodes.host.training import loop as lora_training
from pastiche.nodes.host.training.adapters import Adapters
from pastiche.nodes.host.training.backward import checkpointed, differentiable, recast_in_backward
from pastiche.nodes.host.training.loop import TrainingSettings
from pastiche.nodes.host.training.job import train_for_node


def state_of(model):
    """Everything training could leave behind on the model. On a device, loading it there is no such thing."""
    network = model.model
    return (
        {name: (id(p), p.requires_grad, p.grad is None, ON_CPU and p.device) for name, p in network.named_parameters()},
        {name: p.to("cpu", copy=True) for name, p in network.named_parameters()},
        [(module.training, "forward" in module.__dict__, len(module._forward_hooks)) for module in network.modules()],
    )


def assert_untouched(model, before):
    now = state_of(model)
    assert now[0] == before[0] and now[2] == before[2] and same(now[1], before[1])
    assert not model.model_options["transformer_options"] and not model.patches and not model.injections


@pytest.mark.parametrize("family, prediction", [("sd15", "eps"), ("sd20", "v"), ("sdxl", "eps")])
def test_trains_saves_and_loads_in_core(family, prediction, tmp_path):
    model = tiny_unet(family, prediction)
    before = state_of(model)
    trained = train(model)
    assert_untouched(model, before)
    assert trained.steps == 3 and len(trained.losses) == 3 and all(loss > 0 for loss in trained.losses)
    attentions = sum(name.endswith("to_q") for name, _ in model.model.named_modules())
    assert len(trained.lora) == 3 * 3 * attentions
    path = tmp_path / "style.safetensors"
    safetensors.torch.save_file(trained.lora, str(path))
    loaded = safetensors.torch.load_file(str(path))
    assert same(loaded, trained.lora)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    assert len(comfy.lora.load_lora(loaded, keys)) == len(trained.lora) // 3  # none is left out
    patched, _ = comfy.sd.load_lora_for_models(model, None, loaded, 1.0, 0.0)
    assert len(patched.patches) == 3 * attentions


def test_merged_lora_lowers_the_loss_it_was_trained_on():
    """The trained file, merged by core, does what the adapters did: the first step's loss on it is what we computed."""
    model = tiny_unet()
    trained = train(model, steps=20, learning_rate=3e-3)
    merged, _ = comfy.sd.load_lora_for_models(model, None, trained.lora, 1.0, 0.0)
    probe = {"steps": 10, "learning_rate": 1e-12}  # a rate that changes nothing: losses of 20 fixed draws
    base, styled = sum(train(model, **probe).losses), sum(train(merged, **probe).losses)
    assert styled < 0.98 * base


@pytest.mark.parametrize("targets", ["qkv", "all+conv"])
def test_gradients_equal_merged_weights_in_float64(targets):
    """U-Net in float64: adapters beside the weights against autograd through W + scale U D."""
    network = on_cpu(trainable("sd15", torch.float64)).model.diffusion_model
    generator = torch.Generator().manual_seed(1)
    adapters = Adapters(network, targets, 2, 4.0, generator)
    kinds = (torch.nn.Linear, torch.nn.Conv2d) if targets == "all+conv" else torch.nn.Linear
    every = [name for name, module in network.named_modules() if isinstance(module, kinds)]
    expected = [name for name in every if targets == "all+conv" or name.endswith(("to_q", "to_k", "to_v"))]
    assert sorted(adapters.down) == sorted(expected)
    for parameter in adapters.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    x, context = (torch.randn(shape, generator=generator).double() for shape in ((1, 4, 8, 8), (1, 5, 32)))
    run = lambda: network(x, torch.tensor([300.0]), context).square().mean()
    with adapters.attached():
        beside = torch.autograd.grad(run(), adapters.parameters())
    merged = {}
    for name, module in network.named_modules():
        if name in adapters.down:
            low = adapters.down[name], adapters.up[name]
            change = low[1].flatten(1) @ low[0].flatten(1)
            merged[f"{name}.weight"] = module.weight.detach() + 2.0 * change.reshape(module.weight.shape)
    loss = torch.func.functional_call(network, merged, (x, torch.tensor([300.0]), context)).square().mean()
    expected = torch.autograd.grad(loss, adapters.parameters())
    assert_same_gradients(beside, expected, rtol=1e-9, floor=1e-12)


@pytest.mark.parametrize("targets", ["qkv", "all+conv"])
def test_saved_alpha_is_the_strength_that_was_trained(targets):
    """Core's merge of the file at strength 1 adds alpha / rank U D, what the attached adapters compute."""
    model, generator = on_cpu(tiny_unet()), torch.Generator().manual_seed(1)
    adapters = Adapters(model.model.diffusion_model, targets, 2, 7.0, generator)
    for up in adapters.up.values():
        torch.nn.init.normal_(up, std=0.3, generator=generator)
    merged, _ = comfy.sd.load_lora_for_models(model, None, adapters.state_dict(), 1.0, 0.0)
    assert len(merged.patches) == len(adapters.up)
    for name, up in adapters.up.items():
        key = f"diffusion_model.{name}.weight"
        down = adapters.down[name].detach().double()
        weight = torch.zeros(up.shape[0], *down.shape[1:], dtype=torch.float64)
        found = comfy.lora.calculate_weight(merged.patches[key], weight, key, intermediate_dtype=torch.float64)
        expected = 7.0 / 2 * up.detach().double().flatten(1) @ down.flatten(1)
        torch.testing.assert_close(found, expected.reshape(weight.shape), rtol=1e-9, atol=1e-12)


def test_same_seed_same_file():
    model = tiny_unet()
    data = images(2, 16, std=torch.full((1, 2, 4, 16, 16), 0.1))
    options = {"batch_size": 2, "flip": True, "crop": 0.5}
    first, again = (safetensors.torch.save(train(model, data, **options).lora) for _ in range(2))
    assert first == again
    assert first != safetensors.torch.save(train(model, data, **options, seed=6).lora)


def test_resume_equals_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setattr("folder_paths.get_output_directory", lambda: str(tmp_path))
    model, cond = tiny_unet(), None
    cond = tiny_cond(model)
    latents = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}
    run = lambda steps, name, rank=2: train_for_node(
        model, cond, latents, None, None, TrainingSettings(steps=steps, rank=rank, learning_rate=1e-2), name
    )
    whole = run(5, "")
    run(2, "style")
    resumed = run(5, "style")
    assert safetensors.torch.save(whole.lora) == safetensors.torch.save(resumed.lora)
    assert whole.losses == resumed.losses and resumed.steps == 5
    assert [path.name for path in (tmp_path / "loras").iterdir()] == ["style.training.safetensors"]
    with pytest.raises(ValueError, match="its rank is 2, this one's is 3"):
        run(5, "style", rank=3)
    with pytest.raises(ValueError, match="plain name"):
        run(5, "../style")
    (tmp_path / "loras" / "broken.training.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no training state"):
        run(5, "broken")


def test_inference_mode_models_train():
    """ComfyUI loads models and runs nodes in inference mode, where autograd may not save a tensor."""
    with torch.inference_mode():
        model = tiny_unet()
        before = state_of(model)
        assert next(model.model.parameters()).is_inference()
        cond = [[context + 0, extra] for context, extra in tiny_cond(model)]
        trained = train(model, cond=cond)
        assert_untouched(model, before)
    assert same(trained.lora, train(tiny_unet()).lora)


def test_weights_made_in_inference_mode_and_moved_outside_of_it_train():
    """What loading on a device does: such weights count as ordinary ones and still have no version counter."""
    with torch.inference_mode():
        model = tiny_unet()
    for parameter in model.model.parameters():
        parameter.data = parameter.data.clone()
    before = state_of(model)
    assert not next(model.model.parameters()).is_inference()
    trained = train(model)
    assert_untouched(model, before)
    assert same(trained.lora, train(tiny_unet()).lora)


def test_replaced_weights_keep_the_attributes_that_comfyui_put_on_them():
    with torch.inference_mode():
        layer = torch.nn.Linear(2, 2)
    layer.weight._model_dtype = torch.float16
    with differentiable(layer):
        assert not layer.weight.is_inference() and layer.weight._model_dtype == torch.float16


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16])
def test_cast_weights_give_the_same_gradients(weights):
    """Weights that ComfyUI casts on the fly (fp8, offloading) are cast again in backward instead of kept."""
    model = tiny_unet(dtype=weights)
    network = model.model.diffusion_model
    for module in network.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    adapters = Adapters(network, "qkv", 2, 2.0, torch.Generator().manual_seed(0))
    for up in adapters.up.values():
        torch.nn.init.normal_(up, std=0.1, generator=torch.Generator().manual_seed(1))
    network.dtype = torch.float64  # what weights are cast to: nothing but exactness is left to compare
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(1, 4, 8, 8, generator=generator).double(), torch.randn(1, 5, 32, generator=generator).double()
    run = lambda: network(x, torch.tensor([300.0]), context).square().mean()
    with adapters.attached():
        plain = torch.autograd.grad(run(), adapters.parameters())
        with recast_in_backward(network):
            recast = torch.autograd.grad(run(), adapters.parameters())
        with recast_in_backward(network), checkpointed(network):
            both = torch.autograd.grad(run(), adapters.parameters())
    for reference, a, b in zip(plain, recast, both):
        # The LoRA and its gradients are float32, everything between is float64.
        torch.testing.assert_close(a, reference, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(b, reference, rtol=1e-5, atol=1e-7)


def test_checkpointing_changes_nothing_but_memory():
    model = tiny_unet("sdxl", dtype=torch.float64)
    assert_same_gradients(gradients(model, gradient_checkpointing=True), gradients(model), 1e-6)


def test_checkpoints_see_the_options_of_their_own_block():
    """ComfyUI passes one dict along and writes into it which block is running; backward comes when the last one has."""
    model = tiny_unet(dtype=torch.float64)
    model.set_model_attn1_output_patch(lambda out, extra: out * (1 + 0.3 * extra["block"][1]))
    expected = gradients(model)
    assert_same_gradients(gradients(model, gradient_checkpointing=True), expected, 1e-6)
    assert max(float((a - b).norm()) for a, b in zip(expected, gradients(tiny_unet(dtype=torch.float64)))) > 1e-2


@pytest.mark.parametrize("options", [
    {"targets": "qkv+out"}, {"targets": "all"}, {"precision": "bf16"}, {"min_snr_gamma": 5.0}, {"alpha": 1.0},
    {"precision": "fp16"}, {"targets": "all+conv", "gradient_checkpointing": True}, {"clean_weight": 0.1}, {"schedule": "cosine"},
])
def test_options(options):
    model = tiny_unet()
    before = state_of(model)
    trained = train(model, **options)
    assert_untouched(model, before)
    assert all(torch.isfinite(tensor).all() for tensor in trained.lora.values())
    assert any(tensor.any() for key, tensor in trained.lora.items() if "lora_up" in key)
    assert not same(trained.lora, train(model).lora)


def test_cancel(monkeypatch, tmp_path):
    model = tiny_unet()
    before = state_of(model)

    def cancel(step, loss, preview):
        if step == 2:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(model, report=cancel, steps=9)
    assert_untouched(model, before)
    kept = train(model, report=cancel, steps=9, keep_on_cancel=True)
    assert_untouched(model, before)
    assert kept.steps == 2 and same(kept.lora, train(model, steps=2).lora) and "Cancelled after 2" in kept.note


def test_out_of_memory_shrinks_the_batch_then_checkpoints(monkeypatch):
    """In float64, so that a batch and its parts differ by the rounding of float32 LoRAs alone."""
    model = tiny_unet(dtype=torch.float64)
    before = state_of(model)
    whole = gradients(model, count=4, batch_size=4)
    limits, sizes = {"rows": 1}, []
    original = lora_training._TrainingLoop._losses

    def limited(self, conds, latents, sigma, noise):
        if len(latents) > limits["rows"] or (limits["rows"] == 0 and not self._checkpointing):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(latents))
        return original(self, conds, latents, sigma, noise)

    monkeypatch.setattr(lora_training._TrainingLoop, "_losses", limited)
    assert_same_gradients(gradients(model, count=4, batch_size=4), whole, 1e-5)
    assert sizes[:4] == [1, 1, 1, 1]
    limits["rows"] = 0
    with pytest.raises(ValueError, match="Out of memory training on a 8x8 latent, one image at a time"):
        train(model, images(4), batch_size=4)
    assert_untouched(model, before)


def test_one_step_gives_a_loss_map_that_core_can_plot():
    assert len(train(tiny_unet(), steps=1).losses) == 2
