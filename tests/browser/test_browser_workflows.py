"""Every shipped workflow in ComfyUI's own front end: opened from the template browser, legible, the API graph, and run."""

import io
import json
import os
import shutil
import subprocess
import time

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


# pairs of nodes that lie on each other, and nodes that reach out of the group in which their title bar is
OVERLAPS = """() => {
    const found = [], box = (n) => [n.pos[0], n.pos[1] - 30, Math.max(n.size[0], 1), Math.max(n.size[1], n.computeSize()[1]) + 30];
    const boxes = app.graph.nodes.map((node) => [node.title, box(node)]);
    boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
        if (a[0] < b[0] + b[2] && b[0] < a[0] + a[2] && a[1] < b[1] + b[3] && b[1] < a[1] + a[3]) found.push(`${one} and ${other}`);
    }));
    for (const { title, pos, size } of app.graph.groups)
        for (const [name, [x, y, w, h]] of boxes)
            if (x >= pos[0] && x < pos[0] + size[0] && y >= pos[1] && y < pos[1] + size[1])
                if (x + w > pos[0] + size[0] + 1 || y + h > pos[1] + size[1] + 1) found.push(`${name} out of ${title}`);
    return found;
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


def clone(base):
    """The pack as a fresh clone has it: what git knows of, nothing that this checkout made."""
    target = base / "custom_nodes" / "pastiche"
    listed = subprocess.run(["git", "-c", "core.quotePath=false", "ls-files"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if listed.returncode:
        pytest.skip("no git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


@pytest.mark.slow
@pytest.mark.skipif("PASTICHE_NEW_USER" not in os.environ, reason="measures an idle machine: set PASTICHE_NEW_USER")
def test_first_result_of_a_new_user(live_host, tmp_path_factory, page, artifacts, capsys):
    """A fresh clone in an empty ComfyUI, started; Templates, the first of ours as it is shipped, Run: a picture. Prints the times."""
    base = make_base(tmp_path_factory.mktemp("new_user"), pack=False)
    clone(base)
    began, times = time.monotonic(), {}
    with Server(live_host, base) as server, Browser((1920, 1080)) as own:
        user = Frontend(own, server)
        user.open()
        times["ComfyUI on the screen"] = time.monotonic() - began
        first = user.page.do(lambda page: cards(page)[0])
        assert first == TEMPLATES[0].file
        user.open_template(first)
        times["template open"] = time.monotonic() - began
        result = user.queue()
        times["picture"] = time.monotonic() - began
        user.page.screenshot(artifacts / "new_user.png")
        assert user.problems() == []
        check_pictures(server, result)
    with capsys.disabled():
        print("\na new user: " + ", ".join(f"{name} after {seconds:.0f} s" for name, seconds in times.items()))


def cards(page) -> list[str]:
    """Names of our templates in the order of the Templates dialog, which is closed again."""
    page.get_by_role("button", name="Templates").first.click()
    page.get_by_role("button", name="Pastiche", exact=True).first.click()
    page.get_by_test_id(f"template-workflow-{TEMPLATES[0].file}").wait_for(timeout=20_000)
    found = page.evaluate("() => [...document.querySelectorAll('[data-testid^=template-workflow-]')].map((card) => card.dataset.testid)")
    page.keyboard.press("Escape")
    return [name.removeprefix("template-workflow-") for name in found]


def test_templates_come_in_the_order_of_learning(fresh):
    """However the server lists them; other packs' lists stay as they are."""
    listed = fresh.server.get("/workflow_templates")
    assert sorted(listed["pastiche"]) == [template.file for template in TEMPLATES]
    upside_down = {"pastiche": sorted(listed["pastiche"], reverse=True), "another": ["b", "c", "a"]}
    fresh.page.do(lambda page: page.route("**/workflow_templates", lambda route: route.fulfill(json=upside_down)))
    try:
        assert fresh.page.evaluate("() => app.api.getWorkflowTemplates()") == {**upside_down, "pastiche": sorted(listed["pastiche"])}
    finally:
        fresh.page.do(lambda page: page.unroute("**/workflow_templates"))
    assert fresh.page.do(cards) == [template.file for template in TEMPLATES]


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
    assert ui.page.evaluate(OVERLAPS) == []
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
