"""Diffusers' own UNet2DModel and DDIMPipeline as the oracle for Load Unconditional DDPM."""

import copy
import json
import os
import time
from pathlib import Path

import comfy.sample
import comfy.samplers
import pytest
import safetensors.torch
import torch
from comfy.patcher_extension import WrappersMP

from pastiche.nodes.host.networks.families import find_adapter
from pastiche.nodes.host.networks.unconditional import load_unconditional, make_sampling
from pastiche.nodes.host.networks.unconditional_folders import Listing, list_folders

from support.unconditional import COMMON, SCHEDULER, SHAPES, make_network, noise, root, write_folder  # noqa: F401  (a fixture)

diffusers = pytest.importorskip("diffusers")


def sample(model, conditioning, x, sigmas, sampler="euler"):
    """Samples from the noisy latent x (B, 3, H, W) in ComfyUI's scale."""
    return comfy.sample.sample_custom(
        model, torch.zeros_like(x), 1.0, comfy.samplers.sampler_object(sampler), sigmas, conditioning, [],
        x, seed=0, disable_pbar=True,
    )


def predict(model, x, sigma):
    """The network's own prediction at one noise level, through ComfyUI's apply_model."""
    comfy.model_management.load_models_gpu([model])
    seen = []
    with_hook = model.clone()

    def spy(executor, *args, **kwargs):
        seen.append(executor(*args, **kwargs))
        return seen[-1]

    with_hook.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", spy)
    options = comfy.model_patcher.create_model_options_clone(with_hook.model_options)
    options["transformer_options"]["wrappers"] = with_hook.wrappers
    model.model.apply_model(x, sigma.expand(len(x)), transformer_options=options["transformer_options"])
    return seen[0]


@pytest.mark.parametrize("shape, pipeline", [("celebahq", False), ("church", True), ("bedroom", False), ("cifar10", True)])
def test_prediction_is_diffusers_own(root, shape, pipeline):
    """Exact in float64; in float32, where even two loads of one file differ by 2e-6 (memory alignment), within that."""
    folder = write_folder(root / shape, make_network(shape, seed=3), pipeline)
    network = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet" if pipeline else None)
    model, _, _ = load_unconditional(shape)
    sampling, ours, theirs = model.model.model_sampling, model.model.diffusion_model, copy.deepcopy(network).double()
    for size in [(32, 32), (32, 64)]:
        for t in (0, 500, 999):
            x = noise(2, 3, *size) * (1 + sampling.sigmas[t] ** 2).sqrt()
            z = sampling.calculate_input(sampling.sigmas[t], x)
            with torch.no_grad():
                found = predict(model, x, sampling.sigmas[t])
                torch.testing.assert_close(found, network(z, t).sample, rtol=0, atol=5e-6)
                exact = copy.deepcopy(ours).double()(z.double(), torch.full((2,), float(t)), transformer_options={})
                torch.testing.assert_close(exact, theirs(z.double(), t).sample, rtol=0, atol=1e-10)
    assert exact.std() > 0.01


def test_a_network_that_centres_its_input_gets_it_centred(root):
    """center_input_sample: such a network was trained on 0..1 images and maps them to -1..1 itself."""
    network = diffusers.UNet2DModel(**COMMON, **SHAPES["cifar10"], center_input_sample=True).eval().requires_grad_(False)
    model, *_ = load_unconditional(write_folder(root / "centred", network).name)
    ours, theirs, z = copy.deepcopy(model.model.diffusion_model).double(), copy.deepcopy(network).double(), noise(1, 3, 16, 16).double()
    with torch.no_grad():
        found = ours(z, torch.tensor([500.0]), transformer_options={})
        torch.testing.assert_close(found, theirs(z, 500).sample, rtol=0, atol=1e-10)
        assert (found - theirs(2 * z - 1, 500).sample).abs().max() > 1e-3


def test_cores_simple_scheduler_is_trailing_spacing(root):
    """So a graph needs no own SIGMAS node: Basic Scheduler `simple` is diffusers' timestep_spacing "trailing"."""
    model, *_ = load_unconditional(write_folder(root / "net", make_network("cifar10")).name)
    schedule = diffusers.DDIMScheduler(timestep_spacing="trailing")
    schedule.set_timesteps(50)
    sampling = model.model.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 50)
    assert torch.equal(sigmas[:-1], sampling.sigmas[schedule.timesteps]) and sigmas[-1] == 0


