"""The picker of FastSAM Prompt under real mouse and key events, in the classic canvas and in Nodes 2.0."""

import json
import time

import numpy as np
import pytest
from PIL import Image
from support import segmenters

pytest.importorskip("ultralytics", reason="needs ultralytics: pip install --no-deps ultralytics opencv-python-headless")

WIDTH, HEIGHT = 400, 300
NODE = "PasticheFastSAMPrompt"

_VIEW = f"""(selector) => {{
    const node = app.graph.nodes.find((n) => n.type === "{NODE}");
    return node?.widgets.find((w) => w.name === "picker").element.querySelector(selector);
}}"""


def workflow(image, points="", boxes=""):
    def node(number, kind, position, size, inputs, outputs, values):
        return {"id": number, "type": kind, "pos": position, "size": size, "flags": {}, "order": number, "mode": 0, "properties": {},
                "inputs": inputs, "outputs": outputs, "widgets_values": values}

    return {
        "version": 0.4, "last_node_id": 3, "last_link_id": 2, "groups": [], "config": {}, "extra": {},
        "nodes": [
            node(1, "LoadImage", [40, 60], [300, 320], [], [{"name": "IMAGE", "type": "IMAGE", "links": [1]}], [image, "image"]),
            node(2, "PasticheLoadFastSAM", [40, 460], [300, 60], [], [{"name": "fastsam", "type": "PASTICHE_FASTSAM", "links": [2]}],
                 ["pastiche mini (demo)"]),
            node(3, NODE, [420, 60], [460, 860],
                 [{"name": "fastsam", "type": "PASTICHE_FASTSAM", "link": 2}, {"name": "image", "type": "IMAGE", "link": 1}],
                 [{"name": "mask", "type": "MASK", "links": []}], [points, boxes]),
        ],
        "links": [[1, 1, 0, 3, 1, "IMAGE"], [2, 2, 0, 3, 0, "PASTICHE_FASTSAM"]],
    }


class PickerPage:
    """The picker of the only FastSAM Prompt on the canvas."""

    def __init__(self, ui):
        self.ui, self.page = ui, ui.page

    def wait(self):
        self.page.wait_for(f"() => ({_VIEW})('.pastiche-picker-status')?.textContent.includes('×')")
        time.sleep(0.3)

    def at(self, x, y):
        """Window position of the middle of a pixel of the picture."""
        left, top, width, height = self.page.evaluate(
            f"() => {{ const r = ({_VIEW})('img').getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; }}"
        )
        return left + (x + 0.5) / WIDTH * width, top + (y + 0.5) / HEIGHT * height

    def click(self, x, y, **how):
        self.page.click(*self.at(x, y), **how)

    def drag(self, start, end, **how):
        self.page.drag(self.at(*start), self.at(*end), **how)

    def press(self, action):
        box = self.page.evaluate(
            f"(a) => {{ const r = ({_VIEW})(`[data-action=${{a}}]`).getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; }}",
            action,
        )
        self.page.click(*box)

    def focus(self):
        self.page.evaluate(f"() => ({_VIEW})('.pastiche-picker-view').focus()")

    @property
    def points(self):
        text = self.ui.widget(NODE, "points")
        return json.loads(text) if text else {"positive": [], "negative": []}

    @property
    def boxes(self):
        text = self.ui.widget(NODE, "boxes")
        return json.loads(text)["boxes"] if text else []

    @property
    def drawn(self):
        """(positive, negative, box) marks that are on the picture."""
        return tuple(self.page.evaluate(
            f"() => ['positive', 'negative', 'box'].map((k) => ({_VIEW})('svg').querySelectorAll('.mark.' + k).length)"
        ))


def near(found, expected, most=1):
    """Lists of points agree within a pixel of rounding."""
    assert len(found) == len(expected), (found, expected)
    for point, (x, y) in zip(found, expected):
        assert abs(point["x"] - x) <= most and abs(point["y"] - y) <= most, (found, expected)


@pytest.fixture(scope="module")
def scene(server, tmp_path_factory):
    """A drawn scene the model has never seen, on the server, and its masks."""
    drawing = segmenters.scenes()
    found = drawing.draw_scene(drawing.HELD_OUT + 7, HEIGHT, WIDTH, (3, 4))
    path = tmp_path_factory.mktemp("scene") / "picker_scene.png"
    Image.fromarray((found.image * 255).round().astype(np.uint8)).save(path)
    found.name = server.upload(path)
    return found


