"""Parts of Load Unconditional DDPM: limits of files and folders, schedules, and how core loads a model again."""

import json
import types

import comfy.model_sampling
import pytest
import torch

from pastiche.nodes.host.networks import unconditional_folders as folders
from pastiche.nodes.host.networks.unconditional import (
    LONGEST,
    WIDEST_SIGMA,
    PixelSpace,
    _check_schedule,
    discrete_sampling,
    load_unconditional,
    make_sampling,
)
from pastiche.nodes.host.networks.unconditional_checkpoint import Reading, _choose, _unwrapped
from pastiche.nodes.host.networks.unconditional_files import alphas_bar, describe
from pastiche.nodes.host.networks.unconditional_flat import Upsample, _resampled, sinusoids
from pastiche.nodes.host.networks.unconditional_folders import Listing, _of_today, brief, check_sizes, compare_shapes, lies_inside, read_json
from pastiche.nodes.host.networks.unconditional_layouts import Layer, Layout, _check_widths, _count_heads
from pastiche.nodes.host.networks.unconditional_pixels import PixelUNet
from support.unconditional import COMMON, SCHEDULER, TINY, root, write_folder  # noqa: F401  (a fixture)


def conv(width_in, width_out, kind="conv", name="a"):
    return Layer(kind, name, width_in, width_out)


def layout(family="DDPM", scale_shift=False, **changes):
    given = dict(
        family=family, channels=32, embedding=64, levels=1, out_channels=3, scale_shift=scale_shift, inputs=((conv(3, 32),), (conv(32, 64),)),
        middle=(conv(64, 64, "attention"),), outputs=((conv(128, 32),), (conv(64, 32),)), heads=lambda width: 2, per_head=True,
    )
    return Layout(**given | changes)


# layouts


def test_widths_are_followed_through_the_network():
    _check_widths(layout(), "x")
    for changes, message in (
        (dict(inputs=((conv(4, 32),), (conv(32, 64),))), "x: a takes 4 channels where 3 arrive"),
        (dict(middle=(conv(32, 64),)), "takes 32 channels where 64 arrive"),
        (dict(outputs=((conv(96, 32),), (conv(64, 32),))), "takes 96 channels where 128 arrive"),  # 64 and a skip of 64
        (dict(outputs=((conv(128, 32),), (conv(96, 32),))), "takes 96 channels where 64 arrive"),  # 32 and a skip of 32
        (dict(middle=(conv(64, 0),)), "where 64 arrive"), (dict(middle=(conv(64, 16385),)), "where 64 arrive"),
        (dict(middle=(conv(64, 48, "residual"),)), "expected multiples of 32"), (dict(middle=(conv(64, 64), conv(64, 80, "attention"))), "multiples of 32"),
        (dict(out_channels=4), "x gives 4 channels"), (dict(channels=2), "sinusoids of 2"), (dict(channels=33), "sinusoids of 33"),
        (dict(channels=16386), "sinusoids"), (dict(embedding=0), "expected 3"), (dict(embedding=16385), "expected 3"),
    ):
        with pytest.raises(ValueError, match=message):
            _check_widths(layout(**changes), "x")
    for changes in (dict(out_channels=6), dict(channels=4), dict(channels=16384), dict(embedding=16384), dict(embedding=1)):
        _check_widths(layout(**changes), "x")
    wide = dict(middle=(conv(64, 16384), conv(16384, 64)))
    _check_widths(layout(**wide), "x")


def test_heads_divide_the_width():
    assert _count_heads(4, None, "x")(64) == 4 and _count_heads(None, 16, "x")(64) == 4 and _count_heads(None, 64, "x")(64) == 1
    with pytest.raises(ValueError, match="^heads: x has an attention of 64 channels, which 3 heads do not divide"):
        _count_heads(3, None, "x")(64)
    with pytest.raises(ValueError, match="which heads of 48 channels do not divide"):
        _count_heads(None, 48, "x")(64)


@pytest.mark.parametrize("family, scale_shift, expected", [
    ("iDDPM", True, ("cosine", 4000)), ("iDDPM", False, ("linear", 1000)), ("ADM", True, ("linear", 1000)),
    ("DDPM", False, ("linear", 1000)),
])
def test_schedules_of_the_published_models(family, scale_shift, expected):
    own = layout(family, scale_shift)
    assert own.schedule == expected == Reading().schedule(own)
    assert Reading(betas="cosine").schedule(own) == ("cosine", expected[1])
    assert Reading(timesteps=7).schedule(own) == (expected[0], 7)


