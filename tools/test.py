#!/usr/bin/env python3
"""Runs every test in a real ComfyUI: makes the environment on first use, then hands over to pytest.

    python tools/test.py                     everything, then the files of ON_DEVICE on the simulated CUDA device
    python tools/test.py tests/algorithms    some of it; all arguments go to pytest, which runs once
    python tools/test.py -m "not slow" -x

Only the standard library is needed to start. COMFYUI_PATH selects an installation of yours instead;
PASTICHE_TEST_DEVICE (cpu, simulated, cuda) the device, on which everything then runs once.
"""

import os
import subprocess
import sys
from pathlib import Path

from host import environment

TESTS = environment.ROOT / "tests"
# the tests of what a device changes; others join once they have passed there
ON_DEVICE = [
    TESTS / "host" / f"test_{name}.py"
    for name in ("simulated_cuda", "device_modes", "stores", "capture", "feature_library", "training_weights", "support_models")
]


def main(arguments: list[str]) -> int:
    try:
        host = environment.prepare(tests=True)
    except environment.SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    named = [a for a in arguments if not a.startswith("-") and Path(a.split("::")[0]).exists()]
    if arguments or "PASTICHE_TEST_DEVICE" in os.environ:
        return run_pytest(host, [*([] if named else [str(TESTS)]), *arguments])
    first = run_pytest(host, [str(TESTS)])
    reason = environment.lacks_simulated_device(host)
    if reason:
        print(f"simulated CUDA device: not run, {reason}", flush=True)
        return first or int(environment.IN_CI)
    print("\nsimulated CUDA device:", flush=True)
    second = run_pytest(host, [str(path) for path in ON_DEVICE], {"PASTICHE_TEST_DEVICE": "simulated"})
    return first or second


def run_pytest(host: environment.Host, arguments: list[str], variables: dict[str, str] = {}) -> int:
    """pytest's exit status."""
    command = [str(host.python), "-m", "pytest", "-c", str(TESTS / "pytest.ini"), *arguments]
    sys.stdout.flush()
    return environment.wait(subprocess.Popen(command, env={**host.variables(), **variables}))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
