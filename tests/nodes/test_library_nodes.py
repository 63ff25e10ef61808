"""Style Library, Save Style LoRA and Manage Style Library as ComfyUI calls them."""

import json
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from support.library import own_library
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, schedule
from support.styles import random_lora

from pastiche.nodes import library
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.features.library import save_bank
from pastiche.nodes.host.networks.fingerprint import fingerprint
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.library import ManageStyles, SaveStyleLoRA, StyleLibrary


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    return own_library(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def model():
    return tiny_unet()


def saved(model, name="mine"):
    trajectory = invert(model, {"samples": random_latent(8, 8)}, schedule(model, 2), tiny_cond(model), "next")[1]
    return save_bank(capture(model, trajectory, "self_attention", "6-7", "recompute"), name)


def run(node, **inputs):
    node = type(node.__name__, (node,), {"hidden": SimpleNamespace(unique_id="7", prompt=None, extra_pnginfo=None)})
    return node.execute(**inputs)


def shown():
    """What the page reads of /object_info."""
    return json.loads(json.dumps(StyleLibrary.GET_NODE_INFO_V1()))["input"]["required"]["style"][1]["pastiche_library"]


def test_the_page_is_told_everything_by_object_info(model):
    path = saved(model)
    (entry,) = [style for style in shown()["styles"] if style["kind"] != "ready"]
    assert entry["key"] == f"saved/{path.name}" and entry["size"] == path.stat().st_size == shown()["total"]
    assert (entry["folder"], entry["file"]) == ("pastiche_features", path.name)
    assert folder_paths.get_folder_paths("pastiche_features")[entry["index"]] == str(path.parent)  # core's route finds the picture there
    options = StyleLibrary.define_schema().inputs[0].options
    assert options == [style["key"] for style in shown()["styles"]] and len(options) == 13


def test_the_model_in_hand_is_told_whether_the_style_fits_or_not(model, monkeypatch):
    told = []
    monkeypatch.setattr(library, "say_to_page", lambda event, detail: told.append((event, detail)))
    key = f"saved/{saved(model).name}"
    output = run(StyleLibrary, style=key, model=model, memory="recompute")
    hand = {"weights": fingerprint(model).weights, "model": "", "family": type(model.model).__name__}
    assert output.ui == {"pastiche_library": [hand]} and told == [("pastiche_library", {"node": "7", **hand})]
    other = tiny_unet(seed=4)
    with pytest.raises(ValueError, match="made with another model"):
        run(StyleLibrary, style=key, model=other, memory="recompute")
    assert told[1][1]["weights"] == fingerprint(other).weights != hand["weights"]


def test_a_style_saved_anew_is_run_again(model):
    path = saved(model)
    key = f"saved/{path.name}"
    before = StyleLibrary.fingerprint_inputs(style=key, memory="ram")
    assert before == StyleLibrary.fingerprint_inputs(style=key, memory="ram")
    path.write_bytes(path.read_bytes() + b" ")
    assert StyleLibrary.fingerprint_inputs(style=key, memory="ram") != before
    assert StyleLibrary.fingerprint_inputs(style="saved/gone", memory="ram") == "saved/gone"


def test_save_style_lora_and_delete_it(model):
    output = run(SaveStyleLoRA, lora=random_lora(model, 0), model=model, filename_prefix="oil", picture=torch.rand(1, 32, 32, 3), notes="")
    key = output.result[0]
    assert output.ui["pastiche_saved"] == [True] and output.ui["text"][0].startswith(f"{key}: ")
    assert run(StyleLibrary, style=key, model=model).result[3].keys() == random_lora(model, 0).keys()
    (entry,) = [style for style in shown()["styles"] if style["key"] == key]
    with pytest.raises(ValueError, match="has changed since it was shown"):
        run(ManageStyles, action="delete", style=key, size=1, modified=0.0)
    done = run(ManageStyles, action="delete", style=key, size=entry["size"], modified=entry["modified"])
    assert done.result[0].startswith("Deleted oil_00001_ (") and key not in [style["key"] for style in shown()["styles"]]
    assert ManageStyles.fingerprint_inputs(action="delete") != ManageStyles.fingerprint_inputs(action="delete")  # NaN: never from the cache


def test_the_limit_in_megabytes(model):
    assert run(ManageStyles, action="limit", limit_mb=3).result == ("The style library may take 3 MB.",)
    assert shown()["limit"] == 3_000_000
    assert run(ManageStyles, action="limit").result == ("The style library has no limit.",) and shown()["limit"] == 0
    assert not list(Path(folder_paths.get_output_directory()).rglob("library.json"))
    with pytest.raises(ValueError, match="action: got 'x', expected one of delete, limit"):
        run(ManageStyles, action="x")
