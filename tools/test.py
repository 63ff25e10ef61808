#!/usr/bin/env python3
"""Runs every test in a real ComfyUI: makes the environment on first use, then hands over to pytest.

    python tools/test.py                     everything, then ON_DEVICE once more on the simulated CUDA device
    python tools/test.py tests/algorithms    some of it; all arguments go to pytest, which runs once, in one process
    python tools/test.py -m "not slow" -x

Everything runs in a process a core (pytest-xdist, a file at a time; tests/conftest.py says what else stays together).
Only the standard library is needed to start. COMFYUI_PATH selects an installation of yours instead;
PASTICHE_TEST_DEVICE (cpu, simulated, cuda) the device, on which everything then runs once.
"""

import os
import subprocess
import sys
from pathlib import Path

from host import environment

TESTS = environment.ROOT / "tests"
PASSED, FAILED = 0, 1  # of pytest's exit statuses
PROCESSES = 4  # at most: each takes some 2 GB
# without the slow tests: what they ask takes long because it is about pictures, and is the same on every device
ON_DEVICE = [TESTS / "host", TESTS / "nodes"]
# files of these folders that no tensor of a model passes through: a device changes nothing in them
WITHOUT_DEVICE = {
    "host/test_files.py": "names and bytes of files",
    "host/test_compatibility.py": "what an older ComfyUI's node interface lacks",
    "host/test_fastsam_format.py": "checkpoint files, which are read on the CPU",
    "host/test_untouched.py": "what importing does, in processes of its own",
    "host/test_version.py": "version numbers",
    "nodes/test_api_graphs.py": "JSON",
    "nodes/test_locales.py": "JSON",
    "nodes/test_schemas.py": "node schemas",
}


def main(arguments: list[str]) -> int:
    try:
        host = environment.prepare(tests=True)
    except environment.SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    named = [a for a in arguments if not a.startswith("-") and Path(a.split("::")[0]).exists()]
    if arguments or "PASTICHE_TEST_DEVICE" in os.environ:
        return run_pytest(host, [*([] if named else [str(TESTS)]), *arguments])
    return run_everything(host)


def run_everything(host: environment.Host) -> int:
    """On the CPU, then on the simulated device. The first failure's exit status; what was interrupted or could not start ends all."""
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    spread = in_processes(host)
    first = run_pytest(host, [str(TESTS), *spread], variables)
    if first not in (PASSED, FAILED):
        return first
    reason = environment.lacks_simulated_device(host)
    if reason:
        print(f"simulated CUDA device: not run, {reason}", flush=True)
        return first or int(environment.IN_CI)
    print("\nsimulated CUDA device:", flush=True)
    left_out = [f"--ignore={TESTS / name}" for name in WITHOUT_DEVICE]
    second = run_pytest(
        host, [*map(str, ON_DEVICE), *left_out, "-m", "not slow", "-p", "no:cacheprovider", *spread],
        {**variables, "PASTICHE_TEST_DEVICE": "simulated"},
    )
    return first or second


def in_processes(host: environment.Host) -> list[str]:
    """pytest's arguments for a process a core; none where there is one core, or an installation of the user's without pytest-xdist."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(cores, PROCESSES)
    if processes < 2 or not environment.has_package(host, "xdist"):
        return []
    return ["-n", str(processes), "--dist", "loadfile"]


def run_pytest(host: environment.Host, arguments: list[str], variables: dict[str, str] = {}) -> int:
    """pytest's exit status; Ctrl-C is pytest's, too."""
    command = [str(host.python), "-m", "pytest", "-c", str(TESTS / "pytest.ini"), *arguments]
    sys.stdout.flush()
    return environment.wait(subprocess.Popen(command, env={**host.variables(), **variables}))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