@pytest.mark.parametrize("name, changes", [
    ("linear", {}), ("scaled_linear", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    ("cosine", {"beta_schedule": "squaredcos_cap_v2"}), ("short", {"num_train_timesteps": 250}),
    ("ddim", {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}),
    ("zero snr", {"rescale_betas_zero_snr": True}),
])
def test_schedule_is_the_folders(name, changes):
    config = {**SCHEDULER, **changes}
    sampling = make_sampling(config)
    theirs = diffusers.DDPMScheduler.from_config({k: v for k, v in config.items() if k != "_class_name"}).alphas_cumprod
    assert torch.isfinite(sampling.sigmas).all() and len(sampling.sigmas) == config["num_train_timesteps"]
    torch.testing.assert_close((1 / (1 + sampling.sigmas.double() ** 2)).float(), theirs, rtol=1e-5, atol=1e-7)
    assert sampling.percent_to_sigma(0.5) == pytest.approx(
        float(sampling.sigma(torch.tensor((len(theirs) - 1) / 2))), rel=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_parametrisations_are_diffusers(prediction):
    sampling = make_sampling({**SCHEDULER, "prediction_type": prediction})
    theirs = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    theirs.set_timesteps(1000)
    z, output, t = noise(1, 3, 8, 8), noise(1, 3, 8, 8, seed=2), 400
    expected = theirs.step(output, t, z).pred_original_sample
    sigma = sampling.sigmas[t].view(1)
    x = z * (1 + sigma**2).sqrt()
    torch.testing.assert_close(sampling.calculate_input(sigma, x), z, rtol=0, atol=1e-6)
    torch.testing.assert_close(sampling.calculate_denoised(sigma, output, x), expected, rtol=0, atol=2e-6)


def test_pixels_pass_through_the_vae(root):
    _, vae, _ = load_unconditional(write_folder(root / "net", make_network("cifar10")).name)
    image = torch.rand(2, 24, 40, 3, generator=torch.Generator().manual_seed(0))
    latent = vae.encode(image)
    assert latent.shape == (2, 3, 24, 40)
    torch.testing.assert_close(latent, image.movedim(-1, 1) * 2 - 1, rtol=0, atol=1e-6)
    torch.testing.assert_close(vae.decode(latent), image, rtol=0, atol=1e-6)


def test_hooks_fire_as_in_cores_unet(root):
    model, _, conditioning = load_unconditional(write_folder(root / "net", make_network("celebahq")).name)
    blocks, middles = [], []

    def middle(args):
        middles.append((tuple(args["h"].shape), args["transformer_options"]["block"], tuple(args["timesteps"].shape)))
        assert set(args) == {"h", "x", "emb", "context", "y", "timesteps", "transformer_options"}
        return {"h": args["h"] * scale}

    def entered(h, options):
        blocks.append(options["block"])
        return h

    def decoded(h, hsp, options):
        blocks.append(options["block"])
        return h, hsp

    patched = model.clone()
    patched.set_model_patch(middle, "middle_block_after_patch")
    patched.set_model_input_block_patch(entered)
    patched.set_model_output_block_patch(decoded)
    x, sigmas = noise(2, 3, 64, 32) * 3, torch.tensor([3.0, 0.0])
    scale = 1.0
    plain = sample(model, conditioning, x, sigmas)
    assert torch.equal(sample(patched, conditioning, x, sigmas), plain)
    scale = 0.5
    assert (sample(patched, conditioning, x, sigmas) - plain).abs().max() > 1e-4
    assert middles == [((2, 64, 2, 1), ("middle", 0), (2,))] * 2
    assert blocks[: len(blocks) // 2] == [("input", i) for i in range(7)] + [("output", i) for i in range(6)]
    adapter = find_adapter(model)
    assert adapter.shape(adapter.keys("h_space", "")[0], 64, 32) == (64, 2, 1)


def test_conditioning_is_ignored_and_empty_latents_fit(root):
    model, _, conditioning = load_unconditional(write_folder(root / "net", make_network("cifar10")).name)
    x, sigmas = noise(1, 3, 32, 32) * 3, torch.tensor([3.0, 1.0, 0.0])
    text = [[torch.ones(1, 77, 768), {"pooled_output": torch.ones(1, 768)}]]
    assert torch.equal(sample(model, text, x, sigmas), sample(model, conditioning, x, sigmas))
    empty = comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, 4, 4, 8), 8)
    assert empty.shape == (1, 3, 32, 64)


@pytest.mark.parametrize("dtype, tolerance", [("fp16", 2e-2), ("bf16", 8e-2)])
def test_half_weights_stay_close(root, dtype, tolerance):
    write_folder(root / "net", make_network("cifar10", seed=8))
    full, half = load_unconditional("net", "fp32")[0], load_unconditional("net", dtype)[0]
    assert half.model_size() < 0.6 * full.model_size()
    x, sigma = noise(1, 3, 32, 32) * 2, torch.tensor(1.7)
    torch.testing.assert_close(predict(half, x, sigma).float(), predict(full, x, sigma), rtol=0, atol=tolerance)


def test_folders_are_found(root):
    write_folder(root / "one", make_network("cifar10"))
    write_folder(root / "lab" / "two", make_network("cifar10"), pipeline=True)
    (root / "sd").mkdir()
    (root / "sd" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert list_folders() == ["lab/two", "one"]


@pytest.mark.parametrize("name", ["../outside", "missing", "", ".", "/etc"])
def test_paths_stay_inside(root, name):
    with pytest.raises(ValueError, match="models|folder"):
        load_unconditional(name)


def test_pickles_are_refused_with_the_way_out(root):
    folder = write_folder(root / "old", make_network("cifar10"))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="no .safetensors"):
        load_unconditional("old")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="(?s)diffusion_pytorch_model.bin.*save_pretrained"):
        load_unconditional("old")


