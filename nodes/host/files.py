"""Files that are whole or not there at all, and folders of models."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import folder_paths

PREFIX, SUFFIX = "pastiche-", ".partial"
WRITTEN = ("pastiche_features", "loras")  # in ComfyUI's output folder: Save Features and Train Style LoRA
STALE_AFTER = 24 * 3600  # seconds since the last write, where locks cannot tell whether the writer lives
YOUNG = 60  # seconds in which a file may not be locked yet


class PartialFile:
    """A file that is being written beside `target`, and takes its place in one step when it is whole.

    Its name is new whatever other processes do on the same disk. While it is open it is locked, so what a process
    that was killed has left behind is known and goes when the next file is written in that folder.
    """

    def __init__(self, target: Path):
        self.target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # a name that is too long or not allowed: now, not when the work is done
        _remove_stale(target.parent)
        self.path = target.with_name(f"{PREFIX}{os.getpid()}-{os.urandom(8).hex()}{SUFFIX}")
        self.handle = open(self.path, "x+b")
        _lock(self.handle.fileno())

    def commit(self, durable: bool = True) -> Path:
        """Gives the file its name. durable: its bytes reach the disk first, so that a power cut leaves the old file or the new."""
        try:
            self.handle.close()  # Windows renames closed files only
            if durable:
                with open(self.path, "rb+") as written:  # who wrote by name may have made the file anew
                    os.fsync(written.fileno())
            os.replace(self.path, self.target)
        except BaseException:
            self.discard()
            raise
        if durable:
            _sync_folder(self.target.parent)
        return self.target

    def discard(self) -> None:
        """Leaves nothing behind; does nothing after `commit`."""
        with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses
            self.handle.close()
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(target: Path, durable: bool = True, replace: bool = True) -> Iterator[Path]:
    """Gives a temporary path to write to. After the block the file is at `target`; after an error or Cancel nothing is left.

    replace False: a trial that leaves `target` as it is. Raises OSError where the folder or the name cannot be written.
    """
    partial = PartialFile(target)
    try:
        yield partial.path
        if replace:
            partial.commit(durable)
    finally:
        partial.discard()


def remove_partial_files() -> None:
    """What processes that were killed left in the output folders that the pack writes to."""
    for name in WRITTEN:
        _remove_stale(Path(folder_paths.get_output_directory()) / name)


def refuse_web_page(path: str | os.PathLike) -> None:
    """Raises ValueError where a download got a page, or Git LFS's note, in a model's place. Unreadable files pass: their reader tells."""
    try:
        with open(path, "rb") as file:
            begin = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    except (OSError, ValueError):
        return
    name = os.path.basename(path)
    if begin.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise ValueError(f"{name} is a web page, not a model: the link led to a page about the file. Download the file itself.")
    if begin.startswith(b"version https://git-lfs"):
        raise ValueError(f"{name} is a note of Git LFS, not a model: run `git lfs pull`, or download the file itself.")


def register_models_folder(key: str, extensions: Iterable[str], *folders: str | os.PathLike) -> None:
    """Makes folders (models/<key> if none is named) known to ComfyUI under a key that lists these extensions only."""
    for folder in folders or (os.path.join(folder_paths.models_dir, key),):
        folder_paths.add_model_folder_path(key, os.fspath(folder))
    paths, _ = folder_paths.folder_names_and_paths[key]
    folder_paths.folder_names_and_paths[key] = (paths, set(extensions))


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(f"{PREFIX}*{SUFFIX}"):
        # Windows does not remove what is open; folders that may only be read keep what they have
        with contextlib.suppress(OSError):
            if _abandoned(path):
                path.unlink()


def _abandoned(path: Path) -> bool:
    """Whether no process writes this file any more."""
    age = time.time() - path.stat().st_mtime
    if age < YOUNG:
        return False
    if age > STALE_AFTER or os.name == "nt":
        return True
    with open(path, "rb") as file:
        return _lock(file.fileno())


def _lock(descriptor: int) -> bool:
    """Holds the file until it is closed, also when the process is killed; False where another does, or no lock can be had."""
    if os.name == "nt":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Makes a rename in it last; Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
