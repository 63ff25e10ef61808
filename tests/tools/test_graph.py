"""Graphs as data: finding, setting, comparing, and a layout without overlap."""

import copy
import json
import random

import pytest
from host import graph
from support.live import API_WORKFLOWS

PROMPT = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}, "_meta": {"title": "Content"}},
    "2": {"class_type": "LoadImage", "inputs": {"image": "b.png"}, "_meta": {"title": "Style"}},
    "3": {"class_type": "Mix", "inputs": {"a": ["1", 0], "b": ["2", 0], "amount": 0.5}},
}


def test_find_and_set_by_class_and_title():
    prompt = copy.deepcopy(PROMPT)
    assert graph.find(prompt, "LoadImage") == ["1", "2"] and graph.find(prompt, "LoadImage", "Style") == ["2"]
    assert graph.set_input(prompt, "LoadImage", "image", "c.png", "Content") == 1
    assert prompt["1"]["inputs"]["image"] == "c.png" and prompt["2"]["inputs"]["image"] == "b.png"
    assert graph.set_input(prompt, "Mix", "a", 1.0) == 0, "a link must not be replaced by a value"
    assert graph.set_input(prompt, "None", "x", 1) == 0


def test_differences():
    other = copy.deepcopy(PROMPT)
    other["3"]["inputs"]["more"] = 1
    assert graph.differences(PROMPT, other) == []
    other["3"]["inputs"].update(amount=0.25, a=[2, 0])
    del other["2"]
    other["9"] = {"class_type": "Extra", "inputs": {}}
    assert len(graph.differences(PROMPT, other)) == 4


def check_layout(prompt, sizes):
    places = graph.layout(prompt, sizes)
    boxes = [(*places[k], *sizes[k]) for k in prompt]
    for i, (x, y, w, h) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[:i]:
            apart = x + w <= x2 or x2 + w2 <= x or y + h + 30 <= y2 or y2 + h2 + 30 <= y
            assert apart, "two nodes overlap, titles included"
    for key, node in prompt.items():
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert places[str(value[0])][0] < places[key][0], "data flows to the right"


@pytest.mark.parametrize("path", API_WORKFLOWS, ids=lambda path: path.stem)
def test_layout_of_shipped_graphs(path):
    prompt = json.loads(path.read_text())
    chance = random.Random(0)
    check_layout(prompt, {key: [chance.randint(150, 400), chance.randint(30, 500)] for key in prompt})


@pytest.mark.parametrize("seed", range(5))
def test_layout_of_random_graphs(seed):
    chance = random.Random(seed)
    prompt = {
        str(i): {"class_type": "N", "inputs": {f"x{j}": [str(chance.randrange(i)), 0] for j in range(min(i, chance.randint(0, 3)))}}
        for i in range(25)
    }
    check_layout(prompt, {key: [chance.randint(150, 400), chance.randint(30, 500)] for key in prompt})


def test_api_workflows_are_tidy():
    """Links lead to nodes that exist, every node has a title, nothing hangs in the air."""
    assert API_WORKFLOWS
    for path in API_WORKFLOWS:
        prompt = json.loads(path.read_text())
        used = set()
        for key, node in prompt.items():
            assert node["_meta"]["title"], f"{path.name}: node {key} has no title"
            for value in node["inputs"].values():
                if isinstance(value, list):
                    assert str(value[0]) in prompt, f"{path.name}: node {key} is linked to {value[0]}, which is not there"
                    used.add(str(value[0]))
        assert len(used) < len(prompt)
