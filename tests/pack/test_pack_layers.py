"""The pack's layers and what its code may import, read from the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES = ROOT / "nodes"
SOURCES = sorted(NODES.rglob("*.py"))
# what each room of nodes/host may import beside itself; files outside of the rooms are free to all and import none
ROOMS = {
    "networks": set(),
    "trajectories": {"networks"},
    "features": {"networks", "trajectories"},
    "injections": {"networks", "trajectories", "features"},
    "references": {"networks", "injections"},
    "multistyle": {"networks", "trajectories", "features", "injections", "references"},
    "training": {"networks", "trajectories"},
    "frames": {"networks", "trajectories", "features", "injections"},
    "fastsam": set(),
}
STANDARD_LIBRARY = set(__import__("sys").stdlib_module_names)
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview", "node_helpers", "nodes", "server"}
# unpickle, run or fetch: what a pack's runtime code has no business with
FORBIDDEN = {"pickle", "cPickle", "dill", "marshal", "shelve", "subprocess", "socket", "urllib", "http", "requests", "aiohttp", "ctypes", "pip"}


def imports(path: Path):
    """(module, level, line) of every import, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, 0, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level, node.lineno


def target(path: Path, module: str, level: int) -> Path:
    """The file or folder a relative import means."""
    folder = path.parent
    for _ in range(level - 1):
        folder = folder.parent
    return folder / module.replace(".", "/") if module else folder


def layer(path: Path) -> str:
    parts = path.relative_to(NODES).parts
    return parts[0] if parts[0] in ("algorithms", "host") else "nodes"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(NODES)))
def test_imports_keep_to_the_layers(path):
    for module, level, line in imports(path):
        where = f"{path.relative_to(ROOT)}:{line}"
        top = module.split(".")[0]
        if level == 0:
            assert top not in FORBIDDEN, f"{where} imports {module}"
            assert top not in ("pastiche", "host", "algorithms"), f"{where}: imports within the pack are relative"
            if layer(path) == "algorithms":
                assert top not in COMFYUI, f"{where}: algorithms know nothing of ComfyUI, {module}"
            if layer(path) == "nodes":
                assert top not in COMFYUI - {"comfy_api"}, f"{where}: only nodes/host knows ComfyUI, {module}"
        else:
            aim = target(path, module, level)
            assert NODES in (aim, *aim.parents), f"{where} leaves nodes/"
            aim = aim if aim == NODES else NODES / aim.relative_to(NODES)
            reached = aim.relative_to(NODES).parts[:1]
            if layer(path) == "algorithms":
                assert reached == ("algorithms",), f"{where}: algorithms import nothing else of ours"
            if layer(path) == "host":
                assert reached in (("host",), ("algorithms",), ("sockets",)), f"{where}: host builds on algorithms and sockets only"


def room(path: Path) -> str | None:
    """The room of nodes/host that a file or folder lies in."""
    parts = path.relative_to(NODES).parts
    return parts[1] if len(parts) > 1 and parts[0] == "host" and (NODES / "host" / parts[1]).is_dir() else None


def test_rooms_import_only_the_rooms_below_them():
    assert {folder.name for folder in (NODES / "host").iterdir() if folder.is_dir() and any(folder.glob("*.py"))} == set(ROOMS)
    for path in SOURCES:
        for module, level, line in imports(path):
            aim = target(path, module, level) if level else path
            if layer(path) == "host" and layer(aim) == "host":
                reached = room(aim)
                assert reached in {None, room(path)} | ROOMS.get(room(path), set()), (
                    f"{path.relative_to(ROOT)}:{line}: {room(path) or 'a file outside of the rooms'} must not import {reached}"
                )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(NODES)))
def test_no_code_is_made_of_data(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            owner = node.func.value.id if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) else ""
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            builtin = isinstance(node.func, ast.Name)
            assert not (builtin and name in ("eval", "exec", "compile", "__import__")), f"{where} calls {name}"
            assert (owner, name) not in {("os", "system"), ("os", "popen"), ("os", "execv"), ("os", "execve")}, f"{where} calls {owner}.{name}"
            if (owner, name) == ("torch", "load"):
                safe = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                assert safe.get("weights_only") is True, f"{where}: torch.load without weights_only=True"


def test_algorithms_need_only_torch():
    for path in (NODES / "algorithms").glob("*.py"):
        for module, level, line in imports(path):
            top = module.split(".")[0]
            assert level or top == "torch" or top in STANDARD_LIBRARY, f"{path.name}:{line} imports {module}"


def test_one_dialect():
    """Annotations are never evaluated, and log lines go to the root logger, as ComfyUI's own do."""
    for path in SOURCES:
        text = path.read_text()
        assert not text.strip() or "from __future__ import annotations" in text, f"{path.relative_to(ROOT)} lacks the __future__ import"
        assert "getLogger(" not in text, f"{path.relative_to(ROOT)}: logging.info(\"Pastiche: ...\") and the like"


def test_class_names_are_of_one_floor():
    """The node and what host does for it are two things: a name on both floors would be a trap."""
    names: dict[str, set[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, set()).add(layer(path))
    assert [name for name, floors in names.items() if {"nodes", "host"} <= floors] == []


def test_files_stay_short():
    long = {path.name: count for path in SOURCES if (count := len(path.read_text().splitlines())) > 400}
    assert not long


def test_text_is_clean():
    """No machine's paths, no debugging left, in any file that is shipped."""
    found = []
    for folder in ("nodes", "js", "workflows", "subgraphs", "tools", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".js", ".json", ".md") and path != Path(__file__) and "__pycache__" not in path.parts:
                for number, line in enumerate(path.read_text().splitlines(), 1):
                    if re.search(r"/(work|root|tmp)/[a-z]|\bbreakpoint\(|console\.log\(", line):
                        found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found


def test_files_of_tests_have_names_of_their_own():
    """Their folders are no packages, so pytest refuses two modules of one name; runs of one folder do not show it."""
    names = [path.name for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    assert [name for name in names if names.count(name) > 1] == []
