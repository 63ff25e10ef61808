"""Every shipped workflow in ComfyUI's own front end: it loads clean, is the API graph, and runs from there."""

import io
import json

import pytest
from host import graph
from PIL import Image, ImageStat
from support.live import ROOT, SMALL

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def load(ui, path):
    ui.load(json.loads(path.read_text()))
    assert ui.problems() == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_loads_clean_and_is_its_api_form(ui, artifacts, path):
    load(ui, path)
    ui.page.screenshot(artifacts / f"workflow_{path.stem}.png")
    api = json.loads((path.parent / "api" / path.name).read_text())
    assert graph.differences(api, ui.prompt()) == []


@pytest.mark.parametrize("path", [p for p in WORKFLOWS if p.stem.endswith("_mini")], ids=lambda path: path.stem)
def test_mini_workflow_runs_from_the_page(ui, artifacts, path):
    load(ui, path)
    prompt = ui.prompt()
    for class_type, name, value in SMALL:
        for node in graph.find(prompt, class_type):
            if not isinstance(prompt[node]["inputs"].get(name), list):
                ui.set_widget(node, name, value)
    result = ui.queue()
    assert ui.problems() == []
    ui.page.screenshot(artifacts / f"ran_{path.stem}.png")
    saved = [image for image in result.images if image["type"] == "output"]
    assert saved
    image = Image.open(io.BytesIO(ui.server.fetch(saved[0]))).convert("RGB")
    assert max(ImageStat.Stat(image).stddev) > 2


def test_workflows_have_thumbnails():
    assert WORKFLOWS
    for path in WORKFLOWS:
        with Image.open(path.with_suffix(".jpg")) as image:
            assert image.format == "JPEG" and 128 <= max(image.size) <= 1600


def test_problems_are_noticed(ui):
    """The check above can fail: a missing node and a missing model are reported."""
    ui.load_api({"1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "no_such_file.safetensors"}}})
    assert any("Load Checkpoint" in problem or "CheckpointLoaderSimple" in problem for problem in ui.problems())
    missing = {
        "version": 0.4, "links": [], "groups": [], "config": {}, "extra": {},
        "nodes": [{"id": 1, "type": "NoSuchNode", "pos": [0, 0], "size": [200, 100], "flags": {}, "order": 0, "mode": 0,
                   "inputs": [], "outputs": [], "properties": {}, "widgets_values": []}],
    }
    ui.load(missing)
    assert any("NoSuchNode" in problem for problem in ui.problems())
