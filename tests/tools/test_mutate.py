"""tools/mutate.py: what it changes, what it leaves alone, and what it concludes."""

import ast
import importlib.util
import json
import subprocess
import sys
import types
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
    assert "algorithms/test_slerp.py" in mutate.importers(path)
    assert "host/test_fastsam.py" in mutate.importers(Path("nodes/host/fastsam/prompt.py"))


def test_a_mistake_knows_its_statement_without_the_body(mutate):
    found = {one.text: one.statement for one in mutate.find_mutations(Path("a.py"), SOURCE.encode())}
    assert found["(4 + 1)"] == found["a"] == (12, 13)
    assert found["<="] == (9, 9) and found["(3 + 1)"] == (4, 4)
    imported = {one.text for one in mutate.find_mutations(Path("a.py"), SOURCE.encode()) if one.imported}
    assert imported == {"(3 + 1)", "(2 + 1)", "False"}


def asked(mutate, profile, root, *statement):
    return profile.tests(mutate.Mutation(Path("nodes/a.py"), statement[0], "constant", 0, 1, "2", statement), root)


def test_the_modules_own_tests_come_first_then_the_fastest(mutate, tmp_path):
    (tmp_path / "tests" / "host").mkdir(parents=True)
    (tmp_path / "tests" / "host" / "test_a.py").write_text("from pastiche.nodes import a\n")
    one, two, three, four = (f"host/test_{name}" for name in ("a.py::one", "a.py::two", "b.py::three", "b.py::four"))
    own = {"tests": {one: 2.0, two: 1.0}, "lines": {"nodes/a.py": {"1": [], "3": [0], "4": [0, 1]}}}
    other = {"tests": {three: 0.1, four: 100.0}, "lines": {"nodes/a.py": {"1": [], "4": [0, 1]}}}
    profile = mutate.Profile({"host/test_a.py": own, "host/test_b.py": other})
    assert asked(mutate, profile, tmp_path, 3, 3) == [one]
    # both lines of the statement; four would take too long
    assert asked(mutate, profile, tmp_path, 3, 4) == [two, one, three]
    assert asked(mutate, profile, tmp_path, 1, 1) == [two, one, three]  # importing executes it: all of the module's
    assert asked(mutate, profile, tmp_path, 5, 5) == []


def test_constants_are_asked_of_tests_that_only_look_at_them(mutate, tmp_path):
    (tmp_path / "tests" / "host").mkdir(parents=True)
    (tmp_path / "tests" / "host" / "test_a.py").write_text("from pastiche.nodes import a\n")
    looks, other = {"tests": {"host/test_a.py::one": 1.0}, "lines": {}}, {"tests": {"host/test_b.py::two": 0.1}, "lines": {}}
    looks["lines"] = {"nodes/a.py": {"1": [], "3": []}}
    profile = mutate.Profile({"host/test_a.py": looks, "host/test_b.py": other})
    assert asked(mutate, profile, tmp_path, 1, 1) == ["host/test_a.py::one"]
    other["lines"] = {"nodes/a.py": {"1": [0]}}  # imports the module while it runs
    profile = mutate.Profile({"host/test_a.py": looks, "host/test_b.py": other})
    constant = mutate.Mutation(Path("nodes/a.py"), 1, "constant", 0, 1, "2", (1, 1), imported=True)
    assert profile.tests(constant, tmp_path) == ["host/test_a.py::one", "host/test_b.py::two"]


def test_without_a_profile_whole_files_are_asked(mutate):
    ask = lambda path: mutate.Files.tests(mutate.Mutation(Path(path), 1, "constant", 0, 1, "2"))
    assert ask("nodes/algorithms/slerp.py")[0] == "algorithms/test_slerp.py"
    assert "host/test_fastsam.py" in ask("nodes/host/fastsam/prompt.py")
    assert ask("nodes/host/networks/unet_hidden.py")  # through the modules that import it
    assert len(ask("nodes/host/messages.py")) == mutate.MOST_FILES


class Fake:
    """A copy whose tests pass as long as a file holds a word."""

    def __init__(self, root, word):
        self.root, self.word = root, word

    def write(self, path, source):
        (self.root / path).write_bytes(source)

    def run(self, tests, limit):
        return "" if self.word in (self.root / "nodes" / "a.py").read_text() else tests[-1]

    def passes(self, test, limit):
        return not self.run([test], limit)


ONE = "host/test_a.py::one"


@pytest.mark.parametrize(
    "word, expected", [("a < b", ("caught", ONE)), ("return", ("survived", "")), ("missing", ("fails without it", ONE))]
)
def test_a_mistake_is_judged_by_its_tests_and_taken_back(mutate, tmp_path, word, expected):
    (tmp_path / "nodes").mkdir()
    source = b"def f(a, b):\n    return a < b\n"
    (tmp_path / "nodes" / "a.py").write_bytes(source)
    mutation = next(one for one in mutate.find_mutations(Path("nodes/a.py"), source) if one.kind == "comparison")
    file = {"tests": {ONE: 0.1}, "lines": {"nodes/a.py": {"2": [0]}}}
    assert mutate.examine(Fake(tmp_path, word), mutation, mutate.Profile({"host/test_a.py": file}), 60) == expected
    assert (tmp_path / "nodes" / "a.py").read_bytes() == source


def test_every_content_of_a_file_has_a_second_of_its_own(mutate, tmp_path, monkeypatch):
    """Compiled files of mistakes of one length, made within a second, would be taken for each other."""
    monkeypatch.setattr(mutate.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout=b""))
    copy = mutate.Copy(tmp_path, None)
    times = []
    for text in (b"a + b", b"a - b", b"a + b"):
        copy.write(Path("a.py"), text)
        times.append(int((tmp_path / "a.py").stat().st_mtime))
        assert (tmp_path / "a.py").read_bytes() == text
    assert len(set(times)) == 3


def test_a_line_that_no_test_executes_is_said(mutate):
    mutation = mutate.Mutation(Path("a.py"), 1, "constant", 0, 1, "2", (1, 1))
    assert mutate.examine(None, mutation, mutate.Profile({}), 60) == ("no tests", "")


TESTS = """
import pytest, sys
sys.path.insert(0, "nodes")
import code_under_test as code

@pytest.fixture(scope="module")
def shared():
    return code.shared()

def test_one(shared):
    code.one()

def test_two(shared):
    pass

def test_fails():
    code.one()
    assert False
"""
CODE = "def one():\n    return 1\n\ndef shared():\n    return 2\n\ndef never():\n    return 3\n"


def test_the_profile_has_every_test_that_passed_and_what_it_executed(tmp_path):
    pytest.importorskip("coverage")
    files = {"nodes/code_under_test.py": CODE, "tests/host/test_code.py": TESTS, "tests/pytest.ini": "[pytest]\n"}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    command = [sys.executable, str(ROOT / "tools" / "profile_tests.py"), "out.json", "-c", "tests/pytest.ini", "tests/host"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr  # pytest's status
    file = json.loads((tmp_path / "out.json").read_text())["host/test_code.py"]
    assert list(file["tests"]) == ["host/test_code.py::test_one", "host/test_code.py::test_two"]
    lines = file["lines"]["nodes/code_under_test.py"]
    assert lines == {"1": [], "4": [], "7": [], "2": [0], "5": [0, 1]}  # what a shared fixture executes counts for all its tests
