"""The style library: what a saved style says of itself, what fits a model, deleting, the size limit, and files that are none."""

import base64
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image
from pastiche.nodes.host.features import shelf, style_notes
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.features.library import load_bank, save_bank
from pastiche.nodes.host.features.ready_styles import READY, ready_file, ready_picture
from pastiche.nodes.host.features.shelf import delete_style, find_style, list_styles, listing, set_size_limit, size_limit
from pastiche.nodes.host.features.style_library import load_style
from pastiche.nodes.host.features.style_loras import load_lora, save_lora
from pastiche.nodes.host.networks.fingerprint import fingerprint, model_name
from pastiche.nodes.host.networks.mini import load_mini
from pastiche.nodes.host.trajectories.inversion import invert
from support.library import own_library
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, schedule
from support.styles import random_lora


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An output folder of the test's own."""
    return own_library(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def model():
    return tiny_unet()


@pytest.fixture(scope="module")
def bank(model):
    trajectory = invert(model, {"samples": random_latent(7, 9)}, schedule(model, 2), tiny_cond(model), "next")[1]
    return capture(model, trajectory, "self_attention", "6-7", "ram")


def picture(height=300, width=500):
    """Red at the left, blue at the right."""
    image = torch.zeros(1, height, width, 3)
    image[:, :, : width // 2, 0] = 1
    image[:, :, width // 2 :, 2] = 1
    return image


def metadata(path):
    with safetensors.safe_open(str(path), "pt") as file:
        return file.metadata()


def cover(about):
    return base64.b64decode(json.loads(about["ssmd_cover_images"])[0])


def test_a_saved_style_tells_its_picture_model_and_settings(bank, model):
    path = save_bank(bank, "deer", picture(), "painted by\nnobody")
    about = metadata(path)
    with Image.open(io.BytesIO(cover(about))) as small:
        assert small.format == "JPEG" and small.size == (192, 115) and len(cover(about)) < 12_000
        left, right = (np.asarray(small)[57, x].astype(int) for x in (40, 150))
        assert left[0] > 200 > 60 > left[2] and right[2] > 200 > 60 > right[0]
    (style,) = [style for style in list_styles() if style.kind != "ready"]
    assert (style.key, style.kind, style.title) == (f"saved/{path.name}", "features", path.stem)
    assert (style.size, style.weights, style.cover) == (path.stat().st_size, fingerprint(model).weights, True)
    assert style.family == type(model.model).__name__ and style.notes == "painted by\nnobody"
    assert style.settings == {
        "scheme": "next", "steps": "2", "latent": "7x9", "pictures": "1", "streams": "self_attention", "layers": "output 6, output 7",
    }
    assert torch.equal(load_bank(path.name, "ram", model).trajectory.latents, bank.trajectory.latents)


def test_without_a_picture_the_latents_own_colours_are_drawn(bank, model):
    latent = torch.zeros(1, 4, 8, 16)
    latent[:, :, :, 8:] = 1.5
    factors = torch.tensor(model.model.latent_format.latent_rgb_factors, dtype=torch.float64)
    bias = getattr(model.model.latent_format, "latent_rgb_factors_bias", None) or [0.0] * 3
    expected = [((factors.T @ torch.full((4,), value, dtype=torch.float64) + torch.tensor(bias, dtype=torch.float64)) / 2 + 0.5).clamp(0, 1) * 255 for value in (0.0, 1.5)]
    with Image.open(io.BytesIO(style_notes.latent_thumbnail(model, latent))) as small:
        pixels = np.asarray(small.convert("RGB")).astype(float)
    for x, colour in ((2, expected[0]), (13, expected[1])):
        assert np.abs(pixels[4, x] - colour.numpy()).max() < 6  # of 255, JPEG's rounding
    assert cover(metadata(save_bank(bank, "plain")))[:2] == b"\xff\xd8"


def test_colours_that_do_not_fit_give_no_picture(model):
    assert style_notes.latent_thumbnail(model, torch.zeros(1, 5, 8, 8)) is None


def test_files_from_before_pictures_still_load_and_are_listed(bank, model):
    path = save_bank(bank, "old")
    about = metadata(path)
    for name in ("model", "family", "settings", "notes", "ssmd_cover_images"):
        del about[name]
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in safetensors.torch.load_file(str(path)).items()}, str(path), about)
    style = find_style(f"saved/{path.name}")
    assert (style.kind, style.cover, style.problem) == ("features", False, "") and style.settings["steps"] == "2"
    assert torch.equal(load_bank(path.name, "ram", model).trajectory.sigmas, bank.trajectory.sigmas)
    loaded = load_style(style.key, model, "ram", None, None, None, 256, "self_attention", "auto")
    assert torch.equal(loaded.trajectory.latents, bank.trajectory.latents) and "without a picture" in loaded.picture.message


def test_another_model_is_refused_with_both_names(bank):
    path = save_bank(replace(bank, model=named(bank.model, "sd15_of_mine.safetensors")), "other")
    other = named(tiny_unet(seed=4), "somebody_elses.safetensors")
    family = type(other.model).__name__
    message = rf"made with another model \(sd15_of_mine.safetensors \({family}\), fingerprint \w+, this one is somebody_elses.safetensors \({family}\), \w+\). Connect"
    with pytest.raises(ValueError, match=message):
        load_style(f"saved/{path.name}", other, "ram", None, None, None, 256, "self_attention", "auto")


def named(model, name):
    model = model.clone()
    model.cached_patcher_init = (None, (os.path.join("somewhere", name), None))
    return model


def test_names_of_models():
    assert str(model_name(load_mini()[0])) == "mini.safetensors (Mini)"
    assert str(model_name(named(tiny_unet(), "a.safetensors"))).startswith("a.safetensors (")
    assert model_name(tiny_unet()).name == ""


def test_a_style_lora_goes_round(model, folders):
    lora = random_lora(model, 0)
    key, path = save_lora(lora, model, "été/鹿", picture(64, 64), "painting of <sss>")
    assert path.is_relative_to(Path(folder_paths.get_output_directory()) / "loras" / "pastiche")
    style = find_style(key)
    assert (style.kind, style.title, style.notes) == ("lora", f"été/{path.stem}", "painting of <sss>")
    assert style.settings == {"rank": "4", "tensors": str(len(lora))}
    back = load_lora(style, model)
    assert back.keys() == lora.keys() and all(torch.equal(back[name], lora[name]) for name in lora)
    assert f"pastiche/été/{path.name}" in [name.replace(os.sep, "/") for name in folder_paths.get_filename_list("loras")]  # for core's Load LoRA
    loaded = load_style(key, model, "ram", None, None, None, 256, "self_attention", "auto")
    assert loaded.lora.keys() == lora.keys() and loaded.picture.shape == (1, 64, 64, 3) and "is a LoRA" in loaded.features.message


def test_a_lora_fits_its_family_and_no_other(model):
    style = find_style(save_lora(random_lora(model, 0), model, "lora", None, "")[0])
    assert load_lora(style, tiny_unet(seed=4))  # another checkpoint of the same kind
    with pytest.raises(ValueError, match=r"was trained on a model of the family \w+; this model is mini.safetensors of Mini. Connect a checkpoint of \w+, or choose"):
        load_lora(style, load_mini()[0])


@pytest.mark.parametrize("lora", [{}, {"a": torch.zeros(2, 2), "b": None}])
def test_what_is_no_lora_is_not_saved(model, lora):
    with pytest.raises(ValueError, match="lora: expected tensors by name"):
        save_lora(lora, model, "none", None, "")


@pytest.mark.parametrize("prefix", ["../../escape", "/abs/escape"])
def test_a_lora_stays_in_its_folder(model, prefix):
    with pytest.raises(ValueError, match="output folder"):
        save_lora(random_lora(model, 0), model, prefix, None, "")


def broken_files(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>" + b" " * 200)
    (folder / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (folder / "empty.safetensors").write_bytes(b"")
    safetensors.torch.save_file({"a": torch.zeros(1)}, str(folder / "foreign.safetensors"), {"format": "pt"})


def test_broken_and_foreign_files_are_listed_with_the_reason_and_harm_nothing(bank, model):
    path = save_bank(bank, "good")
    broken_files(path.parent)
    broken_files(Path(folder_paths.get_output_directory()) / "loras" / "pastiche")
    problems = {style.key: style.problem for style in list_styles() if style.kind == "unreadable"}
    assert len(problems) == 8
    assert "web page" in problems["saved/page.safetensors"] and "not a complete safetensors file" in problems["saved/cut.safetensors"]
    assert problems["saved/foreign.safetensors"].startswith("not written by Save Features")
    assert problems["lora/pastiche/foreign.safetensors"].startswith("not written by Save Style LoRA")
    for key in problems:
        with pytest.raises(ValueError, match=f'"{Path(key).stem}" cannot be used: '):
            load_style(key, model, "ram", None, None, None, 256, "self_attention", "auto")
    assert find_style(f"saved/{path.name}").problem == ""
    json.dumps(listing())


def test_notes_that_mean_nothing_are_shown_as_far_as_they_go(bank):
    path = save_bank(bank, "odd")
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(str(path)).items()}
    for changes in ({"settings": "[1]"}, {"settings": "{"}, {"settings": '{"a": [[1]]}'}, {"ssmd_cover_images": "x"}, {"ssmd_cover_images": '["####"]'}, {"ssmd_cover_images": '["/9j/4AAQ"]'}):
        safetensors.torch.save_file(tensors, str(path), {**metadata(path), **changes})
        style = find_style(f"saved/{path.name}")
        assert style.problem == "" and isinstance(style.settings, dict)
        if "ssmd_cover_images" in changes:
            assert style_notes.cover_of(changes) is None


@pytest.mark.parametrize("notes", ["数字绘画", "half \ud83d", "n" * 5000])
def test_any_notes_can_be_kept(bank, notes):
    path = save_bank(bank, "notes", None, notes)
    kept = find_style(f"saved/{path.name}").notes
    assert kept == notes.encode("utf-8", "replace").decode()[:2000]


@pytest.mark.parametrize("key", ["", "ready/nothing", "saved/../secret.safetensors", "saved//etc/passwd", "../x", "lora/secret.safetensors", "saved/missing.safetensors"])
def test_nothing_outside_of_the_library_can_be_named(key, folders):
    (Path(folder_paths.get_output_directory()) / "secret.safetensors").write_bytes(b"")
    lora = Path(folder_paths.get_output_directory()) / "loras" / "secret.safetensors"  # beside the library's own part
    lora.parent.mkdir(parents=True)
    lora.write_bytes(b"")
    for asked in (find_style, lambda name: delete_style(name, 0, 0.0)):
        with pytest.raises(ValueError, match="is not in the style library"):
            asked(key)
    assert lora.exists()


def test_deleting_takes_the_file_that_was_seen_and_no_other(bank):
    path = save_bank(bank, "gone")
    style = find_style(f"saved/{path.name}")
    for size, modified in ((style.size + 1, style.modified), (style.size, style.modified + 1), (0, 0.0)):
        with pytest.raises(ValueError, match="has changed since it was shown"):
            delete_style(style.key, size, modified)
    assert path.exists()
    delete_style(style.key, style.size, json.loads(json.dumps(style.modified)))
    assert not path.exists() and style.key not in [style.key for style in list_styles()]
    with pytest.raises(ValueError, match="comes with the pack"):
        delete_style("ready/impasto", 0, 0.0)
    assert ready_file("impasto").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_a_link_out_of_the_folder_is_not_deleted(folders):
    outside = folders / "outside.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, str(outside))
    root = Path(folder_paths.get_output_directory()) / "pastiche_features"
    root.mkdir(parents=True)
    (root / "link.safetensors").symlink_to(outside)
    style = find_style("saved/link.safetensors")
    with pytest.raises(ValueError, match="link out of its folder"):
        delete_style(style.key, style.size, style.modified)
    assert outside.exists()


def test_the_limit_refuses_and_deletes_nothing(bank, model):
    first = save_bank(bank, "first")
    held = first.stat().st_size
    assert size_limit() == 0 and listing()["total"] == held
    set_size_limit(held + 1000)
    assert size_limit() == listing()["limit"] == held + 1000
    before = sorted(first.parent.rglob("*"))
    for save in (lambda: save_bank(bank, "second"), lambda: save_lora(random_lora(model, 0), model, "second", None, "")):
        with pytest.raises(ValueError, match="its limit is .* and this style takes .* more. Delete styles in the Style Library"):
            save()
    assert sorted(first.parent.rglob("*")) == before
    set_size_limit(0)
    assert save_bank(bank, "second").exists() and size_limit() == 0


@pytest.mark.parametrize("text", ["", "{", "3", '{"limit": "x"}', '{"limit": true}', '{"limit": -1}', "[" * 3000])
def test_a_limit_that_cannot_be_read_is_told(bank, text):
    path = save_bank(bank, "first")
    (path.parent / shelf.LIMIT_FILE).write_text(text)
    with pytest.raises(ValueError, match="limit"):
        save_bank(bank, "second")
    assert listing()["limit"] == 0


def test_a_dozen_ready_styles_are_small_pictures_that_differ(repository):
    assert len(READY) == 12 and {path.stem for path in (repository / "js" / "styles").iterdir()} == set(READY)
    assert sum(ready_file(name).stat().st_size for name in READY) < 600_000
    small = [torch.nn.functional.interpolate(ready_picture(name).movedim(-1, 1), (32, 32), mode="area") for name in READY]
    assert min(float((a - b).abs().mean()) for i, a in enumerate(small) for b in small[:i]) > 0.02
    for name in READY:
        image = ready_picture(name)
        assert image.shape[0] == 1 and image.shape[-1] == 3 and float(image.std()) > 0.02
        assert find_style(f"ready/{name}").cover


def test_a_ready_style_becomes_features_of_the_model_in_hand():
    model, vae, conditionings = load_mini()
    sigmas = schedule(model, 2)
    loaded = load_style("ready/woodcut", model, "ram", vae, sigmas, conditionings["empty"], 64, "self_attention", "6-7")
    assert loaded.trajectory.fingerprint == fingerprint(model) and torch.equal(loaded.trajectory.schedule, sigmas.cpu())
    assert loaded.trajectory.latents.shape[-2:] == (8, 8) and {key.number for key in loaded.features.keys} == {6, 7}
    assert loaded.noise["samples"].shape == (1, 16, 8, 8) and "is no LoRA" in loaded.lora.message
    assert torch.equal(loaded.picture, ready_picture("woodcut"))
    for vae, sigmas, name in ((None, sigmas, "vae"), (vae, None, "sigmas")):
        with pytest.raises(ValueError, match=f"{name}: the ready style .* connect"):
            load_style("ready/woodcut", model, "ram", vae, sigmas, None, 64, "self_attention", "6-7")
