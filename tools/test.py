#!/usr/bin/env python3
"""Runs every test in a real ComfyUI: makes the environment on first use, then hands over to pytest.

    python tools/test.py                     everything, and beside it ON_DEVICE on the simulated CUDA device
    python tools/test.py tests/algorithms    some of it; all arguments go to pytest, which runs once
    python tools/test.py -m "not slow" -x

Only the standard library is needed to start. COMFYUI_PATH selects an installation of yours instead;
PASTICHE_TEST_DEVICE (cpu, simulated, cuda) the device, on which everything then runs once.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

from host import environment

TESTS = environment.ROOT / "tests"
ON_DEVICE = [TESTS / "host", TESTS / "nodes"]
# files of these folders that no tensor of a model passes through: a device changes nothing in them
WITHOUT_DEVICE = {
    "host/test_files.py": "names and bytes of files",
    "host/test_compatibility.py": "what an older ComfyUI's node interface lacks",
    "host/test_fastsam_format.py": "checkpoint files, which are read on the CPU",
    "host/test_untouched.py": "what importing does, in processes of its own",
    "host/test_verify_models.py": "a tool that checks files on the CPU; its test of broken unconditional files fails there, not understood yet",
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
        return environment.wait(start_pytest(host, [*([] if named else [str(TESTS)]), *arguments]))
    reason = environment.lacks_simulated_device(host)
    if not reason:
        return run_both(host)
    first = environment.wait(start_pytest(host, [str(TESTS)]))
    print(f"simulated CUDA device: not run, {reason}", flush=True)
    return first or int(environment.IN_CI)


def run_both(host: environment.Host) -> int:
    """Two suites at a time, a core each: what the one on the device says comes afterwards. The first failure's exit status."""
    one_core = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    left_out = [f"--ignore={TESTS / name}" for name in WITHOUT_DEVICE]
    with tempfile.TemporaryFile() as said:
        beside = start_pytest(
            host, [*map(str, ON_DEVICE), *left_out, "-p", "no:cacheprovider"], {**one_core, "PASTICHE_TEST_DEVICE": "simulated"}, said
        )
        try:
            first = environment.wait(start_pytest(host, [str(TESTS)], one_core))
            second = environment.wait(beside)
        finally:
            beside.kill()
        said.seek(0)
        print("\nsimulated CUDA device:", said.read().decode(errors="replace"), sep="\n", flush=True)
    return first or second


def start_pytest(
    host: environment.Host, arguments: list[str], variables: dict[str, str] = {}, output: BinaryIO | None = None
) -> subprocess.Popen:
    """pytest, saying what it says in a file instead where there is one."""
    command = [str(host.python), "-m", "pytest", "-c", str(TESTS / "pytest.ini"), *arguments]
    sys.stdout.flush()
    return subprocess.Popen(command, env={**host.variables(), **variables}, stdout=output, stderr=output and subprocess.STDOUT)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
