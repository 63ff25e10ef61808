#!/usr/bin/env python3
"""Writes node_list.json, from which ComfyUI-Manager learns the pack's nodes without running it.

Reads the schemas' literals from the source: run it after adding a node or changing a description.
"""

import ast
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def literal(call: ast.Call, name: str) -> str:
    """A keyword's string, or "" when it is absent or computed."""
    value = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else ""


def node_list() -> dict[str, str]:
    """Description by node id, in the order of the ids."""
    found = {}
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Schema" and literal(node, "node_id"):
                found[literal(node, "node_id")] = literal(node, "description") or literal(node, "display_name")
    return dict(sorted(found.items()))


if __name__ == "__main__":
    target = ROOT / "node_list.json"
    target.write_text(json.dumps(node_list(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{target}: {len(node_list())} nodes")