@pytest.mark.parametrize("key, value, message", [
    ("in_channels", 1, "in_channels is 1, expected 3"),
    ("num_class_embeds", 10, "num_class_embeds is 10"),
    ("time_embedding_type", "fourier", "time_embedding_type is fourier"),
    ("_class_name", "UNet2DConditionModel", "_class_name is UNet2DConditionModel"),
    ("down_block_types", ["SkipDownBlock2D"], "SkipDownBlock2D"),
])
def test_other_models_are_refused(root, key, value, message):
    folder = write_folder(root / "net", make_network("cifar10"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=message):
        load_unconditional("net")


def test_broken_folders_say_what_is_wrong(root):
    folder = write_folder(root / "net", make_network("cifar10"))
    schedule = folder / "scheduler_config.json"
    schedule.write_text(json.dumps({**SCHEDULER, "_class_name": "ScoreSdeVeScheduler"}))
    with pytest.raises(ValueError, match="ScoreSdeVeScheduler"):
        load_unconditional("net")
    schedule.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_unconditional("net")
    schedule.unlink()
    with pytest.raises(ValueError, match="no scheduler_config.json"):
        load_unconditional("net")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "block_out_channels": [64, 64, 64, 64]}))
    with pytest.raises((ValueError, RuntimeError)):
        load_unconditional("net")


def test_sizes_that_do_not_fit_are_refused(root):
    model, _, conditioning = load_unconditional(write_folder(root / "net", make_network("celebahq")).name)
    with pytest.raises(ValueError, match="multiples of 32, got 40x64"):
        sample(model, conditioning, noise(1, 3, 64, 40), torch.tensor([3.0, 0.0]))


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("changes, message", [
    ({"block_out_channels": [32, 1 << 40, 64, 64]}, "block_out_channels is .* at most"),
    ({"block_out_channels": [32] * 100_000}, "block_out_channels|more than the"),
    ({"block_out_channels": [32, 32, 32, 10**400]}, "block_out_channels"),
    ({"block_out_channels": 3}, "block_out_channels"),
    ({"layers_per_block": 10**9}, "layers_per_block 1000000000 are more than the"),
    ({"layers_per_block": "two"}, "layers_per_block"),
    ({"block_out_channels": [64, 64, 64, 64]}, "does not fit its config.json: .* expected, .* found"),
    ({"layers_per_block": 1}, "does not fit its config.json"),
    ({"norm_num_groups": 10**12}, "makes no network of it"),
    ({"attention_head_dim": 0}, "makes no network of it"),
    ({"down_block_types": "DownBlock2D"}, "down_block_types must name 4 blocks"),
    ({"act_fn": [1]}, "makes no network of it"),
])
def test_sizes_that_only_a_config_claims_take_no_memory(root, monkeypatch, changes, message):
    folder = write_folder(root / "net", make_network("cifar10"))
    rewrite(folder / "config.json", **changes)
    from diffusers import UNet2DModel

    monkeypatch.setattr(UNet2DModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("memory was taken"))
    with pytest.raises(ValueError, match=message):
        load_unconditional("net")


