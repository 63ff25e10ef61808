"""Models in ComfyUI's diffusers folders: which there are, and what they say about themselves, read before any memory is taken."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Iterator

import folder_paths
from safetensors import SafetensorError, safe_open

from ..files import refuse_web_page
from .unconditional_checkpoint import EXTENSIONS

LARGEST_CONFIG = 1 << 20  # bytes; real ones have 1 kB
FRESH = 1.0  # seconds for which a listing is not repeated: ComfyUI asks several times for one prompt
TELLING = {"config.json", "model_index.json"}  # in a folder whose weight files are parts of a model
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # attention layers of diffusers before 0.17

Shapes = dict[str, tuple[int, ...]]


class Listing:
    """Folders that hold a UNet2DModel's config.json, at most two deep, and weight files. What has not changed is not read again."""

    def __init__(self) -> None:
        self._folders: dict[str, tuple[int, list[str], list[str]]] = {}  # path: mtime, subfolders, files that tell or are a model
        self._configs: dict[str, tuple[tuple[int, int], bool]] = {}  # path: (mtime, size), whether it is a UNet2DModel's
        self._last: tuple[list[Path], float, tuple[list[str], list[str]]] = ([], 0.0, ([], []))

    def names(self, roots: list[Path]) -> tuple[list[str], list[str]]:
        """(folders, files), relative to their roots, sorted."""
        known, until, names = self._last
        if known != roots or time.monotonic() > until:
            found = [entry for root in roots for entry in self._search(str(root))]
            names = tuple(sorted({name for name, is_file in found if is_file == which}) for which in (False, True))
            self._last = list(roots), time.monotonic() + FRESH, names
        return names

    def _search(self, root: str) -> Iterator[tuple[str, bool]]:
        """(name, whether it is a file)"""
        folders, files = self._inside(root)
        yield from ((name, True) for name in files if name not in TELLING)
        for first in folders:
            if self._is_model(os.path.join(root, first)):
                yield first, False
            folders, files = self._inside(os.path.join(root, first))
            if first != "unet" and not TELLING.intersection(files):
                yield from ((f"{first}/{name}", True) for name in files)
            for second in folders:
                if second != "unet" and self._is_model(os.path.join(root, first, second)):
                    yield f"{first}/{second}", False

    def _is_model(self, folder: str) -> bool:
        folders, files = self._inside(folder)
        if "config.json" in files and self._is_config(os.path.join(folder, "config.json")):
            return True
        unet = os.path.join(folder, "unet")
        return "unet" in folders and "config.json" in self._inside(unet)[1] and self._is_config(os.path.join(unet, "config.json"))

    def _inside(self, folder: str) -> tuple[list[str], list[str]]:
        try:
            changed = os.stat(folder).st_mtime_ns
            if self._folders.get(folder, (None,))[0] != changed:
                with os.scandir(folder) as entries:
                    found = sorted((entry.name, entry.is_dir()) for entry in entries)
                files = [name for name, is_folder in found if not is_folder and (name in TELLING or name.lower().endswith(EXTENSIONS))]
                self._folders[folder] = changed, [name for name, is_folder in found if is_folder], files
        except OSError:  # removed meanwhile, or not ours to read
            return [], []
        return self._folders[folder][1:]

    def _is_config(self, path: str) -> bool:
        try:
            about = os.stat(path)
            state = about.st_mtime_ns, about.st_size
            if self._configs.get(path, (None,))[0] != state:
                text = Path(path).read_bytes() if about.st_size <= LARGEST_CONFIG else b""
                self._configs[path] = state, b"UNet2DModel" in text
        except OSError:
            return False
        return self._configs[path][1]


_LISTING = Listing()


def list_folders() -> list[str]:
    """Names, relative to ComfyUI's `diffusers` folders, of the folders that hold a UNet2DModel's config.json."""
    return list(_LISTING.names(roots())[0])


def list_files() -> list[str]:
    """Names of weight files that lie in those folders or one folder below, and are no part of a diffusers model."""
    return list(_LISTING.names(roots())[1])


