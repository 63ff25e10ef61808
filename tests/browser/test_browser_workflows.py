"""Every shipped workflow in ComfyUI's own front end: opened from the template browser, legible, the API graph, and run."""

import io
import json

import pytest
import templates
from host import graph
from host.browser import Browser
from host.comfy import Server, make_base
from host.frontend import Frontend
from PIL import Image, ImageStat
from support.live import ROOT, SMALL

TEMPLATES = templates.TEMPLATES
MINI = [template for template in TEMPLATES if template.mini]
LEGIBLE = 8 / 14  # below this zoom the classic canvas leaves out text: 14 units high, 8 pixels at least
# dials on subgraphs that say the same as SMALL
SMALL_DIALS = {"size": 128, "steps": 4, "training steps": 3}

SHRINK = """(small, dials) => {
    const graphs = [app.graph, ...(app.graph.subgraphs?.values() ?? [])];
    for (const node of graphs.flatMap((graph) => graph.nodes)) {
        const own = small.filter(([type]) => type === node.type).map(([, name, value]) => [name, value]);
        for (const [name, value] of [...own, ...(node.isSubgraphNode?.() ? Object.entries(dials) : [])]) {
            const widget = node.widgets?.find((w) => w.name === name || w.label === name);
            if (widget) { widget.value = value; widget.callback?.(value); }
        }
    }
    app.graph.setDirtyCanvas(true, true);
}"""


@pytest.fixture(scope="module")
def fresh(live_host, tmp_path_factory, page):  # `page` skips where there is no browser
    """A user's first look: a server with nothing in input/ and no model, in a browser of its own."""
    with Server(live_host, make_base(tmp_path_factory.mktemp("fresh"))) as server, Browser((1920, 1080)) as own:
        frontend = Frontend(own, server)
        frontend.open()
        yield frontend


def check_pictures(server, result):
    """Every picture that the run gave, and it is not blank."""
    assert result.images
    for entry in result.images:
        picture = Image.open(io.BytesIO(server.fetch(entry))).convert("RGB")
        assert max(ImageStat.Stat(picture).stddev) > 2, entry


def read(template):
    return json.loads((ROOT / "workflows" / f"{template.file}.json").read_text(encoding="utf-8"))


# ---- as a new user ---------------------------------------------------------------------------------


@pytest.mark.parametrize("template", MINI, ids=lambda template: template.api)
def test_template_opens_from_the_browser_and_runs(fresh, artifacts, template):
    """Nothing was put into input/: the Templates dialog, a click on the card, a click on Run, and pictures."""
    assert not [path for path in (fresh.server.base / "input").rglob("*") if path.is_file()]
    fresh.open_template(template.file, artifacts / "template_grid.png" if template is MINI[0] else None)
    fresh.page.screenshot(artifacts / f"opened_{template.api}.png")
    assert fresh.problems() == []
    assert fresh.page.evaluate("() => app.canvas.ds.scale") >= LEGIBLE
    fresh.page.evaluate(SHRINK, SMALL, SMALL_DIALS)
    sent = fresh.prompt()
    assert not [node for node in sent.values() if node["inputs"].get("largest_size", 128) != 128]
    result = fresh.queue()
    fresh.page.screenshot(artifacts / f"ran_{template.api}.png")
    assert fresh.problems() == []
    assert {image["node"] for image in result.images} >= {key for key, node in sent.items() if node["class_type"] in ("SaveImage", "PreviewImage")}
    check_pictures(fresh.server, result)
    shown = fresh.page.evaluate("() => [...document.querySelectorAll('.pastiche-compare img')].map((image) => image.naturalWidth)")
    assert len(shown) == 2 * sum(node["class_type"] == "PasticheCompare" for node in sent.values()) and all(shown)


def test_quick_start_has_five_nodes(fresh):
    fresh.open_template(TEMPLATES[0].file)
    visible = fresh.page.evaluate("() => app.graph.nodes.filter((node) => node.type !== 'MarkdownNote').map((node) => node.title)")
    assert sorted(visible) == ["Compare", "Painting", "Photo", "Photo in the painting's style", "Result"]
    widgets = fresh.page.evaluate("() => app.graph.nodes.find((n) => n.isSubgraphNode?.()).widgets.map((w) => w.label ?? w.name)")
    assert widgets[0] == "style amount"


def test_style_amount_zero_is_the_photo(fresh):
    """The dial on top turns both of its nodes."""
    fresh.open_template(TEMPLATES[0].file)
    fresh.page.evaluate(SHRINK, SMALL, {**SMALL_DIALS, "style amount": 0.25})
    sent = fresh.prompt().values()
    assert [n["inputs"]["strength"] for n in sent if "strength" in n["inputs"]] == [0.25, 0.25]


def test_my_own_picture_takes_the_samples_place(fresh):
    fresh.open_template(TEMPLATES[0].file)
    before = {key: node["inputs"] for key, node in fresh.prompt().items()}
    fresh.page.evaluate(
        "() => app.graph.nodes.find((n) => n.title === 'Photo').widgets.find((w) => w.label === 'Use my own picture' || w.name === 'Use my own picture').callback()"
    )
    photo = fresh.page.evaluate("() => { const n = app.graph.nodes.find((n) => n.title === 'Photo'); return [String(n.id), n.type]; }")
    assert photo[1] == "LoadImage"
    after = fresh.prompt()
    old = next(key for key in before if key not in after)
    moved = json.loads(json.dumps(before).replace(f'["{old}", 0]', f'["{photo[0]}", 0]'))
    assert {key: node["inputs"] for key, node in after.items() if key != photo[0]} == {k: v for k, v in moved.items() if k != old}


# ---- as files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.api)
def test_workflow_loads_clean_and_is_its_api_form(ui, artifacts, template):
    ui.load(read(template))
    assert ui.problems() == []
    ui.page.screenshot(artifacts / f"workflow_{template.api}.png")
    assert ui.page.evaluate("() => app.canvas.ds.scale") >= LEGIBLE
    api = json.loads((ROOT / "workflows" / "api" / f"{template.api}.json").read_text())
    assert graph.differences(api, graph.flat(ui.prompt())) == []


def test_problems_are_noticed(ui):
    """The checks above can fail: a missing node and a missing model are reported."""
    ui.load_api({"1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "no_such_file.safetensors"}}})
    assert any("Load Checkpoint" in problem or "CheckpointLoaderSimple" in problem for problem in ui.problems())
    missing = {
        "version": 0.4, "links": [], "groups": [], "config": {}, "extra": {},
        "nodes": [{"id": 1, "type": "NoSuchNode", "pos": [0, 0], "size": [200, 100], "flags": {}, "order": 0, "mode": 0,
                   "inputs": [], "outputs": [], "properties": {}, "widgets_values": []}],
    }
    ui.load(missing)
    assert any("NoSuchNode" in problem for problem in ui.problems())
