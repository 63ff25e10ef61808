"""Parts of Train Style LoRA: what a VAE's posterior is taken for, refusals, progress, and switches put back."""

import functools
import types

import pytest
import torch
from torch import nn

from pastiche.nodes.host.training import progress
from pastiche.nodes.host.training.backward import _alias, _blocks, _has_version, deterministic, kernels_with_gradients
from pastiche.nodes.host.training.checks import check_conditioning, check_inputs
from pastiche.nodes.host.training.images import TrainingImages, encode_posterior, training_images
from pastiche.nodes.host.training.loop import TrainedLoRA, TrainingSettings, _finite, _ordinary, _out_of_memory
from pastiche.nodes.host.training.progress import NodeProgress, TimeLeft
from support.models import tiny_cond, tiny_unet
from support.training import images


@functools.cache
def unet():
    """One for all tests, which leave it as it is."""
    return tiny_unet()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class FakeVAE:
    """Hands moments (B, 2C, h, w) to its regulariser and gives `latent`."""

    def __init__(self, moments, latent=None):
        self.first_stage_model = types.SimpleNamespace(regularization=nn.Identity())
        self.moments, self.latent = moments, moments.chunk(2, 1)[0] if latent is None else latent

    def encode(self, image):
        self.seen = image
        for part in self.moments.split(1):  # one picture at a time, as core may
            self.first_stage_model.regularization(part)
        return self.latent.clone()


def test_deviations_are_those_of_the_moments():
    moments = torch.cat([random(2, 4, 3, 5), torch.tensor([-40.0, -30.0, 0.0, 2.0]).view(1, 4, 1, 1).expand(2, 4, 3, 5)], 1)
    vae = FakeVAE(moments)
    mean, std = encode_posterior(vae, torch.rand(2, 24, 40, 3))
    assert torch.equal(mean, moments[:, :4])
    expected = torch.tensor([-30.0, -30.0, 0.0, 2.0]).div(2).exp().view(1, 4, 1, 1).expand(2, 4, 3, 5)  # log variances are cut at -30
    torch.testing.assert_close(std, expected)
    assert not vae.first_stage_model.regularization._forward_pre_hooks
    huge = FakeVAE(torch.cat([random(1, 4, 3, 5), torch.full((1, 4, 3, 5), 50.0)], 1))
    torch.testing.assert_close(encode_posterior(huge, torch.rand(1, 24, 40, 3))[1], torch.full((1, 4, 3, 5), 10.0).exp())


def test_what_is_no_posterior_is_taken_as_exact():
    moments = torch.cat([random(2, 4, 3, 5), torch.zeros(2, 4, 3, 5)], 1)
    shifted, tiles, plain = FakeVAE(moments, moments[:, :4] + 0.1), FakeVAE(moments, random(2, 4, 6, 5)), FakeVAE(moments)
    plain.first_stage_model.regularization = None
    plain.encode = lambda image: plain.latent
    for vae in (shifted, tiles, plain):
        mean, std = encode_posterior(vae, torch.rand(2, 24, 40, 3))
        assert std is None and torch.equal(mean, vae.latent)
    rounded = FakeVAE(moments, moments[:, :4].bfloat16())
    assert encode_posterior(rounded, torch.rand(2, 24, 40, 3))[1] is not None  # half precision is no other mean


def test_a_failing_vae_keeps_no_hook():
    vae = FakeVAE(torch.zeros(1, 8, 2, 2))
    vae.encode = lambda image: (_ for _ in ()).throw(RuntimeError("stopped"))
    with pytest.raises(RuntimeError, match="stopped"):
        encode_posterior(vae, torch.rand(1, 16, 16, 3))
    assert not vae.first_stage_model.regularization._forward_pre_hooks


def test_pictures_are_encoded_once_and_once_mirrored():
    moments, picture = torch.cat([random(2, 4, 3, 5), torch.zeros(2, 4, 3, 5)], 1), torch.rand(2, 24, 40, 4)
    seen = []
    vae = FakeVAE(moments)
    encode = vae.encode
    vae.encode = lambda image: seen.append(image) or encode(image)
    data = training_images(None, picture, vae, True)
    assert data.mean.shape == data.std.shape == (2, 2, 4, 3, 5) and data.samples_posterior and len(data) == 2
    assert data.shape == (1, 4, 3, 5)
    assert torch.equal(seen[0], picture[..., :3]) and torch.equal(seen[1], picture[..., :3].flip(2))
    assert training_images(None, picture, vae, False).mean.shape == (1, 2, 4, 3, 5)
    mixed = FakeVAE(moments, moments[:, :4] + 1)
    assert not training_images(None, picture, mixed, False).samples_posterior
    vae.latent = torch.full((2, 4, 3, 5), float("nan"))
    with pytest.raises(ValueError, match="^The VAE encodes this image to NaN"):
        training_images(None, picture, vae, False)


