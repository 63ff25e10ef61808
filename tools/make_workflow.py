#!/usr/bin/env python3
"""Makes the workflow files that ComfyUI's template browser shows, from API-format graphs and tools/templates.py.

    python tools/make_workflow.py styleid_mini             one template, by the name of its API graph
    python tools/make_workflow.py --all                    all of them
    python tools/make_workflow.py --all --pictures         and their thumbnails, which runs the graphs of the mini model

For a template of workflows/api/<api>.json writes `workflows/<file>.json` (UI format: laid out in groups, with a note
and subgraphs). ComfyUI's own front end in headless Chromium does the conversion, so the files are what it would save;
each is loaded again and must show no problem and give the same graph. `--screenshot DIR` also keeps a picture of each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import templates
from host import environment, graph
from host.browser import Browser, BrowserError
from host.comfy import Server, ServerError, make_base
from host.environment import ROOT
from host.files import atomic_write
from host.frontend import Frontend
from templates import NOTE, Box, Template

GAP, PADDING, TITLE = 28, 20, 34  # between nodes, inside groups, a node's title bar; graph units
COLOURS = ["#4d94c4", "#c79a4a", "#b57bd1", "#5fb583", "#d07f7f"]  # light: titles of groups are written in them


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("api", nargs="*", help="names of API graphs in tools/templates.py")
    parser.add_argument("--all", action="store_true", help="every template")
    parser.add_argument("--pictures", action="store_true", help="run the graphs of the mini model and make their thumbnails")
    parser.add_argument("--screenshot", type=Path, metavar="DIR", help="folder for pictures of the graphs")
    options = parser.parse_args(arguments)
    wanted = [t for t in templates.TEMPLATES if options.all or t.api in options.api]
    unknown = set(options.api) - {t.api for t in wanted}
    if unknown or not wanted:
        parser.error(f"not in tools/templates.py: {', '.join(unknown) or 'no template named'}")
    host = environment.prepare()
    code = environment.run_inside(host, __file__, arguments)
    if code is not None:
        return code

    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder))
        for template in wanted:
            graph.provide_files(read(template), base)
        with Server(host, base) as server, Browser((1920, 1080)) as page:
            ui = Frontend(page, server)
            failed = False
            for template in wanted:
                ui.open()  # a page remembers values of widgets in subgraphs: each graph gets a fresh one
                problems = convert(ui, template)
                if options.screenshot:
                    ui.page.screenshot(options.screenshot / f"{template.api}.png")
                if options.pictures and template.mini and template.shown:
                    import thumbnails

                    thumbnails.make(server, template, read(template))
                failed |= bool(problems)
                print(f"{template.api}: " + ("; ".join(problems) or "written"), flush=True)
    return int(failed)


def read(template: Template) -> dict:
    return json.loads((ROOT / "workflows" / "api" / f"{template.api}.json").read_text(encoding="utf-8"))


def convert(ui: Frontend, template: Template) -> list[str]:
    """Writes one workflow; returns what is wrong with it."""
    prompt = read(template)
    try:
        ui.load_api(prompt, template.api)
    except ValueError as error:
        return [str(error)]
    ui.page.evaluate(PREPARE, templates.MODELS)
    for box in template.boxes:
        make_box(ui, box, prompt)
    ui.page.evaluate(RECONNECT, growing(template, prompt))
    ui.page.evaluate(ADD_NOTE, NOTE, template.note)
    arrange(ui, template)
    workflow = ui.serialize()
    workflow["extra"] = {}
    ui.load(workflow)
    problems = ui.problems() + graph.differences(prompt, graph.flat(ui.prompt()))
    write_json(ROOT / "workflows" / f"{template.file}.json", workflow)
    return problems


def write_json(target: Path, content: dict) -> None:
    with atomic_write(target) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# Sizes, fixed seeds, and the models that the front end offers to download
PREPARE = """(models) => {
    for (const node of app.graph.nodes) {
        const [width, height] = node.computeSize();
        node.setSize([Math.max(width, 230), height]);
        for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
        const named = (node.widgets ?? []).map((widget) => models[widget.value]).filter(Boolean);
        if (named.length) node.properties.models = named;
    }
}"""

ADD_NOTE = """(title, text) => {
    const note = LiteGraph.createNode("MarkdownNote");
    note.title = title;
    app.graph.add(note);
    note.widgets[0].value = text;
}"""

MAKE_BOX = """(title, titles, dials, description) => {
    const inside = titles.map((wanted) => app.graph.nodes.find((node) => node.title === wanted));
    const { node, subgraph } = app.graph.convertToSubgraph(new Set(inside));
    node.title = subgraph.name = title;
    subgraph.description = description;
    // the front end puts seeds and texts of its choice outside; here the template says what is a dial
    for (const slot of subgraph.inputs.filter((slot, i) => node.inputs[i].link == null)) subgraph.removeInput(slot);
    for (const [label, turns] of dials) {
        let dial = null;
        for (const [wanted, name] of turns) {
            const inner = subgraph.nodes.find((n) => n.title === wanted);
            const slot = inner.inputs.find((input) => input.name === name);
            if (!slot) throw new Error(`${wanted} has no input ${name}`);
            dial ??= subgraph.addInput(label, slot.type);
            dial.connect(slot, inner);
        }
        dial.label = label;
    }
    const links = (ids) => ids.map((id) => subgraph.getLink?.(id) ?? subgraph.links.get(id));
    return [
        node.id,
        subgraph.inputs.map((slot) => links(slot.linkIds).map((l) => [subgraph.getNodeById(l.target_id).title,
            subgraph.getNodeById(l.target_id).inputs[l.target_slot].name])),
        subgraph.outputs.map((slot) => links(slot.linkIds).map((l) => subgraph.getNodeById(l.origin_id).title)),
    ];
}"""

RECONNECT = """(wanted) => {
    for (const [title, name, origin, slot] of wanted) {
        const target = app.graph.nodes.find((node) => node.title === title);
        for (const box of app.graph.nodes.filter((node) => node.isSubgraphNode?.())) {
            const output = box.subgraph.outputs.findIndex((out) => out.linkIds.some((id) => {
                const link = box.subgraph.getLink?.(id) ?? box.subgraph.links.get(id);
                return String(link.origin_id) === origin && link.origin_slot === slot;
            }));
            if (output >= 0) box.connect(output, target, target.inputs.findIndex((input) => input.name === name));
        }
    }
}"""

NAME_SLOTS = """(id, inputs, outputs) => {
    const node = app.graph.getNodeById(id);
    inputs.forEach((label, i) => { if (label) node.subgraph.inputs[i].label = node.inputs[i].label = label; });
    outputs.forEach((label, i) => { if (label) node.subgraph.outputs[i].label = node.outputs[i].label = label; });
    for (const widget of node.widgets ?? []) widget.label ??= node.inputs.find((input) => input.widget?.name === widget.name)?.label;
}"""

INNER = "(id) => app.graph.getNodeById(id).subgraph.nodes.map((node) => [String(node.id), node.size])"
PLACE_INNER = """(id, places) => {
    const { subgraph } = app.graph.getNodeById(id);
    for (const node of subgraph.nodes) node.pos = places[node.id];
    const xs = subgraph.nodes.map((n) => n.pos[0]), right = Math.max(...subgraph.nodes.map((n) => n.pos[0] + n.size[0]));
    const top = Math.min(...subgraph.nodes.map((n) => n.pos[1]));
    subgraph.inputNode.pos = [Math.min(...xs) - 260, top];
    subgraph.outputNode.pos = [right + 100, top];
}"""


def growing(template: Template, prompt: dict) -> list[list]:
    """Links from inside a box to inputs that grow with use ("styles.style0"), in order: grouping drops them."""
    inside = {key for key, node in prompt.items() for box in template.boxes if node["_meta"]["title"] in box.nodes}
    return [
        [node["_meta"]["title"], name, value[0], value[1]]
        for key, node in prompt.items() if key not in inside
        for name, value in node["inputs"].items() if "." in name and isinstance(value, list) and value[0] in inside
    ]


def make_box(ui: Frontend, box: Box, prompt: dict) -> None:
    """Groups nodes of the loaded graph into a subgraph with named slots and dials."""
    number, inputs, outputs = ui.page.evaluate(MAKE_BOX, box.title, list(box.nodes), [[d, list(map(list, t))] for d, t in box.dials], box.description)
    dials = [label for label, _ in box.dials]
    fed = len(inputs) - len(dials)
    labels = [_label(box, prompt, turns) for turns in inputs[:fed]] + dials
    ui.page.evaluate(NAME_SLOTS, number, labels, [next((box.labels[t] for t in titles if t in box.labels), "") for titles in outputs])
    sizes = dict(ui.page.evaluate(INNER, number))
    inside = {key: node for key, node in prompt.items() if key in sizes}
    ui.page.evaluate(PLACE_INNER, number, graph.layout(inside, sizes))


def _label(box: Box, prompt: dict, turns: list[list[str]]) -> str:
    """A subgraph input's name: as told, or what feeds it: "photo", "invert content: noise"."""
    for title, name in turns:
        if f"{title}.{name}" in box.labels:
            return box.labels[f"{title}.{name}"]
    title, name = turns[0]
    key = next(key for key, node in prompt.items() if node["_meta"]["title"] == title)
    return name if not name.startswith(("image", "pixels")) else prompt[prompt[key]["inputs"][name][0]]["_meta"]["title"].lower()