@pytest.fixture(params=["classic", "nodes2"])
def picker(ui, scene, request):
    ui.set_setting("Comfy.VueNodes.Enabled", request.param == "nodes2")
    ui.load(workflow(scene.name))
    picker = PickerPage(ui)
    picker.mode = request.param
    picker.wait()
    yield picker
    assert ui.console_errors() == []
    ui.set_setting("Comfy.VueNodes.Enabled", False)


def test_load_image_is_shown_before_any_run(picker):
    assert picker.drawn == (0, 0, 0)
    natural = picker.page.evaluate(f"() => {{ const i = ({_VIEW})('img'); return [i.naturalWidth, i.naturalHeight]; }}")
    assert natural == [WIDTH, HEIGHT]


def test_mouse_points_box_undo_redo_delete_clear(picker):
    picker.click(100, 80)
    picker.click(300, 200, button="right")
    picker.click(350, 40, modifiers=["Shift"])
    picker.drag((40, 150), (160, 250))
    assert picker.drawn == (1, 2, 1)
    near(picker.points["positive"], [(100, 80)])
    near(picker.points["negative"], [(300, 200), (350, 40)])
    assert picker.points["size"] == [WIDTH, HEIGHT]
    (box,) = picker.boxes
    near([box], [(40, 150)], 2)
    assert abs(box["width"] - 120) <= 2 and abs(box["height"] - 100) <= 2

    picker.page.key("Control+z")
    picker.page.key("Control+z")
    assert picker.drawn == (1, 1, 0) and picker.boxes == []
    picker.page.key("Control+Shift+z")
    picker.press("redo")
    assert picker.drawn == (1, 2, 1)
    picker.press("undo")
    picker.press("redo")
    assert picker.drawn == (1, 2, 1)

    picker.drag((100, 80), (120, 60))  # moves the point
    near(picker.points["positive"], [(120, 60)])
    picker.click(300, 200)  # selects
    picker.page.key("Delete")
    near(picker.points["negative"], [(350, 40)])
    picker.click(350, 40, modifiers=["Alt"])
    assert picker.drawn == (1, 0, 1)
    picker.press("clear")
    assert picker.drawn == (0, 0, 0)
    assert picker.ui.widget(NODE, "points") == "" and picker.ui.widget(NODE, "boxes") == ""
    assert len(picker.page.evaluate("() => app.graph.nodes.map((n) => n.id)")) == 3  # Delete was the picker's


def test_zoom_and_pan_keep_pixels(picker):
    picker.click(200, 150)
    x, y = picker.at(200, 150)
    before = picker.at(210, 150)[0] - x
    graph_scale = picker.page.evaluate("() => app.canvas.ds.scale")
    for _ in range(4):
        picker.page.wheel(x, y, -120)
    time.sleep(0.3)
    assert picker.at(210, 150)[0] - picker.at(200, 150)[0] > 2 * before
    assert picker.page.evaluate("() => app.canvas.ds.scale") == graph_scale
    assert np.hypot(*np.subtract(picker.at(200, 150), (x, y))) < before  # the pixel under the mouse stays
    picker.page.drag((x, y), (x + 30, y + 20), button="middle")
    assert np.allclose(np.subtract(picker.at(200, 150), (x, y)), (30, 20), atol=before)
    picker.click(190, 140)
    near(picker.points["positive"], [(200, 150), (190, 140)], 0)
    picker.press("fit")
    assert picker.at(210, 150)[0] - picker.at(200, 150)[0] == pytest.approx(before, rel=0.01)


def test_keyboard_alone(picker):
    picker.focus()
    key = picker.page.key
    key("Enter")
    near(picker.points["positive"], [(200, 150)])
    key("Shift+ArrowRight")  # a tenth of the longer side
    key("n")
    near(picker.points["negative"], [(240, 150)])
    key("b")
    key("Shift+ArrowDown")
    key("Shift+ArrowLeft")
    key("b")
    (box,) = picker.boxes
    assert (box["x"], box["y"], box["width"], box["height"]) == (200, 150, 40, 40)
    key("Escape")
    key("]")
    key("ArrowUp")
    key("Shift+ArrowUp")
    near(picker.points["positive"], [(200, 139)], 0)
    key("Delete")
    assert picker.drawn == (0, 1, 1)
    key("Control+z")
    assert picker.drawn == (1, 1, 1)