@pytest.mark.parametrize("latents, image, vae, message", [
    (None, None, None, "got neither"), ({"samples": torch.zeros(1, 4, 8, 8)}, torch.zeros(1, 8, 8, 3), None, "got both"),
    (None, torch.zeros(1, 8, 8, 3), None, "^image needs a vae"),
    (None, torch.zeros(0, 8, 8, 3), object(), "^image: got a batch of 0"),
    ({"samples": torch.zeros(0, 4, 8, 8)}, None, None, "^latents: got a batch of 0"),
    ({"samples": torch.full((1, 4, 8, 8), float("inf"))}, None, None, "^latents: holds NaN or infinite"),
])
def test_one_source_of_images_is_needed(latents, image, vae, message):
    with pytest.raises(ValueError, match=message):
        training_images(latents, image, vae, False)


def test_draws_of_a_posterior_are_its_mean_and_deviation_times_noise():
    mean, std = random(2, 1, 4, 3, 5), random(2, 1, 4, 3, 5, seed=1).abs()
    data = TrainingImages(mean, std)
    for seed in range(8):
        own = torch.Generator().manual_seed(seed)
        variant = int(torch.rand(1, generator=own) < 0.5)
        found = data.draw([0], torch.Generator().manual_seed(seed), True, 1.0)[0]
        torch.testing.assert_close(found, mean[variant, 0] + std[variant, 0] * torch.randn(4, 3, 5, generator=own))
    assert data.draw([0], torch.Generator().manual_seed(0), False, 0.5).shape[1:] == (4, 3, 5)  # no side of 8 cells to cut
    wide = TrainingImages(random(1, 1, 4, 32, 32))
    sides = {wide.draw([0], torch.Generator().manual_seed(seed), False, 0.5).shape[-1] for seed in range(20)}
    assert sides == {16, 24} and wide.draw([0], torch.Generator().manual_seed(1), False, 1.0).shape[-1] == 32


def test_digests_tell_values_shapes_and_deviations_apart():
    mean = random(1, 1, 4, 2, 3)
    digests = {TrainingImages(*tensors).digest() for tensors in (
        (mean,), (mean.view(1, 1, 4, 3, 2),), (mean + 1,), (mean, mean.abs()), (mean, mean.abs() + 1),
    )}
    assert len(digests) == 5 and all(len(digest) == 16 for digest in digests)
    assert TrainingImages(mean.clone()).digest() in digests


@pytest.mark.parametrize("change", [dict(steps=0), dict(rank=0), dict(batch_size=0)])
def test_numbers_below_one_are_refused(change):
    with pytest.raises(ValueError, match="^steps, rank and batch_size must be at least 1"):
        check_inputs(unet(), [[None, {}]], images(), TrainingSettings(**change))


def test_a_prompt_may_be_none_but_not_nan():
    model, one = unet(), TrainingSettings(steps=1, rank=1, batch_size=1)
    broken = [[torch.tensor([[[float("nan")]]]), {}]]
    check_inputs(model, [[None, {}]], images(), one)
    check_inputs(model, tiny_cond(model) * 3, images(3), one)
    for positive in (broken, [[None, {}], *broken]):
        with pytest.raises(ValueError, match="^positive: holds NaN"):
            check_inputs(model, positive, images(len(positive)), one)
    with pytest.raises(ValueError, match="^latents: got 3 channels"):
        check_inputs(model, [[None, {}]], TrainingImages(torch.zeros(1, 1, 3, 8, 8)), one)


def test_windows_of_models_that_read_a_picture_are_refused():
    beside, plain = [{"model_conds": {"c_concat": 1}}], [{"model_conds": {}}]
    check_conditioning(beside, 1.0)
    check_conditioning(plain, 0.5)
    with pytest.raises(ValueError, match="^crop: got 0.5"):
        check_conditioning([*plain, *beside], 0.5)


