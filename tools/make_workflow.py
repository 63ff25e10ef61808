#!/usr/bin/env python3
"""Turns API-format graphs into the workflow files that ComfyUI's template browser shows.

    python tools/make_workflow.py workflows/api/styleid_mini.json --image result.png
    python tools/make_workflow.py workflows/api/*.json               the graph itself as thumbnail

For each `workflows/api/<name>.json` writes `workflows/<name>.json` (UI format, laid out in columns) and
`<name>.jpg` (the image given, else the thumbnail there is, else a picture of the graph). ComfyUI's own front
end in headless Chromium does the conversion, so the files are what it would save; each is loaded again and
must show no problem and give the same graph. `--screenshot DIR` also keeps a picture of each. Images and
checkpoints that a graph names are put in place, so that their absence is no error.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from host import environment, graph
from host.browser import Browser, BrowserError
from host.comfy import Server, ServerError, make_base
from host.frontend import Frontend

THUMBNAIL = 512


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("api", nargs="+", type=Path, help="workflows/api/<name>.json")
    parser.add_argument("--image", type=Path, help="picture for the thumbnail (with one graph)")
    parser.add_argument("--note", help="text (Markdown) for a note beside the graph")
    parser.add_argument("--screenshot", type=Path, metavar="DIR", help="folder for pictures of the graphs")
    options = parser.parse_args(arguments)
    if options.image and len(options.api) > 1:
        parser.error("--image goes with a single graph")
    host = environment.prepare()
    code = environment.run_inside(host, __file__, arguments)
    if code is not None:
        return code

    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder))
        prompts = {path: json.loads(path.read_text()) for path in options.api}
        for prompt in prompts.values():
            graph.provide_files(prompt, base)
        with Server(host, base) as server, Browser((2880, 1400)) as page:
            ui = Frontend(page, server)
            ui.open()
            failed = False
            for path, prompt in prompts.items():
                problems = convert(ui, path, prompt, options)
                failed |= bool(problems)
                print(f"{path.stem}: " + ("; ".join(problems) or "written"))
    return int(failed)


def convert(ui: Frontend, path: Path, prompt: dict, options: argparse.Namespace) -> list[str]:
    """Writes one workflow and its thumbnail; returns what is wrong with it."""
    try:
        ui.load_api(prompt, path.stem)
    except ValueError as error:
        return [str(error)]
    workflow = arrange(ui, prompt)
    if options.note:
        workflow = add_note(ui, workflow, options.note)
    workflow["extra"] = {}
    ui.load(workflow)
    problems = ui.problems() + graph.differences(prompt, ui.prompt())
    target = path.parent.parent / path.name
    part = target.with_suffix(".part")
    part.write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n")
    part.replace(target)
    thumbnail = target.with_suffix(".jpg")
    if options.image:
        from PIL import Image, ImageOps

        with Image.open(options.image) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
            image.save(thumbnail, quality=88)
    elif not thumbnail.exists():
        ui.page.screenshot(thumbnail, clip=(700, 120, 1500, 1200))
    if options.screenshot:
        ui.page.screenshot(options.screenshot / f"{path.stem}.png")
    return problems


def arrange(ui: Frontend, prompt: dict) -> dict:
    """Gives the loaded nodes sizes and places them in columns; returns the UI format."""
    sizes = ui.page.evaluate(
        """() => Object.fromEntries(app.graph.nodes.map((node) => {
            const [width, height] = node.computeSize();
            const shows = ["LoadImage", "SaveImage", "PreviewImage", "PasticheInversionReport"].includes(node.type);
            node.setSize([Math.max(width, shows ? 300 : 250), Math.max(height, shows ? 340 : 0)]);
            for (const widget of node.widgets ?? [])
                if (widget.name === "control_after_generate") widget.value = "fixed";
            return [node.id, [...node.size]];
        }))"""
    )
    places = graph.layout(prompt, sizes)
    ui.page.evaluate(
        "(places) => { for (const node of app.graph.nodes) { node.pos = places[node.id]; } app.graph.setDirtyCanvas(true, true); }",
        places,
    )
    return ui.serialize()


def add_note(ui: Frontend, workflow: dict, text: str) -> dict:
    left = min(node["pos"][0] for node in workflow["nodes"])
    top = min(node["pos"][1] for node in workflow["nodes"])
    height = 60 + 22 * (text.count("\n") + 1 + len(text) // 55)
    ui.page.evaluate(
        """(text, x, y, height) => {
            const note = LiteGraph.createNode("MarkdownNote");
            note.title = "About this workflow";
            app.graph.add(note);
            note.pos = [x, y];
            note.setSize([400, height]);
            note.widgets[0].value = text;
        }""",
        text, left - 460, top, height,
    )
    return ui.serialize()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (environment.SetupError, BrowserError, ServerError, OSError) as error:
        sys.exit(f"error: {error}")