def test_run_shows_the_mask(picker, scene):
    x, y = segmenters.scenes().inner_point(scene.masks[0])
    picker.click(x, y)
    picker.ui.queue()
    picker.page.wait_for(f"() => {{ const m = ({_VIEW})('.pastiche-picker-mask'); return !m.hidden && m.complete && m.naturalWidth; }}")
    opacity = picker.page.evaluate(
        f"""() => {{
            const image = ({_VIEW})('.pastiche-picker-mask'), canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
            return Array.from(pixels.filter((_, i) => i % 4 === 3));
        }}"""
    )
    shown = np.array(opacity).reshape(HEIGHT, WIDTH) > 0
    mask = scene.masks[0]
    assert (shown & mask).sum() / (shown | mask).sum() > 0.7
    assert "found" in picker.page.evaluate(f"() => ({_VIEW})('.pastiche-picker-status').textContent")
    picker.press("mask")
    assert picker.page.evaluate(f"() => ({_VIEW})('.pastiche-picker-mask').hidden")
    picker.press("mask")
    picker.click(5, 5)
    assert picker.page.evaluate(f"() => ({_VIEW})('.pastiche-picker-mask').classList.contains('stale')")


def test_state_is_in_the_workflow_and_in_the_api(picker):
    picker.click(100, 80)
    picker.drag((40, 150), (160, 250))
    points, boxes = picker.ui.widget(NODE, "points"), picker.ui.widget(NODE, "boxes")
    sent = picker.ui.prompt()["3"]["inputs"]
    assert (sent["points"], sent["boxes"]) == (points, boxes)
    assert "picker" not in sent
    saved = json.loads(json.dumps(picker.ui.serialize()))
    picker.ui.load(workflow("picker_scene.png"))
    picker.wait()
    assert picker.drawn == (0, 0, 0)
    picker.ui.load(saved)
    picker.wait()
    assert (picker.ui.widget(NODE, "points"), picker.ui.widget(NODE, "boxes")) == (points, boxes)
    assert picker.drawn == (1, 0, 1)
    assert picker.ui.widget(NODE, "confidence") == pytest.approx(0.4)  # the widgets after ours kept their places


def test_copy_and_paste(picker):
    picker.click(100, 80)
    picker.page.evaluate(
        f"""() => {{
            const node = app.graph.nodes.find((n) => n.type === "{NODE}");
            app.canvas.copyToClipboard([node]);
            app.canvas.pasteFromClipboard();
        }}"""
    )
    found = picker.page.evaluate(
        f"""() => app.graph.nodes.filter((n) => n.type === "{NODE}").map((n) => [
            n.widgets.find((w) => w.name === "points").value, n.widgets.find((w) => w.name === "picker").element.isConnected])"""
    )
    assert len(found) == 2 and found[0][0] == found[1][0] != ""
    # the copy has a picker of its own
    elements = picker.page.evaluate(
        f"""() => new Set(app.graph.nodes.filter((n) => n.type === "{NODE}").map((n) => n.widgets.find((w) => w.name === "picker").element)).size"""
    )
    assert elements == 2


def test_undo_of_the_workflow(picker):
    picker.click(100, 80)
    time.sleep(0.5)
    picker.click(200, 150)
    time.sleep(0.5)
    assert picker.drawn == (2, 0, 0)
    picker.ui.command("Comfy.Undo")
    picker.wait()
    near(picker.points["positive"], [(100, 80)])
    assert picker.drawn == (1, 0, 0)
    picker.ui.command("Comfy.Redo")
    picker.wait()
    assert picker.drawn == (2, 0, 0)


def test_typed_text_is_shown(picker):
    picker.ui.set_widget(NODE, "points", '[{"x": 10, "y": 20}, [30, 40, 0]]')
    picker.ui.set_widget(NODE, "boxes", "[[10, 10, 60, 50]]")
    picker.page.wait_for(f"() => ({_VIEW})('svg').querySelectorAll('.mark').length === 3")
    assert picker.drawn == (1, 1, 1)
    picker.ui.set_widget(NODE, "points", "[[")
    picker.page.wait_for(f"() => ({_VIEW})('.pastiche-picker-status').textContent.includes('no valid JSON')")
    assert picker.ui.widget(NODE, "points") == "[["


