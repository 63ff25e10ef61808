"""Runs pytest and writes down which test executes which lines of nodes/. A program of tools/mutate.py's.

    python tools/profile_tests.py profile.json -c tests/pytest.ini tests/algorithms

Runs in the folder above nodes/. JSON: "tests" (seconds of every test that passed, by its id) and "lines" (by file, by
line: numbers of the tests, in the order of "tests"; empty for lines that only importing executes).
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


def main(out: str, arguments: list[str]) -> int:
    measured = coverage.Coverage(data_file=None, source=["nodes"], config_file=False)
    recorder = Recorder(measured)
    measured.start()
    status = pytest.main(arguments, plugins=[recorder])
    measured.stop()
    tests = list(recorder.seconds)
    users: dict[str, list[int]] = {}
    for number, test in enumerate(tests):
        for context in (test, *recorder.fixtures[test]):
            users.setdefault(context, []).append(number)
    data = measured.get_data()
    lines = {
        os.path.relpath(file).replace(os.sep, "/"): {line: sorted({number for context in contexts for number in users.get(context, ())}) for line, contexts in found.items()}
        for file, found in ((file, data.contexts_by_lineno(file)) for file in data.measured_files())
    }
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"tests": recorder.seconds, "lines": lines}, file)
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
