"""The oldest ComfyUI the pack works with."""

from __future__ import annotations

import logging
import re

# Also stated as requires-comfyui in pyproject.toml, a test compares them.
OLDEST_COMFYUI = "0.30.0"


def parse_version(text: str) -> tuple[int, ...]:
    """(0, 30, 0) from "v0.30.0-rc1"; missing parts are 0. Raises ValueError when there is no number."""
    found = re.match(r"v?(\d+)(?:\.(\d+))?(?:\.(\d+))?", text.strip())
    if not found:
        raise ValueError(f"{text!r} is no version number such as {OLDEST_COMFYUI}")
    return tuple(int(part or 0) for part in found.groups())


def warn_if_too_old(running: str | None = None) -> bool:
    """Logs a warning when ComfyUI (its version by default, else `running`) is older than OLDEST_COMFYUI; tells whether."""
    if running is None:
        try:
            from comfyui_version import __version__ as running
        except ImportError:  # came with 0.3.x: anything without it is older
            running = "0"
    try:
        old = parse_version(running) < parse_version(OLDEST_COMFYUI)
    except ValueError:  # a fork with versions of its own
        return False
    if old:
        logging.warning(
            "Pastiche: this ComfyUI is %s, Pastiche is made for %s or newer. Some of its nodes may not work; "
            "please update ComfyUI.", running, OLDEST_COMFYUI,
        )
    return old
