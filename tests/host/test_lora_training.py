import comfy.lora
import comfy.model_management
import comfy.sd
import pytest
import safetensors.torch
import torch
from support.devices import ON_CPU
from support.models import randomize, tiny_cond, tiny_unet

from pastiche.nodes.host.training import loop as lora_training
from pastiche.nodes.host.training.adapters import Adapters
from pastiche.nodes.host.training.backward import checkpointed, differentiable, recast_in_backward
from pastiche.nodes.host.training.loop import TrainingSettings, train_style_lora
from pastiche.nodes.host.training.images import TrainingImages, encode_posterior, training_images
from pastiche.nodes.host.training.job import train_for_node


def images(count=1, size=8, seed=0, std=None):
    generator = torch.Generator().manual_seed(seed)
    return TrainingImages(torch.randn(1, count, 4, size, size, generator=generator), std)


def train(model, data=None, cond=None, report=lambda *a: None, **settings):
    settings = {"steps": 3, "rank": 2, "learning_rate": 1e-2, "seed": 5, **settings}
    return train_style_lora(model, data or images(), cond or tiny_cond(model), TrainingSettings(**settings), report)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


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


def test_gradients_equal_merged_weights_in_float64():
    """U-Net in float64: adapters beside the weights against autograd through W + scale U D."""
    model = tiny_unet(dtype=torch.float64)
    network = model.model.diffusion_model.double()
    generator = torch.Generator().manual_seed(1)
    adapters = Adapters(network, "qkv", 2, 4.0, generator)
    for parameter in adapters.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    x, context = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 5, 32).double()
    run = lambda: network(x, torch.tensor([300.0]), context).square().mean()
    with adapters.attached():
        beside = torch.autograd.grad(run(), adapters.parameters())
    merged = {}
    for name, module in network.named_modules():
        if name in adapters.down:
            low = adapters.down[name], adapters.up[name]
            merged[f"{name}.weight"] = module.weight.detach() + 2.0 * low[1] @ low[0]
    loss = torch.func.functional_call(network, merged, (x, torch.tensor([300.0]), context)).square().mean()
    expected = torch.autograd.grad(loss, adapters.parameters())
    assert max(g.abs().max() for g in expected) > 1e-4
    for ours, theirs in zip(beside, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


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
    latents = {"samples": torch.randn(1, 4, 8, 8)}
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
    network.dtype = torch.float32
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    run = lambda: network(x, torch.tensor([300.0]), context).square().mean()
    with adapters.attached():
        plain = torch.autograd.grad(run(), adapters.parameters())
        with recast_in_backward(network):
            recast = torch.autograd.grad(run(), adapters.parameters())
        with recast_in_backward(network), checkpointed(network):
            both = torch.autograd.grad(run(), adapters.parameters())
    for reference, a, b in zip(plain, recast, both):
        torch.testing.assert_close(a, reference, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(b, reference, rtol=1e-4, atol=1e-6)


def test_checkpointing_changes_nothing_but_memory():
    model = tiny_unet("sdxl")
    plain, saved = train(model), train(model, gradient_checkpointing=True)
    assert plain.losses == pytest.approx(saved.losses, rel=1e-5)


@pytest.mark.parametrize("options", [
    {"targets": "qkv+out"}, {"targets": "all"}, {"precision": "bf16"}, {"min_snr_gamma": 5.0}, {"alpha": 1.0},
    {"precision": "fp16"},
])
def test_options(options):
    model = tiny_unet()
    before = state_of(model)
    trained = train(model, **options)
    assert_untouched(model, before)
    assert all(torch.isfinite(tensor).all() for tensor in trained.lora.values())
    assert any(tensor.any() for key, tensor in trained.lora.items() if "lora_up" in key)
    assert not same(trained.lora, train(model).lora)


def test_batches_and_captions():
    """A batch equals its rows: the gradient of N images is the mean of theirs, captions in their own forwards."""
    model = tiny_unet()
    captions = tiny_cond(model, seed=1) + tiny_cond(model, seed=2)
    both = train(model, images(2), captions, batch_size=2, steps=2)
    swapped = train(model, images(2), captions[::-1], batch_size=2, steps=2)
    assert both.losses != swapped.losses
    shared = train(model, images(2), captions[:1], batch_size=2, steps=2)
    twice = train(model, images(2), captions[:1] * 2, batch_size=2, steps=2)  # two forwards instead of one
    assert shared.losses == pytest.approx(twice.losses, rel=1e-4)
    with pytest.raises(ValueError, match="2 conditionings for 3 image"):
        train(model, images(3), captions)


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
    model = tiny_unet()
    before = state_of(model)
    # AdamW's first steps are the sign of the gradient, so rounding decides weights whose gradient is near zero:
    # a small rate keeps that below the tolerance.
    whole = train(model, images(4), batch_size=4, learning_rate=1e-4)
    limits = {"rows": 1}
    original = lora_training._TrainingLoop._losses

    def limited(self, conds, latents, sigma, noise):
        if len(latents) > limits["rows"] or (limits["rows"] == 0 and not self._checkpointing):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(self, conds, latents, sigma, noise)

    monkeypatch.setattr(lora_training._TrainingLoop, "_losses", limited)
    split = train(model, images(4), batch_size=4, learning_rate=1e-4)
    assert whole.losses == pytest.approx(split.losses, rel=1e-4)  # the steps between are the same too
    limits["rows"] = 0
    with pytest.raises(ValueError, match="Out of memory training on a 8x8 latent, one image at a time"):
        train(model, images(4), batch_size=4)
    assert_untouched(model, before)


def test_diverged_loss_keeps_the_last_good_weights(monkeypatch):
    model = tiny_unet()
    original = lora_training._TrainingLoop._losses
    calls = []

    def fails_in_the_third(self, conds, latents, sigma, noise):
        calls.append(0)
        return original(self, conds, latents, sigma, noise) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(lora_training._TrainingLoop, "_losses", fails_in_the_third)
    trained = train(model, steps=9)
    assert trained.steps == 2 and "nan at step 3" in trained.note and "learning_rate below 0.01" in trained.note
    assert all(torch.isfinite(tensor).all() for tensor in trained.lora.values())
    broken = tiny_unet()
    broken.model.diffusion_model.out[2].weight.data[:] = float("nan")
    monkeypatch.setattr(lora_training._TrainingLoop, "_losses", original)
    with pytest.raises(ValueError, match="step 1: the model itself predicts NaN"):
        train(broken)


def test_errors_name_the_cure():
    model = tiny_unet()
    with pytest.raises(ValueError, match="got neither"):
        training_images(None, None, None, False)
    with pytest.raises(ValueError, match="needs a vae"):
        training_images(None, torch.rand(1, 64, 64, 3), None, False)
    with pytest.raises(ValueError, match="NaN"):
        training_images({"samples": torch.full((1, 4, 8, 8), float("nan"))}, None, None, False)
    bad = tiny_cond(model)
    bad[0][0][0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="positive: holds NaN"):
        train(model, cond=bad)


def test_one_step_gives_a_loss_map_that_core_can_plot():
    assert len(train(tiny_unet(), steps=1).losses) == 2


def test_previews_come_on_time_and_do_not_disturb():
    model = tiny_unet()
    seen = []
    trained = train(model, report=lambda step, loss, preview: seen.append((step, preview)), steps=4, preview_every=2)
    assert [step for step, preview in seen if preview is not None] == [2, 4]
    assert seen[1][1].shape == (1, 4, 8, 8) and torch.isfinite(seen[1][1]).all()
    assert same(trained.lora, train(model, steps=4).lora)


def test_posterior_is_sampled_where_the_vae_has_one():
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = {"double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
              "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    autoencoder = AutoencoderKL(ddconfig=config, embed_dim=4)
    randomize(autoencoder)
    vae = comfy.sd.VAE(sd=autoencoder.state_dict(), config={"params": {"ddconfig": config, "embed_dim": 4}})
    pixels = torch.rand(2, 32, 48, 3)
    mean, std = encode_posterior(vae, pixels)
    assert mean.shape == std.shape == (2, 4, 4, 6) and (std > 0).all()
    torch.testing.assert_close(mean, vae.encode(pixels).float())
    data = training_images(None, pixels, vae, flip=True)
    assert data.samples_posterior and data.mean.shape[0] == 2
    draw = lambda seed: data.draw([0, 1], torch.Generator().manual_seed(seed), False, 1.0)
    spread = torch.stack([draw(seed) for seed in range(200)]).std(dim=0)
    torch.testing.assert_close(spread, std, rtol=0.3, atol=0)
    assert not vae.first_stage_model.regularization._forward_pre_hooks
