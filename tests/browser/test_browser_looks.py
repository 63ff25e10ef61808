"""The pack's own socket colours and translations reach the page."""

import json
import re

import pytest
from support.live import ROOT, workflow_by_name

from pastiche.nodes import sockets

SOCKETS = sorted(set(re.findall(r'Custom\("(PASTICHE_[A-Z_]+)"', "".join(path.read_text() for path in (ROOT / "nodes").rglob("*.py")))))


def test_every_socket_has_a_colour_in_both_canvases(ui):
    assert sockets and len(SOCKETS) >= 4
    colours = ui.page.evaluate("async () => (await import('/extensions/pastiche/colours.js')).COLOURS")
    assert sorted(colours) == SOCKETS and len(set(colours.values())) == len(SOCKETS)
    for palette in (None, "light", "dark"):  # a palette forgets what it does not know
        if palette:
            ui.set_setting("Comfy.ColorPalette", palette)
            ui.page.wait_for("(want) => app.canvas.default_connection_color_byType.PASTICHE_STYLE === want", colours["PASTICHE_STYLE"])
        classic = ui.page.evaluate("(types) => types.map((t) => [app.canvas.default_connection_color_byType[t], app.canvas.constructor.link_type_colors[t]])", SOCKETS)
        assert classic == [[colours[name]] * 2 for name in SOCKETS]
        modern = ui.page.evaluate("(types) => types.map((t) => getComputedStyle(document.documentElement).getPropertyValue(`--color-datatype-${t}`).trim())", SOCKETS)
        assert modern == [colours[name] for name in SOCKETS]


def test_translations_are_served(server):
    served = server.get("/i18n")["zh"]
    ours = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert {name: served["nodeDefs"][name] for name in ours} == ours
    assert served["templateWorkflows"]["category"]["pastiche"]


SWAP = """() => {
    const saved = app.graph.serialize(), node = saved.nodes.find((n) => n.type === "PasticheStyleInjection");
    const [content, style] = ["content", "style"].map((name) => node.inputs.findIndex((input) => input.name === name));
    [node.inputs[content], node.inputs[style]] = [node.inputs[style], node.inputs[content]];
    for (const link of saved.links)
        if (link[3] === node.id) link[4] = link[4] === content ? style : link[4] === style ? content : link[4];
    return saved;
}"""


@pytest.mark.parametrize("mode", ["classic", "nodes2"])
def test_content_stands_above_style_and_old_workflows_load(ui, mode):
    """Saved with style first, as the pack once had it, the graph is the same."""
    ui.set_setting("Comfy.VueNodes.Enabled", mode == "nodes2")
    try:
        ui.load_api(json.loads(workflow_by_name("styleid_mini").read_text()))
        order = "() => app.graph.nodes.find((n) => n.type === 'PasticheStyleInjection').inputs.filter((i) => !i.widget).map((i) => i.name)"
        assert ui.page.evaluate(order)[:3] == ["model", "content", "style"]
        sent, old = ui.prompt(), ui.page.evaluate(SWAP)
        assert [i["name"] for n in old["nodes"] if n["type"] == "PasticheStyleInjection" for i in n["inputs"]][1:3] == ["style", "content"]
        ui.load(old)
        assert ui.problems() == [] and ui.prompt() == sent
    finally:
        ui.set_setting("Comfy.VueNodes.Enabled", False)
