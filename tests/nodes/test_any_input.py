"""Whatever a schema allows, every node gives a result without NaN or refuses in a sentence.

PASTICHE_FUZZ=2000 tries that many inputs a node, anew each time; without it few, always the same.
"""

import asyncio
import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from support import anything

from pastiche.nodes.extension import PasticheExtension

LONG = int(os.environ.get("PASTICHE_FUZZ", "0"))
NODES = {node.define_schema().node_id: node for node in asyncio.run(PasticheExtension().get_node_list())}
FEW = {"PasticheTrainStyleLoRA": 6, "PasticheRestyleFrames": 6, "PasticheMultiStyleGuider": 10, "PasticheInjectFusionSampler": 10, "PasticheDDIMInversion": 15, "PasticheInversionReport": 12, "PasticheLoadMini": 2, "PasticheLoadUnconditional": 6, "PasticheLoadFastSAM": 1}


@pytest.fixture(scope="module", autouse=True)
def files():
    anything.register_files()
    yield
    anything.forget_limit()


@pytest.mark.parametrize("name", NODES)
def test_every_node_takes_what_its_schema_allows_or_says_why_not(name):
    node, problems = NODES[name], {}

    @settings(
        max_examples=LONG or FEW.get(name, 20), derandomize=not LONG, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )
    @given(anything.values(node))
    def tries(arguments):
        try:
            anything.run(node, arguments)
        except Exception as error:
            problem = anything.complaint(error)
            if problem:
                problems.setdefault(problem.partition(": ")[0], f"{problem}\n    {repr(arguments)[:700]}")

    tries()
    assert not problems, "\n".join(problems.values())