@pytest.mark.parametrize(
    "points, boxes",
    [
        ("", ""),
        ('[{"x": 1, "y": 2}, {"x": 3, "y": 4, "label": 0}]', '[{"x": 1, "y": 2, "width": 3, "height": 4}]'),
        ("[[1, 2], [3, 4, 0]]", "[[4, 6, 1, 2], [0, 0, 9, 9]]"),
        ('{"positive": [[1, 2]], "negative": [{"x": 3, "y": 4}], "size": [100, 50]}', '{"boxes": [[1, 2, 4, 6]], "size": [100, 50]}'),
        ("[[[1, 2], [5, 6]], [[3, 4]]]", '[{"x1": 1, "y1": 2, "x2": 4, "y2": 6}]'),
        ('{"points": [[1, 2], [3, 4]], "labels": [1, 0]}', '[[{"startX": 4, "startY": 2, "endX": 1, "endY": 6}]]'),
        ("[5, 6]", "[1, 2, 4, 6]"),
    ],
)
def test_picker_reads_what_the_node_reads(ui, points, boxes):
    from pastiche.nodes.algorithms.prompts import parse_boxes, parse_points

    marks = ui.page.evaluate(
        "async (p, b) => (await import('/extensions/pastiche/fastsam_marks.js')).parseMarks(p, b, [200, 200])", points, boxes
    )
    expected = parse_points(points).on(200, 200)
    assert [(m["x"], m["y"]) for m in marks if m["kind"] == "positive"] == [tuple(p) for p in expected.positive]
    assert [(m["x"], m["y"]) for m in marks if m["kind"] == "negative"] == [tuple(p) for p in expected.negative]
    corners = [(m["x"], m["y"], m["x"] + m["width"], m["y"] + m["height"]) for m in marks if m["kind"] == "box"]
    assert corners == [tuple(b) for b in parse_boxes(boxes).on(200, 200)]


def test_high_dpi_and_resized_node(picker):
    small = picker.at(WIDTH, 0)[0] - picker.at(0, 0)[0]
    try:
        picker.page.pixel_ratio(2)
        time.sleep(0.5)
        picker.click(120, 90)
        near(picker.points["positive"], [(120, 90)])
    finally:
        picker.page.pixel_ratio(1)
    picker.page.evaluate(
        f'() => {{ app.graph.nodes.find((n) => n.type === "{NODE}").setSize([760, 1100]); app.canvas.setDirty(true, true); }}'
    )
    time.sleep(0.7)
    assert picker.at(WIDTH, 0)[0] - picker.at(0, 0)[0] > 1.2 * small
    picker.click(60, 200)
    near(picker.points["positive"], [(120, 90), (60, 200)])


def test_graph_zoom_keeps_pixels(picker):
    picker.page.evaluate("() => { app.canvas.ds.scale *= 0.6; app.canvas.setDirty(true, true); }")
    time.sleep(0.7)
    picker.click(250, 100)
    near(picker.points["positive"], [(250, 100)])


def test_removed_node_leaves_nothing(picker):
    """Listeners on window and document, timers and elements, counted around the life of a second picker."""
    counted = picker.page.evaluate(
        f"""async () => {{
            const alive = {{ listeners: 0, timers: new Set() }};
            const own = [EventTarget.prototype.addEventListener, EventTarget.prototype.removeEventListener, setInterval.bind(window), clearInterval.bind(window)];
            const isOurs = () => new Error().stack.includes('/fastsam_') || new Error().stack.includes('/pastiche.js');
            EventTarget.prototype.addEventListener = function (...a) {{
                if ((this === window || this === document || this === document.body) && isOurs()) alive.listeners++;
                return own[0].apply(this, a);
            }};
            window.setInterval = (...a) => {{ const id = own[2](...a); if (isOurs()) alive.timers.add(id); return id; }};
            window.clearInterval = (id) => {{ alive.timers.delete(id); return own[3](id); }};
            try {{
                const node = LiteGraph.createNode("{NODE}");
                app.graph.add(node);
                await new Promise((done) => setTimeout(done, 700));
                const element = node.widgets.find((w) => w.name === "picker").element;
                const during = [alive.listeners, alive.timers.size, element.isConnected];
                app.graph.remove(node);
                await new Promise((done) => setTimeout(done, 700));
                let after = 0;
                element.querySelector('.pastiche-picker-view').dispatchEvent(new PointerEvent('pointerdown', {{ bubbles: true }}));
                element.addEventListener('keydown', () => after++);
                const key = new KeyboardEvent('keydown', {{ key: 'Delete', bubbles: true, cancelable: true }});
                element.querySelector('.pastiche-picker-view').dispatchEvent(key);
                return {{ during, after: [alive.listeners, alive.timers.size, element.isConnected], handled: key.defaultPrevented, heard: after }};
            }} finally {{
                [EventTarget.prototype.addEventListener, EventTarget.prototype.removeEventListener, window.setInterval, window.clearInterval] = own;
            }}
        }}"""
    )
    assert counted["during"] == [0, 1, True], counted
    assert counted["after"] == [0, 0, False], counted
    assert not counted["handled"] and counted["heard"] == 1, counted  # the picker's own key handler is gone


