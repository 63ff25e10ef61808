"""What the tests of this folder prove goes to docs/compatibility.md, by tools/make_compatibility.py."""

import json

import pytest


@pytest.fixture
def pair(record_property):
    """pair(ours, theirs, verdict): notes what this test shows of two nodes, if it passes. verdict: works | refused | left out."""

    def note(ours, theirs, verdict="works"):
        record_property("pair", json.dumps([ours, theirs, verdict]))

    return note
