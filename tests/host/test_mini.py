"""The embedded mini model through ComfyUI's own loading, sampling and VAE code."""
import json

import comfy.model_management
import comfy.sample
import comfy.samplers
import latent_preview
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pastiche.nodes.host.networks.mini import FORMAT, KINDS, WEIGHTS, load_mini, read_weights


@pytest.fixture(scope="module")
def mini():
    return load_mini()


@pytest.fixture
def photos(repository):
    """The committed sample photos as IMAGE (3, 256, 256, 3) in 0..1; none was trained on."""
    squares = []
    for path in sorted((repository / "assets" / "samples").glob("content_*.jpg")):
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        squares.append(np.array(image.crop((0, 0, side, side)).resize((256, 256), Image.LANCZOS)))
    return torch.from_numpy(np.stack(squares)).float() / 255


@pytest.fixture
def photo(photos):
    """One of them, (1, 256, 256, 3)."""
    return photos[:1]


def psnr(a, b):
    return 10 * torch.log10(1 / (a - b).square().mean()).item()


def noise_like(latent, seed=0):
    return torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))


def sample(model, latent, positive, negative, cfg=1.0, steps=2):
    return comfy.sample.sample(
        model, noise_like(latent), steps, cfg, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=0
    )


def test_file_is_small_and_says_what_it_is():
    tensors, metadata = read_weights()
    assert WEIGHTS.stat().st_size <= 32_000_000
    assert metadata["format"] == FORMAT
    unet = sum(v.numel() for k, v in tensors.items() if k.startswith("unet."))
    autoencoder = sum(v.numel() for k, v in tensors.items() if k.startswith("autoencoder."))
    assert 10e6 <= unet <= 15e6 and autoencoder <= 3e6


def test_blocks_stand_where_sd15_has_them(mini):
    unet = mini[0].model.diffusion_model

    def attention(blocks):
        return [i for i, b in enumerate(blocks) if any(type(m).__name__ == "SpatialTransformer" for m in b)]

    assert len(unet.input_blocks) == len(unet.output_blocks) == 12
    assert attention(unet.input_blocks) == [1, 2, 4, 5, 7, 8]
    assert attention(unet.output_blocks) == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert attention([unet.middle_block]) == [0]


def test_schedule_is_sd1(mini):
    sigmas = mini[0].model.model_sampling.sigmas
    assert len(sigmas) == 1000
    assert sigmas[-1].item() == pytest.approx(14.6146, rel=1e-4)
    assert sigmas[0].item() == pytest.approx(0.0292, rel=1e-2)


def test_vae_round_trip(mini, photos):
    vae = mini[1]
    latents = vae.encode(photos)
    assert latents.shape == (len(photos), 16, 32, 32)
    decoded = vae.decode(latents)
    assert decoded.shape == photos.shape
    decibels = [psnr(a, b) for a, b in zip(decoded, photos)]
    assert sum(decibels) / len(decibels) >= 28 and min(decibels) >= 26, decibels


@torch.inference_mode()  # as core's executor runs nodes; its tiled encode relies on that
def test_vae_tiled_agrees(mini, photo):
    vae = mini[1]
    latent = vae.encode(photo)
    assert psnr(vae.decode_tiled(latent, tile_x=24, tile_y=24, overlap=8), vae.decode(latent)) > 40
    tiled = vae.encode_tiled(photo, tile_x=128, tile_y=128, overlap=32)  # a latent pixel sees 48 pixels to each side
    assert psnr(vae.decode(tiled), vae.decode(latent)) > 40


def test_vae_sizes_and_batch(mini):
    vae = mini[1]
    image = torch.rand(3, 72, 104, 3, generator=torch.Generator().manual_seed(1))
    latent = vae.encode(image)
    assert latent.shape == (3, 16, 9, 13)
    assert vae.decode(latent).shape == image.shape
    assert vae.encode(image[:, :70, :100]).shape == (3, 16, 8, 12)  # core crops to multiples of 8
    torch.testing.assert_close(vae.encode(image[1:2]), latent[1:2], atol=1e-5, rtol=1e-5)