def test_what_is_taken_for_granted_is_said():
    assert describe(layout(), Reading()) == "2 heads at 64 channels, linear betas over 1000 timesteps, 3 output channels"
    learned = layout("iDDPM", True, out_channels=6, middle=(conv(64, 64),))
    assert describe(learned, Reading()) == "no attention, cosine betas over 4000 timesteps, 6 output channels, the first 3 are the noise"
    two = layout(middle=(conv(64, 64, "attention"), conv(64, 32, "attention")), inputs=((conv(3, 32, "attention"),),))
    assert "at 64 channels" in describe(two, Reading())


def test_settings_within_their_limits():
    assert LONGEST == 100_000 and Reading(timesteps=100_000).timesteps == 100_000
    for wrong in (dict(timesteps=100_001), dict(timesteps=-1), dict(heads="3"), dict(attention_order="?"), dict(betas="?")):
        with pytest.raises(ValueError, match="^heads, attention_order, betas, timesteps: got"):
            Reading(**wrong)
    assert Reading().noted({"pastiche.timesteps": "250", "pastiche.heads": "4"}, "x") == Reading(heads="4", timesteps=250)
    assert Reading(heads="8").noted({"pastiche.heads": "4"}, "x") == Reading(heads="8")
    for note in ("1000000", "x", "100001", "-3"):
        with pytest.raises(ValueError, match="^x: its notes are not those"):
            Reading().noted({"pastiche.timesteps": note}, "x")
    assert Reading(heads="4", timesteps=9).notes() == {"pastiche.heads": "4", "pastiche.timesteps": "9"}
    assert Reading().notes() == {}


def test_state_dicts_three_wrappers_deep():
    weights = {"a.weight": torch.zeros(1)}
    assert _choose({"model": {"state_dict": {"ema": weights}}}, "x") == (weights, True)
    assert _choose({"model": weights, "ema": weights}, "x")[1]
    assert _choose({"model": {"net": {"unet": weights}}}, "x") == (weights, False)
    with pytest.raises(ValueError, match="^x holds no state dict"):
        _choose({"model": {"net": {"unet": {"params": weights}}}}, "x")
    last = {"b.weight": torch.ones(1)}
    assert _choose([weights, {"lr": 1}, 5, last], "x") == (last, True) and _choose([weights, 5], "x") == (weights, False)
    assert _unwrapped({"module.model.a": 1, "module.model.b": 2}) == {"a": 1, "b": 2}
    assert _unwrapped({"model.a": 1, "b": 2}) == {"model.a": 1, "b": 2}


# the network


def test_sinusoids_are_the_papers():
    t = torch.tensor([0.0, 3.0, 250.5], dtype=torch.float64)
    found, original = sinusoids(t, 8, False), sinusoids(t, 8, True)
    for channel in range(4):
        waves = t * 10000 ** (-channel / 4)
        torch.testing.assert_close(found[:, channel], waves.cos())
        torch.testing.assert_close(found[:, 4 + channel], waves.sin())
        waves = t * 10000 ** (-channel / 3)
        torch.testing.assert_close(original[:, channel], waves.sin())
        torch.testing.assert_close(original[:, 4 + channel], waves.cos())
    assert sinusoids(t.half(), 8, False).dtype == torch.float32


