"""Style Library's gallery under a real mouse and keyboard, in the classic canvas and in Nodes 2.0: choose, run, delete, limit."""

import json
import os
import time

import pytest
import safetensors.torch
import torch
from host.comfy import ServerError

NODE = "PasticheStyleLibrary"
FIND = f'(() => app.graph.nodes.find((n) => n.type === "{NODE}"))()'
VIEW = f'{FIND}.widgets.find((w) => w.name === "gallery").element'
PROMPT = {
    "1": {"class_type": "PasticheLoadMini", "inputs": {"kind": "empty"}, "_meta": {"title": "Mini model"}},
    "2": {"class_type": "BasicScheduler", "inputs": {"model": ["1", 0], "scheduler": "normal", "steps": 2, "denoise": 1.0}, "_meta": {"title": "Schedule"}},
    "3": {
        "class_type": NODE,
        "inputs": {"style": "ready/impasto", "model": ["1", 0], "memory": "recompute", "vae": ["1", 1], "sigmas": ["2", 0], "positive": ["1", 2], "size": 64,
                   "streams": "self_attention", "layers": "6-7"},
        "_meta": {"title": "Library"},
    },
    "4": {"class_type": "PasticheSaveFeatures", "inputs": {"features": ["3", 0], "filename_prefix": "mine", "picture": ["3", 4], "notes": "kept"},
          "_meta": {"title": "Save"}},
    "5": {"class_type": "PreviewImage", "inputs": {"images": ["3", 4]}, "_meta": {"title": "Picture"}},
}
PLACES = {"Mini model": (0, 0, 240, 120), "Schedule": (0, 200, 240, 130), "Library": (300, 0, 520, 760), "Save": (880, 0, 300, 160), "Picture": (880, 260, 300, 300)}