def test_latent_format(mini, photo):
    model, vae, _ = mini
    latent = vae.encode(photo)
    scaled = model.model.process_latent_in(latent)
    torch.testing.assert_close(model.model.process_latent_out(scaled), latent, atol=1e-4, rtol=1e-4)
    assert 0.75 < scaled.std() < 3 and scaled.mean().abs() < 0.5  # 1.5 and 0 over all pictures
    assert latent.std(dim=(0, 2, 3)).max() > 5 * latent.std(dim=(0, 2, 3)).min()  # the format has something to do


def test_preview_looks_like_the_picture(mini, photo):
    model, vae, _ = mini
    scaled = model.model.process_latent_in(vae.encode(photo))
    factors = model.model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(factors.latent_rgb_factors, factors.latent_rgb_factors_bias)
    preview = torch.from_numpy(np.array(previewer.decode_latent_to_preview(scaled))).float() / 255
    small = torch.nn.functional.avg_pool2d(photo.movedim(-1, 1), 8)[0].movedim(0, -1)  # BHWC -> HWC
    assert preview.shape == (32, 32, 3)
    assert psnr(preview, small) > 25


def test_kinds_differ(mini):
    conditionings = mini[2]
    assert tuple(conditionings) == KINDS
    shapes = {tuple(conditionings[kind][0][0].shape) for kind in KINDS}
    assert shapes == {(1, 8, 64)}
    for i, one in enumerate(KINDS):
        for other in KINDS[i + 1:]:
            assert not torch.equal(conditionings[one][0][0], conditionings[other][0][0])


@pytest.mark.parametrize("size", [(16, 16), (9, 13)])
def test_samples_with_guidance_under_cores_sampler(mini, size):
    model, vae, conditionings = mini
    latent = torch.zeros(2, 16, *size)
    out = sample(model, latent, conditionings["painting"], conditionings["empty"], cfg=3.0)
    assert out.shape == latent.shape and out.isfinite().all()
    assert vae.decode(out).shape == (2, size[0] * 8, size[1] * 8, 3)


def test_kind_matters(mini):
    model, _, conditionings = mini
    latent = torch.zeros(1, 16, 8, 8)
    empty = conditionings["empty"]
    assert not torch.equal(sample(model, latent, conditionings["photo"], empty), sample(model, latent, conditionings["drawing"], empty))


def test_no_conditioning_means_empty(mini):
    model, _, conditionings = mini
    latent = torch.zeros(1, 16, 8, 8)
    nothing = [[None, {}]]
    torch.testing.assert_close(
        sample(model, latent, nothing, nothing), sample(model, latent, conditionings["empty"], nothing), atol=0, rtol=0
    )
    assert torch.equal(model.model.empty_context, conditionings["empty"][0][0])


def test_it_denoises(mini, photo):
    """One prediction from the middle of the schedule is far nearer the photo than its input."""
    model, vae, conditionings = mini
    clean = model.model.process_latent_in(vae.encode(photo))
    sigma = torch.tensor([2.0])
    noisy = clean + sigma * noise_like(clean)
    comfy.model_management.load_models_gpu([model])
    device = model.load_device
    with torch.no_grad():
        guess = model.model.apply_model(noisy.to(device), sigma.to(device), c_crossattn=conditionings["photo"][0][0].to(device)).cpu()
    assert (guess - clean).square().mean() < 0.4 * (noisy - clean).square().mean()


def test_two_loads_share_nothing(mini):
    other = load_mini()[0]
    assert other.model is not mini[0].model
    key = "diffusion_model.out.2.weight"
    assert other.model_state_dict()[key].data_ptr() != mini[0].model_state_dict()[key].data_ptr()


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="weights are missing.*train_mini"):
        load_mini(tmp_path / "mini.safetensors")


def test_truncated_file(tmp_path):
    path = tmp_path / "mini.safetensors"
    path.write_bytes(WEIGHTS.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="100000 bytes.*Reinstall"):
        load_mini(path)


def test_foreign_file(tmp_path):
    path = tmp_path / "mini.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"format": "pt", "unet": json.dumps({})})
    with pytest.raises(ValueError, match="format 'pt', expected 'pastiche-mini-1'"):
        load_mini(path)
