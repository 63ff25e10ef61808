"""The style library: what is saved, for which model, how large it all is, and what its user lets go.

Saved styles lie in two of ComfyUI's model folders, because core's own routes list those and show their pictures
(/object_info, /experiment/models/preview): the pack has no route of its own. Those folders have no route that deletes.
/userdata has, but belongs to one user of the page, whom a running node does not know, and takes files as uploads. So
deleting is a node (Manage Style Library) that the page queues once its user has confirmed it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Iterator

import folder_paths

from ..files import atomic_write
from .ready_styles import READY, ready_file
from .stores import open_safetensors, readable_size
from .style_notes import COVERS, named_model, settings_of

FOLDER, FORMAT, VERSION = "pastiche_features", "pastiche-features", "1"
LORAS, LORA_PART, LORA_FORMAT = "loras", "pastiche", "pastiche-style-lora"  # output/loras/pastiche: Load LoRA lists them too
LIMIT_FILE = "library.json"  # in output/pastiche_features; no route lists it, and no list of styles has it


@dataclass(frozen=True)
class SavedStyle:
    """One entry of the library.

    key: what Style Library's input names it: "ready/...", "saved/..." or "lora/..."; kind: ready | features | trajectory |
    lora | unreadable; folder, index, file: where core's routes find it; size in bytes, modified in seconds since 1970;
    weights, model, family: of the MODEL it belongs to; problem: why it cannot be used, "" where it can.
    """

    key: str
    kind: str
    title: str
    folder: str = ""
    index: int = 0
    file: str = ""
    size: int = 0
    modified: float = 0.0
    weights: str = ""
    model: str = ""
    family: str = ""
    settings: dict[str, str] | None = None
    notes: str = ""
    cover: bool = False
    problem: str = ""

    @property
    def path(self) -> Path:
        if self.kind == "ready":
            return ready_file(self.title)
        return Path(folder_paths.get_folder_paths(self.folder)[self.index]) / self.file


def list_styles() -> list[SavedStyle]:
    """Ready styles, then saved ones by name. What cannot be read is listed with its reason."""
    found = {style.key: style for style in (SavedStyle(f"ready/{name}", "ready", name, cover=True) for name in READY)}
    for kind, folder, part in (("saved", FOLDER, ""), ("lora", LORAS, LORA_PART)):
        styles = [_read_style(kind, folder, *place) for place in _files(folder, part)]
        for style in sorted(filter(None, styles), key=lambda style: style.title.lower()):
            found.setdefault(style.key, style)  # of two folders the first counts, as for core
    return list(found.values())


def find_style(key: str) -> SavedStyle:
    """Raises ValueError for a key that the library does not list, paths out of its folders included."""
    style = next((style for style in list_styles() if style.key == key), None)
    if style is None:
        raise ValueError(f"style: {ascii(key)[:80]} is not in the style library. Refresh the list (R), or choose one that it shows.")
    return style


def listing() -> dict[str, Any]:
    """Everything that the page shows: styles, their size altogether and the limit, in bytes."""
    styles = list_styles()
    try:
        limit = size_limit()
    except ValueError:  # saving says it
        limit = 0
    return {"styles": [asdict(style) for style in styles], "total": _total(styles), "limit": limit}


def delete_style(key: str, size: int, modified: float) -> SavedStyle:
    """Removes one saved style for good. size, modified: of the file that its user saw.

    A workflow of somebody else cannot know these, so running one deletes nothing; a file that was replaced stays as well.
    """
    style = find_style(key)
    if style.kind == "ready":
        raise ValueError(f'style: "{style.title}" comes with the pack and cannot be deleted.')
    if not _inside(style.path, style.folder):
        raise ValueError(f'style: "{style.title}" is a link out of its folder; delete it where it lies.')
    if size != style.size or abs(modified - style.modified) > 1e-3:
        raise ValueError(
            f'style: "{style.title}" is {style.size} bytes of {style.modified:.3f}, not {size} of {modified:.3f}: it has changed since '
            "it was shown. Refresh the library and look again."
        )
    try:
        style.path.unlink()
    except OSError as error:
        raise ValueError(f'style: "{style.title}" cannot be deleted ({error.strerror or error}). Stop what uses it, or make the folder writable.') from error
    folder_paths.filename_list_cache.pop(style.folder, None)
    return style


def size_limit() -> int:
    """Bytes that saved styles may take altogether, 0 for any. Raises ValueError where the note of it cannot be read."""
    try:
        limit = json.loads(_limit_path().read_text(encoding="utf-8"))["limit"]
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'"{_limit_path()}" with the style library\'s limit cannot be read ({error}). Set the limit again, or delete the file.') from error
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ValueError(f'"{_limit_path()}": the limit is {str(limit)[:40]}, expected a number of bytes. Set it again, or delete the file.')
    return limit


def set_size_limit(limit: int) -> None:
    """0 takes the limit away. Nothing is ever deleted for it; what is beyond is refused when it is saved."""
    try:
        if not limit:
            _limit_path().unlink(missing_ok=True)
            return
        with atomic_write(_limit_path()) as partial:
            partial.write_text(json.dumps({"limit": limit}), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"limit_mb: the limit cannot be written ({error.strerror or error}). Make ComfyUI's output folder writable.") from error


def require_room(size: int) -> None:
    """Raises ValueError where `size` bytes more would go beyond the limit, before anything is written."""
    limit = size_limit()
    total = _total(list_styles()) if limit else 0
    if limit and total + size > limit:
        raise ValueError(
            f"filename_prefix: the style library holds {readable_size(total)}, its limit is {readable_size(limit)}, and this style takes "
            f"{readable_size(size)} more. Delete styles in the Style Library node or raise the limit there; nothing is deleted by itself."
        )


def _total(styles: list[SavedStyle]) -> int:
    return sum(style.size for style in styles)


def _limit_path() -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER / LIMIT_FILE


def _files(folder: str, part: str) -> Iterator[tuple[int, str, os.stat_result]]:
    """(index of the folder, name in it, its state) of every safetensors file. Core's own list is a moment old."""
    for index, root in enumerate(folder_paths.get_folder_paths(folder) if folder in folder_paths.folder_names_and_paths else ()):
        for place, folders, names in os.walk(os.path.join(root, part), followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                if name.endswith(".safetensors") and not name.startswith("."):
                    with contextlib.suppress(OSError):  # gone meanwhile
                        full = os.path.join(place, name)
                        yield index, os.path.relpath(full, root), os.stat(full)


def _read_style(kind: str, folder: str, index: int, file: str, state: os.stat_result) -> SavedStyle | None:
    shown = file.replace(os.sep, "/")
    try:
        shown.encode()
    except UnicodeEncodeError:
        return None  # a name that is no text cannot travel to the page
    path = os.path.join(folder_paths.get_folder_paths(folder)[index], file)
    made, about, problem = _read_header(path, state.st_size, state.st_mtime_ns, kind == "lora")
    title = shown.removesuffix(".safetensors").removeprefix(f"{LORA_PART}/" if kind == "lora" else "")
    return SavedStyle(
        f"{kind}/{shown}", made, title, folder, index, shown, state.st_size, state.st_mtime, problem=problem, **dict(about),
    )


@functools.lru_cache(maxsize=2048)
def _read_header(path: str, size: int, modified: int, lora: bool) -> tuple[str, tuple, str]:
    """(kind, what a SavedStyle tells of it, problem); size and modified say for how long that holds."""
    try:
        with open_safetensors(Path(path)) as file:
            metadata = file.metadata() or {}
    except ValueError as error:
        return "unreadable", (), str(error)
    expected = LORA_FORMAT if lora else FORMAT
    if metadata.get("format") != expected or metadata.get("version") != VERSION:
        writer = "Save Style LoRA" if lora else "Save Features"
        found = f'format "{metadata.get("format", "none")[:40]}" version {metadata.get("version", "none")[:20]}'
        return "unreadable", (), f"not written by {writer} (expected {expected} version {VERSION}, got {found})"
    named = named_model(metadata)
    about = {
        "weights": metadata.get("weights", ""), "model": named.name, "family": named.family, "settings": settings_of(metadata),
        "notes": metadata.get("notes", ""), "cover": COVERS in metadata,
    }
    kind = "lora" if lora else "features" if metadata.get("method") == "capture" else "trajectory"
    return kind, tuple(about.items()), ""


def _inside(path: Path, folder: str) -> bool:
    real = os.path.realpath(path)
    return any(os.path.commonpath([real, os.path.realpath(root)]) == os.path.realpath(root) for root in folder_paths.get_folder_paths(folder))
