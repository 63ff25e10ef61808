"""The embedded flow transformer: the training network against ComfyUI's own class, the file, the loader, the sampler.

All on a tiny random network, so that nothing here depends on which weights the pack ships.
"""
import comfy.model_management
import comfy.sample
import numpy as np
import pytest
import torch
from mini_training.data import KINDS as TRAINED_KINDS
from mini_training.data import SHARE, Feed, Pool
from mini_training.export import export_transformer, shipped_transformer
from mini_training.flow import FlowTrainer, times
from mini_training.transformer import CONFIG, FlowTransformer
from pastiche.nodes.host.networks.mini import KINDS, TRANSFORMER_FORMAT, load_mini, read_weights
from PIL import Image
from safetensors.torch import save_file
from support.mini_trainings import check_resumption
from support.models import randomize

TINY = {**CONFIG, "hidden_size": 32, "num_heads": 2, "axes_dim": [4, 6, 6], "depth": 1, "depth_single_blocks": 2,
        "vec_in_dim": 8, "context_in_dim": 8}


@pytest.fixture(scope="module")
def network():
    network = FlowTransformer(len(KINDS), TINY)
    randomize(network)
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "mini_transformer.safetensors"
    generator = torch.Generator().manual_seed(1)
    statistics = [torch.randn(16, generator=generator), 0.5 + torch.rand(16, generator=generator), torch.zeros(16, 3), torch.zeros(3)]
    export_transformer((None, *statistics), {"average": network.state_dict(), "step": 7, "images": 112, "minutes": 1.5}, path, TINY)
    return path


@pytest.fixture
def loaded(file):
    return load_mini(architecture="transformer", transformer=file)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def predict(model, x, sigma, conditioning):
    """The clean latent that MODEL predicts, float32 on the CPU."""
    comfy.model_management.load_models_gpu([model])
    device, (context, extra) = model.load_device, conditioning[0]
    rows = len(x)
    with torch.no_grad():
        return model.model.apply_model(
            x.to(device), sigma.to(device), c_crossattn=context.repeat(rows, 1, 1).to(device), y=extra["pooled_output"].repeat(rows, 1).to(device)
        ).float().cpu()


def sample(model, latent, positive, negative, cfg=1.0):
    return comfy.sample.sample(model, noise(*latent.shape), 2, cfg, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=0)


def test_training_forward_is_fluxs_own(network):
    x, t, kind = noise(3, 16, 5, 7), torch.tensor([0.02, 0.5, 0.97]), torch.tensor([0, 2, 3])
    theirs = network.flux(x, t, network.context[kind], network.pooled[kind])
    torch.testing.assert_close(network(x, t, kind), theirs, atol=1e-5 * theirs.std().item(), rtol=1e-5)


def test_gradients_reach_every_parameter():
    network = FlowTransformer(len(KINDS), TINY)
    randomize(network)
    network(noise(4, 16, 3, 4), torch.rand(4), torch.arange(4)).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_prediction_is_rectified_flow(loaded, network):
    """x - sigma v, v from the network with the file's rounded weights; sigma is the network's own time."""
    model, _, conditionings = loaded
    rounded = FlowTransformer(len(KINDS), TINY)
    rounded.load_state_dict({k: v.half().float() if k.startswith("flux.") else v for k, v in network.state_dict().items()})
    x, sigma = noise(2, 16, 4, 6), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        expected = x - sigma[:, None, None, None] * rounded(x, sigma, torch.tensor([2, 2]))
    bound = 1e-4 if model.model.get_dtype_inference() == torch.float32 else 0.05  # bf16 on a GPU
    torch.testing.assert_close(predict(model, x, sigma, conditionings["painting"]), expected, atol=bound, rtol=bound)


