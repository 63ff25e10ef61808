import pytest
import torch
from pastiche.nodes.host.trajectories.latent_adain import latent_adain
from support.sampling import random_latent


def latents(batch=2, style_batch=1):
    return {"samples": random_latent(6, 9, batch)}, {"samples": 2 * random_latent(8, 5, style_batch, seed=1) + 1}


def test_takes_the_styles_statistics_at_any_size():
    content, style = latents()
    out = latent_adain(content, style, 1.0, None, None)["samples"]
    for statistic in (torch.Tensor.mean, torch.Tensor.std):
        assert torch.allclose(statistic(out, dim=(2, 3)), statistic(style["samples"], dim=(2, 3)).expand(2, 4), atol=1e-4)


def test_strength_0_and_a_zero_mask_are_identity_and_half_lies_between():
    content, style = latents()
    assert latent_adain(content, style, 0.0, None, None)["samples"] is content["samples"]
    assert torch.equal(latent_adain(content, style, 1.0, torch.zeros(1, 48, 72), None)["samples"], content["samples"])
    full = latent_adain(content, style, 1.0, None, None)["samples"]
    half = latent_adain(content, style, 0.5, None, None)["samples"]
    assert torch.allclose(half, (content["samples"] + full) / 2, atol=1e-5)


def test_masks_choose_statistics_and_bound_the_change():
    content, style = latents()
    inside = torch.zeros(1, 48, 72)
    inside[:, :, :40] = 1  # latent columns 0-4
    where = torch.zeros(1, 64, 40)
    where[:, :32] = 1  # latent rows 0-3
    out = latent_adain(content, style, 1.0, inside, where)["samples"]
    assert torch.equal(out[..., 5:], content["samples"][..., 5:])
    source = style["samples"][:, :, :4]
    assert torch.allclose(out[..., :5].mean((2, 3)), source.mean((2, 3)).expand(2, 4), atol=1e-4)
    assert torch.allclose(out[..., :5].std((2, 3)), source.std((2, 3)).expand(2, 4), atol=1e-4)


def test_batches_pair_up_and_other_keys_stay():
    content, style = latents(2, 2)
    content["batch_index"] = [3, 4]
    out = latent_adain(content, style, 1.0, None, None)
    alone = latent_adain({"samples": content["samples"][1:]}, {"samples": style["samples"][1:]}, 1.0, None, None)
    assert torch.allclose(out["samples"][1:], alone["samples"], atol=1e-6) and out["batch_index"] == [3, 4]


def test_bad_input_gets_a_sentence():
    content, style = latents()
    with pytest.raises(ValueError, match="3 latents for 2 contents"):
        latent_adain(content, {"samples": random_latent(batch=3)}, 1.0, None, None)
    with pytest.raises(ValueError, match="16 latent channels, the content has 4"):
        latent_adain(content, {"samples": random_latent(channels=16)}, 1.0, None, None)
    with pytest.raises(ValueError, match="style: holds NaN"):
        latent_adain(content, {"samples": style["samples"] / 0}, 1.0, None, None)
    with pytest.raises(ValueError, match="3 masks for 2 latents"):
        latent_adain(content, style, 1.0, torch.ones(3, 8, 8), None)


def test_a_video_is_one_picture_of_all_its_frames():
    content, style = random_latent(6, 9, 2), 2 * random_latent(6, 9, 2, seed=1) + 1
    below = [{"samples": latent} for latent in (content, style)]
    frames = [{"samples": latent.reshape(2, 4, 3, 2, 9)} for latent in (content, style)]  # three frames of two rows
    for ones in (None, torch.ones(1, 6, 9)):
        video = latent_adain(*frames, 0.7, ones, ones)["samples"]
        assert video.shape == (2, 4, 3, 2, 9)
        assert torch.allclose(video.flatten(2, 3), latent_adain(*below, 0.7, ones, ones)["samples"], atol=1e-5)
    half = torch.tensor([1.0, 0.0]).view(1, 2, 1).expand(1, 2, 9)  # the upper row of every frame
    out = latent_adain(*frames, 1.0, half, None)["samples"]
    assert torch.equal(out[..., 1, :], frames[0]["samples"][..., 1, :]) and not torch.equal(out, frames[0]["samples"])


def test_shared_statistics_are_one_mean_and_deviation_over_all_frames():
    content, style = ({"samples": latent["samples"].double()} for latent in latents(3, 2))
    out = latent_adain(content, style, 1.0, None, None, statistics="batch")["samples"]
    x, y = content["samples"], style["samples"]
    over = (0, 2, 3)
    scale = y.std(over, keepdim=True) / x.std(over, keepdim=True)
    expected = scale * (x - x.mean(over, keepdim=True)) + y.mean(over, keepdim=True)
    assert out.dtype == torch.float64 and torch.allclose(out, expected, rtol=0, atol=1e-12)
    differences = scale * (x[1:] - x[:-1])  # what moves between frames is scaled, never shifted
    assert torch.allclose(out[1:] - out[:-1], differences, rtol=0, atol=1e-12)
    alone = latent_adain({"samples": x[:1]}, style, 1.0, None, None, statistics="batch")["samples"]
    assert not torch.allclose(out[:1], alone)


def test_shared_statistics_of_videos_are_over_frames_and_batch():
    video = random_latent(6, 9, 2).double().reshape(2, 4, 3, 2, 9)
    style = {"samples": 3 * random_latent(8, 5, 1, seed=1).double() - 1}
    out = latent_adain({"samples": video}, style, 0.7, None, None, statistics="batch")["samples"]
    over = (0, 2, 3, 4)
    mean, std = style["samples"].mean((2, 3)).view(1, 4, 1, 1, 1), style["samples"].std((2, 3)).view(1, 4, 1, 1, 1)
    expected = std * (video - video.mean(over, keepdim=True)) / video.std(over, keepdim=True) + mean
    assert torch.allclose(out, torch.lerp(video, expected, 0.7), rtol=0, atol=1e-12)


def test_shared_statistics_come_from_each_frames_own_mask():
    content, style = ({"samples": latent["samples"].double()} for latent in latents(2, 1))
    masks = torch.zeros(2, 6, 9)
    masks[0, :, :4], masks[1, 2:] = 1, 1
    out = latent_adain(content, style, 1.0, masks, torch.ones(1, 8, 5), statistics="batch")["samples"]
    x = content["samples"]
    inside = torch.cat([x[0, :, :, :4].flatten(1), x[1, :, 2:].flatten(1)], 1)  # (C, pixels)
    y = style["samples"][0].flatten(1)
    expected = (y.std(1) / inside.std(1)).view(4, 1, 1) * (x[1] - inside.mean(1).view(4, 1, 1)) + y.mean(1).view(4, 1, 1)
    assert torch.allclose(out[1, :, 2:], expected[:, 2:], rtol=0, atol=1e-12)
    assert torch.equal(out[0, :, :, 4:], x[0, :, :, 4:]) and torch.equal(out[1, :, :2], x[1, :, :2])


def test_one_picture_shares_with_nobody_and_unknown_statistics_are_refused():
    content, style = latents(1, 1)
    shared, each = (latent_adain(content, style, 0.4, None, None, statistics=how)["samples"] for how in ("batch", "each"))
    assert torch.equal(shared, each)
    with pytest.raises(ValueError, match="statistics: got .film., choose among each, batch"):
        latent_adain(content, style, 1.0, None, None, statistics="film")
