#!/usr/bin/env python3
"""Runs every test in a real ComfyUI: makes the environment on first use, then hands over to pytest.

    python tools/test.py                     everything
    python tools/test.py tests/algorithms    some of it; all arguments go to pytest
    python tools/test.py -m "not slow" -x

Only the standard library is needed to start. COMFYUI_PATH selects an installation of yours instead.
"""

import os
import subprocess
import sys
from pathlib import Path

from host import environment

TESTS = environment.ROOT / "tests"


def main(arguments: list[str]) -> int:
    try:
        host = environment.prepare(tests=True)
    except environment.SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    named = [a for a in arguments if not a.startswith("-") and Path(a.split("::")[0]).exists()]
    command = [str(host.python), "-m", "pytest", "-c", str(TESTS / "pytest.ini"), *([] if named else [str(TESTS)]), *arguments]
    sys.stdout.flush()
    if os.name != "nt":
        os.execve(command[0], command, host.variables())
    return subprocess.run(command, env=host.variables()).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
