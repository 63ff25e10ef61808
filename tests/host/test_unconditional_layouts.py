"""Load Unconditional on single files: ADM, P2, iDDPM and the original DDPM, against plain float64 networks of the papers."""

import copy
import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.hspace import inject_content
from pastiche.nodes.host.networks import unconditional_checkpoint, unconditional_files, unconditional_layouts
from pastiche.nodes.host.networks.families import find_adapter
from pastiche.nodes.host.networks.unconditional_checkpoint import Reading, read_weights
from pastiche.nodes.host.networks.unconditional_files import alphas_bar, list_models, load_model
from pastiche.nodes.host.networks.unconditional_folders import find_folder
from pastiche.nodes.host.trajectories.inversion import invert
from support.published_unets import PLANS, draw, predict
from support.sampling import sample, schedule
from support.unconditional import TRAINED, noise, root  # noqa: F401  (a fixture)

ORDERS = unconditional_layouts.ORDERS
READINGS = {"iddpm": Reading(betas="linear", timesteps=1000), "one level": Reading(betas="linear", timesteps=1000),
            "adm, other order": Reading(heads="32 channels each", attention_order=ORDERS[2])}


def exact(model, x, t, **options):
    """The network's prediction in float64; t are indices of the model's schedule."""
    network = copy.deepcopy(model.model.diffusion_model).double()
    return network(x.double(), t.double(), transformer_options=options)


def saved(root, plan, name="net.safetensors", seed=0, **notes):
    state = draw(PLANS[plan], seed)
    if name.endswith(".safetensors"):
        save_file(state, str(root / name), metadata=notes or None)
    else:
        torch.save(state, root / name)
    return state


@pytest.mark.parametrize("plan", PLANS)
def test_prediction_is_the_papers(root, plan):
    """The whole forward at 1e-10, in a batch with two timesteps; of six channels the first three."""
    state = saved(root, plan)
    model, *_ = load_model("net.safetensors", reading=READINGS.get(plan, Reading()))
    x, t = noise(2, 3, 16, 8), torch.tensor([999.0, 17.0])
    expected = predict(PLANS[plan], state, x, t)[:, :3]
    assert expected.std() > 0.05
    torch.testing.assert_close(exact(model, x, t), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("plan", ["p2", "iddpm", "ddpm"])
def test_sampling_steps_are_the_papers(root, plan):
    """What core's sampler makes of the network: x - sigma eps at x / sqrt(1 + sigma^2), in float32."""
    state = saved(root, plan)
    model, _, conditioning = load_model("net.safetensors", reading=READINGS.get(plan, Reading()))
    x, sigma = 3 * noise(1, 3, 16, 16), model.model.model_sampling.sigmas[600]
    found = sample(model, x, torch.stack([sigma, torch.zeros(())]), conditioning)
    eps = predict(PLANS[plan], state, x / (1 + sigma**2).sqrt(), torch.tensor([600.0]))[:, :3]
    torch.testing.assert_close(found.double(), x - sigma * eps, rtol=0, atol=1e-3 * float(sigma))


def test_wrong_heads_are_other_predictions(root):
    """What the tests above would miss if heads or their order were not read at all."""
    saved(root, "iddpm")
    x, t = noise(1, 3, 8, 8), torch.tensor([500.0])
    found = [exact(load_model("net.safetensors", reading=reading)[0], x, t)
             for reading in (Reading(), Reading(heads="4"), Reading(heads="2"), Reading(attention_order=ORDERS[2]))]
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).abs().max() > 1e-4 and (found[0] - found[3]).abs().max() > 1e-4


