"""What a running ComfyUI knows of the pack's nodes."""

import asyncio
import re

import pytest
from host.comfy import ServerError

from pastiche.nodes.extension import PasticheExtension

NODES = [node.define_schema().node_id for node in asyncio.run(PasticheExtension().get_node_list())]


@pytest.fixture(scope="module")
def info(server):
    return server.object_info()


def test_pack_loads_without_a_complaint(server, info):
    # what was logged while starting: other tests of the session provoke errors, which ComfyUI logs with tracebacks
    log = server.log.read_text().partition("To see the GUI go to")[0]
    assert "IMPORT FAILED" not in log and "Traceback" not in log
    assert re.search(r"[\d.]+ seconds:.*custom_nodes.pastiche", log)
    assert sorted(NODES) == sorted(name for name, node in info.items() if node["python_module"] == "custom_nodes.pastiche")


@pytest.mark.parametrize("name", NODES)
def test_node_is_described(info, name):
    node = info[name]
    assert node["display_name"] and node["display_name"] != name
    assert node["description"] and node["category"].split("/")[0] == "pastiche"
    for group in ("required", "optional"):
        for key, value in node["input"].get(group, {}).items():
            assert len(value) > 1 and value[1].get("tooltip"), f"input {key} has no tooltip"
    assert len(node["output_tooltips"]) == len(node["output"]) and all(node["output_tooltips"])
    assert not set(node["output_name"]) & {"", None}


def test_help_pages_are_served(server):
    for name in NODES:
        assert server.request(f"/extensions/pastiche/docs/{name}.md").strip()


@pytest.mark.parametrize("points, boxes, text", [("[[1", "", "no valid JSON"), ("", "[[1, 2]]", "no box")])
def test_a_wrong_prompt_text_is_told_once(server, points, boxes, text):
    """Not for `points` and `boxes` both, whichever of them is wrong."""
    prompt = {
        "1": {"class_type": "PasticheFastSAMPrompt", "inputs": {
            "fastsam": ["2", 0], "image": ["3", 0], "points": points, "boxes": boxes, "mode": "auto"}},
        "2": {"class_type": "PasticheLoadFastSAM", "inputs": {"model_name": "pastiche mini (demo)"}},
        "3": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
    }
    with pytest.raises(ServerError) as refused:
        server.run(prompt)
    of_the_node = [line for line in str(refused.value).splitlines() if line.startswith("PasticheFastSAMPrompt")]
    assert len(of_the_node) == 1 and text in of_the_node[0]