def run(picker):
    picker.ui.queue()
    picker.page.wait_for(f"() => {{ const m = ({_VIEW})('.pastiche-picker-mask'); return !m.hidden && m.complete && m.naturalWidth; }}")


def status(picker):
    return picker.page.evaluate(f"() => ({_VIEW})('.pastiche-picker-status').textContent")


def empty_pixel(scene):
    """A pixel far from every object of the scene."""
    taken = np.pad(np.any(scene.masks, axis=0), 1, constant_values=True)
    reach = np.zeros_like(taken, dtype=int)
    while not taken.all():
        reach[~taken] += 1
        taken = taken | np.roll(taken, 1, 0) | np.roll(taken, -1, 0) | np.roll(taken, 1, 1) | np.roll(taken, -1, 1)
    y, x = np.unravel_index(reach.argmax(), reach.shape)
    return int(x) - 1, int(y) - 1


def test_zoom_pan_and_history_survive_a_run(picker, scene):
    x, y = segmenters.scenes().inner_point(scene.masks[0])
    picker.click(x, y)
    picker.click(20, 20, button="right")
    for _ in range(4):
        picker.page.wheel(*picker.at(x, y), -120)
    time.sleep(0.3)
    before = [*picker.at(x, y), *picker.at(x + 10, y + 10)]
    run(picker)
    assert [*picker.at(x, y), *picker.at(x + 10, y + 10)] == pytest.approx(before, abs=0.5)
    picker.focus()
    picker.page.key("Control+z")
    assert picker.drawn == (1, 0, 0)
    picker.page.key("Control+Shift+z")
    assert picker.drawn == (1, 1, 0)


def test_a_point_on_nothing_says_so(picker, scene):
    picker.click(*segmenters.scenes().inner_point(scene.masks[0]))
    picker.click(*empty_pixel(scene))
    run(picker)
    assert "no object at the hollow point" in status(picker)
    missed = picker.page.evaluate(f"() => ({_VIEW})('svg').querySelectorAll('.mark.missed').length")
    assert missed == 1
    picker.focus()
    picker.page.key("Control+z")  # the hollow point goes, and the sentence with it
    assert "no object" not in status(picker)


def test_an_object_lights_up_under_the_pointer(picker, scene):
    x, y = segmenters.scenes().inner_point(scene.masks[0])
    picker.click(5, 5, button="right")
    run(picker)
    shape = f"""() => {{
        const canvas = ({_VIEW})('.pastiche-picker-object');
        if (canvas.hidden) return null;
        const {{ data }} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        return Array.from(data.filter((_, i) => i % 4 === 3));
    }}"""
    picker.page.wait_for(f"() => ({_VIEW})('.pastiche-picker-object').width === {WIDTH}")
    picker.page.move(*picker.at(x, y))
    time.sleep(0.2)
    lit = np.array(picker.page.evaluate(shape)).reshape(HEIGHT, WIDTH) > 0
    assert (lit & scene.masks[0]).sum() / (lit | scene.masks[0]).sum() > 0.7
    picker.page.move(*picker.at(*empty_pixel(scene)))
    time.sleep(0.2)
    assert picker.page.evaluate(shape) is None


