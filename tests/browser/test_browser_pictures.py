"""Sample Picture and Compare Pictures under a real mouse, in the classic canvas and in Nodes 2.0."""

import re
import time

import pytest

PROMPT = {
    "1": {"class_type": "PasticheSamplePicture", "inputs": {"picture": "coffee"}, "_meta": {"title": "Before"}},
    "2": {"class_type": "PasticheSamplePicture", "inputs": {"picture": "impasto"}, "_meta": {"title": "Other"}},
    "3": {"class_type": "ImageScale", "inputs": {"image": ["2", 0], "upscale_method": "bilinear", "width": 304, "height": 200, "crop": "center"},
          "_meta": {"title": "After"}},
    "4": {"class_type": "PasticheCompare", "inputs": {"before": ["1", 0], "after": ["3", 0]}, "_meta": {"title": "Compare"}},
}
PLACES = {"Before": (0, 0, 300, 380), "Other": (0, 460, 300, 380), "After": (360, 460, 280, 200), "Compare": (700, 0, 640, 520)}
WIDGET = "(title, name) => app.graph.nodes.find((n) => n.title === title).widgets.find((w) => w.name === name || w.label === name)"
FRAME = f"() => {{ const r = ({WIDGET})('Compare', 'compare').element.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; }}"


@pytest.fixture(params=["classic", "nodes2"])
def canvas(ui, request):
    ui.set_setting("Comfy.VueNodes.Enabled", request.param == "nodes2")
    ui.load({"version": 0.4, "nodes": [], "links": [], "groups": [], "config": {}, "extra": {}})  # lets go of the last graph's elements
    ui.load_api(PROMPT)
    ui.page.evaluate(
        "(places) => { for (const n of app.graph.nodes) { const [x, y, w, h] = places[n.title]; n.pos = [x, y]; n.setSize([w, h]); } }", PLACES
    )
    ui.command("Comfy.Canvas.FitView")
    time.sleep(1)
    ui.mode = request.param
    yield ui
    problems = [text for text in ui.console_errors() if "filename=undefined" not in text]  # core's Load Image, where input/ is empty
    ui.set_setting("Comfy.VueNodes.Enabled", False)
    assert problems == []


def scene(ui):
    """What a drag inside a node must leave alone."""
    return ui.page.evaluate("() => [app.canvas.ds.offset[0], app.canvas.ds.offset[1], app.canvas.ds.scale, ...app.graph.nodes.map((n) => [...n.pos, ...n.size])]")


def shown(ui):
    """Where the slider's line is and how much of the second picture it covers, as shares of the first picture's width."""
    return ui.page.evaluate(
        f"""() => {{
            const frame = ({WIDGET})('Compare', 'compare').element, [before, after] = frame.querySelectorAll('img');
            const scale = Math.min(frame.clientWidth / before.naturalWidth, frame.clientHeight / before.naturalHeight);
            const wide = before.naturalWidth * scale, inset = (frame.clientWidth - wide) / 2;
            const line = [...frame.children].find((child) => child.style.width === '2px');
            const clip = parseFloat(after.style.clipPath.match(/([\\d.]+)px\\)$/)?.[1] ?? 0);
            return [(parseFloat(line.style.left) + 1 - inset) / wide, (clip - inset) / wide, line.style.visibility, before.naturalWidth, after.naturalWidth];
        }}"""
    )


def margins(ui):
    """What the node leaves free above and left of the second picture, and what it should: it lies on the first."""
    return ui.page.evaluate(
        f"""() => {{
            const frame = ({WIDGET})('Compare', 'compare').element, [before, after] = frame.querySelectorAll('img');
            const scale = Math.min(frame.clientWidth / before.naturalWidth, frame.clientHeight / before.naturalHeight);
            const is = getComputedStyle(after), free = [frame.clientHeight - before.naturalHeight * scale, frame.clientWidth - before.naturalWidth * scale];
            return [[parseFloat(is.paddingTop), parseFloat(is.paddingLeft)], free.map((size) => size / 2)];
        }}"""
    )


def test_the_slider_follows_the_mouse(canvas):
    assert shown(canvas)[2:] == ["hidden", 0, 0]
    canvas.queue()
    canvas.page.wait_for(
        f"() => {{ const f = ({WIDGET})('Compare', 'compare').element; return f.querySelectorAll('img')[1].complete && f.lastChild.style.left; }}"
    )
    assert shown(canvas) == [pytest.approx(0.5, abs=0.01), pytest.approx(0.5, abs=0.01), "visible", 600, 304]
    before = scene(canvas)
    left, top, width, height = canvas.page.evaluate(FRAME)
    assert width > 200 and height > 150
    scale = min(width / 600, height / 400)
    inset = (width - 600 * scale) / 2

    def at(share):
        return left + inset + share * (width - 2 * inset), top + height / 2

    for share in (0.8, 0.25):
        canvas.page.drag(at(0.5), at(share))
        assert shown(canvas)[:2] == pytest.approx([share, share], abs=0.02)
    is_free, should_be = margins(canvas)
    assert is_free == pytest.approx(should_be, abs=0.5) and max(should_be) > 10
    assert scene(canvas) == before  # neither the node nor the canvas moved with it


def test_the_sample_is_shown_before_any_run_and_with_each_choice(canvas):
    source = f"() => {{ const i = ({WIDGET})('Before', 'preview').element; const r = i.getBoundingClientRect(); return [i.src, i.naturalWidth, r.width]; }}"
    for picture in ("coffee", "stained glass", "dandelion"):
        canvas.set_widget("Before", "picture", picture)
        canvas.page.wait_for(f"(name) => {{ const i = ({WIDGET})('Before', 'preview').element; return i.src.includes(name) && i.naturalWidth; }}",
                             picture.replace(" ", "%20"))
        assert canvas.page.evaluate(source)[2] > 100
    assert canvas.prompt()["1"]["inputs"] == {"picture": "dandelion"}


def test_use_my_own_picture_by_mouse(canvas):
    if canvas.mode == "nodes2":
        x, y = canvas.page.do(lambda page: (lambda b: (b["x"] + b["width"] / 2, b["y"] + b["height"] / 2))(
            page.get_by_role("button", name=re.compile("Use my own picture")).first.bounding_box()))
    else:
        x, y = canvas.page.evaluate(
            f"""() => {{
                const node = app.graph.nodes.find((n) => n.title === 'Before'), widget = ({WIDGET})('Before', 'Use my own picture');
                return app.canvasPosToClientPos([node.pos[0] + node.size[0] / 2, node.pos[1] + widget.y + 10]);
            }}"""
        )
    canvas.page.click(x, y)
    canvas.page.wait_for("() => app.graph.nodes.some((n) => n.type === 'LoadImage')")
    types = canvas.page.evaluate("() => app.graph.nodes.map((n) => [n.title, n.type]).sort()")
    replaced = dict(types)
    assert len(types) == 4 and "LoadImage" in replaced.values()
    key = next(key for key, node in canvas.prompt().items() if node["class_type"] == "LoadImage")
    assert canvas.prompt()["4"]["inputs"]["before"] == [key, 0]