def test_schedule_is_flows(loaded):
    sampling = loaded[0].model.model_sampling
    assert sampling.sigma_max == 1.0 and sampling.sigma_min < 1e-3
    x, n = noise(1, 16, 4, 4), noise(1, 16, 4, 4, seed=1)
    torch.testing.assert_close(sampling.noise_scaling(torch.tensor(0.25), n, x), 0.25 * n + 0.75 * x)


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_samples_with_guidance_under_cores_sampler(loaded, size):
    model, vae, conditionings = loaded
    latent = torch.zeros(2, 16, *size)
    out = sample(model, latent, conditionings["painting"], conditionings["empty"], cfg=3.0)
    assert out.shape == latent.shape and out.isfinite().all()
    assert vae.decode(out).shape == (2, size[0] * 8, size[1] * 8, 3)


def test_kinds_speak_through_tokens_and_pooled_vector(loaded):
    model, _, conditionings = loaded
    assert tuple(conditionings) == KINDS
    assert not conditionings["empty"][0][1]["pooled_output"].any()
    latent, empty = torch.zeros(1, 16, 4, 4), conditionings["empty"]
    photo = conditionings["photo"][0]
    without_pooled = [[photo[0], {"pooled_output": torch.zeros_like(photo[1]["pooled_output"])}]]
    results = [sample(model, latent, c, empty) for c in (*conditionings.values(), without_pooled)]
    for i, one in enumerate(results):
        assert all(not torch.equal(one, other) for other in results[:i])


def test_no_conditioning_means_empty(loaded):
    model, _, conditionings = loaded
    latent, nothing = torch.zeros(1, 16, 4, 4), [[None, {}]]
    assert torch.equal(sample(model, latent, nothing, nothing), sample(model, latent, conditionings["empty"], nothing))
    assert torch.equal(model.model.empty_context, conditionings["empty"][0][0])


def test_latent_format_has_deviation_1(loaded, file):
    model = loaded[0].model
    tensors, _ = read_weights(file, TRANSFORMER_FORMAT)
    z = tensors["latent.mean"][:, None, None] + tensors["latent.std"][:, None, None] * noise(1, 16, 64, 64)
    scaled = model.process_latent_in(z)
    torch.testing.assert_close(scaled.std(dim=(0, 2, 3)), torch.ones(16), atol=0.06, rtol=0)
    torch.testing.assert_close(model.process_latent_out(scaled), z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option, dtype", [("fp16_unet", torch.float16), ("bf16_unet", torch.bfloat16)])
def test_half_precision(file, monkeypatch, option, dtype):
    exact = load_mini(architecture="transformer", transformer=file)
    x, sigma = noise(1, 16, 4, 6), torch.tensor([0.5])
    expected = predict(exact[0], x, sigma, exact[2]["photo"])
    monkeypatch.setattr(comfy.model_management.args, option, True)
    model, _, conditionings = load_mini(architecture="transformer", transformer=file)
    assert model.model.diffusion_model.dtype == dtype
    error = (predict(model, x, sigma, conditionings["photo"]) - expected).square().mean().sqrt() / expected.std()
    assert error < 16 * torch.finfo(dtype).eps  # a few roundings a block


def test_the_file_gives_the_training_network_back(network, file):
    state, images = shipped_transformer(file)
    assert images == 112 and state.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(state[name], value.half().float() if name.startswith("flux.") else value), name


def test_core_reloads_it_from_its_file(loaded, file):
    model, _, conditionings = loaded
    load, arguments = model.cached_patcher_init
    x, sigma = noise(1, 16, 4, 4), torch.tensor([0.5])
    again = load(*arguments)
    assert again.model is not model.model
    assert torch.equal(predict(again, x, sigma, conditionings["photo"]), predict(model, x, sigma, conditionings["photo"]))


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="weights are missing.*mini_transformer.*train_mini.*or choose architecture \"unet\""):
        load_mini(architecture="transformer", transformer=tmp_path / "mini_transformer.safetensors")


def test_foreign_file(tmp_path):
    path = tmp_path / "mini_transformer.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"format": "pastiche-mini-1"})
    with pytest.raises(ValueError, match="format 'pastiche-mini-1', expected 'pastiche-mini-transformer-1'"):
        load_mini(architecture="transformer", transformer=path)