@pytest.fixture
def folder(server):
    """The server's folder of saved styles, with a style of another model and two files that are none."""
    root = server.base / "output" / "pastiche_features"
    root.mkdir(parents=True, exist_ok=True)
    about = {"format": "pastiche-features", "version": "1", "method": "recompute", "scheme": "next", "weights": "0123456789abcdef", "patches": "",
             "keys": "[]", "steps": "2", "model": "somebody_elses.safetensors", "family": "SDXL", "notes": "", "settings": '{"steps": "2"}'}
    safetensors.torch.save_file({"trajectory.sigmas": torch.zeros(3), "trajectory.latents": torch.zeros(3, 1, 16, 8, 8)}, str(root / "theirs.safetensors"), about)
    (root / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>" + b" " * 200)
    yield root
    for path in root.iterdir():
        path.unlink()


@pytest.fixture(params=["classic", "nodes2"])
def library(ui, folder, request):
    ui.set_setting("Comfy.VueNodes.Enabled", request.param == "nodes2")
    ui.load({"version": 0.4, "nodes": [], "links": [], "groups": [], "config": {}, "extra": {}})
    ui.load_api(PROMPT)
    ui.page.evaluate("(places) => { for (const n of app.graph.nodes) { const [x, y, w, h] = places[n.title]; n.pos = [x, y]; n.setSize([w, h]); } }", PLACES)
    ui.command("Comfy.Canvas.FitView")
    ui.page.wait_for(f"() => {VIEW}.querySelectorAll('[role=option]').length > 3")
    time.sleep(1)
    ui.mode = request.param
    yield ui
    problems = [text for text in ui.console_errors() if "filename=undefined" not in text]  # core's Load Image, where input/ is empty
    ui.set_setting("Comfy.VueNodes.Enabled", False)
    assert problems == []


def tiles(ui):
    return ui.page.evaluate(f"() => [...{VIEW}.querySelectorAll('[role=option]')].map((t) => t.dataset.key)")


def tile(ui, key, what):
    return ui.page.evaluate(f"(key) => {{ const t = [...{VIEW}.querySelectorAll('[role=option]')].find((t) => t.dataset.key === key); return {what}; }}", key)


def click_on(ui, selector):
    box = ui.page.evaluate(f"(s) => {{ const r = {VIEW}.querySelector(s).getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; }}", selector)
    ui.page.click(*box)


def choose(ui, key):
    tile(ui, key, "t.scrollIntoView({block: 'nearest'})")
    ui.page.click(*tile(ui, key, "(() => { const r = t.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"))


def status(ui):
    return ui.page.evaluate(f"() => {VIEW}.querySelector('[role=status]').textContent")


def test_choose_run_save_and_delete(library, folder, artifacts):
    assert tiles(library)[0].startswith("ready/") and {"saved/theirs.safetensors", "saved/page.safetensors"} <= set(tiles(library))
    loaded = "() => [...%s.querySelectorAll('img')].slice(0, 3).every((i) => i.complete && i.naturalWidth > 50)" % VIEW
    assert library.page.wait_for(loaded)
    assert tile(library, "ready/impasto", "t.getAttribute('aria-selected')") == "true"
    assert tile(library, "saved/theirs.safetensors", "t.className.includes('unfit')") is False  # the model in hand is not known yet
    assert "web page" in tile(library, "saved/page.safetensors", "t.title")

    choose(library, "ready/woodcut")
    assert library.widget("Library", "style") == library.prompt()["3"]["inputs"]["style"] == "ready/woodcut"
    places = library.page.evaluate("() => app.graph.nodes.map((n) => [...n.pos, ...n.size])")
    library.queue()

    # what was saved is there with its picture, and what belongs to another model is grey
    library.page.wait_for(f"() => [...{VIEW}.querySelectorAll('[role=option]')].some((t) => t.dataset.key.includes('mine_'))")
    mine = next(key for key in tiles(library) if "mine_" in key)
    tile(library, mine, "t.scrollIntoView({block: 'nearest'})")
    library.page.wait_for(f"(key) => {{ const i = [...{VIEW}.querySelectorAll('[role=option]')].find((t) => t.dataset.key === key).querySelector('img'); return i?.complete && i.naturalWidth > 50; }}", mine)
    assert tile(library, mine, "[t.className.includes('unfit'), t.lastChild.textContent]") == [False, "mini.safetensors"]
    assert "kept" in tile(library, mine, "t.title") and "steps: 2" in tile(library, mine, "t.title")
    grey = tile(library, "saved/theirs.safetensors", "[t.className.includes('unfit'), t.title]")
    assert grey[0] and "made with somebody_elses.safetensors (SDXL); the model of the last run is mini.safetensors (Mini)" in grey[1]
    assert library.page.evaluate("() => app.graph.nodes.map((n) => [...n.pos, ...n.size])") == places
    library.page.screenshot(artifacts / f"style_library_{library.mode}.png")
    click_on(library, "input[type=checkbox]")
    assert "saved/theirs.safetensors" not in tiles(library) and mine in tiles(library)
    click_on(library, "input[type=checkbox]")

    # deleting asks first, and takes that file only
    choose(library, mine)
    click_on(library, "[data-action=delete]")
    assert f"Delete {mine[6:-12]}" in status(library) and "cannot be brought back" in status(library)
    library.page.screenshot(artifacts / f"style_library_delete_{library.mode}.png")
    click_on(library, "[data-action=keep]")
    assert (folder / mine[6:]).exists() and status(library) == ""
    click_on(library, "[data-action=delete]")
    click_on(library, "[data-action=confirm]")
    library.page.wait_for(f"(key) => ![...{VIEW}.querySelectorAll('[role=option]')].some((t) => t.dataset.key === key)", mine)
    assert not (folder / mine[6:]).exists() and (folder / "theirs.safetensors").exists() and len(library.page.evaluate("() => app.graph.nodes.map((n) => n.id)")) == 5
    assert not any("pastiche_style_library" in entry["prompt"][2] for entry in library.server.get("/history").values())


def test_keyboard(library, folder):
    library.page.evaluate(f"() => {VIEW}.querySelector('[role=listbox]').focus()")
    library.page.key("ArrowRight")
    library.page.key("Enter")
    assert library.widget("Library", "style") == tiles(library)[1]
    library.page.key("End")
    last = tiles(library)[-1]
    assert last == "saved/theirs.safetensors"
    library.page.key("Delete")  # asks; the node stays
    assert "Delete theirs" in status(library) and library.page.evaluate("() => document.activeElement.dataset.action") == "keep"
    library.page.key("Escape")
    assert status(library) == "" and (folder / "theirs.safetensors").exists() and tiles(library)[-1] == last
    assert library.page.evaluate("() => app.graph.nodes.length") == 5


@pytest.mark.parametrize("library", ["classic"], indirect=True)  # the same in both
def test_a_file_that_changed_meanwhile_stays(library, folder):
    choose(library, "saved/theirs.safetensors")
    click_on(library, "[data-action=delete]")
    os.utime(folder / "theirs.safetensors", (1, 1))
    click_on(library, "[data-action=confirm]")
    library.page.wait_for(f"() => {VIEW}.querySelector('[role=status]').textContent.includes('has changed since it was shown')")
    assert (folder / "theirs.safetensors").exists()


@pytest.mark.parametrize("library", ["classic"], indirect=True)  # the same in both
def test_a_style_of_another_model_is_told_and_marked(library, folder):
    choose(library, "saved/theirs.safetensors")
    with pytest.raises(ServerError):
        library.queue()
    library.page.wait_for(f"() => [...{VIEW}.querySelectorAll('[role=option]')].find((t) => t.dataset.key === 'saved/theirs.safetensors').className.includes('unfit')")
    library.page.evaluate("() => { app.extensionManager.toast.removeAll?.(); }")
    for _ in range(3):
        library.page.key("Escape")


@pytest.mark.parametrize("library", ["nodes2"], indirect=True)
def test_the_limit_is_set_here_and_kept_when_saving(library, folder):
    box = library.page.evaluate(f"() => {{ const r = {VIEW}.querySelector('input[type=number]').getBoundingClientRect(); return [r.x + 20, r.y + r.height / 2]; }}")
    library.page.click(*box, count=2)
    library.page.type("7")
    library.page.key("Tab")
    library.page.wait_for(f"() => {VIEW}.querySelector('[role=status]').textContent === ''")
    deadline = time.monotonic() + 10
    while not (folder / "library.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert json.loads((folder / "library.json").read_text()) == {"limit": 7_000_000}
