"""tools/mutate.py: what it changes, what it leaves alone, and what it concludes."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
from host import environment

ROOT = environment.ROOT
SOURCE = '''"""Text - 1."""
import math

LIMIT: int = 3


def share(a: int, b: "x < y" = 2, *, on=True) -> float:
    """Not a - b."""
    if a < b and not on:
        raise ValueError(f"a is {a - 1}")
    logging.info("a %d", a + 1)
    total = -a * (b
                  // 4)  # é
    return total if a is not None else {"a": "x" + "y"}
'''


@pytest.fixture(scope="module")
def mutate():
    spec = importlib.util.spec_from_file_location("tools_mutate", ROOT / "tools" / "mutate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tools_mutate"] = module
    spec.loader.exec_module(module)
    return module


def test_every_kind_once_and_nothing_in_messages(mutate):
    found = mutate.find_mutations(Path("a.py"), SOURCE.encode())
    changed = [SOURCE.encode()[one.begin : one.end].decode() for one in found]
    pairs = sorted((before, one.text) for before, one in zip(changed, found))
    assert pairs == sorted([
        ("3", "(3 + 1)"), ("2", "(2 + 1)"), ("True", "False"), ("<", "<="), ("and", "or"), ("not on", "on"), ("-a", "a"),
        ("a < b and not on", "(not (a < b and not on))"), ("*", "/"), ("//", "*"), ("4", "(4 + 1)"),
        ("is not", "is"), ("a is not None", "(not (a is not None))"),
        ('total if a is not None else {"a": "x" + "y"}', "None"),
    ])
    for one in found:
        ast.parse(one.apply(SOURCE.encode()))


def test_the_packs_own_files_have_mistakes_and_tests(mutate):
    path = Path("nodes/algorithms/slerp.py")
    assert len(mutate.find_mutations(path, (ROOT / path).read_bytes())) > 20
    assert mutate.tests_of(path)[0] == Path("tests/algorithms/test_slerp.py")
    assert Path("tests/host/test_fastsam.py") in mutate.tests_of(Path("nodes/host/fastsam/prompt.py"))


class Fake:
    """A copy whose tests pass as long as a file holds a word."""

    def __init__(self, root, word):
        self.root, self.word = root, word
        self.runs = 0

    def run(self, files, limit):
        self.runs += 1
        return "passed" if self.word in (self.root / "nodes" / "a.py").read_text() else "failed"


@pytest.mark.parametrize("word, expected", [("a < b", "caught"), ("return", "survived"), ("missing", "tests fail without it")])
def test_a_mistake_is_judged_by_its_tests_and_taken_back(mutate, tmp_path, monkeypatch, word, expected):
    monkeypatch.setattr(mutate, "tests_of", lambda path: [Path("tests/host/test_a.py")])
    (tmp_path / "nodes").mkdir()
    source = b"def f(a, b):\n    return a < b\n"
    (tmp_path / "nodes" / "a.py").write_bytes(source)
    mutation = next(one for one in mutate.find_mutations(Path("nodes/a.py"), source) if one.kind == "comparison")
    copy, limits = Fake(tmp_path, word), {}
    assert mutate.examine(copy, mutation, limits, 60) == expected
    assert (tmp_path / "nodes" / "a.py").read_bytes() == source
    mutate.examine(copy, mutation, limits, 60)
    assert copy.runs == (1 if expected == "tests fail without it" else 3)  # the right code is run once


def test_a_module_without_tests_is_said(mutate, monkeypatch):
    monkeypatch.setattr(mutate, "tests_of", lambda path: [])
    assert mutate.examine(None, mutate.Mutation(Path("a.py"), 1, "constant", 0, 1, "2"), {}, 60) == "no tests"
