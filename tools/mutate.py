#!/usr/bin/env python3
"""Makes small mistakes in a copy of nodes/algorithms and nodes/host, one at a time, and asks whether the tests notice.

    python tools/mutate.py --sample 60 --seed 0
    python tools/mutate.py --sample 20 nodes/host/fastsam

First every test is run once, to learn which lines it executes (profile_tests.py; some ten minutes on one core, kept in
.environment/ while nodes/ stays as it is; changed test files run again). Then, for each mistake, the tests that execute
its line: those of files that import the module first, the fastest first, until one fails. Prints a table, the diff of
every survivor and the share that was caught; `--minutes 30` ends early, with the share of those judged. The checkout stays as it is. `--files` measures nothing and asks the few
test files that name the module most, whole: quicker for a small sample, and stricter.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
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
from host.files import atomic_write

ROOT = environment.ROOT
FOLDERS = ("nodes/algorithms", "nodes/host")
TEST_FOLDERS = ("algorithms", "host", "nodes", "neighbours")
MOST_TESTS, MOST_SECONDS = 200, 90  # of tests for one mistake
MOST_FILES = 3  # with --files
BATCH = 8  # test files that are measured at a time: a run that was stopped goes on with the next
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
    statement: tuple[int, int] = (0, 0)  # first and last line of what it is part of, without the body of an if or a loop
    imported: bool = False  # importing executes it: a constant, a default

    def apply(self, source: bytes) -> bytes:
        return source[: self.begin] + self.text.encode() + source[self.end :]


class _Finder(ast.NodeVisitor):
    """Collects mutations of one file. Messages, annotations and docstrings are left alone."""

    def __init__(self, path: Path, source: bytes):
        self.path, self.source = path, source
        self.found: list[Mutation] = []
        self._statement, self._functions = (0, 0), 0
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            self._statement = node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
        if isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Assert)):
            return
        if isinstance(node, ast.Expr) and (isinstance(node.value, ast.Constant) or self._is_log(node.value)):
            return
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.visit(node.value)
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for part in [*node.args.defaults, *[d for d in node.args.kw_defaults if d]]:
                self.visit(part)
            self._functions += 1
            for part in node.body:
                self.visit(part)
            self._functions -= 1
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
        self._found(node, kind, *self._span(node), text)

    def _found(self, node: ast.AST, kind: str, begin: int, end: int, text: str) -> None:
        self.found.append(Mutation(self.path, node.lineno, kind, begin, end, text, self._statement, not self._functions))

    def _between(self, node: ast.AST, left: ast.AST, right: ast.AST, word: str, kind: str) -> None:
        """Replaces the operator between two operands, keeping brackets and line breaks around it."""
        begin, end = self._span(left)[1], self._span(right)[0]
        gap = self.source[begin:end].decode()
        operator = re.search(r"not\s+in|is\s+not|is|in|and|or|//|\*\*|[<>=!]=|[-+*/%<>]", gap)
        if operator:
            offset = begin + len(gap[: operator.start()].encode())
            self._found(node, kind, offset, offset + len(operator[0]), word)


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


@lru_cache(maxsize=None)
def importers(path: Path, root: Path = ROOT) -> frozenset[str]:
    """Test files, relative to tests/, that import a module."""
    dotted, (package, name) = ".".join(path.with_suffix("").parts), (".".join(path.parts[:-1]), path.stem)
    pattern = rf"{re.escape(dotted)}\b|{re.escape(package)} import [^\n]*\b{name}\b"
    files = [file for folder in TEST_FOLDERS for file in (root / "tests" / folder).glob("test_*.py")]
    return frozenset(file.relative_to(root / "tests").as_posix() for file in files if re.search(pattern, file.read_text()))


def users(path: Path, root: Path = ROOT) -> list[Path]:
    """Modules of nodes/ that import a module."""
    pattern = rf"\b{path.stem} import|import {path.stem}\b"
    return [file.relative_to(root) for file in (root / "nodes").rglob("*.py") if re.search(pattern, file.read_text())]


class Profile:
    """Which tests execute a line, and how long each takes."""

    def __init__(self, files: dict[str, dict]):
        self.seconds: dict[str, float] = {test: seconds for file in files.values() for test, seconds in file["tests"].items()}
        self._files = [(list(file["tests"]), file["lines"]) for file in files.values()]

    def _executed(self, path: Path) -> dict[int, set[str]]:
        """By line of a file: the tests that execute it, none for lines that only importing does."""
        found: dict[int, set[str]] = {}
        for names, lines in self._files:
            for line, numbers in lines.get(path.as_posix(), {}).items():
                found.setdefault(int(line), set()).update(names[number] for number in numbers)
        return found

    def tests(self, mutation: Mutation, root: Path = ROOT) -> list[str]:
        """Ids of the tests to ask, in the order to ask them; of lines that only importing executes, all of the module's tests."""
        lines, own = self._executed(mutation.path), importers(mutation.path, root)
        first, last = mutation.statement
        executed = [lines[line] for line in range(first, last + 1) if line in lines]
        found = set().union(*executed)
        # A default, a constant: tests may look at it without executing anything of the module, and one that imports it first is not all.
        if executed and (mutation.imported or not found):
            found = set().union(*lines.values(), (test for test in self.seconds if test.split("::")[0] in own))
        names = sorted(found, key=lambda name: (name.split("::")[0] not in own, self.seconds[name], name))
        chosen, total = [], 0.0
        for name in names[:MOST_TESTS]:
            total += self.seconds[name]
            if chosen and total > MOST_SECONDS:
                break
            chosen.append(name)
        return chosen


