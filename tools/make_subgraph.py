#!/usr/bin/env python3
"""Makes the one-node StyleID blueprint `subgraphs/StyleID Style Transfer.json` out of workflows/api/styleid.json.

    python tools/make_subgraph.py

ComfyUI's own front end does the grouping: everything between the loaders and the saved image becomes one
subgraph whose inputs are model, vae, empty prompt and two images.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from host import environment, graph
from host.environment import ROOT

NAME = "StyleID Style Transfer"
OUTSIDE = ("LoadImage", "CheckpointLoaderSimple", "CLIPTextEncode", "SaveImage", "PasticheInversionReport")
PROMOTED = (("Content size", "largest_size"), ("Style size", "largest_size"), ("Schedule", "steps"),
            ("Style injection", "gamma"), ("Style injection", "temperature"), ("Style injection", "layers"),
            ("Start from the content in the style's tones", "strength"))
LABELS = {"IMAGE": ("content image", "style image"), "MODEL": ("model",), "VAE": ("vae",), "CONDITIONING": ("empty prompt",)}

GROUP = """(outside) => {
    const inside = app.graph.nodes.filter((node) => !outside.includes(node.type));
    app.graph.convertToSubgraph(new Set(inside));
}"""


def main() -> int:
    host = environment.prepare()
    code = environment.run_inside(host, __file__, sys.argv[1:])
    if code is not None:
        return code
    from host.browser import Browser
    from host.comfy import Server, make_base
    from host.frontend import Frontend

    prompt = json.loads((ROOT / "workflows" / "api" / "styleid.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder))
        graph.provide_files(prompt, base)
        with Server(host, base) as server, Browser((1600, 1000)) as page:
            ui = Frontend(page, server)
            ui.open()
            ui.load_api(prompt, "styleid")
            sizes = page.evaluate("() => Object.fromEntries(app.graph.nodes.map((n) => [n.id, [...n.size]]))")
            page.evaluate("(places) => { for (const n of app.graph.nodes) n.pos = places[n.id]; }", graph.layout(prompt, sizes))
            page.evaluate(GROUP, list(OUTSIDE))
            workflow = ui.serialize()
    blueprint = reduce_to(workflow)
    target = ROOT / "subgraphs" / f"{NAME}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(blueprint, indent=1) + "\n")
    print(target)
    return 0


def reduce_to(workflow: dict) -> dict:
    """The workflow with the subgraph's node alone, its sockets named and its dials on the outside."""
    inner = workflow["definitions"]["subgraphs"][0]
    node = next(node for node in workflow["nodes"] if node["type"] == inner["id"])
    ids = {}
    for child in inner["nodes"]:
        ids.setdefault(child.get("title") or child["type"], child["id"])
    node["properties"]["proxyWidgets"] = [[str(ids[title]), name] for title, name in PROMOTED]
    node.update(title=NAME, pos=[0, 0], widgets_values=[], order=0)
    counts: dict[str, int] = {}
    for slot, outer in zip(inner["inputs"], node["inputs"]):
        index = counts[slot["type"]] = counts.get(slot["type"], -1) + 1
        label = LABELS[slot["type"]][min(index, len(LABELS[slot["type"]]) - 1)]
        slot["label"] = outer["label"] = label
        outer["link"] = None
    for slot in node["outputs"]:
        slot["links"] = []
    inner.update(name=NAME, category="pastiche", description="A photo in the manner of a painting (StyleID): needs no "
                 "training. Connect a checkpoint, an empty CLIP Text Encode and two images.")
    return {"revision": 0, "last_node_id": node["id"], "last_link_id": 0, "nodes": [node], "links": [], "version": 0.4,
            "definitions": {"subgraphs": [inner]}, "extra": {}}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except environment.SetupError as error:
        sys.exit(f"error: {error}")
