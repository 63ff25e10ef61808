"""What a running ComfyUI knows of the pack's nodes."""

import asyncio
import re

import pytest

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