def test_unknown_architecture():
    with pytest.raises(ValueError, match="architecture: got 'dit', expected one of unet, transformer"):
        load_mini(architecture="dit")


def test_the_transformer_has_at_most_24_mb():
    with torch.device("meta"):
        from comfy.ldm.flux.model import Flux
        from comfy.ops import disable_weight_init

        network = Flux(**CONFIG, dtype=torch.float16, operations=disable_weight_init)
    assert 9e6 < sum(p.numel() for p in network.parameters()) < 12e6 - 50_000


def test_times_are_logit_normal_with_a_uniform_share():
    t = times(40_000, torch.Generator().manual_seed(0)).double()
    assert t.min() > 0 and t.max() < 1
    # P(t < 0.1): 3/4 of the normal's P(z < logit 0.1) and 1/4 of 0.1; the bound is four deviations of a proportion
    low = 0.75 * torch.special.ndtr(torch.tensor(1 / 9, dtype=torch.float64).log()) + 0.25 * 0.1
    assert abs((t < 0.1).double().mean() - low) < 4 * (low * (1 - low) / 40_000) ** 0.5
    assert abs(t.mean() - 0.5) < 4 * 0.25 / 200


@pytest.fixture
def make_trainer(tmp_path):
    images = [(noise(24, 24, 3, seed=i) * 40 + 128).clamp(0, 255).byte().numpy() for i in range(3)]
    pools = {name: Pool(images, 1.5) for name in ("photo", "painting", "drawing")}
    Image.fromarray(images[0]).save(tmp_path / "held_out.png")
    encode = torch.nn.Conv2d(3, 16, 8, stride=8).requires_grad_(False)
    return lambda: FlowTrainer(encode, pools, [tmp_path / "held_out.png"], tmp_path, config=TINY, batch=4)


def test_training_resumes_where_it_stopped(make_trainer):
    check_resumption(make_trainer, 16, 1e-3)


def test_feed_draws_pools_by_their_shares():
    """Every pool has one grey level, so a crop says which pool it is from; four deviations of a proportion as bounds."""
    grey = {name: 10 * i + 10 for i, name in enumerate(SHARE)}
    pools = {name: Pool([np.full((9, 9, 3), level, np.uint8)], 1.0) for name, level in grey.items()}
    crops, kinds = Feed(pools, 0, [0])(8, 4000)
    assert crops.shape == (4000, 8, 8, 3)
    level = crops[:, 0, 0, 0]
    for name, share in SHARE.items():
        assert abs((level == grey[name]).double().mean() - share) < 4 * (share * (1 - share) / 4000) ** 0.5
        kind = "painting" if name == "strokes" else name
        assert set(kinds[level == grey[name]].tolist()) == {0, TRAINED_KINDS.index(kind)}
    assert abs((kinds == 0).double().mean() - 0.15) < 4 * (0.15 * 0.85 / 4000) ** 0.5


def test_a_pool_without_pictures_is_not_drawn_from():
    pools = {name: Pool([], 1.0) for name in SHARE} | {"drawing": Pool([np.zeros((9, 9, 3), np.uint8)], 1.0)}
    _, kinds = Feed(pools, 0, [0])(8, 40)
    assert set(kinds.tolist()) <= {0, TRAINED_KINDS.index("drawing")}


def test_feeds_workers_draw_different_crops():
    images = [noise(40, 40, 3, seed=i).mul(40).add(128).clamp(0, 255).byte().numpy() for i in range(3)]
    feed = Feed({name: Pool(images, 1.5) for name in ("photo", "painting", "drawing")}, 2, [0])
    first, second = feed(8, 4)[0], feed(8, 4)[0]
    assert first.shape == second.shape == (4, 8, 8, 3) and not torch.equal(first, second)


def test_a_shipped_file_is_where_training_goes_on(make_trainer, file, network):
    trainer = make_trainer()
    trainer.resume(shipped_transformer(file))
    assert (trainer.step, trainer.images) == (0, 112)
    assert torch.equal(trainer.average["flux.img_in.weight"], network.flux.img_in.weight.half().float())
