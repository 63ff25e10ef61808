"""The output folder: which names are finished, a journal of what was made where, and contact sheets.

restyle.jsonl has the settings in its first line, then a line a picture: name, content, style, server, seconds, the
titles of the nodes that ran. A picture is finished when the file of its name is there: it is written under another name
and renamed.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import threading
import uuid
from pathlib import Path

from . import UserError
from .members import Made
from .pairs import Job
from .recipe import Recipe, place

JOURNAL, LOCK, PART = "restyle.jsonl", ".restyle.lock", ".restyle-*.part"
SHEET_ROWS, SHEET_COLUMNS, SHEET_CELL = 20, 10, (160, 120)


class Results:
    """Use as a context manager: only one run at a time writes into a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.recorded: dict[tuple[str, str], str] = {}  # names of earlier runs, by the names of content and style
        self._settings: str | None = None
        self._journal = self._lock_file = None
        self._writing = threading.Lock()

    def __enter__(self) -> Results:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = open(self.folder / LOCK, "a+")
            _lock(self._lock_file, self.folder)
            for left in self.folder.glob(PART):  # of a run that was killed; nobody else writes here
                left.unlink()
            self._read()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise UserError(f"--output {self.folder} cannot be written to: {error}") from None
            raise
        return self

    def __exit__(self, *_) -> None:
        for file in (self._journal, self._lock_file):
            if file is not None:
                file.close()
        self._journal = self._lock_file = None

    def begin(self, recipe: Recipe) -> None:
        """Opens the journal. Raises UserError when the folder's pictures were made with other settings."""
        settings = _digest(recipe)
        if self._settings is not None and self._settings != settings:
            raise UserError(
                f"the pictures in {self.folder} were made with another workflow or other settings. "
                "Choose another folder with --output, or delete that one to make them anew."
            )
        path = self.folder / JOURNAL
        broken = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._journal = open(path, "a", encoding="utf-8", errors="backslashreplace")
        if broken:  # the last line of a run that was killed
            self._journal.write("\n")
        if self._settings is None:
            self._write({"settings": settings})

    def path(self, job: Job) -> Path:
        return self.folder / f"{job.name}.png"

    def finished(self, job: Job) -> bool:
        return self.path(job).is_file()

    def save(self, job: Job, made: Made, server: str, seconds: float) -> None:
        part = self.folder / PART.replace("*", uuid.uuid4().hex)
        with open(part, "xb") as file:
            file.write(made.data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path(job))
        with self._writing:
            self._write({
                "name": job.name, "content": job.content.name, "style": job.style.name, "server": server, "seconds": round(seconds, 2),
                "ran": made.ran,
            })

    def _write(self, line: dict) -> None:
        self._journal.write(json.dumps(line) + "\n")  # ASCII: any name, whatever its bytes
        self._journal.flush()

    def _read(self) -> None:
        path = self.folder / JOURNAL
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
            with contextlib.suppress(ValueError, LookupError, TypeError):  # a line that was cut short tells nothing
                line = json.loads(text)
                if "settings" in line:
                    self._settings = str(line["settings"])
                else:
                    self.recorded[str(line["content"]), str(line["style"])] = str(line["name"])


def _digest(recipe: Recipe) -> str:
    """Of the graph without its two pictures."""
    graph = copy.deepcopy(recipe.graph)
    for title in (recipe.content, recipe.style):
        place(graph, title, "")
    return hashlib.sha256(json.dumps([graph, recipe.content, recipe.style, recipe.result], sort_keys=True).encode()).hexdigest()


def _lock(file, folder: Path) -> None:
    """The operating system drops it when the process ends, however it ends."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another restyle.py is writing into {folder}: wait for it, or choose another --output") from None


def contact_sheets(results: Results, jobs: list[Job]) -> list[Path]:
    """Contents down, styles across, what is finished in between; a file for every 20 x 10. Needs Pillow, [] without it."""
    try:
        from PIL import Image
    except ImportError:
        return []
    from pictures import sheet

    def small(path: Path) -> Image.Image:
        from PIL import ImageOps

        try:
            with Image.open(path) as image:
                image.draft("RGB", (2 * SHEET_CELL[0], 2 * SHEET_CELL[1]))
                image = ImageOps.exif_transpose(image).convert("RGB")
                image.thumbnail((2 * SHEET_CELL[0], 2 * SHEET_CELL[1]))
                return image
        except (OSError, ValueError, SyntaxError, ImportError, Image.DecompressionBombError):
            return Image.new("RGB", SHEET_CELL, "lightgrey")

    def caption(path: Path) -> str:
        return path.stem if len(path.stem) <= 20 else path.stem[:19] + "…"

    contents, styles = (list(dict.fromkeys(getattr(job, side).path for job in jobs)) for side in ("content", "style"))
    made = {(job.content.path, job.style.path): results.path(job) for job in jobs if results.finished(job)}
    blank, written = ("", Image.new("RGB", SHEET_CELL, "white")), []
    for old in results.folder.glob("contact_sheet*.jpg"):
        old.unlink()
    blocks = [
        (contents[y : y + SHEET_ROWS], styles[x : x + SHEET_COLUMNS])
        for y in range(0, len(contents), SHEET_ROWS) for x in range(0, len(styles), SHEET_COLUMNS)
    ]
    for number, (down, across) in enumerate(blocks, 1):
        rows = [[blank, *((caption(path), small(path)) for path in across)]]
        for path in down:
            cells = [made.get((path, style)) for style in across]
            rows.append([(caption(path), small(path)), *(("", small(cell)) if cell else blank for cell in cells)])
        target = results.folder / (f"contact_sheet_{number:03}.jpg" if len(blocks) > 1 else "contact_sheet.jpg")
        part = results.folder / PART.replace("*", uuid.uuid4().hex)
        sheet(rows, SHEET_CELL).save(part, "JPEG", quality=88)
        part.replace(target)
        written.append(target)
    return written