def test_grids_halve_and_double():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert _resampled(x, "down").flatten().tolist() == [2.5, 4.5, 10.5, 12.5] and _resampled(x, "") is x
    assert torch.equal(_resampled(x, "up"), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    up = Upsample(conv(1, 2))
    assert up(x, None).shape == (1, 2, 8, 8)


@pytest.mark.parametrize("levels, size, right", [(1, (5, 7), True), (2, (6, 8), True), (2, (7, 8), False), (2, (8, 7), False), (4, (24, 16), True), (4, (24, 20), False)])
def test_sides_are_multiples_of_the_coarsest_cell(levels, size, right):
    network = PixelUNet()
    network.levels = levels
    x = torch.zeros(1, 3, *size)
    with pytest.raises(ValueError, match="ControlNet does not fit"):
        network._check(torch.zeros(1, 3, 16, 16), {"input": []})
    if right:
        return network._check(x, None)
    with pytest.raises(ValueError, match=f"multiples of {2 ** (levels - 1)}, got {size[1]}x{size[0]}"):
        network._check(x, None)


def test_a_pixels_preview_is_the_pixel():
    assert torch.equal(torch.tensor(PixelSpace.latent_rgb_factors), torch.eye(3))
    assert PixelSpace.latent_channels == 3 and PixelSpace.spacial_downscale_ratio == 1


# schedules


def test_the_shortest_schedules():
    assert alphas_bar("linear", 21).shape == (21,) and len(alphas_bar("cosine", 1)) == 1
    with pytest.raises(ValueError, match="^timesteps: 20 are too few for linear betas, whose last would be 1.00; use 21 or more"):
        alphas_bar("linear", 20)
    linear = alphas_bar("linear", 1000)
    assert float(linear[0]) == pytest.approx(1 - 1e-4) and float(1 - linear[-1] / linear[-2]) == pytest.approx(0.02)
    cosine = alphas_bar("cosine", 50)
    assert float(1 - cosine[-1] / cosine[-2]) == pytest.approx(0.999)


def test_predicted_pictures_are_clamped_where_it_is_asked_for():
    x, out, sigma = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), -9.0), torch.tensor([1.0])
    for limit, expected in ((None, 9.0), (1.5, 1.5)):
        sampling = discrete_sampling(alphas_bar("linear", 100), comfy.model_sampling.EPS, limit)
        assert sampling.calculate_denoised(sigma, out, x).unique().tolist() == pytest.approx([expected])
        assert sampling.calculate_denoised(sigma, -out, x).unique().tolist() == pytest.approx([-expected])
    assert sampling.num_timesteps == 100
    assert sampling.percent_to_sigma(0.0) == pytest.approx(float(sampling.sigmas[99]))
    assert sampling.percent_to_sigma(1.0) == 0
    ended = discrete_sampling(torch.tensor([0.5, 0.0]), comfy.model_sampling.EPS)
    assert float(ended.sigmas[1]) == pytest.approx(WIDEST_SIGMA) == pytest.approx((1 / 4.9e-8) ** 0.5, rel=1e-3)


def test_without_a_word_nothing_is_clamped():
    x, out = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), -9.0)
    for clip, expected in (({}, 9.0), (dict(clip_denoised=True), 1.0)):
        assert make_sampling(SCHEDULER, **clip).calculate_denoised(torch.tensor([1.0]), out, x).unique().tolist() == pytest.approx([expected])


@pytest.mark.parametrize("change, right", [
    (dict(num_train_timesteps=1), True), (dict(num_train_timesteps=100_000), True), (dict(num_train_timesteps=0), False),
    (dict(num_train_timesteps=100_001), False), (dict(num_train_timesteps=True), False), (dict(num_train_timesteps=10.0), False),
    (dict(trained_betas=[0.1]), True), (dict(trained_betas=[]), False), (dict(trained_betas=0.1), False),
    (dict(trained_betas=[0.1] * 100_001), False),
    (dict(beta_start=1), True), (dict(beta_end=float("nan")), False), (dict(beta_end="x"), False),
    (dict(clip_sample_range=10**6), False),
    (dict(clip_sample_range=-100_000), True), (dict(beta_end=None), True), ({}, True),
])
def test_numbers_of_a_schedule(change, right):
    if right:
        return _check_schedule(change)
    with pytest.raises(ValueError, match=f"^scheduler_config.json: {next(iter(change))}"):
        _check_schedule(change)


# files and folders


def test_a_file_is_read_up_to_a_mebibyte(tmp_path):
    path = tmp_path / "config.json"
    for size, right in ((1 << 20, True), ((1 << 20) + 1, False)):
        path.write_text(json.dumps({"a": ""}).replace('""', '"' + "x" * (size - 9) + '"'))
        assert path.stat().st_size == size
        if right:
            assert len(read_json(path, "config.json")["a"]) == size - 9
        else:
            with pytest.raises(ValueError, match="config.json has 1 MB, which no model's has"):
                read_json(path, "config.json")
        path.write_text('{"_class_name": "UNet2DModel"}' + " " * (size - 30))
        assert Listing()._is_config(str(path)) is right


def test_values_are_shown_in_60_characters():
    assert brief("x" * 60) == "x" * 60 and brief("x" * 61) == "x" * 57 + "..." and brief([1, 2]) == "[1, 2]"
    assert brief(10 ** 5000) == "a int too long to show"


