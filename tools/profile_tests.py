"""Runs pytest and writes down which test executes which lines of nodes/. A program of tools/mutate.py's.

    python tools/profile_tests.py profile.json -c tests/pytest.ini tests/algorithms

Runs in the folder above nodes/. JSON: for each test file "tests" (seconds of every test that passed, by its id) and
"lines" (by file, by line: numbers of the tests, in the order of "tests"; empty for lines that only importing executes).
"""

from __future__ import annotations

import json
import os
import sys

import coverage
import pytest


class Recorder:
    """Gives coverage a context for each test and, as tests share it, for each fixture that outlives one."""

    def __init__(self, measured: coverage.Coverage):
        self._measured, self._test = measured, ""
        self.seconds: dict[str, float] = {}
        self.fixtures: dict[str, set[str]] = {}  # contexts of shared fixtures that a test uses

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self._test, self.seconds[item.nodeid] = item.nodeid, 0.0
        self.fixtures[item.nodeid] = {self._name(definition[-1]) for definition in item._fixtureinfo.name2fixturedefs.values()}
        self._measured.switch_context(item.nodeid)
        try:
            return (yield)
        finally:
            self._measured.switch_context("")
            self._test = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope != "function":
            self._measured.switch_context(self._name(fixturedef))
        try:
            return (yield)
        finally:
            self._measured.switch_context(self._test)

    def pytest_runtest_logreport(self, report):
        if report.nodeid in self.seconds:
            self.seconds[report.nodeid] += report.duration
            if not report.passed:
                del self.seconds[report.nodeid]

    @staticmethod
    def _name(definition) -> str:
        return f"fixture {definition.baseid} {definition.argname}"


def by_file(seconds: dict[str, float], executed: dict[str, dict[int, set[str]]]) -> dict:
    """What main writes, from the tests that executed each line of each file."""
    files: dict[str, dict] = {}
    for test in seconds:
        files.setdefault(test.split("::")[0], {"tests": {}, "lines": {}})["tests"][test] = seconds[test]
    for file in files.values():
        number = {test: index for index, test in enumerate(file["tests"])}
        for path, lines in executed.items():
            file["lines"][path] = {line: sorted(number[test] for test in tests & number.keys()) for line, tests in lines.items()}
    return files


def main(out: str, arguments: list[str]) -> int:
    measured = coverage.Coverage(data_file=None, source=["nodes"], config_file=False)
    recorder = Recorder(measured)
    measured.start()
    status = pytest.main(arguments, plugins=[recorder])
    measured.stop()
    users: dict[str, set[str]] = {}
    for test in recorder.seconds:
        for context in (test, *recorder.fixtures[test]):
            users.setdefault(context, set()).add(test)
    data = measured.get_data()
    executed = {
        os.path.relpath(file).replace(os.sep, "/"): {
            line: set().union(*(users.get(context, ()) for context in contexts)) for line, contexts in data.contexts_by_lineno(file).items()
        }
        for file in data.measured_files()
    }
    with open(out, "w", encoding="utf-8") as file:
        json.dump(by_file(recorder.seconds, executed), file)
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
