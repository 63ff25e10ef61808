"""What a training step of Train Style LoRA is: its images, captions, noise, optimiser and previews."""

import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from support.models import randomize, tiny_cond, tiny_unet
from support.training import images, same, train

from pastiche.nodes.algorithms.training import step_generator
from pastiche.nodes.host.training import loop as lora_training
from pastiche.nodes.host.training.images import TrainingImages, encode_posterior, training_images


def test_two_steps_are_adamw():
    """AdamW with betas 0.9 and 0.999, eps 1e-8 and decay 0.01, by hand in float64 from the gradients of each step."""
    rate, gradients, start = 1e-2, [], []
    plain = lora_training._TrainingLoop._step

    def step(self, number, scaler):
        parameters = self._adapters.parameters()
        if not start:
            generator = torch.Generator().manual_seed(3)
            for parameter in parameters:
                parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)
                start.append(parameter.detach().double().cpu().clone())
        loss = plain(self, number, scaler)
        gradients.append([parameter.grad.double().cpu() for parameter in parameters])
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_training._TrainingLoop, "_step", step)
        trained = train(tiny_unet(), steps=2, learning_rate=rate)
    found = [tensor for key, tensor in trained.lora.items() if not key.endswith("alpha")]
    assert len(found) == len(start)
    for expected, first, second, ours in zip(start, *gradients, found):
        mean, square = torch.zeros_like(first), torch.zeros_like(first)
        for number, gradient in enumerate((first, second), start=1):
            expected = expected * (1 - rate * 1e-2)
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            corrected = mean / (1 - 0.9**number), (square / (1 - 0.999**number)).sqrt() + 1e-8
            expected = expected - rate * corrected[0] / corrected[1]
        # The decay alone moves a weight by 1e-4 of itself; float32 rounds it by 6e-8.
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


def test_batches_and_captions():
    """A batch equals its rows: the gradient of N images is the mean of theirs, captions in their own forwards."""
    model = tiny_unet()
    captions = tiny_cond(model, seed=1) + tiny_cond(model, seed=2)
    still = {"batch_size": 2, "steps": 2, "learning_rate": 1e-12}  # a rate that changes nothing
    both = train(model, images(2), captions, **still)
    swapped = train(model, images(2), captions[::-1], **still)
    shared = train(model, images(2), captions[:1], **still)
    twice = train(model, images(2), captions[:1] * 2, **still)  # two forwards instead of one
    assert shared.losses == pytest.approx(twice.losses, rel=1e-4)
    assert both.losses != pytest.approx(swapped.losses, rel=1e-3)
    with pytest.raises(ValueError, match="2 conditionings for 3 image"):
        train(model, images(3), captions)


def test_every_image_has_its_own_caption():
    model = tiny_unet()
    captions = tiny_cond(model, seed=1) + tiny_cond(model, seed=2)
    still = {"steps": 4, "learning_rate": 1e-12}
    losses = train(model, images(2), captions, **still).losses
    alone = [train(model, images(2), [caption], **still).losses for caption in captions]
    assert losses == pytest.approx([alone[step % 2][step] for step in range(4)], rel=1e-5)
    assert losses != pytest.approx([alone[1 - step % 2][step] for step in range(4)], rel=1e-3)


def test_batches_go_through_the_images_in_turn(monkeypatch):
    drawn, plain = [], TrainingImages.draw
    monkeypatch.setattr(TrainingImages, "draw", lambda self, indices, *args: drawn.append(indices) or plain(self, indices, *args))
    train(tiny_unet(), images(3), batch_size=2, steps=3)
    assert drawn == [[0, 1], [2, 0], [1, 2]]


def test_mirrored_latents_are_mirrored():
    data, mirrored = images(1), []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        mirror = bool(torch.rand(1, generator=torch.Generator().manual_seed(seed)) < 0.5)  # the first draw of a step
        mirrored.append(mirror)
        expected = data.mean[0].flip(-1) if mirror else data.mean[0]
        assert torch.equal(data.draw([0], generator, True, 1.0), expected)
        assert torch.equal(data.draw([0], torch.Generator().manual_seed(seed), False, 1.0), data.mean[0])
    assert True in mirrored and False in mirrored


