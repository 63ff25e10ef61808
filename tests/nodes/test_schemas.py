"""Every node of the pack: a schema that builds, complete texts, a help page, an id the Manager can read."""

import asyncio
import json
import math
import re
from pathlib import Path

import pytest
from comfy_api.latest import io

from pastiche.nodes.extension import PasticheExtension

ROOT = Path(__file__).resolve().parents[2]
NODES = {node.define_schema().node_id: node for node in asyncio.run(PasticheExtension().get_node_list())}


def test_ids_are_prefixed_and_unique():
    assert len(NODES) == len(asyncio.run(PasticheExtension().get_node_list()))
    assert all(re.fullmatch(r"Pastiche[A-Za-z]+", name) for name in NODES)


@pytest.mark.parametrize("name", NODES)
def test_schema_is_complete(name):
    schema = NODES[name].GET_SCHEMA()
    assert schema.display_name and schema.description and schema.category.split("/")[0] == "pastiche"
    inputs, outputs = {i.id for i in schema.inputs}, [o.id for o in schema.outputs]
    assert not inputs & set(outputs), "an id is an input and an output"
    for item in [*schema.inputs, *schema.outputs]:
        assert len(item.tooltip or "") >= 10, f"{item.id} has no tooltip"
    assert all(output.display_name for output in schema.outputs)


@pytest.mark.parametrize("name, first", json.loads((ROOT / "tests" / "assets" / "first_inputs.json").read_text()).items())
def test_scripts_and_saved_graphs_of_the_first_version_still_fit(name, first):
    """ComfyUI refuses a prompt that lacks a required input, and a saved graph has its widgets' values by their order."""
    inputs = NODES[name].GET_SCHEMA().inputs
    assert {part.id for part in inputs if not part.optional} <= set(first["required"]), "an input added later must be optional"
    assert {*first["required"], *first["widgets"]} <= {part.id for part in inputs}, "an input's id is frozen"
    widgets = [part for part in inputs if isinstance(part, io.WidgetInput) and not getattr(part, "force_input", False)]
    order = [part.id for part in widgets if not part.optional] + [part.id for part in widgets if part.optional]
    assert order[: len(first["widgets"])] == first["widgets"], "a widget added later comes after all others"


@pytest.mark.parametrize("name", NODES)
def test_defaults_are_shown_as_they_are(name):
    """The front end shows as many decimals as `step` has, counted from its first digit: 0.375 in steps of 0.01 reads 0.38."""
    for part in NODES[name].GET_SCHEMA().inputs:
        if isinstance(part, io.Float.Input) and part.step:
            decimals = max(0, -math.floor(math.log10(part.step)))
            assert round(part.default, decimals) == part.default, f"{part.id}: {part.default} in steps of {part.step}"


@pytest.mark.parametrize("name", NODES)
def test_help_page_names_every_input_and_output(name):
    page = ROOT / "js" / "docs" / f"{name}.md"
    assert page.is_file()
    words = page.read_text(encoding="utf-8").lower().replace("_", " ")
    schema = NODES[name].GET_SCHEMA()
    missing = [
        item.id for item in [*schema.inputs, *schema.outputs]
        if not any(re.search(rf"\b{re.escape(called.lower().replace('_', ' '))}\b", words) for called in (item.id, item.display_name) if called)
    ]
    assert not missing, f"{page.name} does not mention {missing}"


def test_help_pages_have_nodes():
    assert {page.stem for page in (ROOT / "js" / "docs").glob("*.md")} <= set(NODES)


def test_node_list_for_the_manager_is_current():
    """Otherwise run tools/make_node_list.py."""
    assert set(json.loads((ROOT / "node_list.json").read_text())) == set(NODES)
