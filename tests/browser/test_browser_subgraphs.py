"""The one-node StyleID blueprint: its dials are on the outside, it lists under the pack, and it runs."""

import io
import json

from PIL import Image
from support.live import ROOT

BLUEPRINT = ROOT / "subgraphs" / "StyleID Style Transfer.json"

CONNECT = """() => {
    const style = app.graph.nodes.find((node) => node.isSubgraphNode?.());
    const add = (type, place) => {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        node.pos = place;
        return node;
    };
    const mini = add("PasticheLoadMini", [-700, 0]);
    const images = ["content_coffee.jpg", "style_impasto.png"].map((name, i) => {
        const node = add("LoadImage", [-350, 400 * i]);
        node.widgets.find((widget) => widget.name === "image").value = name;
        return node;
    });
    const save = add("SaveImage", [500, 0]);
    const input = (label) => style.inputs.findIndex((slot) => slot.label === label);
    mini.connect(0, style, input("model"));
    mini.connect(1, style, input("vae"));
    mini.connect(2, style, input("empty prompt"));
    images.forEach((node, i) => node.connect(0, style, input(["content image", "style image"][i])));
    style.connect(style.outputs.findIndex((slot) => slot.type === "IMAGE"), save, 0);
    return style.widgets.map((widget) => widget.name);
}"""

SET = """(values) => {
    const style = app.graph.nodes.find((node) => node.isSubgraphNode?.());
    for (const [name, value] of Object.entries(values))
        for (const widget of style.widgets.filter((widget) => widget.name.includes(name))) widget.value = value;
}"""


def test_comfyui_lists_the_blueprint(ui):
    listed = ui.server.get("/global_subgraphs")
    assert any(entry["name"] == BLUEPRINT.stem for entry in listed.values())


def test_blueprint_connects_and_runs(ui, artifacts):
    ui.load(json.loads(BLUEPRINT.read_text()))
    widgets = ui.page.evaluate(CONNECT)
    for name in ("largest_size", "steps", "gamma", "temperature", "layers", "strength"):
        assert any(name in widget for widget in widgets), widgets
    ui.page.evaluate(SET, {"largest_size": 96, "steps": 3})
    ui.page.screenshot(artifacts / "subgraph_styleid.png")
    prompt = ui.prompt()
    assert {node["inputs"]["largest_size"] for node in prompt.values() if "largest_size" in node["inputs"]} == {96}
    result = ui.queue()
    assert ui.problems() == []
    saved = [image for image in result.images if image["type"] == "output"]
    assert max(Image.open(io.BytesIO(ui.server.fetch(saved[0]))).size) == 96