PLACE = """(places, groups) => {
    for (const node of app.graph.nodes) {
        const [x, y, width, height] = places[node.title];
        node.pos = [x, y];
        node.setSize([width, height]);
    }
    for (const [title, [x, y, width, height], colour] of groups) {
        const group = new LiteGraph.LGraphGroup(title);
        group.pos = [x, y];
        group.size = [width, height];
        group.color = colour;
        app.graph.add(group);
    }
    app.graph.setDirtyCanvas(true, true);
}"""


def arrange(ui: Frontend, template: Template) -> None:
    """Places nodes and groups as the template says: stacks from left to right, groups from top to bottom."""
    # a title bar cuts off what is longer than the node; in Nodes 2.0 a subgraph has a button more at its end
    least = dict(ui.page.evaluate(
        "() => app.graph.nodes.map((n) => [n.title, [Math.max(230, 74 + 7 * n.title.length), n.computeSize()[1] + (n.isSubgraphNode?.() ? 36 : 0)]])"
    ))
    missing = set(least) - {title for stack in template.stacks for _, columns in stack for column in columns for title in column}
    if missing:
        raise ValueError(f"{template.api}: tools/templates.py gives no place to {', '.join(missing)}")
    sizes = {
        title: [max(width, template.sizes.get(title, (0, 0))[0]), max(height, template.sizes.get(title, (0, 0))[1])]
        for title, (width, height) in least.items()
    }
    ui.page.evaluate(PLACE, *places(template, sizes))


