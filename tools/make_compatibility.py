"""Writes docs/compatibility.md from what tests/neighbours shows.

    python tools/make_compatibility.py                     runs the tests (COMFYUI_PATH or .environment)
    python tools/make_compatibility.py --results *.xml     from runs of all of them with pytest's --junitxml (xunit1)

A pair stands as works, refused or left out where every test of it passed, as failing where one did not; pairs without
a test stay empty.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from host.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
HEADER = """# Which nodes go together

Written by `tools/make_compatibility.py` from the results of `tests/neighbours`, on ComfyUI {version}. Nothing here is claimed that was not run: an empty field is unknown.

- **works**: equal to an oracle that uses none of our patches (module hooks on the network, each style run alone), in the orders that the tests name.
- **refused**: stops with a sentence that names the other node.
- **left out**: the other node is stepped over in this run, and the log says so.

Features are the same wherever they are used only on the grids that they were captured on: with PatchModelAddDownscale (Deep Shrink) that node belongs on the MODEL of DDIM Inversion and Capture Features as well, or query preservation and Feature Injection are refused. Refused in any case are: files of its features, whose sizes change from step to step; HyperTile beside strength below 1, a mask or Feature Injection's self-attention, which need the tiles, of random sizes, that it keeps to itself; TomePatchModel beside captures and query preservation, as it merges other tokens in every pass; conditions with an area and query preservation or Feature Injection, as the content's features are of the whole picture.

\\* not the node itself, but a small patch of the same shape, written for the tests.

"""
BY_HAND = ROOT / "tests" / "neighbours" / "by_hand.md"  # a section of what no test repeats, which says so


def read_pairs(*results: Path) -> dict[tuple[str, str], str]:
    """(ours, theirs) -> verdict, from junit files whose test cases carry `pair` properties."""
    found: dict[tuple[str, str], set[str]] = {}
    for case in (case for path in results for case in ElementTree.parse(path).iter("testcase")):
        passed = all(case.find(kind) is None for kind in ("failure", "error", "skipped"))
        for item in case.iter("property"):
            if item.get("name") == "pair":
                ours, theirs, verdict = json.loads(item.get("value"))
                found.setdefault((ours, theirs), set()).add(verdict if passed else "fails")
    return {pair: "fails" if "fails" in verdicts else ", ".join(sorted(verdicts)) for pair, verdicts in found.items()}


def as_page(pairs: dict[tuple[str, str], str], version: str) -> str:
    """A table: other nodes down, ours across."""
    ours, theirs = (sorted({pair[side] for pair in pairs}, key=str.lower) for side in (0, 1))
    lines = [["", *ours], ["---"] * (len(ours) + 1)]
    lines += [[other.replace("*", "\\*"), *(pairs.get((own, other), "") for own in ours)] for other in theirs]
    return HEADER.format(version=version) + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def run_tests(results: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-c", "tests/pytest.ini", "tests/neighbours", "-q", "-o", "junit_family=xunit1", f"--junitxml={results}"]
    subprocess.run(command, cwd=ROOT, check=False)


def host_version() -> str:
    path = Path(os.environ.get("COMFYUI_PATH", ROOT / ".environment" / "ComfyUI")) / "comfyui_version.py"
    return path.read_text(encoding="utf-8").split('"')[-2] if path.is_file() else "?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", help="junit files of tests/neighbours")
    results = parser.parse_args().results
    with tempfile.TemporaryDirectory() as folder:
        if results is None:
            results = [Path(folder) / "results.xml"]
            run_tests(results[0])
        page = as_page(read_pairs(*results), host_version()) + BY_HAND.read_text(encoding="utf-8")
    target = ROOT / "docs" / "compatibility.md"
    with atomic_write(target) as part:
        part.write_text(page, encoding="utf-8")
    print(f"{target}: {page.count('works')} work")


if __name__ == "__main__":
    main()
