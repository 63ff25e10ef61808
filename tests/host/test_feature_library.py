import json
import os
from pathlib import Path

import folder_paths
import pytest
import safetensors.torch
import torch
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.features.library import list_files, load_bank, register_folder, save_bank
from pastiche.nodes.host.features.on_the_way import invert_and_capture
from pastiche.nodes.host.injections.style import inject_style
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.sockets import FeatureKey
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule

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


def rewritten(path, name, change):
    """The file with one tensor changed."""
    tensors = safetensors.torch.load_file(str(path))
    with safetensors.safe_open(str(path), "pt") as file:
        about = file.metadata()
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors[name] = change(tensors[name])
    safetensors.torch.save_file(tensors, str(path), about)


def spoiled(tensor):
    tensor.flatten()[-1] = float("nan")
    return tensor


@pytest.mark.parametrize("name, change, message", [
    ("trajectory.sigmas", lambda sigmas: sigmas.flip(0).contiguous(), "noise levels must ascend from 0"),
    ("trajectory.sigmas", spoiled, r"trajectory \(sigmas\): holds NaN"),
    ("trajectory.latents", spoiled, r"trajectory \(latents\): holds NaN"),
    ("conditioning.context", spoiled, "conditioning: holds NaN"),
    ("trajectory.latents", lambda latents: latents[:2].contiguous(), "damaged"),
])
@pytest.mark.parametrize("memory", ["ram", "disk", "recompute"])
def test_a_trajectory_that_is_none_is_refused(model, trajectory, name, change, message, memory):
    path = save_bank(capture(model, trajectory, "h_space", "auto", "ram"), "spoiled")
    rewritten(path, name, change)
    with pytest.raises(ValueError, match=f'"{path.name}" is damaged: .*{message}' if message != "damaged" else message):
        load_bank(path.name, memory, model)


def test_features_that_are_nan_are_told(model, trajectory):
    bank = capture(model, trajectory, "h_space", "auto", "ram")
    path, key = save_bank(bank, "nan"), bank.keys[0]
    rewritten(path, str(key), spoiled)
    with pytest.raises(ValueError, match=f'"{path.name}": h_space/middle.0.0 holds NaN or infinite values at step 3'):
        load_bank(path.name, "ram", model)
    store = load_bank(path.name, "disk", model).store
    assert store.read(key, 1, CPU).isfinite().all()
    with pytest.raises(ValueError, match="at step 3"):
        store.read(key, 3, CPU)


@pytest.mark.parametrize("changes", [{"keys": "[" * 3000}, {"keys": "[1]"}, {"keys": "[]"}, {"keys": '["nothing/output.1.0"]'}, {"keys": '["x"]'}, {"method": ""}, {"keys": "{}"}])
def test_notes_that_mean_nothing_are_refused(model, trajectory, changes):
    path = save_bank(capture(model, trajectory, "h_space", "auto", "ram"), "notes")
    tensors = safetensors.torch.load_file(str(path))
    with safetensors.safe_open(str(path), "pt") as file:
        about = file.metadata()
    safetensors.torch.save_file({key: tensor.clone() for key, tensor in tensors.items()}, str(path), {**about, **changes})
    if changes == {"method": ""}:
        assert load_bank(path.name, "disk", model).store is None  # as a file without features
        return
    with pytest.raises(ValueError, match="is damaged"):
        load_bank(path.name, "ram", model)


def test_the_name_that_save_features_gives_is_the_one_that_load_features_lists(model, trajectory):
    from pastiche.nodes.features import LoadFeatures, SaveFeatures

    bank = capture(model, trajectory, "h_space", "auto", "recompute")
    for prefix in ("agreed", "a/b/agreed", "agreed/"):
        name = SaveFeatures.execute(bank, prefix).result[0]
        forget_listing()
        assert name in list_files()
        assert torch.equal(LoadFeatures.execute(name, model, "recompute").result[1].latents, trajectory.latents)


def test_a_name_that_another_listed_folder_has_is_not_taken(model, trajectory):
    """Load Features reads the first it finds, and models/ comes before output/."""
    bank = capture(model, trajectory, "h_space", "auto", "recompute")
    first = Path(folder_paths.models_dir) / "pastiche_features" / "taken_00001_.safetensors"
    first.parent.mkdir(parents=True, exist_ok=True)
    first.write_bytes(b"")
    assert save_bank(bank, "taken").name == "taken_00002_.safetensors"


@pytest.mark.parametrize("prefix, message", [
    ("", "give a name"), (" ", "give a name"), ("./", "give a name"), ("n" * 300, "no file can be called 'nnn"), ("a\0b", "no file can be called"), ("\ud800", "no file can be called"),
])
def test_names_that_no_file_can_have(model, trajectory, prefix, message):
    with pytest.raises(ValueError, match=f"filename_prefix: .*{message}"):
        save_bank(capture(model, trajectory, "h_space", "auto", "recompute"), prefix)


def test_a_full_disk_is_told_and_leaves_nothing(model, trajectory, monkeypatch):
    from pastiche.nodes.host.features import stores

    bank = capture(model, trajectory, "h_space", "auto", "ram")
    monkeypatch.setattr(stores.FileWriter, "write", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match="cannot be written .No space left on device"):
        save_bank(bank, "full/disk")
    assert not list((Path(folder_paths.get_output_directory()) / "pastiche_features" / "full").iterdir())
    with pytest.raises(ValueError, match="memory: the disk took no more features .No space"):
        capture(model, trajectory, "h_space", "auto", "disk")


def test_numbers_beyond_half_precision_are_told(model, trajectory):
    """An inf among half-precision features was once injected without a word."""
    from pastiche.nodes.host.features.stores import MemoryStore

    key = FeatureKey("h_space", "middle", 0)
    half = MemoryStore({key: (1, 4)}, 1, torch.float16, CPU)
    with pytest.raises(ValueError, match="h_space/middle.0.0 is NaN or beyond what float16 holds. Set precision to full"):
        half.write(key, 1, torch.full((1, 4), 1e5))
    MemoryStore({key: (1, 4)}, 1, torch.float32, CPU).write(key, 1, torch.full((1, 4), 1e5))


def test_a_photo_in_several_saved_styles_is_inverted_once_and_costs_its_samplings():
    """Every forward of the network is counted: the library's part of a picture is none of them."""
    model, steps = tiny_unet(), 2
    sigmas, positive, forwards = schedule(model, steps), tiny_cond(model), []
    names = []
    for seed in (2, 3):
        bank = invert_and_capture(
            model, {"samples": random_latent(seed=seed)}, sigmas, "self_attention", "6-8", "ram", positive=positive, scheme="next"
        )[2]
        names.append(f"library/{save_bank(bank, f'library/styles_{seed}').name}")
    forget_listing()
    model.model.diffusion_model.register_forward_pre_hook(lambda module, args: forwards.append(len(args[0])))
    noise, _, content = invert_and_capture(
        model, {"samples": random_latent(seed=1)}, sigmas, "self_attention", "6-8", "ram", positive=positive, scheme="predicted"
    )
    assert forwards == [1] * (steps + 1)
    pictures = []
    for memory, name in zip(("disk", "ram"), names):
        forwards.clear()
        patched = inject_style(model, load_bank(name, memory, model), content, 0.75, 1.5, 1.0, "6-8", 0.0, 1.0, None)
        pictures.append(sample(patched, noise["samples"], sigmas, positive))
        assert forwards == [1] * steps
    assert not torch.allclose(*pictures, atol=1e-2)
