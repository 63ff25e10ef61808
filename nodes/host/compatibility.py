"""comfy_api's `io` for the nodes' schemas: ComfyUI's own, with substitutes for what an older one lacks."""

from __future__ import annotations

import inspect
from typing import Any, Callable

from comfy_api.latest import io as host_io

SHOWN = {"advanced", "search_aliases", "is_dev_only"}  # schema keywords that only say where something is shown or found
SOCKETS = {"BoundingBox": "BOUNDING_BOX", "BoundingBoxes": "BOUNDING_BOXES"}  # classes that came late, and their types' names


def _unknown(make: Callable) -> set[str]:
    """Which keywords of SHOWN `make` does not take."""
    parameters = inspect.signature(make).parameters.values()
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return set() if open_ended else SHOWN - {parameter.name for parameter in parameters}


def _without_unknown(make: Callable) -> Callable:
    unknown = _unknown(make)
    return lambda *args, **settings: make(*args, **{name: value for name, value in settings.items() if name not in unknown})


class _AlwaysRandom:
    """Before `ControlAfterGenerate` a seed's widget had the control or not, and no way to say which choice is first."""

    fixed = increment = decrement = randomize = True


class CompletedIO:
    """`io` of an older ComfyUI with what the nodes need of a newer one.

    Keywords of SHOWN are dropped where they are not known, sockets that have no class yet are made by their type's
    name. Everything else is the host's; what it has no substitute for raises AttributeError as before.
    """

    def __init__(self, io: Any):
        self._io = io

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._io, name, None)
        if found is None and name in SOCKETS:
            return self._io.Custom(SOCKETS[name])
        if found is None and name == "ControlAfterGenerate":
            return _AlwaysRandom
        if name == "Schema":
            return _without_unknown(found)
        if isinstance(getattr(found, "Input", None), type) and "advanced" in _unknown(found.Input):
            return type(found.__name__, (found,), {"Input": staticmethod(_without_unknown(found.Input))})
        return getattr(self._io, name)


def completed(io: Any) -> Any:
    """`io` itself where it lacks nothing, else a CompletedIO of it."""
    missing = [name for name in (*SOCKETS, "ControlAfterGenerate") if not hasattr(io, name)]
    unknown = _unknown(io.Schema) - {"advanced"} | _unknown(io.Float.Input) - {"search_aliases", "is_dev_only"}
    return CompletedIO(io) if missing or unknown else io


io = completed(host_io)
