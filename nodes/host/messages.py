"""What a node says to its user while something else runs: in the log, under the node, and as a note on the page."""

from __future__ import annotations

import logging
import sys
from typing import Any

from comfy_execution.utils import get_executing_context

HINT = "pastiche.hint"
"""WebSocket event for the front end: {"node": id or None, "title": the node's name, "text": a sentence}."""


def executing_node() -> str | None:
    """Id of the node that ComfyUI runs now; None outside of a prompt."""
    context = get_executing_context()
    return None if context is None else context.node_id


def say_on_node(node_id: str | None, text: str) -> None:
    """Puts a line of text under a node; nothing without ComfyUI's server."""
    server = _server()
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def hint(node_id: str | None, title: str, text: str) -> None:
    """Something runs, but can hardly give what its user wants: says so wherever it may be seen."""
    logging.warning("Pastiche: %s: %s", title, text)
    say_on_node(node_id, text)
    server = _server()
    if server is not None:
        server.send_sync(HINT, {"node": node_id, "title": title, "text": text}, server.client_id)


def say_to_page(event: str, detail: dict[str, Any]) -> None:
    """A WebSocket event for the front end of who queued the prompt; nothing without ComfyUI's server."""
    server = _server()
    if server is not None:
        server.send_sync(event, detail, server.client_id)


def _server() -> Any:
    """The running PromptServer. ComfyUI has no public call for these messages."""
    module = sys.modules.get("server")  # absent when nodes run without ComfyUI's server
    return getattr(getattr(module, "PromptServer", None), "instance", None)