@pytest.mark.parametrize("changes, message", [
    ({"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000, expected 1 to"),
    ({"num_train_timesteps": 0}, "num_train_timesteps"),
    ({"num_train_timesteps": "1000"}, "num_train_timesteps"),
    ({"trained_betas": [float("nan")] * 3}, "no noise schedule"),
    ({"trained_betas": "x"}, "trained_betas must be a list"),
    ({"beta_end": float("inf")}, "beta_end is inf"),
    ({"beta_end": 10**400}, "beta_end"),
    ({"beta_start": -3.0}, "no noise schedule"),
    ({"beta_schedule": "nothing"}, "makes no schedule of it"),
    ({"prediction_type": ["epsilon"]}, "prediction_type"),
])
def test_schedules_that_no_model_has_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_sampling({**SCHEDULER, **changes}, True)


def test_damaged_files_get_a_sentence(root):
    folder = write_folder(root / "net", make_network("cifar10"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    incomplete = "no complete safetensors file"
    for damaged, said in ((data[: len(data) // 2], incomplete), (b"<!DOCTYPE html>" * 100, "is a web page, not a model"), (b"", incomplete)):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=said):
            load_unconditional("net")
    tensors = {key: tensor.clone() for key, tensor in make_network("cifar10").state_dict().items()}
    tensors["conv_out.weight"][0, 0, 0, 0] = float("nan")
    safetensors.torch.save_file(tensors, str(weights))
    with pytest.raises(ValueError, match="conv_out.weight holds NaN"):
        load_unconditional("net")


def test_names_of_old_attention_layers_are_understood(root):
    """google/ddpm-* were saved before diffusers renamed them."""
    network = make_network("cifar10")
    folder = write_folder(root / "net", network)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, tensor in network.state_dict().items():
        for new, before in old.items():
            key = key.replace(f".{new}.", f".{before}.")
        tensors[key] = tensor.clone()
    assert any(".query." in key for key in tensors)
    safetensors.torch.save_file(tensors, str(folder / "diffusion_pytorch_model.safetensors"), {"format": "pt"})
    state = load_unconditional("net")[0].model.diffusion_model.network.state_dict()
    assert torch.equal(state["mid_block.attentions.0.to_q.weight"], network.state_dict()["mid_block.attentions.0.to_q.weight"])


@pytest.mark.parametrize("text, message", [(b"[" * 3000 + b"]" * 3000, "not valid JSON"), (b"\xff\xfe", "cannot be read"), (b"[1]", "JSON object")])
def test_configs_that_are_none(root, text, message):
    folder = write_folder(root / "net", make_network("cifar10"))
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load_unconditional("net")


def test_a_huge_config_is_neither_listed_nor_read(root, monkeypatch):
    folder = write_folder(root / "net", make_network("cifar10"))
    with open(folder / "config.json", "r+b") as file:
        file.truncate(300 << 20)  # sparse
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
    monkeypatch.setattr(Path, "read_text", lambda path, **kwargs: pytest.fail("it was read"))
    assert Listing().names([root])[0] == []
    with pytest.raises(ValueError, match="config.json has 315 MB"):
        load_unconditional("net")


def test_a_listing_reads_again_only_what_has_changed(tmp_path, monkeypatch):
    for number in range(30):
        (tmp_path / f"net{number:02}").mkdir()
        (tmp_path / f"net{number:02}" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    reads, scans, looks = [], [], []
    read, scan, stat = Path.read_bytes, os.scandir, os.stat
    monkeypatch.setattr(Path, "read_bytes", lambda path: (reads.append(path), read(path))[1])
    monkeypatch.setattr(os, "scandir", lambda path: (scans.append(path), scan(path))[1])
    monkeypatch.setattr(os, "stat", lambda path, **kwargs: (looks.append(path), stat(path, **kwargs))[1])
    listing, now = Listing(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert len(listing.names([tmp_path])[0]) == 30 and len(reads) == 30 and len(scans) == 31
    looks.clear()
    assert len(listing.names([tmp_path])[0]) == 30 and looks == []  # asked again for the same prompt
    now[0] = 10.0
    assert len(listing.names([tmp_path])[0]) == 30 and len(reads) == 30 and len(scans) == 31 and looks
    (tmp_path / "net00" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    (tmp_path / "lab" / "new" / "unet").mkdir(parents=True)
    (tmp_path / "lab" / "new" / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    now[0] = 20.0
    assert listing.names([tmp_path])[0] == ["lab/new", *(f"net{number:02}" for number in range(1, 30))]
    assert len(reads) == 32
