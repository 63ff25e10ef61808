#!/usr/bin/env python3
"""Makes small mistakes in a copy of nodes/algorithms and nodes/host, one at a time, and asks whether the tests notice.

    python tools/mutate.py --sample 60 --seed 0           about half an hour on one core
    python tools/mutate.py --sample 20 nodes/host/fastsam

For each mistake run the test files that import the changed module (or, where none does, those that import a module
that imports it). Prints a table, the diff of every survivor and the share that was caught. The checkout stays as it is.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from host import environment

ROOT = environment.ROOT
FOLDERS = ("nodes/algorithms", "nodes/host")
TEST_FOLDERS = ("algorithms", "host", "nodes")
MOST_FILES = 6  # test files for one module; those that name it most often come first
COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
               ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}
ARITHMETIC = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*"}


@dataclass(frozen=True)
class Mutation:
    """One small mistake: bytes begin..end of a file become `text`."""

    path: Path  # relative to the repository
    line: int
    kind: str
    begin: int
    end: int
    text: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.begin] + self.text.encode() + source[self.end :]


class _Finder(ast.NodeVisitor):
    """Collects mutations of one file. Messages, annotations and docstrings are left alone."""

    def __init__(self, path: Path, source: bytes):
        self.path, self.source = path, source
        self.found: list[Mutation] = []
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Assert)):
            return
        if isinstance(node, ast.Expr) and (isinstance(node.value, ast.Constant) or self._is_log(node.value)):
            return
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.visit(node.value)
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for part in [*node.args.defaults, *[d for d in node.args.kw_defaults if d], *node.body]:
                self.visit(part)
            return
        self._mutate(node)
        self.generic_visit(node)

    @staticmethod
    def _is_log(node: ast.AST) -> bool:
        owner = getattr(getattr(node, "func", None), "value", None)
        return isinstance(owner, ast.Name) and owner.id in ("logging", "log")

    def _mutate(self, node: ast.AST) -> None:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            self._between(node, node.left, node.comparators[0], COMPARISONS[type(node.ops[0])], "comparison")
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not self._is_text(node):
            self._between(node, node.left, node.right, ARITHMETIC[type(node.op)], "arithmetic")
        elif isinstance(node, ast.BoolOp):
            word = "or" if isinstance(node.op, ast.And) else "and"
            self._between(node, node.values[0], node.values[1], word, "logic")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
            self._add(node, self._text(node.operand), "sign" if isinstance(node.op, ast.USub) else "logic")
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            self._add(node.test, f"(not ({self._text(node.test)}))", "condition")
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, bool):
                self._add(node, str(not node.value), "constant")
            elif isinstance(node.value, (int, float)):
                self._add(node, f"({node.value!r} + 1)", "constant")
        elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
            self._add(node.value, "None", "result")

    @staticmethod
    def _is_text(node: ast.BinOp) -> bool:
        return any(isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", None), str) for side in (node.left, node.right))

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return self._starts[node.lineno - 1] + node.col_offset, self._starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.AST) -> str:
        begin, end = self._span(node)
        return self.source[begin:end].decode()

    def _add(self, node: ast.AST, text: str, kind: str) -> None:
        self.found.append(Mutation(self.path, node.lineno, kind, *self._span(node), text))

    def _between(self, node: ast.AST, left: ast.AST, right: ast.AST, word: str, kind: str) -> None:
        """Replaces the operator between two operands, keeping brackets and line breaks around it."""
        begin, end = self._span(left)[1], self._span(right)[0]
        gap = self.source[begin:end].decode()
        operator = re.search(r"not\s+in|is\s+not|is|in|and|or|//|\*\*|[<>=!]=|[-+*/%<>]", gap)
        if operator:
            offset = begin + len(gap[: operator.start()].encode())
            self.found.append(Mutation(self.path, node.lineno, kind, offset, offset + len(operator[0]), word))


def find_mutations(path: Path, source: bytes) -> list[Mutation]:
    """Every mutation of a file that is still Python and says something else."""
    finder = _Finder(path, source)
    finder.visit(ast.parse(source))
    plain = ast.dump(ast.parse(source))
    kept = []
    for mutation in finder.found:
        try:
            if ast.dump(ast.parse(mutation.apply(source))) != plain:
                kept.append(mutation)
        except SyntaxError:
            continue
    return kept


def tests_of(path: Path, root: Path = ROOT) -> list[Path]:
    """Test files of a module, relative to the repository."""
    direct = _importers(path, root)
    if not direct:
        for other in sorted((root / "nodes").rglob("*.py")):
            if re.search(rf"from \.+[\w.]*\b{path.stem} import|import {path.stem}\b", other.read_text()):
                direct += _importers(other.relative_to(root), root)
    return list(dict.fromkeys(direct))[:MOST_FILES]


@lru_cache(maxsize=None)
def _importers(path: Path, root: Path) -> list[Path]:
    dotted, (package, name) = ".".join(path.with_suffix("").parts), (".".join(path.parts[:-1]), path.stem)
    pattern = rf"{re.escape(dotted)}\b|{re.escape(package)} import [^\n]*\b{name}\b"
    counted = []
    for folder in TEST_FOLDERS:
        for file in sorted((root / "tests" / folder).glob("test_*.py")):
            if re.search(pattern, file.read_text()):
                counted.append((-len(re.findall(rf"\b{name}\b", file.read_text())), file.relative_to(root)))
    return [file for _, file in sorted(counted)]


class Copy:
    """The files that git knows, in a folder of their own."""

    def __init__(self, folder: Path, host: environment.Host):
        self.root, self.host = folder, host
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        for name in filter(None, listed):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)

    def run(self, files: list[Path], limit: float) -> str:
        """passed, failed or timeout of pytest on these files."""
        command = [str(self.host.python), "-m", "pytest", "-c", "tests/pytest.ini", "-q", "-x", "-p", "no:cacheprovider",
                   "-m", "not slow", *map(str, files)]
        variables = {**self.host.variables(), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, cwd=self.root, env=variables, capture_output=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return "timeout"
        return "failed" if done.returncode else "passed"


def examine(copy: Copy, mutation: Mutation, limits: dict[tuple, float | None], most: float) -> str:
    """caught, survived, or why it cannot be told. limits: seconds for each set of test files, measured on the right code."""
    files = tuple(tests_of(mutation.path))
    if not files:
        return "no tests"
    if files not in limits:
        started = time.monotonic()
        passed = copy.run(list(files), most) == "passed"
        limits[files] = 5 * (time.monotonic() - started) + 30 if passed else None
    if limits[files] is None:
        return "tests fail without it"
    target = copy.root / mutation.path
    source = target.read_bytes()
    try:
        target.write_bytes(mutation.apply(source))
        return "survived" if copy.run(list(files), min(limits[files], most)) == "passed" else "caught"
    finally:
        target.write_bytes(source)


def diff_of(mutation: Mutation) -> str:
    source = (ROOT / mutation.path).read_bytes()
    lines = [text.decode().splitlines(keepends=True) for text in (source, mutation.apply(source))]
    return "".join(difflib.unified_diff(*lines, str(mutation.path), str(mutation.path), n=1))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", default=FOLDERS, help="files or folders to make mistakes in")
    parser.add_argument("--sample", type=int, default=60, help="how many mistakes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit", type=float, default=600, help="seconds for the tests of one mistake at most")
    options = parser.parse_args(arguments)
    try:
        host = environment.prepare(tests=True)
    except environment.SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files = [file for path in options.paths for file in ([ROOT / path] if path.endswith(".py") else sorted((ROOT / path).rglob("*.py")))]
    everything = [mutation for file in files for mutation in find_mutations(file.relative_to(ROOT), file.read_bytes())]
    chosen = random.Random(options.seed).sample(everything, min(options.sample, len(everything)))
    print(f"{len(chosen)} of {len(everything)} mistakes, seed {options.seed}", flush=True)
    results: dict[Mutation, str] = {}
    limits: dict[tuple, float | None] = {}
    with tempfile.TemporaryDirectory(prefix="pastiche-mutate-") as folder:
        copy = Copy(Path(folder), host)
        for mutation in sorted(chosen, key=lambda one: (str(one.path), one.begin)):
            results[mutation] = examine(copy, mutation, limits, options.time_limit)
            print(f"{results[mutation]:<22} {mutation.kind:<11} {mutation.path}:{mutation.line}", flush=True)
    for mutation, result in results.items():
        if result in ("survived", "no tests"):
            print(f"\n{result}: {mutation.kind}\n{diff_of(mutation)}", end="")
    judged = [result for result in results.values() if result in ("caught", "survived", "no tests")]
    caught = judged.count("caught")
    print(f"\ncaught {caught} of {len(judged)} ({100 * caught / max(1, len(judged)):.0f} %), "
          f"not judged {len(results) - len(judged)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
