"""The soak's draws and verdicts; the server is a stand-in."""

import argparse
import random
from collections import Counter

import pytest
import soak
from pastiche_client import Interrupted, Progress, ServerError, load

ALL = {node["class_type"] for name in soak.MINI for node in load(name).values()}


def test_what_is_drawn_belongs_to_nodes_of_the_workflows():
    assert {class_type for class_type, *_ in [*soak.SMALL, *soak.DRAWN, *soak.MISTAKES]} - {"KSampler", "KSamplerAdvanced", "ImageScale"} <= ALL


def test_the_same_seed_draws_the_same_prompts():
    def drawn(seed):
        draw = random.Random(seed)
        prompts = [soak.small(load(name)) for name in soak.MINI]
        for prompt in prompts:
            soak.vary(prompt, draw)
        return prompts

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_mistake_is_put_where_the_graph_has_room_for_it():
    prompt = load("styleid_mini")
    before = {key: dict(node["inputs"]) for key, node in prompt.items()}
    assert soak.spoil(prompt, random.Random(0))
    made = {
        (node["class_type"], name, value) for key, node in prompt.items() for name, value in node["inputs"].items() if before[key].get(name) != value
    }
    assert len(made) == 1 and made <= set(soak.MISTAKES)
    assert not soak.spoil({"1": {"class_type": "SaveImage", "inputs": {}}}, random.Random(0))


class Server:
    def __init__(self, error=None):
        self.error, self.interrupted = error, 0

    def interrupt(self):
        self.interrupted += 1

    def require_alive(self):
        pass

    def run(self, prompt, on_progress):
        for finished in (0, 1, 2):
            on_progress(Progress("1", "x", 0, 1, finished, 3))
        if self.error:
            raise self.error


def test_how_a_prompt_ends():
    assert soak.run(Server(), {}, "runs") == "finished"
    cancelled = Server(Interrupted("x"))
    assert soak.run(cancelled, {}, "cancelled") == "cancelled" and cancelled.interrupted == 1
    assert soak.run(Server(ServerError("layers: too far.")), {}, "invalid") == "refused"
    with pytest.raises(ServerError):
        soak.run(Server(ServerError("layers: too far.")), {}, "runs")
    with pytest.raises(ServerError):
        soak.run(Server(ServerError("Traceback (most recent call last)")), {}, "invalid")


@pytest.mark.parametrize("change, word", [
    ({}, None), ({"memory": 1100.0}, "memory"), ({"files": 30}, "open files"), ({"threads": 9}, "threads"), ({"left": 3}, "temporary file"),
])
def test_what_grew_is_named(change, word):
    plain = dict(memory=1000.0, files=20, threads=5, left=0)
    table = [soak.Measured(0, minutes=0, **plain), soak.Measured(8, minutes=1, **plain), soak.Measured(16, minutes=2, **{**plain, **change})]
    text, good = soak.report(table, Counter(finished=16), True, argparse.Namespace(prompts=16, seed=0))
    bad = [line for line in text.splitlines() if line.endswith(": NO")]
    assert good == (word is None) and [word in line for line in bad] == [True] * (word is not None)
    assert not soak.report(table, Counter(), False, argparse.Namespace(prompts=16, seed=0))[1]