@pytest.mark.parametrize("config, message", [
    ({}, "block_out_channels is .224"), (dict(block_out_channels=[]), "block_out_channels is"),
    (dict(block_out_channels=[64, 65]), "at most 64 channels"),
    (dict(block_out_channels=[0]), "block_out_channels"), (dict(block_out_channels=[True]), "block_out_channels"),
    (dict(block_out_channels=[64] * 3, layers_per_block=2), "3 blocks of layers_per_block 2 are more than the 5 tensors"),
    (dict(block_out_channels=[64], layers_per_block=0), "layers_per_block 0"),
    (dict(block_out_channels=[64], layers_per_block=6), "layers_per_block 6"),
    (dict(block_out_channels=[64, 64], layers_per_block=1, up_block_types=["a"]), "up_block_types must name 2 blocks"),
    (dict(block_out_channels=[64], layers_per_block=1, down_block_types=[5]), "down_block_types must name 1 blocks"),
    (dict(block_out_channels=[64], layers_per_block=1, down_block_types="a"), "down_block_types must name 1 blocks"),
    (dict(block_out_channels=[64, 1], layers_per_block=2, up_block_types=["a", "b"]), None),
    (dict(block_out_channels=[64], layers_per_block=5), None),
])
def test_sizes_that_the_weights_cannot_have(config, message):
    shapes = {str(number): (64, 3) for number in range(5)}
    if message is None:
        return check_sizes(config, shapes)
    with pytest.raises(ValueError, match=f"^config.json: .*{message}"):
        check_sizes(config, shapes)


def test_tensors_that_are_missing_or_of_another_shape_are_counted():
    expected = {"b": (1, 2), "c": (3,), "a": (4,)}
    compare_shapes(expected, {**expected, "more": (1,)}, "x")
    with pytest.raises(ValueError, match=r"^x does not .*: 2 tensors are missing .* the first b \(\(1, 2\) expected, \(2, 1\) found\)"):
        compare_shapes(expected, {"b": (2, 1), "a": (4,)}, "x")
    with pytest.raises(ValueError, match=r"1 tensors .* the first a \(\(4,\) expected, nothing found\)"):
        compare_shapes(expected, {"b": (1, 2), "c": (3,)}, "x")


@pytest.mark.parametrize("name, today", [
    ("a.attentions.0.query.weight", "a.attentions.0.to_q.weight"), ("attentions.proj_attn.bias", "attentions.to_out.0.bias"), ("a.query.weight", "a.query.weight"),
    ("attentions", "attentions"), ("attentions.value", "attentions.value"), ("query.attentions", "to_q.attentions"), ("a.attentions.0.query", "a.attentions.0.query"),
])
def test_names_of_attention_layers(name, today):
    assert _of_today(name) == today


def test_inside_is_below(tmp_path):
    assert lies_inside(tmp_path / "a" / "b", tmp_path) and not lies_inside(tmp_path, tmp_path)
    assert not lies_inside(tmp_path / "..", tmp_path)
    assert not lies_inside(tmp_path / "a" / ".." / ".." / "b", tmp_path)


def test_a_listing_is_kept_for_a_second(tmp_path, monkeypatch):
    now, listing = [100.0], Listing()
    monkeypatch.setattr(folders.time, "monotonic", lambda: now[0])
    searched = []
    monkeypatch.setattr(listing, "_search", lambda root: searched.append(root) or iter([("b", False), ("a", False), ("c.pt", True)]))
    for later, count in ((0.0, 1), (0.9, 1), (1.1, 2), (1.9, 2), (2.2, 3)):
        now[0] = 100.0 + later
        assert listing.names([tmp_path]) == (["a", "b"], ["c.pt"]) and len(searched) == count
    listing.names([tmp_path, tmp_path / "more"])
    assert len(searched) == 5


def test_core_makes_the_model_again_from_what_is_kept(root):
    diffusers = pytest.importorskip("diffusers")
    write_folder(root / "net", diffusers.UNet2DModel(**COMMON, **TINY).eval())
    model, vae, conditioning = load_unconditional("net", "bf16")
    again, arguments = model.cached_patcher_init
    other = again(*arguments, disable_dynamic=True)
    assert type(other) is type(model) and other is not model and conditioning == [[None, {}]] and vae is not None
    ours, theirs = (each.model.diffusion_model.state_dict() for each in (model, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == torch.bfloat16 for key in ours)
    assert model.model.model_config.memory_usage_factor == 32 / 320 and not any(p.requires_grad for p in model.model.parameters())
    assert not model.model.diffusion_model.training and isinstance(model.model.latent_format, PixelSpace)
    assert arguments == ("net", "bf16", False) and types.FunctionType is type(again)
