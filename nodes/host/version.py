"""The oldest ComfyUI the pack works with. Imports nothing of ComfyUI's but its version, as it runs first on any."""

from __future__ import annotations

import logging

from packaging.version import InvalidVersion, Version

# Also stated as requires-comfyui in pyproject.toml, a test compares them.
OLDEST_COMFYUI = "0.20.0"


def warn_if_too_old(running: str | None = None) -> bool:
    """Logs a warning when ComfyUI (its version by default, else `running`) is older than OLDEST_COMFYUI; tells whether."""
    if running is None:
        try:
            from comfyui_version import __version__ as running
        except ImportError:  # came with 0.3.x: anything without it is older
            running = "0"
    try:
        old = Version(Version(running).base_version) < Version(OLDEST_COMFYUI)  # its release candidates count as the version
    except InvalidVersion:  # a fork with versions of its own
        return False
    if old:
        logging.warning(
            "Pastiche: this ComfyUI is %s, Pastiche is made for %s or newer. Some of its nodes may not work; "
            "please update ComfyUI.", running, OLDEST_COMFYUI,
        )
    return old
