#!/usr/bin/env python3
"""Makes the one-node blueprints `subgraphs/*.json` out of the API graphs with a checkpoint.

    python tools/make_blueprints.py

ComfyUI's own front end does the grouping: everything between the loaders and the saved image becomes one subgraph
with labelled inputs, the prompts' text and the method's dials on it, and the image as its only output.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from host import environment, graph
from host.browser import Browser, BrowserError
from host.comfy import Server, ServerError, make_base
from host.environment import ROOT
from host.frontend import Frontend
from make_workflow import make_box, write_json
from templates import Box

OUTSIDE = ("PasticheSamplePicture", "CheckpointLoaderSimple", "SaveImage")
LEFT_OUT = ("PasticheCompare", "PasticheInversionReport")


@dataclass(frozen=True)
class Blueprint:
    name: str
    api: str
    dials: tuple
    description: str


def _dial(label: str, *turns: tuple[str, str]) -> tuple:
    return label, turns


BLUEPRINTS = [
    Blueprint(
        "Photo in a painting's style (StyleID)", "styleid",
        (
            _dial("style amount", ("Style injection", "strength"), ("Content in the style's tones", "strength")),
            _dial("keep the photo's shapes", ("Style injection", "gamma")),
            _dial("sharpness", ("Style injection", "temperature")),
            _dial("size", ("Content size", "largest_size"), ("Style size", "largest_size")),
            _dial("steps", ("Schedule", "steps")),
        ),
        "A photo in the manner of a painting: needs no training and no prompt. SD1.5, SD2, SDXL.",
    ),
    Blueprint(
        "One picture in another's look (InjectFusion)", "injectfusion",
        (
            _dial("content amount", ("Inject content", "gamma")),
            _dial("keep the original's colours", ("Calibrated sampler", "omega")),
            _dial("size", ("Original size", "largest_size"), ("Content size", "largest_size")),
            _dial("steps", ("Schedule", "steps")),
        ),
        "The content's shapes drawn in the original's look, by way of the U-Net's deepest features. SD1.5, SD2, SDXL.",
    ),
    Blueprint(
        "Restyle a region with a LoRA of one picture (DiffStyler)", "diffstyler",
        (
            _dial("prompt", ("Prompt", "text")),
            _dial("negative prompt", ("Negative prompt", "text")),
            _dial("what the style picture shows", ("What the style picture shows", "text")),
            _dial("LoRA strength", ("Style LoRA", "strength_model")),
            _dial("keep the photo's shapes", ("Keep the content's structure", "feature_steps")),
            _dial("size", ("Content size", "largest_size"), ("Style size", "largest_size")),
            _dial("steps", ("Schedule", "steps")),
            _dial("training steps", ("Train the style", "steps")),
        ),
        "Learns the style picture as a LoRA, then redraws the masked region of the photo with it. SD1.x, SD2.x.",
    ),
]


def main() -> int:
    host = environment.prepare()
    code = environment.run_inside(host, __file__, sys.argv[1:])
    if code is not None:
        return code
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder))
        prompts = {blueprint.api: read(blueprint) for blueprint in BLUEPRINTS}
        for prompt in prompts.values():
            graph.provide_files(prompt, base)
        with Server(host, base) as server, Browser((1600, 1000)) as page:
            ui = Frontend(page, server)
            for blueprint in BLUEPRINTS:
                ui.open()
                print(make(ui, blueprint, prompts[blueprint.api]), flush=True)
    return 0


def read(blueprint: Blueprint) -> dict:
    prompt = json.loads((ROOT / "workflows" / "api" / f"{blueprint.api}.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        if node["class_type"] == "CLIPTextEncode" and "<sss>" in node["inputs"]["text"]:
            node["inputs"]["text"] = "painting of <sss>"  # what the template's own pictures show is not yours
    return {key: node for key, node in prompt.items() if node["class_type"] not in LEFT_OUT}


def make(ui: Frontend, blueprint: Blueprint, prompt: dict) -> Path:
    ui.load_api(prompt, blueprint.api)
    inside = tuple(node["_meta"]["title"] for node in prompt.values() if node["class_type"] not in OUTSIDE)
    make_box(ui, Box(blueprint.name, inside, blueprint.dials, {"Decode": "image"}, blueprint.description), prompt)
    workflow = ui.serialize()
    inner = workflow["definitions"]["subgraphs"][0]
    inner.update(category="pastiche")
    node = next(node for node in workflow["nodes"] if node["type"] == inner["id"])
    node.update(pos=[0, 0], order=0)
    for slot in node["inputs"]:
        slot["link"] = None
    for slot in node["outputs"]:
        slot["links"] = []
    alone = {"revision": 0, "last_node_id": node["id"], "last_link_id": 0, "nodes": [node], "links": [], "version": 0.4,
             "definitions": {"subgraphs": [inner]}, "extra": {}}
    target = ROOT / "subgraphs" / f"{blueprint.name}.json"
    target.parent.mkdir(exist_ok=True)
    write_json(target, alone)
    return target


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (environment.SetupError, BrowserError, ServerError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
