"""Graphs in API format go on running: a node may gain inputs, but none that an older graph must have."""

import json

import pytest

from pastiche.nodes.extension import PasticheExtension


@pytest.fixture(scope="module")
def required():
    """Names of the inputs that ComfyUI refuses to run without, by node id."""
    import asyncio

    found = {}
    for node in asyncio.run(PasticheExtension().get_node_list()):
        info = node.GET_NODE_INFO_V1()
        found[info["name"]] = set(info["input"].get("required", {}))
    return found


def test_shipped_api_graphs_give_every_required_input(repository, required):
    missing = []
    for path in sorted((repository / "workflows" / "api").glob("*.json")):
        for node in json.loads(path.read_text()).values():
            given = {name.split(".")[0] for name in node["inputs"]}
            missing += [f"{path.stem}: {node['class_type']} lacks {name}" for name in required.get(node["class_type"], set()) - given]
    assert not missing