def test_boxes_resize_at_corners_and_edges_and_move_by_the_middle(picker):
    picker.drag((100, 100), (200, 180))
    (box,) = picker.boxes
    left, top, right, bottom = box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]

    def edges():
        (now,) = picker.boxes
        return [now["x"], now["y"], now["x"] + now["width"], now["y"] + now["height"]]

    picker.drag((right, bottom), (right + 60, bottom + 40))
    assert edges() == pytest.approx([left, top, right + 60, bottom + 40], abs=2)
    picker.drag((left, (top + bottom) // 2), (left - 30, (top + bottom) // 2 + 25))  # an edge moves across itself only
    assert edges() == pytest.approx([left - 30, top, right + 60, bottom + 40], abs=2)
    middle = (left + right + 30) // 2, (top + bottom + 40) // 2
    picker.drag(middle, (middle[0] + 20, middle[1] - 15))
    assert edges() == pytest.approx([left - 10, top - 15, right + 80, bottom + 25], abs=2)
    picker.focus()
    picker.page.key("Control+z")
    picker.page.key("Control+z")
    picker.page.key("Control+z")
    assert edges() == [left, top, right, bottom]


def test_large_view_has_the_same_keys_and_gives_the_picker_back(picker):
    small = picker.at(WIDTH, 0)[0] - picker.at(0, 0)[0]
    picker.press("large")
    picker.page.wait_for("() => document.querySelector('dialog.pastiche-picker-large[open] .pastiche-picker')")
    time.sleep(0.3)
    assert picker.at(WIDTH, 0)[0] - picker.at(0, 0)[0] > 2 * small
    picker.click(100, 80)
    picker.drag((200, 100), (300, 200))
    near(picker.points["positive"], [(100, 80)])
    assert picker.drawn == (1, 0, 1)
    picker.page.key("Delete")  # the box is selected
    assert picker.drawn == (1, 0, 0)
    picker.page.key("Control+z")
    assert picker.drawn == (1, 0, 1)
    picker.page.key("Escape")
    picker.page.wait_for("() => !document.querySelector('dialog.pastiche-picker-large')")
    time.sleep(0.4)
    assert picker.at(WIDTH, 0)[0] - picker.at(0, 0)[0] == pytest.approx(small, rel=0.02)
    picker.click(300, 250)
    assert picker.drawn == (2, 0, 1)
    assert len(picker.page.evaluate("() => app.graph.nodes.map((n) => n.id)")) == 3


def test_source_is_found_through_a_subgraph(picker):
    """The picker moves into a subgraph whose image comes from outside."""
    picker.page.evaluate(
        f"""() => {{
            const node = app.graph.nodes.find((n) => n.type === "{NODE}");
            app.graph.convertToSubgraph(new Set([node]));
        }}"""
    )
    picker.page.wait_for(
        f"""() => {{
            const inner = [...app.graph.subgraphs.values()].flatMap((g) => g.nodes).find((n) => n.type === "{NODE}");
            const image = inner?.widgets.find((w) => w.name === "picker")?.element.querySelector("img");
            return image?.naturalWidth === {WIDTH} && image.src.includes("picker_scene");
        }}"""
    )


def test_unconnected_copy_shows_its_marks(picker):
    picker.click(100, 80)
    picker.drag((40, 150), (160, 250))
    drawn = picker.page.evaluate(
        f"""async () => {{
            const node = app.graph.nodes.find((n) => n.type === "{NODE}");
            app.canvas.copyToClipboard([node]);
            app.canvas.pasteFromClipboard();
            await new Promise((done) => setTimeout(done, 1000));
            const copy = app.graph.nodes.filter((n) => n.type === "{NODE}").find((n) => n !== node);
            const element = copy.widgets.find((w) => w.name === "picker").element;
            return [copy.inputs.some((i) => i.name === "image" && i.link != null), element.querySelectorAll(".mark").length,
                    element.querySelector(".pastiche-picker-note").textContent];
        }}"""
    )
    assert drawn == [False, 2, "Not connected: the marks are kept."]


def test_status_fits(picker, scene):
    """Nothing of it is cut off at the node's least width."""
    picker.page.evaluate(
        f'() => {{ const n = app.graph.nodes.find((n) => n.type === "{NODE}"); n.setSize([340, n.size[1]]); app.canvas.setDirty(true, true); }}'
    )
    picker.click(*empty_pixel(scene))
    picker.drag((40, 150), (160, 250))
    run(picker)
    time.sleep(0.3)
    over = picker.page.evaluate(
        f"""() => {{ const s = ({_VIEW})('.pastiche-picker-status'); return [s.scrollWidth - s.clientWidth, s.scrollHeight - s.clientHeight]; }}"""
    )
    assert max(over) <= 1, (over, status(picker))


def test_the_picture_gets_the_room_of_the_node(picker):
    """A taller node is a taller picture. Nodes 2.0 gives every text box an equal part of the room, and lets nobody say otherwise."""
    height = f"() => ({_VIEW})('.pastiche-picker-view').clientHeight"
    before = picker.page.evaluate(height)
    picker.page.evaluate(f'() => {{ const n = app.graph.nodes.find((n) => n.type === "{NODE}"); n.setSize([n.size[0], n.size[1] + 300]); app.canvas.setDirty(true, true); }}')
    time.sleep(0.7)
    assert picker.page.evaluate(height) - before >= (250 if picker.mode == "classic" else 145)
