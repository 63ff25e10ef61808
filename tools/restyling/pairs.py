"""Which content goes with which style, and what the result is called."""

from __future__ import annotations

import csv
import hashlib
import threading
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable

from . import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
LONGEST = 180  # bytes of a result's name without its suffix; file systems allow 255 with what is added while writing


class Unreadable(Exception):
    """A picture that cannot be read."""


@dataclass(eq=False)
class Picture:
    """A file of the user's. It is read when a server is to get it, and looked at once."""

    path: Path
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _uploaded: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    def upload_name(self) -> str:
        """What it is called on every server: by its bytes, so that two pictures of one name do not collide. Raises Unreadable."""
        with self._lock:
            if self._uploaded is None:
                data = self.read()
                _look(self.path)
                self._uploaded = f"restyle_{hashlib.sha256(data).hexdigest()[:20]}{self.path.suffix.lower()}"
            return self._uploaded

    def read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise Unreadable(f"{self.path} cannot be read: {error.strerror or error}") from None


@dataclass(eq=False)
class SavedStyle:
    """A style that the servers have in their libraries, by the name that their Style Library gives it, e.g. "ready/comic"."""

    name: str

    @property
    def path(self) -> Path:
        """What results are called after."""
        return Path(self.name)


def saved_styles(names: str) -> dict[str, SavedStyle]:
    """By name in order, of a list with commas. Raises UserError."""
    found = {name: SavedStyle(name) for name in (part.strip() for part in names.split(",")) if name}
    if not found:
        raise UserError("library: names no style; for example library:ready/comic,ready/woodcut")
    return found


def _look(path: Path) -> None:
    try:
        from PIL import Image
    except ImportError:  # then the server says what is wrong with it
        return
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, ImportError, Image.DecompressionBombError) as error:  # Import: of a format's plug-in
        raise Unreadable(f"{path} cannot be read as a picture: {error}") from None


@dataclass(eq=False)
class Job:
    """One result to make. `tried`: members on which it failed; `lost`: those that were lost meanwhile."""

    name: str
    content: Picture
    style: Picture | SavedStyle
    tried: set = field(default_factory=set)
    lost: list = field(default_factory=list)

    @property
    def pair(self) -> tuple[str, str]:
        return self.content.name, self.style.name


def pictures(path: Path, tell=print) -> dict[str, Picture]:
    """The pictures right in a folder, or the one that `path` is, by name in order. Tells what it leaves out. Raises UserError."""
    if path.is_file():
        return {path.name: Picture(path)}
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder nor a file.")
    home, found, others, outside = path.resolve(), {}, [], []
    for file in sorted(path.iterdir(), key=lambda file: file.name):
        if not file.is_file() or file.name.startswith("."):
            continue
        if file.suffix.lower() not in SUFFIXES:
            others.append(file.name)
        elif not file.resolve().is_relative_to(home):
            outside.append(file.name)
        else:
            found[file.name] = Picture(file)
    if others:
        tell(f"{path}: left out {_some(others)}, no {', '.join(sorted(SUFFIXES))}")
    if outside:
        tell(f"{path}: left out {_some(outside)}, links out of the folder")
    if not found:
        raise UserError(f"{path} has no pictures ({', '.join(sorted(SUFFIXES))}).")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def all_pairs(contents: dict[str, Picture], styles: dict[str, Picture | SavedStyle]) -> list[tuple[Picture, Picture | SavedStyle]]:
    return [(content, style) for content in contents.values() for style in styles.values()]


def pairs_from(file: Path, contents: dict[str, Picture], styles: dict[str, Picture | SavedStyle]) -> list[tuple[Picture, Picture | SavedStyle]]:
    """Pairs of file names from a CSV of two columns, content and style, with or without a heading.

    The names are looked up among the pictures of the two folders, so nothing else can be named. Raises UserError.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            rows = [(number, [cell.strip() for cell in row]) for number, row in enumerate(csv.reader(lines), 1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--pairs {file} cannot be read as CSV in UTF-8: {error}") from None
    rows = [(number, row) for number, row in rows if any(row)]
    if rows and [cell.lower() for cell in rows[0][1]] == ["content", "style"]:
        rows = rows[1:]
    sides = [{unicodedata.normalize("NFC", name): picture for name, picture in found.items()} for found in (contents, styles)]
    found, wrong = {}, []
    for number, row in rows:
        if len(row) != 2:
            wrong.append(f"line {number} has {len(row)} columns, not content,style")
            continue
        pair = [side.get(unicodedata.normalize("NFC", cell)) for side, cell in zip(sides, row)]
        for picture, cell, what in zip(pair, row, ("contents", "styles")):
            if picture is None:
                wrong.append(f"line {number}: {cell!r} is not the name of a picture of the {what}")
        if None not in pair:
            found[tuple(pair)] = None  # a pair that is there twice is one
    if wrong:
        raise UserError(f"--pairs {file}: " + "; ".join(wrong[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""))
    if not found:
        raise UserError(f"--pairs {file} names no pairs.")
    return list(found)


def name_jobs(pairs: Iterable[tuple[Picture, Picture | SavedStyle]], recorded: dict[tuple[str, str], str]) -> list[Job]:
    """Jobs with names content_style, one a pair.

    Where two pairs would have one name, on any file system, each gets a number of its own that does not depend on the
    others. `recorded` are names of earlier runs: they stay, whatever has been added to the folders since.
    """
    pairs = list(pairs)
    plain = {pair: _short(f"{pair[0].path.stem}_{pair[1].path.stem}", pair) for pair in pairs}
    own = {pair: f"{name}_{_digest(pair)}" for pair, name in plain.items()}
    # a record can come from anybody: only what this function could have said counts
    known = {pair: recorded[_names(pair)] for pair in plain if recorded.get(_names(pair)) in (plain[pair], own[pair])}
    counts = Counter(_folded(name) for pair, name in plain.items() if pair not in known) + Counter(map(_folded, recorded.values()))
    return [Job(known.get(pair) or (own[pair] if counts[_folded(name)] > 1 else name), *pair) for pair, name in plain.items()]


def in_rows(jobs: list[Job], keep: int) -> tuple[list[list[Job]], str]:
    """The jobs in rows that a server does one after the other, and which side's pictures ride along ("content", "style").

    A row is one picture of the larger side with those of the smaller, at most `keep` at a time: as many as a server
    keeps the results of.
    """
    contents, styles = ({getattr(job, side) for job in jobs} for side in ("content", "style"))
    carried, other = ("style", "content") if len(styles) <= len(contents) else ("content", "style")
    order = {picture: place for place, picture in enumerate(dict.fromkeys(getattr(job, carried) for job in jobs))}
    rows: dict[tuple, list[Job]] = {}
    for job in jobs:
        rows.setdefault((order[getattr(job, carried)] // max(keep, 1), getattr(job, other)), []).append(job)
    return [rows[key] for key in sorted(rows, key=lambda key: key[0])], carried


def _names(pair: tuple[Picture, Picture | SavedStyle]) -> tuple[str, str]:
    return pair[0].name, pair[1].name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _digest(pair: tuple[Picture, Picture | SavedStyle]) -> str:
    return hashlib.sha256("\0".join(_names(pair)).encode(errors="surrogateescape")).hexdigest()[:8]


def _short(name: str, pair: tuple[Picture, Picture | SavedStyle]) -> str:
    data = name.encode(errors="surrogateescape")
    if len(data) <= LONGEST:
        return name
    return data[:LONGEST].decode(errors="ignore") + "_" + _digest(pair)