def test_the_summary_tells_the_mean_of_the_last_twenty():
    trained = TrainedLoRA({}, [9.0] * 5 + [1.0] * 20, 25)
    assert trained.summary() == "25 steps, mean loss of the last 20: 1.0000"
    assert TrainedLoRA({}, [2.0, 4.0], 2, trouble="No room.").summary() == "2 steps, mean loss of the last 2: 3.0000 No room."
    assert TrainedLoRA({}, [1.0], 1, note="Cancelled.").summary() == "Cancelled."


def test_time_is_counted_from_the_first_step_seen():
    now = [0.0]
    clock = TimeLeft(100, 40, lambda: now[0])
    assert clock.text(41) == "timing"
    now[0] = 59.6
    assert clock.text(42) == "57:37 left"  # 58 steps of 59.6 s
    now[0] = 20.0
    assert clock.text(51) == "1:38 left"  # 49 steps of 2 s
    assert clock.text(41) == "timing" and clock.text(100) == clock.text(101) == "done"
    now[0] = 7200.0
    assert clock.text(61) == "3:54:00 left"  # 39 steps of 6 minutes


def test_texts_come_twice_a_second_at_most(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "say_on_node", lambda node, text: said.append((node, text)))
    shown = NodeProgress(5, unet(), "7")
    for later, text in ((0.0, "a"), (0.4, "b"), (0.6, "c"), (1.0, "d"), (1.11, "e")):
        now[0] = 100.0 + later
        shown.update(1, text)
    assert said == [("7", "a"), ("7", "c"), ("7", "e")]
    shown.say("f")
    assert said[-1] == ("7", "f")


def test_a_preview_is_the_latents_colours():
    kind, picture, longest = NodeProgress(5, unet(), None)._picture(random(1, 4, 6, 8))
    assert kind == "JPEG" and picture.size[0] >= 8 and picture.size[0] * 6 == picture.size[1] * 8 and longest >= 64


def test_deterministic_kernels_are_switched_on_and_back():
    assert not torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        for before in (False, True):
            torch.use_deterministic_algorithms(before, warn_only=False)
            torch.utils.deterministic.fill_uninitialized_memory = True
            with pytest.raises(RuntimeError, match="stopped"), deterministic(torch.device("cuda")):
                assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
                assert torch.utils.deterministic.fill_uninitialized_memory is False
                raise RuntimeError("stopped")
            assert torch.are_deterministic_algorithms_enabled() is before
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.utils.deterministic.fill_uninitialized_memory is True
        torch.use_deterministic_algorithms(False)
        with deterministic(torch.device("cpu")):
            assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def test_cores_training_switch_is_put_back(monkeypatch):
    import comfy.model_management

    for before in (False, True):
        monkeypatch.setattr(comfy.model_management, "in_training", before, raising=False)
        with pytest.raises(RuntimeError), kernels_with_gradients():
            assert comfy.model_management.in_training is True
            raise RuntimeError("stopped")
        assert comfy.model_management.in_training is before


def test_aliases_are_the_same_memory():
    with torch.inference_mode():
        made = torch.arange(12.0).view(3, 4)[1:, ::2]
    assert not _has_version(made) and _has_version(torch.zeros(1))
    alias = _alias(made)
    assert _has_version(alias) and torch.equal(alias, made) and alias.data_ptr() == made.data_ptr()
    assert alias.stride() == made.stride()


def test_blocks_are_those_of_lists_and_stages():
    network = nn.Module()
    network.first = nn.Linear(2, 2)
    network.blocks = nn.ModuleList([nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.SiLU()), nn.ModuleDict({"a": nn.Linear(2, 2)}), nn.SiLU()])
    network.alone = nn.ModuleDict({"a": nn.Linear(2, 2)})
    assert _blocks(network) == [network.blocks[0][0], network.blocks[1]]


def test_small_parts():
    assert _finite([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3))])
    for bad in (float("nan"), float("inf")):
        assert not _finite([nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor([1.0, bad]))])
    for error in (MemoryError(), torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")):
        assert _out_of_memory(error)
    for error in (RuntimeError("shapes"), ValueError("not enough memory")):
        assert not _out_of_memory(error)
    tensor, other = torch.ones(2), object()
    copied = _ordinary([[tensor, {"a": tensor, "b": (tensor, other)}]])
    assert copied[0][0] is not tensor and torch.equal(copied[0][0], tensor) and copied[0][1]["b"][1] is other
    assert copied[0][1]["b"][0] is not tensor
