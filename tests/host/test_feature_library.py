import json
import os
from pathlib import Path

import folder_paths
import pytest
import safetensors.torch
import torch
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.features.library import list_files, load_bank, register_folder, save_bank
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.sockets import FeatureKey
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, schedule

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def folder():
    register_folder()


@pytest.fixture(scope="module")
def model():
    return tiny_unet("sdxl")


@pytest.fixture(scope="module")
def trajectory(model):
    return invert(model, {"samples": random_latent(7, 9)}, schedule(model, 3), tiny_cond(model), "next")[1]


def forget_listing():
    folder_paths.filename_list_cache.pop("pastiche_features", None)


@pytest.mark.parametrize("captured", ["ram", "disk", "recompute"])
@pytest.mark.parametrize("loaded", ["ram", "vram", "disk", "recompute"])
def test_round_trip(model, trajectory, captured, loaded):
    bank = capture(model, trajectory, "self_attention, h_space", "3-5", captured)
    path = save_bank(bank, f"library/{captured}_{loaded}")
    forget_listing()
    name = f"library/{path.name}"
    assert name in [entry.replace(os.sep, "/") for entry in list_files()]
    back = load_bank(name, loaded, model)
    assert back.keys == bank.keys and back.trajectory.fingerprint == trajectory.fingerprint
    assert torch.equal(back.trajectory.latents, trajectory.latents) and torch.equal(back.trajectory.sigmas, trajectory.sigmas)
    assert torch.equal(back.trajectory.conditioning[0][0], trajectory.conditioning[0][0])
    assert torch.equal(back.trajectory.conditioning[0][1]["pooled_output"], trajectory.conditioning[0][1]["pooled_output"])
    expected = capture(model, trajectory, "self_attention, h_space", "3-5", "ram")
    assert (back.store is None) == (loaded == "recompute" if captured != "recompute" else loaded in ("recompute", "disk"))
    if back.store is None:
        return
    for key in bank.keys:
        for step in (1, 2, 3):
            assert torch.equal(back.store.read(key, step, CPU), expected.store.read(key, step, CPU))


def test_the_file_is_plain_safetensors_with_metadata(model, trajectory):
    path = save_bank(capture(model, trajectory, "self_attention", "3-5", "ram"), "plain")
    tensors = safetensors.torch.load_file(str(path))
    key = FeatureKey("self_attention", "output", 3)
    assert tensors[str(key)].shape[0] == 3
    with safetensors.safe_open(str(path), "pt") as file:
        about = file.metadata()
    assert about["format"] == "pastiche-features" and about["version"] == "1" and about["method"] == "capture"
    assert json.loads(about["latent_size"]) == [7, 9] and about["steps"] == "3"
    assert about["weights"] == trajectory.fingerprint.weights
    assert not list(path.parent.glob("*.partial"))


def test_saving_twice_never_overwrites(model, trajectory):
    bank = capture(model, trajectory, "h_space", "auto", "recompute")
    assert save_bank(bank, "twice") != save_bank(bank, "twice")


def test_truncated_and_foreign_files_get_a_sentence(model, trajectory):
    path = save_bank(capture(model, trajectory, "h_space", "auto", "ram"), "broken")
    whole = path.read_bytes()
    for size in (4, 60, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            load_bank(path.name, "ram", model)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, str(path))
    with pytest.raises(ValueError, match="not written by Save Features"):
        load_bank(path.name, "ram", model)
    metadata = {"format": "pastiche-features", "version": "1"}
    safetensors.torch.save_file({"trajectory.sigmas": torch.zeros(3), "trajectory.latents": torch.zeros(3)}, str(path), metadata)
    with pytest.raises(ValueError, match="damaged"):
        load_bank(path.name, "ram", model)


def test_another_model_is_refused(model, trajectory):
    path = save_bank(capture(model, trajectory, "h_space", "auto", "ram"), "other")
    with pytest.raises(ValueError, match="made with another model"):
        load_bank(path.name, "ram", tiny_unet("sdxl", seed=4))


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "missing.safetensors"])
def test_paths_outside_the_folders_are_refused(model, name):
    outside = Path(folder_paths.get_output_directory()).parent / "secret.safetensors"
    outside.write_bytes(b"")
    with pytest.raises(ValueError, match="is not in pastiche_features"):
        load_bank(name, "ram", model)


@pytest.mark.parametrize("prefix", ["../../escape", "/abs/escape"])
def test_saving_outside_the_output_folder_is_refused(model, trajectory, prefix):
    with pytest.raises(ValueError, match="output folder"):
        save_bank(capture(model, trajectory, "h_space", "auto", "recompute"), prefix)


def test_conditioning_that_a_file_cannot_hold_is_refused(model, trajectory):
    from dataclasses import replace

    context, extra = trajectory.conditioning[0]
    guided = replace(trajectory, conditioning=[[context, extra | {"control": object()}]])
    with pytest.raises(ValueError, match="carries control"):
        save_bank(capture(model, guided, "h_space", "auto", "recompute"), "control")