def places(template: Template, sizes: dict[str, list[float]]) -> tuple[dict[str, list[float]], list]:
    """(x, y, width, height) by title, and the groups as (title, bounds, colour)."""
    found, groups, x = {}, [], 0.0
    for stack in template.stacks:
        y, widest = 0.0, 0.0
        for title, columns in stack:
            inset = PADDING if title else 0
            left, top = x + inset, y + (TITLE + 2 * inset if title else TITLE)
            height = 0.0
            for column in columns:
                width, below = max(sizes[name][0] for name in column), top
                for name in column:
                    found[name] = [round(left), round(below), round(width), round(sizes[name][1])]
                    below += sizes[name][1] + TITLE + GAP / 2
                height = max(height, below - TITLE - GAP / 2 - top)
                left += width + GAP * 1.2
            width = left - GAP * 1.2 + inset - x
            bottom = top + height + inset
            if title:
                groups.append([title, [round(x), round(y), round(width), round(bottom - y)], COLOURS[len(groups) % len(COLOURS)]])
            widest, y = max(widest, width), bottom + GAP
        for group in groups[-len(stack):]:
            if group[1][0] == round(x):
                group[1][2] = round(widest)
        x += widest + GAP
    return found, groups


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (environment.SetupError, BrowserError, ServerError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