class Files:
    """In place of a profile: the test files that import a module or, where none does, those of modules that import it."""

    seconds: dict[str, float] = {}

    @staticmethod
    def tests(mutation: Mutation, root: Path = ROOT) -> list[str]:
        path, own = mutation.path, importers(mutation.path, root)
        wave, seen = {path}, {path}
        while not own and wave:
            wave = {user for module in wave for user in users(module, root)} - seen
            seen |= wave
            own = frozenset().union(*(importers(user, root) for user in wave))
        mentions = {name: len(re.findall(rf"\b{path.stem}\b", (root / "tests" / name).read_text())) for name in own}
        return sorted(own, key=lambda name: (not name.endswith(f"test_{path.stem}.py"), -mentions[name], name))[:MOST_FILES]


class Copy:
    """The files that git knows, in a folder of their own."""

    def __init__(self, folder: Path, host: environment.Host):
        self.root, self.host = folder, host
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        for name in sorted(filter(None, listed)):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        self._files = [name for name in listed if name.endswith(".py") and (folder / name).is_file()]
        self._right: dict[str, bool] = {}
        self._seconds = int(time.time())

    def _digest(self, *beginnings: str) -> str:
        found = hashlib.sha256()
        for name in sorted(name for name in self._files if name.startswith(beginnings)):
            found.update(name.encode() + (self.root / name).read_bytes())
        return found.hexdigest()

    def profile(self) -> Profile:
        """Measured on the right code, once for the files as they are. Raises SetupError where no test runs."""
        kept = environment.HOME / "mutations.json"
        code = self._digest("nodes/", "tests/support/", "tests/conftest.py")
        folders = tuple(f"tests/{folder}/test_" for folder in TEST_FOLDERS)
        tests = {name.removeprefix("tests/"): self._digest(name) for name in self._files if name.startswith(folders)}
        known = json.loads(kept.read_text()) if kept.is_file() else {}
        known = known["files"] if known.get("code") == code else {}
        known = {name: file for name, file in known.items() if file["digest"] == tests.get(name)}
        missing = [name for name in tests if name not in known]
        for begin in range(0, len(missing), BATCH):
            batch = missing[begin : begin + BATCH]
            measured = self._measure(batch)
            known |= {name: {"digest": tests[name], **measured.get(name, {"tests": {}, "lines": {}})} for name in batch}
            with atomic_write(kept) as partial:
                partial.write_text(json.dumps({"code": code, "files": known}))
        return Profile(known)

    def _measure(self, files: list[str]) -> dict[str, dict]:
        print(f"running {len(files)} test files to see what they execute, from {files[0]}", flush=True)
        made = self.root / "profile.json"
        made.unlink(missing_ok=True)
        command = [str(self.host.python), "tools/profile_tests.py", str(made), "-c", "tests/pytest.ini", "-q", "-p", "no:cacheprovider",
                   "-m", "not slow", *(f"tests/{name}" for name in files)]
        done = subprocess.run(command, cwd=self.root, env=self._variables(), capture_output=True, text=True)
        if not made.is_file():
            raise environment.SetupError(f"no test was run (is coverage installed?):\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        print(done.stdout.rstrip().splitlines()[-1], flush=True)
        return json.loads(made.read_text())

    def write(self, path: Path, source: bytes) -> None:
        """A file's new content, with a time of its own: Python knows compiled files by size and whole seconds."""
        (self.root / path).write_bytes(source)
        self._seconds += 1
        os.utime(self.root / path, (self._seconds, self._seconds))

    def run(self, tests: list[str], limit: float) -> str:
        """ "" when they pass, else the id of the first test that failed, or "timeout", or pytest's last line."""
        command = [str(self.host.python), "-m", "pytest", "-c", "tests/pytest.ini", "-q", "-x", "-p", "no:cacheprovider", "-rfE",
                   *(f"tests/{test}" for test in tests)]
        try:
            done = subprocess.run(command, cwd=self.root, env=self._variables(), capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return "timeout"
        if not done.returncode:
            return ""
        found = re.search(r"^(?:FAILED|ERROR) tests/(\S+::.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
        return found[1] if found else (done.stdout.rstrip().splitlines() or ["nothing was said"])[-1]

    def passes(self, test: str, limit: float) -> bool:
        """Whether a test passes alone on the right code."""
        if test not in self._right:
            self._right[test] = not self.run([test], limit)
        return self._right[test]

    def _variables(self) -> dict[str, str]:
        return {**self.host.variables(), "OMP_NUM_THREADS": "1"}


def examine(copy: Copy, mutation: Mutation, profile: Profile | Files, most: float) -> tuple[str, str]:
    """(caught, survived, or why it cannot be told; the test that failed). most: seconds for all of its tests."""
    tests = profile.tests(mutation)
    if not tests:
        return "no tests", ""
    source = (copy.root / mutation.path).read_bytes()
    try:
        copy.write(mutation.path, mutation.apply(source))
        failed = copy.run(tests, min(most, 60 + 10 * sum(profile.seconds.get(test, 60) for test in tests)))
    finally:
        copy.write(mutation.path, source)
    if "::" in failed and not copy.passes(failed, most):
        return "fails without it", failed
    return "caught" if failed else "survived", failed


def diff_of(mutation: Mutation) -> str:
    source = (ROOT / mutation.path).read_bytes()
    lines = [text.decode().splitlines(keepends=True) for text in (source, mutation.apply(source))]
    return "".join(difflib.unified_diff(*lines, str(mutation.path), str(mutation.path), n=1))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", default=FOLDERS, help="files or folders to make mistakes in")
    parser.add_argument("--sample", type=int, default=60, help="how many mistakes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", action="store_true", help="ask whole test files instead of measuring what tests execute")
    parser.add_argument("--time-limit", type=float, default=600, help="seconds for the tests of one mistake at most")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="judge no further mistakes after so long")
    options = parser.parse_args(arguments)
    try:
        host = environment.prepare(tests=True)
    except environment.SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    paths = [ROOT / path for path in options.paths]
    files = [file for path in paths for file in ([path] if path.suffix else sorted(path.rglob("*.py")))]
    everything = [mutation for file in files for mutation in find_mutations(file.relative_to(ROOT), file.read_bytes())]
    chosen = random.Random(options.seed).sample(everything, min(options.sample, len(everything)))
    print(f"{len(chosen)} of {len(everything)} mistakes, seed {options.seed}", flush=True)
    results: dict[Mutation, str] = {}
    with tempfile.TemporaryDirectory(prefix="pastiche-mutate-") as folder:
        copy = Copy(Path(folder), host)
        try:
            profile = Files() if options.files else copy.profile()
        except environment.SetupError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        end = time.monotonic() + 60 * options.minutes
        for mutation in chosen:  # as drawn: those before an early end are a sample of everything, too
            started = time.monotonic()
            if started > end:
                break
            results[mutation], failed = examine(copy, mutation, profile, options.time_limit)
            print(f"{results[mutation]:<17} {mutation.kind:<11} {mutation.path}:{mutation.line} "
                  f"{time.monotonic() - started:4.0f} s  {failed}", flush=True)
    for mutation, result in results.items():
        if result in ("survived", "no tests"):
            print(f"\n{result}: {mutation.kind}\n{diff_of(mutation)}", end="")
    judged = [result for result in results.values() if result in ("caught", "survived", "no tests")]
    caught = judged.count("caught")
    print(f"\ncaught {caught} of {len(judged)} ({100 * caught / max(1, len(judged)):.0f} %), "
          f"not judged {len(chosen) - len(judged)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
