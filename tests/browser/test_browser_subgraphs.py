"""The one-node blueprints: listed under the pack, labelled, image first, their dials outside, and they run."""

import io
import json

import pytest
from host import graph
from PIL import Image, ImageStat
from support.live import ROOT

BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))

CONNECT = """(pictures) => {
    const box = app.graph.nodes.find((node) => node.isSubgraphNode?.());
    const add = (type) => { const node = LiteGraph.createNode(type); app.graph.add(node); return node; };
    const input = (label) => box.inputs.findIndex((slot) => slot.label === label);
    const mini = add("PasticheLoadMini");
    mini.connect(0, box, input("model"));
    mini.connect(1, box, input("vae"));
    const texts = add("CLIPLoader");
    texts.connect(0, box, input("clip"));
    for (const [label, picture] of pictures) {
        const node = add("PasticheSamplePicture");
        node.widgets.find((widget) => widget.name === "picture").value = picture;
        node.connect(0, box, input(label));
        if (input("mask") >= 0 && label === "content") node.connect(1, box, input("mask"));
    }
    box.connect(0, add("SaveImage"), 0);
    for (const [name, value] of [["size", 96], ["steps", 3], ["training steps", 2]])
        for (const widget of box.widgets.filter((widget) => widget.label === name || widget.name === name)) widget.value = value;
    return { inputs: box.inputs.filter((slot) => slot.type !== "FLOAT").map((slot) => slot.label ?? slot.name),
             outputs: box.outputs.map((slot) => [slot.label, slot.type]), dials: box.widgets.map((widget) => widget.label ?? widget.name) };
}"""


def test_comfyui_lists_the_blueprints(ui):
    listed = {entry["name"] for entry in ui.server.get("/global_subgraphs").values()}
    assert len(BLUEPRINTS) == 3 and {path.stem for path in BLUEPRINTS} <= listed


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem.rpartition("(")[2].strip(")"))
def test_blueprint_connects_and_runs(ui, artifacts, path):
    ui.load(json.loads(path.read_text()))
    if "InjectFusion" in path.stem:
        pictures = [["original: gives the look", "impasto"], ["content: what is injected", "coffee"]]
    else:
        pictures = [["content", "coffee"], ["style", "impasto"]]
    box = ui.page.evaluate(CONNECT, pictures)
    ui.page.screenshot(artifacts / f"blueprint_{path.stem.rpartition('(')[2].strip(')')}.png")
    assert box["outputs"] == [["image", "IMAGE"]]
    assert {"model", "clip", "vae", *(label for label, _ in pictures)} <= set(box["inputs"])
    assert not {"image", "image_1", "pixels", "positive"} & set(box["inputs"])
    assert {"size", "steps"} <= set(box["dials"])

    # the mini model has no text encoder: its conditioning in the place of what the prompts give
    prompt = ui.prompt()
    for key in graph.find(prompt, "CLIPTextEncode"):
        prompt[key] = {"class_type": "PasticheLoadMini", "inputs": {"kind": "painting" if prompt[key]["inputs"]["text"] else "empty"}}
        prompt = json.loads(json.dumps(prompt).replace(f'["{key}", 0]', f'["{key}", 2]'))
    prompt = {key: node for key, node in prompt.items() if node["class_type"] != "CLIPLoader"}
    assert {node["inputs"]["largest_size"] for node in prompt.values() if "largest_size" in node["inputs"]} == {96}
    (image,) = ui.server.run(prompt).images
    picture = Image.open(io.BytesIO(ui.server.fetch(image))).convert("RGB")
    assert max(picture.size) == 96 and max(ImageStat.Stat(picture).stddev) > 2
