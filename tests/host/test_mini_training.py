"""Training of the mini U-Net and of its autoencoder: what each step touches, and that a run goes on where it stopped."""
import numpy as np
import pytest
import torch
from mini_training import autoencoder, diffusion, export, unet
from mini_training.data import Pairs, Pool
from mini_training.decoder import DecoderTrainer
from pastiche.nodes.algorithms.mini_autoencoder import MiniAutoencoder
from PIL import Image
from safetensors.torch import load_file, save_file
from support.mini_trainings import check_resumption

TINY = {**unet.CONFIG, "model_channels": 32, "num_head_channels": 32}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pools():
    images = [(noise(48, 48, 3, seed=i) * 40 + 128).clamp(0, 255).byte().numpy() for i in range(3)]
    return {name: Pool(images, 1.5) for name in ("photo", "painting", "drawing", "strokes")}


@pytest.fixture
def held_out(tmp_path, pools):
    Image.fromarray(pools["photo"].images[0]).save(tmp_path / "held_out.png")
    return [tmp_path / "held_out.png"]


@pytest.fixture
def make_trainer(tmp_path, pools, held_out, monkeypatch):
    monkeypatch.setattr(diffusion, "Denoiser", lambda kinds, seed: unet.Denoiser(kinds, TINY, seed))
    torch.manual_seed(0)
    encode = torch.nn.Conv2d(3, 16, 8, stride=8).requires_grad_(False)
    return lambda: diffusion.Trainer(encode, pools, held_out, tmp_path, batch=4)


def test_pairs_are_cut_at_the_same_place():
    """Pictures whose colour says where a pixel is: the photo's crop and its painted one agree, the other crop is elsewhere."""
    y, x = np.mgrid[0:40, 0:48]
    photo = np.stack([y, x, np.zeros_like(x)], -1).astype(np.uint8)
    pairs = Pairs([photo, photo + np.uint8(100)], [photo + np.uint8(50), photo + np.uint8(150)], max_zoom=1.0)
    here, painted, there = (part.astype(int) for part in pairs.cut(np.random.default_rng(0), 20, 16))
    assert np.array_equal(painted, here + 50)
    corner = there[:, 0, 0] - painted[:, 0, 0]
    assert (np.abs(corner[:, :2]).sum(-1) > 0).mean() > 0.8  # chance may give the same place twice
    assert (corner[:, 2] == 0).all()  # of the same painting
    mirrored = here[:, 0, 1, 1] < here[:, 0, 0, 1]
    assert 0 < mirrored.sum() < 20 and np.array_equal(there[:, 0, 1, 1] < there[:, 0, 0, 1], mirrored)


def test_keys_and_values_are_exchanged_where_styleid_does():
    q, k, v = noise(4, 5, 3), noise(4, 5, 3, seed=1), noise(4, 5, 3, seed=2)
    rows = torch.tensor([2, 3, 2, 3])
    patch = diffusion.read_others(rows)
    for number in (6, 11):
        seen = patch(q, k, v, {"block": ("output", number)})
        assert torch.equal(seen[0], q) and torch.equal(seen[1], k[rows]) and torch.equal(seen[2], v[rows])
    for block in (("input", 8), ("middle", 0), ("output", 5)):
        assert all(a is b for a, b in zip(patch(q, k, v, {"block": block}), (q, k, v)))


def test_texture_by_hand():
    """White noise of deviation 2: each entry of 3x3 pixels varies alone, so the covariance is 4 times the identity."""
    seen = diffusion.texture(2 * noise(1, 2, 200, 200))
    assert seen.shape == (1, 18, 18)
    torch.testing.assert_close(seen[0], 4 * torch.eye(18), atol=0.1, rtol=0)
    assert diffusion.texture(torch.full((1, 2, 8, 8), 3.0)).abs().max() < 1e-6  # tones are no texture


def test_manner_loss_is_0_for_the_painting_and_1_for_the_photo():
    photo, painted = 0.3 * noise(3, 16, 8, 8), noise(3, 16, 8, 8, seed=1) + 0.5
    distinct = torch.tensor([True, True, False])
    assert all(part == 0 for part in diffusion.manner_loss(painted, photo, painted, distinct))
    told, strokes = diffusion.manner_loss(photo, photo, painted, distinct)
    assert 0.9 < told < 1 and 0.85 < strokes < 1  # just below 1: both divide by a little more than what there is to change
    # Strokes at other places of the same 2x2 pixels: the tones and their share of the loss stay.
    moved = painted.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    assert diffusion.manner_loss(moved, photo, painted, distinct)[0] < 1e-10


