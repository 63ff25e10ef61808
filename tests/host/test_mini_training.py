"""Training of the mini U-Net and of its autoencoder: what each step touches, and that a run goes on where it stopped."""
import numpy as np
import pytest
import torch
from mini_training import autoencoder, diffusion, unet
from mini_training.data import Feed, Pool
from mini_training.decoder import DecoderTrainer
from PIL import Image
from pastiche.nodes.algorithms.mini_autoencoder import MiniAutoencoder

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


def test_twins_are_crops_of_one_picture():
    """Every picture has one grey level, so a crop says which picture it is from."""
    grey = [np.full((20, 20, 3), level, np.uint8) for level in range(0, 250, 10)]
    crops, kinds = Feed({"photo": Pool(grey, 1.0), "drawing": Pool(grey, 1.0)}, 0, [0])(8, 200, of_each=2)
    level = crops[:, 0, 0, 0]
    assert torch.equal(level[::2], level[1::2]) and torch.equal(kinds[::2], kinds[1::2])
    assert len(level.unique()) > 15


def test_read_twin_exchanges_keys_and_values_in_the_decoder_alone():
    q, k, v = noise(4, 5, 3), noise(4, 5, 3, seed=1), noise(4, 5, 3, seed=2)
    patch = diffusion.read_twin(torch.tensor([1, 0, 3, 2]))
    seen = patch(q, k, v, {"block": ("output", 5)})
    assert torch.equal(seen[0], q) and torch.equal(seen[1], k[[1, 0, 3, 2]]) and torch.equal(seen[2], v[[1, 0, 3, 2]])
    for block in (("input", 5), ("middle", 0)):
        assert all(a is b for a, b in zip(patch(q, k, v, {"block": block}), (q, k, v)))


def test_a_twin_changes_the_prediction_of_the_other_only(make_trainer):
    """Two pairs; another second crop in the first pair changes the first pair's predictions and not the second's."""
    trainer = make_trainer()
    for name, parameter in trainer.model.named_parameters():  # ComfyUI's blocks begin as the identity
        parameter.data += 0.02 * noise(*parameter.shape, seed=len(name))
    x, t, kinds = noise(4, 16, 4, 4), torch.tensor([300, 300, 600, 600]), torch.zeros(4, dtype=torch.long)
    options = {"patches": {"attn1_patch": [diffusion.read_twin(torch.arange(4) ^ 1)]}}
    with torch.no_grad():
        before = trainer.model(x, t, kinds, options)
        other = x.clone()
        other[1] = noise(16, 4, 4, seed=9)
        after = trainer.model(other, t, kinds, options)
    assert (after[0] - before[0]).abs().max() > 1e-4
    torch.testing.assert_close(after[2:], before[2:], atol=1e-6, rtol=1e-5)


def test_the_unets_training_resumes_where_it_stopped(make_trainer):
    straight = make_trainer()
    for _ in range(2):
        straight.train_step(64, 4, 1e-4)
    straight.save()
    other = make_trainer()
    other.resume()
    assert (other.step, other.images) == (2, 8)
    resumed = [other.train_step(64, 4, 1e-4) for _ in range(2)]
    straight.seed_samplers(2)  # a resumed run draws anew from its step
    assert [straight.train_step(64, 4, 1e-4) for _ in range(2)] == resumed
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


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