def test_long_schedules_tell_the_network_thousandths(root):
    """iDDPM's 4000 steps, cosine by default: index i is timestep i / 4 of the network's own scale."""
    state = saved(root, "iddpm")
    model, *_ = load_model("net.safetensors")
    sampling = model.model.model_sampling
    assert len(sampling.sigmas) == 4000 and float(sampling.timestep(sampling.sigmas[3001])) == 3001
    torch.testing.assert_close(1 / (1 + sampling.sigmas.double() ** 2), alphas_bar("cosine", 4000), rtol=1e-4, atol=1e-7)
    x = noise(1, 3, 8, 8)
    expected = predict(PLANS["iddpm"], state, x, torch.tensor([3001 / 4]))[:, :3]
    torch.testing.assert_close(exact(model, x, torch.tensor([3001.0])), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("betas, theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_betas_are_diffusers(betas, theirs):
    diffusers = pytest.importorskip("diffusers")
    expected = diffusers.DDPMScheduler(beta_schedule=theirs).alphas_cumprod.double()
    torch.testing.assert_close(alphas_bar(betas, 1000), expected, rtol=1e-4, atol=1e-9)


def test_linear_betas_of_other_lengths_destroy_as_much():
    """Four times the steps, each a quarter: the same alpha_bar up to second order in beta and in 1/T."""
    torch.testing.assert_close(alphas_bar("linear", 4000)[399::400].log(), alphas_bar("linear", 1000)[99::100].log(), rtol=2e-2, atol=0)
    with pytest.raises(ValueError, match="timesteps: 15 are too few"):
        alphas_bar("linear", 15)


@pytest.mark.parametrize("plan", ["adm", "ddpm"])
def test_h_space_is_the_middle_blocks_output(root, plan):
    state = saved(root, plan)
    model, *_ = load_model("net.safetensors")
    x, t, seen, theirs = noise(1, 3, 16, 8), torch.tensor([700.0]), [], []

    def halve(args):
        seen.append(args["h"])
        return {**args, "h": args["h"] / 2}

    found = exact(model, x, t, patches={"middle_block_after_patch": [halve]})
    expected = predict(PLANS[plan], state, x, t, lambda h: theirs.append(h) or h / 2)[:, :3]
    torch.testing.assert_close(seen[0], theirs[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (found - exact(model, x, t)).abs().max() > 1e-4
    adapter = find_adapter(model)
    assert adapter.shape(adapter.keys("h_space", "")[0], 16, 8) == tuple(seen[0].shape[1:])


def test_blocks_are_numbered_as_in_the_file(root):
    saved(root, "iddpm")
    model, *_ = load_model("net.safetensors")
    blocks = []
    patches = {"input_block_patch": [lambda h, options: blocks.append(options["block"]) or h],
               "output_block_patch": [lambda h, skip, options: blocks.append(options["block"]) or (h, skip)]}
    exact(model, noise(1, 3, 8, 8), torch.tensor([3.0]), patches=patches)
    assert blocks == [("input", i) for i in range(9)] + [("output", i) for i in range(9)]


@pytest.mark.parametrize("plan", ["p2", "ddpm"])
def test_h_space_slerp(root, plan):
    saved(root, plan)
    model, _, conditioning = load_model("net.safetensors")
    sigmas = schedule(model, 3, "simple")
    start, trajectory = invert(model, {"samples": noise(1, 3, 16, 16)}, sigmas, scheme="next")
    _, other = invert(model, {"samples": noise(1, 3, 16, 16, seed=2)}, sigmas, scheme="next")
    bank = capture(model, other, "h_space", "auto", "ram", "full")
    results = [sample(patched, start["samples"], sigmas, conditioning)
               for patched in (model, inject_content(model, bank, 0.0, 400), inject_content(model, bank, 0.6, 400))]
    assert torch.equal(results[0], results[1])
    assert (results[0] - results[2]).abs().max() > 1e-3


@pytest.mark.parametrize("extension", ["pt", "pth", "ckpt"])
def test_pickles_of_tensors_are_read(root, extension):
    saved(root, "ddpm")
    saved(root, "ddpm", f"net.{extension}")
    x, t = noise(1, 3, 8, 8), torch.tensor([10.0])
    assert torch.equal(exact(load_model(f"net.{extension}")[0], x, t), exact(load_model("net.safetensors")[0], x, t))


def test_files_of_old_torch_are_read(root):
    state = draw(PLANS["ddpm"])
    torch.save(state, root / "old.ckpt", _use_new_zipfile_serialization=False)
    assert read_weights(root / "old.ckpt").state.keys() == state.keys()


@pytest.mark.parametrize("wrap, averaged", [
    (lambda old, new: {"state_dict": new, "epoch": 3}, False),
    (lambda old, new: {"model": old, "ema": new, "optimizer": {"state": {0: torch.zeros(1)}}}, True),
    (lambda old, new: [old, {"state": {}, "param_groups": []}, 3, 100, new], True),
    (lambda old, new: {f"module.{key}": value for key, value in new.items()}, False),
    (lambda old, new: {"ema": {"shadow": {f"module.model.{key}": value for key, value in new.items()}}}, True),
])
def test_averaged_weights_are_chosen_and_wrappers_dropped(root, wrap, averaged):
    old, new = draw(PLANS["ddpm"], 1), draw(PLANS["ddpm"], 2)
    torch.save(wrap(old, new), root / "net.pt")
    found = read_weights(root / "net.pt")
    assert found.averaged is averaged and found.state.keys() == new.keys()
    assert all(torch.equal(found.state[key], new[key]) for key in new)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_pickles_that_name_code_are_refused(root, monkeypatch):
    monkeypatch.chdir(root)
    torch.save({"model": Evil(), **draw(PLANS["ddpm"])}, root / "net.pt")
    with pytest.raises(ValueError, match="net.pt was refused, and nothing in it was run"):
        load_model("net.pt")
    assert not (root / "ran").exists()


def test_broken_files_are_sentences(root):
    state = saved(root, "ddpm")
    whole = (root / "net.safetensors").read_bytes()
    (root / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (root / "page.pt").write_bytes(b"<html>not found</html>")
    torch.save(state, root / "net.pt")
    with zipfile.ZipFile(root / "net.pt") as source, zipfile.ZipFile(root / "packed.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
    torch.save({"loss": 3.0}, root / "empty.pt")
    torch.save({**state, "conv_in.bias": torch.zeros(1).expand(32)}, root / "wide.pt")
    torch.save({**state, "conv_in.bias": torch.zeros(32, dtype=torch.int64)}, root / "whole.pt")
    for name, message in [("cut.safetensors", "may be truncated"), ("page.pt", "a web page"), ("packed.pt", "compressed"),
                          ("empty.pt", "no state dict"), ("wide.pt", "more than the file holds"), ("whole.pt", "torch.int64")]:
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            load_model(name)


def changed(plan, drop="", **extra):
    state = {key: value for key, value in draw(PLANS[plan]).items() if not (drop and key.startswith(drop))}
    return {**state, **{key.replace("__", "."): value for key, value in extra.items()}}


@pytest.mark.parametrize("state, message", [
    (lambda: changed("p2", label_emb__weight=torch.zeros(10, 256)), "is conditioned on classes"),
    (lambda: changed("p2", input_blocks__0__0__weight=torch.zeros(64, 6, 3, 3)), "takes 6 channels, expected 3"),
    (lambda: changed("p2", "output_blocks"), "no decoder .*a classifier"),
    (lambda: changed("iddpm", input_blocks__1__1__transformer_blocks__0__attn1__to_q__weight=torch.zeros(1)), "text-conditioned"),
    (lambda: changed("iddpm", first_stage_model__x=torch.zeros(1)), "latent diffusion model"),
    (lambda: {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, "diffusers' names"),
    (lambda: {"layer.weight": torch.zeros(1)}, "of no layout that is known here"),
    (lambda: changed("p2", "input_blocks.2."), "some are missing"),
    (lambda: changed("p2", "middle_block.1.norm"), "lacks middle_block.1.norm.weight"),
    (lambda: changed("iddpm", "input_blocks.1.0.out_layers.3.bias"), "lacks input_blocks.1.0.out_layers.3.bias"),
    (lambda: changed("iddpm", "output_blocks.0.0.skip_connection"), "skip.weight is missing"),
    (lambda: changed("iddpm", something__else=torch.zeros(1)), "1 tensors .*no place for, the first something.else"),
    (lambda: changed("iddpm", out__2__weight=torch.zeros(4, 32, 3, 3)), "gives 4 channels"),
    (lambda: changed("iddpm", input_blocks__1__0__in_layers__2__weight=torch.zeros(48, 32, 3, 3)), "32 and 48 channels, expected multiples of 32"),
    (lambda: changed("iddpm", input_blocks__1__0__emb_layers__1__weight=torch.zeros(64, 64)), r"\(64, 64\), expected \(64, 128\)"),
    (lambda: changed("ddpm", "up.1.attn.2"), "has not 3 residual blocks, or attention"),
    (lambda: changed("ddpm", mid__attn_1__q__weight=torch.zeros(64, 32, 1, 1)), r"attention weight of mid.attn_1 is \(64, 32, 1, 1\)"),
    (lambda: changed("ddpm", up__2__block__0__conv1__weight=torch.zeros(64, 64, 3, 3)), "up.2.block.0 takes 64 channels where 128 arrive"),
])
def test_other_networks_are_refused(root, state, message):
    torch.save(state(), root / "net.pt")
    with pytest.raises(ValueError, match=f"net.pt.*{message}"):
        load_model("net.pt")


def test_settings_that_do_not_fit_are_refused(root):
    saved(root, "iddpm")
    saved(root, "ddpm", "old.safetensors")
    with pytest.raises(ValueError, match="heads: net.safetensors has an attention of 64 channels, which heads of 128 channels do not divide"):
        load_model("net.safetensors", reading=Reading(heads="128 channels each"))
    with pytest.raises(ValueError, match="heads: old.safetensors.*one head"):
        load_model("old.safetensors", reading=Reading(heads="4"))
    with pytest.raises(ValueError, match="folder's config.json tells them"):
        load_model("folder", reading=Reading(betas="cosine"))
    with pytest.raises(ValueError, match="betas, timesteps: got auto, auto, square, 0"):
        Reading(betas="square")


def test_notes_of_the_converter_are_taken(root):
    saved(root, "iddpm", **Reading(heads="2", betas="cosine", timesteps=400).notes())
    model, *_ = load_model("net.safetensors")
    attention = model.model.diffusion_model.middle[1]
    assert attention.heads == 2 and len(model.model.model_sampling.sigmas) == 400
    torch.testing.assert_close(1 / (1 + model.model.model_sampling.sigmas.double() ** 2), alphas_bar("cosine", 400), rtol=1e-4, atol=1e-7)
    chosen = load_model("net.safetensors", reading=Reading(heads="4"))[0].model.diffusion_model.middle[1]
    assert chosen.heads == 4
    saved(root, "iddpm", "wrong.safetensors", **{f"{unconditional_checkpoint.NOTE}timesteps": "many"})
    with pytest.raises(ValueError, match="wrong.safetensors: its notes"):
        load_model("wrong.safetensors")


def test_files_are_listed_beside_folders(root):
    (root / "lab").mkdir()
    for name in ("one.pt", "lab/two.safetensors", "three.ckpt", "notes.txt"):
        (root / name).write_bytes(b"")
    (root / "whole").mkdir()
    (root / "whole" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (root / "whole" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert list_models() == ["whole", "lab/two.safetensors", "one.pt", "three.ckpt"]


def test_files_stay_inside(root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    save_file(draw(PLANS["ddpm"]), str(outside / "net.safetensors"))
    assert unconditional_files.find_file(os.path.relpath(outside / "net.safetensors", root)) is None


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_linked_models_are_found_and_read(root, tmp_path_factory):
    """Models on another disk: what is linked in is listed, and what is listed loads."""
    outside = tmp_path_factory.mktemp("disk")
    save_file(draw(PLANS["ddpm"]), str(outside / "net.safetensors"))
    (root / "net.safetensors").symlink_to(outside / "net.safetensors")
    (root / "lab").symlink_to(outside, target_is_directory=True)
    assert list_models() == ["lab/net.safetensors", "net.safetensors"]
    for name in list_models():
        assert load_model(name)[0].model.diffusion_model.layout.family == "DDPM"
    (root / "blobs").symlink_to(TRAINED, target_is_directory=True)
    assert find_folder("blobs") == root / "blobs"


def test_sizes_that_do_not_fit_are_refused(root):
    saved(root, "p2")
    model, _, conditioning = load_model("net.safetensors")
    with pytest.raises(ValueError, match="multiples of 4, got 10x16"):
        sample(model, noise(1, 3, 16, 10), torch.tensor([3.0, 0.0]), conditioning)


@pytest.mark.parametrize("dtype, tolerance", [("fp16", 2e-2), ("bf16", 1e-1)])
def test_half_weights_stay_close(root, dtype, tolerance):
    saved(root, "p2")
    x, sigmas = 3 * noise(1, 3, 16, 16), torch.tensor([1.7, 0.0])
    full, half = (load_model("net.safetensors", kind)[0] for kind in ("fp32", dtype))
    assert half.model_size() < 0.6 * full.model_size()
    torch.testing.assert_close(sample(half, x, sigmas, [[None, {}]]), sample(full, x, sigmas, [[None, {}]]), rtol=0, atol=3 * tolerance)