def test_texture_of_the_noisiest_rows_does_not_count():
    photo, painted, other = noise(2, 16, 8, 8), noise(2, 16, 8, 8, seed=1), noise(2, 16, 8, 8, seed=2)
    clean = torch.stack([painted[0], other[1]])
    assert diffusion.manner_loss(clean, photo, painted, torch.tensor([True, False]))[1] == 0
    assert diffusion.manner_loss(clean, photo, painted, torch.tensor([True, True]))[1] > 0.1


def test_every_second_step_reads_paintings(make_trainer, pools):
    trainer = make_trainer()
    images = [picture[:40, :40] for picture in pools["photo"].images]
    trainer.pairs = Pairs(images, images[::-1])
    trainer.train_step(32, 4, 1e-4)
    assert len(trainer.manner) == 1 and not trainer.foreign
    trainer.train_step(32, 4, 1e-4)
    assert len(trainer.manner) == 1 and len(trainer.foreign) == 1


def test_the_unets_training_resumes_where_it_stopped(make_trainer):
    check_resumption(make_trainer, 64, 1e-4)


def test_the_unets_training_saves_as_it_goes(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    saves = []
    monkeypatch.setattr(trainer, "train_step", lambda size, count, rate: 0.0)
    monkeypatch.setattr(trainer, "save", lambda: saves.append(trainer.minutes))
    clock = iter(range(100, 10_000, 60))
    monkeypatch.setattr(diffusion.time, "process_time", lambda: next(clock))
    trainer.run(10, save_every=110)
    assert saves == [2, 5, 8, 10]  # writing takes a reading of the clock too
    assert len((tmp_path / "unet_log.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("encoder", [True, False])
def test_the_decoders_training_leaves_the_latents(pools, held_out, tmp_path, encoder):
    """Together both are trained; alone the decoder's steps change no latent, or every network on them would be lost."""
    torch.manual_seed(0)
    model = MiniAutoencoder(width=8, finish=4, window=16, correction=8)
    picture = noise(1, 3, 32, 40)
    trainer = DecoderTrainer(model, pools, held_out, tmp_path, np.random.default_rng(0), batch=8, encoder=encoder)
    latents = model.encode(picture).detach()
    decoded = model.decode(latents).detach()
    trainer.train_step(1e-3)
    assert torch.equal(model.encode(picture), latents) is not encoder
    assert (model.decode(latents) - decoded).abs().max() > 1e-4
    trainer.save()
    assert (tmp_path / ("encoder.pt" if encoder else "decoder.pt")).exists()


def test_lapping_lowers_the_error(pools):
    torch.manual_seed(0)
    model = MiniAutoencoder(width=8, finish=4, window=16, correction=8)
    smooth = {name: Pool([np.asarray(Image.fromarray(i[:6, :6]).resize((144, 144), Image.BICUBIC)) for i in pool.images], 1.0)
              for name, pool in pools.items()}
    rng = np.random.default_rng(0)
    autoencoder.set_linear_transform(model, *autoencoder.principal_components(smooth, rng, 16, rounds=1))
    x = smooth["photo"].crops(np.random.default_rng(5), 4, 128)

    def error():
        with torch.no_grad():
            return (model.decode(model.encode(x)) - x).square().mean().item()

    before = error()
    autoencoder.lap(model, smooth, rng, minutes=0.05)
    assert error() < 0.8 * before


def test_another_decoder_leaves_the_shipped_latents(tmp_path):
    """Whatever a checkpoint holds of the encoder, every network in the pack was trained on the shipped one's latents."""
    torch.manual_seed(0)
    shipped, trained = (MiniAutoencoder(width=8, finish=4, window=16, correction=8).state_dict() for _ in range(2))
    trained["latent_std"] = shipped["latent_std"] + 1
    save_file({f"autoencoder.{name}": value for name, value in shipped.items()}, tmp_path / "mini.safetensors", {"format": export.FORMAT})
    export.export_decoder(tmp_path / "mini.safetensors", trained, tmp_path / "new.safetensors")
    written = load_file(tmp_path / "new.safetensors")
    for name, value in shipped.items():
        kept = name == "latent_std" or name.startswith(("analysis", "correction"))
        torch.testing.assert_close(written[f"autoencoder.{name}"].float(), value if kept else trained[name], atol=1e-3, rtol=1e-3)
