"""What Train Style LoRA refuses or survives: models it cannot train through, inputs that do not fit, NaN."""

import pytest
import torch
from support.models import tiny_cond, tiny_unet
from support.training import assert_same_gradients, gradients, images, same, train, trainable

from pastiche.nodes.host.training import loop as lora_training
from pastiche.nodes.host.training.images import TrainingImages, training_images


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


def test_weights_that_ruin_the_next_step_are_not_the_last_good_ones():
    """A rate of 1e17 leaves finite weights of 1e17 behind, whose loss is NaN; the model itself is healthy."""
    trained = train(tiny_unet(), steps=9, learning_rate=1e17)
    assert trained.steps == 1 and "at step 2" in trained.note and "learning_rate below 1e+17" in trained.note
    ups = [tensor for key, tensor in trained.lora.items() if "lora_up" in key]
    assert not any(up.any() for up in ups)  # as before step 1, the last with a loss
    assert all(torch.isfinite(tensor).all() for tensor in trained.lora.values())


def test_a_last_step_that_makes_nan_is_not_handed_on(monkeypatch):
    """The loss of the last step is finite, its gradients are not, and no further loss would tell."""
    plain = lora_training._TrainingLoop._step

    def step(self, number, scaler):
        loss = plain(self, number, scaler)
        if number == 2 and scaler is not None:
            self._adapters.parameters()[0].grad.fill_(float("nan"))
        return loss

    two = train(tiny_unet(), steps=2)
    monkeypatch.setattr(lora_training._TrainingLoop, "_step", step)
    trained = train(tiny_unet(), steps=3)
    assert same(trained.lora, two.lora) and trained.steps == 2 and "became NaN at step 3" in trained.note


def test_attention_of_another_node_cannot_stop_the_gradient(caplog):
    """Sage attention and its like: an override without gradients once left every q, k, v LoRA at exactly 0."""
    model, plain = tiny_unet(), tiny_unet()
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda function, *args, **kwargs: function(*args, **kwargs).detach()
    with caplog.at_level("INFO"):
        trained = train(model, targets="all")
    assert same(trained.lora, train(plain, targets="all").lora)
    assert "optimized_attention_override" in caplog.text
    assert all(tensor.any() for key, tensor in trained.lora.items() if ".attn1.to_v.lora_up" in key)


def test_guidance_is_left_out_of_training():
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    model = trainable("sd15", torch.float64)
    (guided,) = SelfAttentionGuidance.execute(model, 0.5, 2.0).result  # it needs the unconditional half, which is not there
    assert_same_gradients(gradients(guided), gradients(model), 1e-5)


def test_caches_are_left_out_of_training():
    """EasyCache hands on an earlier output instead of evaluating the network."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    (cached,) = EasyCacheNode.execute(tiny_unet(), 100.0, 0.0, 1.0, False).result
    assert same(train(cached, steps=4).lora, train(tiny_unet(), steps=4).lora)


def test_patches_without_a_gradient_are_refused_in_a_sentence():
    from comfy_extras.nodes_freelunch import FreeU_V2

    (patched,) = FreeU_V2.execute(tiny_unet(), 1.1, 1.2, 0.9, 0.2).result
    with pytest.raises(ValueError, match="cannot be trained through; connect the model from before the patch.*inplace"):
        train(patched)
    deaf = tiny_unet()
    deaf.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]).detach())
    with pytest.raises(ValueError, match="no layer with a LoRA reaches the prediction"):
        train(deaf)


def test_models_with_an_injection_are_refused():
    from pastiche.nodes.host.networks.marks import mark_injected

    model = tiny_unet()
    mark_injected(model, "Style Injection")
    with pytest.raises(ValueError, match="already carries Style Injection, which would be trained into the LoRA"):
        train(model)


def test_crops_of_a_model_that_reads_a_picture_too():
    model = tiny_unet(in_channels=9, out_channels=4)
    model.model.set_inpaint()
    assert train(model, images(size=16), steps=1).steps == 1
    with pytest.raises(ValueError, match="crop: got 0.5, but this model reads a picture beside the latent"):
        train(model, images(size=16), crop=0.5)


def test_errors_name_the_cure():
    model = tiny_unet()
    with pytest.raises(ValueError, match="latents: got a batch of 0 images"):
        training_images({"samples": torch.zeros(0, 4, 8, 8)}, None, None, False)
    with pytest.raises(ValueError, match="image: got a batch of 0 images"):
        training_images(None, torch.zeros(0, 64, 64, 3), object(), False)
    with pytest.raises(ValueError, match="latents: got 16 channels, but BaseModel works on latents of 4"):
        train(model, TrainingImages(torch.zeros(1, 1, 16, 8, 8)))
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