def find_folder(name: str) -> Path:
    """The folder called `name` inside ComfyUI's `diffusers` folders. Raises ValueError when it lies elsewhere."""
    for root in roots():
        folder = root / name
        try:
            if lies_inside(folder, root) and folder.is_dir():
                return folder
        except (OSError, ValueError):  # a name that no folder can have
            continue
    known = ", ".join(list_folders()) or "none"
    raise ValueError(
        f'folder: no {ascii(name[:60])} in {", ".join(map(str, roots()))} (found: {known}). '
        "Put the downloaded model's folder there: config.json, the .safetensors and scheduler_config.json."
    )


def lies_inside(path: Path, root: Path) -> bool:
    """By name: what a user links into the folder counts, `..` does not lead out of it."""
    return Path(os.path.abspath(root)) in Path(os.path.abspath(path)).parents


def read_json(path: Path, what: str) -> dict:
    """An object of a small JSON file. Raises ValueError for anything else."""
    where = f"{path.parent.name}/{what}"
    try:
        size = path.stat().st_size
        if size > LARGEST_CONFIG:
            raise ValueError(f"{where} has {size / 1e6:.0f} MB, which no model's has; download the folder again.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path.parent.name} has no {what}; download the whole model folder.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} cannot be read: {error}. Download the folder again.") from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}. Download the folder again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} should hold a JSON object, found {type(value).__name__}.")
    return value


def weight_shapes(files: list[Path]) -> Shapes:
    """Names and shapes of the tensors in safetensors files, whose headers alone are read. Raises ValueError for damaged ones."""
    shapes: Shapes = {}
    for path in files:
        refuse_web_page(path)
        try:
            with safe_open(str(path), framework="pt") as file:
                shapes.update({_of_today(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()})
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} is no complete safetensors file ({error}); a cut download or a web page. Download it again.") from error
    return shapes


def _of_today(name: str) -> str:
    """A tensor's name, or what diffusers has renamed it to."""
    parts = name.split(".")
    if "attentions" in parts and len(parts) > 1:
        parts[-2] = RENAMED.get(parts[-2], parts[-2])
    return ".".join(parts)


def check_sizes(config: dict, shapes: Shapes) -> None:
    """Raises ValueError where config.json describes a network that the weights cannot be: before one is made of it."""
    widths, layers = config.get("block_out_channels", (224, 448, 672, 896)), config.get("layers_per_block", 2)
    widest = max((size for shape in shapes.values() for size in shape), default=0)
    if not (isinstance(widths, (list, tuple)) and widths and all(_whole(width, 1, widest) for width in widths)):
        raise ValueError(f"config.json: block_out_channels is {brief(widths)}, but the weights have at most {widest} channels.")
    if not _whole(layers, 1, len(shapes)) or len(widths) * layers > len(shapes):
        raise ValueError(
            f"config.json: {len(widths)} blocks of layers_per_block {brief(layers)} are more than the {len(shapes)} tensors of the weights."
        )
    for key in ("down_block_types", "up_block_types"):
        kinds = config.get(key)
        if kinds is not None and (not isinstance(kinds, (list, tuple)) or len(kinds) != len(widths) or not all(isinstance(kind, str) for kind in kinds)):
            raise ValueError(f"config.json: {key} must name {len(widths)} blocks, one for each of block_out_channels; it is {brief(kinds)}.")


def compare_shapes(expected: Shapes, found: Shapes, name: str) -> None:
    """Raises ValueError where a network of these tensors cannot be filled from the file called `name`."""
    missing = [key for key in expected if key not in found]
    other = [key for key in expected if key in found and expected[key] != found[key]]
    if missing or other:
        first = min(missing + other)
        raise ValueError(
            f"{name} does not fit its config.json: {len(missing + other)} tensors are missing or of another shape, the first {first} "
            f"({expected[first]} expected, {found.get(first, 'nothing')} found). Download the folder again."
        )


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def brief(value: Any) -> str:
    """At most 60 characters of a value from a file."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # an integer with thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 60 else text[:57] + "..."


def roots() -> list[Path]:
    return [Path(path) for path in folder_paths.get_folder_paths("diffusers")]