def test_previews_come_on_time_and_do_not_disturb():
    model = tiny_unet()
    seen = []
    trained = train(model, report=lambda step, loss, preview: seen.append((step, preview)), steps=4, preview_every=2)
    assert [step for step, preview in seen if preview is not None] == [2, 4]
    assert seen[1][1].shape == (1, 4, 8, 8) and torch.isfinite(seen[1][1]).all()
    assert same(trained.lora, train(model, steps=4).lora)


def test_preview_is_a_sample_of_the_model():
    """Core's own euler sampler from the same noise, at a rate that leaves the LoRA at nothing."""
    model, seen = tiny_unet(), []
    train(model, report=lambda step, loss, preview: seen.append(preview), steps=1, preview_every=1, learning_rate=1e-12)
    noise = torch.randn(1, 4, 8, 8, generator=step_generator(5, -2))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 12)
    euler, cond = comfy.samplers.sampler_object("euler"), tiny_cond(model)
    with torch.no_grad():
        latent = comfy.sample.sample_custom(model, noise, 1.0, euler, sigmas, cond, cond, torch.zeros(1, 4, 8, 8), seed=0)
    expected = model.model.process_latent_in(latent)
    assert float((seen[0].cpu() - expected).norm()) < 0.01 * float(expected.norm())


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


def test_the_schedule_sets_the_rate_of_every_step(monkeypatch):
    rates, plain = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append([group["lr"] for group in self.param_groups])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(tiny_unet(), steps=4, learning_rate=1e-2, schedule="cosine")
    half = 0.5**0.5
    assert [rate for (rate,) in rates] == pytest.approx([1e-2, 1e-2 * (1 + half) / 2, 5e-3, 1e-2 * (1 - half) / 2])


def test_clean_weight_adds_the_error_of_the_clean_latent(monkeypatch):
    """Loss of the first step with weight w: the plain one, times 1 + w sigma^2 for a model that predicts noise."""
    sigmas, plain = [], lora_training._TrainingLoop._losses

    def losses(self, conds, latents, sigma, noise):
        sigmas.append(float(sigma))
        return plain(self, conds, latents, sigma, noise)

    monkeypatch.setattr(lora_training._TrainingLoop, "_losses", losses)
    model, still = tiny_unet(), {"steps": 2, "learning_rate": 1e-12}
    without, added = train(model, **still).losses, train(model, **still, clean_weight=0.3).losses
    assert added == pytest.approx([loss * (1 + 0.3 * sigma**2) for loss, sigma in zip(without, sigmas)], rel=1e-5)


def test_held_out_loss_is_measured_on_time_and_disturbs_nothing():
    model = tiny_unet()
    plain, watched = train(model, steps=5), train(model, steps=5, validation_every=2)
    assert [step for step, _ in watched.validation] == [0, 2, 4, 5] and not plain.validation
    assert same(plain.lora, watched.lora) and plain.losses == watched.losses
    other = train(model, steps=1, validation_every=9, seed=77)
    assert [step for step, _ in other.validation] == [0, 1] and other.validation[0] == watched.validation[0]
    first, last = watched.validation[0][1], watched.validation[-1][1]
    assert watched.summary().endswith(f"held-out loss {first:.4f} to {last:.4f}")


def test_held_out_loss_is_that_of_the_model_on_eight_levels():
    """By hand from the model without a LoRA: eps at eight evenly spaced levels, the noise of a generator of its own."""
    model, data = tiny_unet(), images()
    found = train(model, data, steps=1, validation_every=1).validation[0][1]
    sampling, generator = model.model.model_sampling, step_generator(0, -3)
    total, (context, _) = 0.0, tiny_cond(model)[0]
    for number in range(8):
        latent = model.model.process_latent_in(data.draw([0], generator, False, 1.0)).to(model.load_device)
        noise = torch.randn(latent.shape, generator=generator).to(latent)
        sigma = sampling.sigmas[1000 * (2 * number + 1) // 16].reshape(1).to(latent)
        with torch.no_grad():
            denoised = model.model.apply_model(latent + sigma * noise, sigma, c_crossattn=context.to(latent))
        total += float(((denoised - latent) / sigma).square().mean())
    assert found == pytest.approx(total / 8, rel=1e-4)
