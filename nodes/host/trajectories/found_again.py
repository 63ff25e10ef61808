"""Inversions and features that were computed before: kept in RAM by what they were computed from, the least used going first.

ComfyUI keeps a node's output while its inputs stay the same; where a node upstream ran again and gave the same picture,
this finds the result. Nothing in here holds a MODEL, and what is kept for one goes with it.
"""

from __future__ import annotations

import collections
import logging
import os
import sys
import threading
import weakref
from typing import Any, Hashable, NamedTuple

import psutil
from comfy.cli_args import args
from torch import nn

SETTING = "PASTICHE_CACHE_MB"
DEFAULT_MB = 2048
HEADROOM = 2 << 30  # bytes of RAM that stay free for others


class _Entry(NamedTuple):
    value: Any
    nbytes: int
    owner: weakref.ref  # of the network that computed it


class FoundAgain:
    """Values by keys, as many as `limit` bytes and the free RAM allow. What a key says of its value is the callers' business.

    Values are given out as they were put in: callers keep copies, or what cannot be written to.
    """

    def __init__(self):
        self._entries: collections.OrderedDict[Hashable, _Entry] = collections.OrderedDict()  # least recently used first
        self._gone: collections.deque[Hashable] = collections.deque()  # keys whose network is no more
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in list(self._entries.values()))

    @property
    def limit(self) -> int:
        """In bytes: PASTICHE_CACHE_MB, or 2048 MB where it is not set and ComfyUI itself keeps results; 0 switches off."""
        text = os.environ.get(SETTING, "").strip()
        if not text:
            return 0 if getattr(args, "cache_none", False) else DEFAULT_MB * 1_000_000
        try:
            return max(0, int(float(text) * 1_000_000))
        except (ValueError, OverflowError):
            _tell_once(f'{SETTING} is "{text}", which is no number of megabytes; {DEFAULT_MB} is used.')
            return DEFAULT_MB * 1_000_000

    def find(self, key: Hashable | None) -> Any | None:
        """The value kept under `key`, which then is the most recently used; None where there is none."""
        if key is None:
            return None
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            dropped = self._shrink(self.limit)
        del dropped  # out of the lock: what goes may end in code of others
        return None if entry is None else entry.value

    def takes(self, nbytes: int) -> bool:
        """Whether a value of this size would be kept; the log names the setting where it is too large for it."""
        if nbytes > self.limit > 0:
            logging.info("Pastiche: %.0f MB are more than is kept to be found again (%s=%.0f).", nbytes / 1e6, SETTING, self.limit / 1e6)
        return nbytes <= self.limit and nbytes + HEADROOM <= psutil.virtual_memory().available + self.nbytes

    def keep(self, key: Hashable | None, owner: nn.Module, value: Any, nbytes: int) -> bool:
        """Keeps a finished value for as long as `owner` lives, at most; tells whether it was kept."""
        if key is None or not self.takes(nbytes):
            return False
        entry = _Entry(value, nbytes, weakref.ref(owner, lambda _: self._forget(key)))
        with self._lock:
            self._entries[key] = entry
            self._entries.move_to_end(key)
            dropped = self._shrink(self.limit)
        del dropped
        return True

    def relieve(self) -> None:
        """Lets go of what there is too little RAM for by now."""
        with self._lock:
            dropped = self._shrink(self.limit)
        del dropped

    def clear(self) -> None:
        with self._lock:
            dropped = self._shrink(-1)
        del dropped

    def _shrink(self, limit: int) -> list[_Entry]:
        """Takes out what is over `limit` or whose network is gone; called with the lock."""
        dropped = []
        while self._gone:
            dropped.append(self._entries.pop(self._gone.popleft(), None))
        held = self.nbytes
        limit = min(limit, held + psutil.virtual_memory().available - HEADROOM) if limit > 0 else limit
        while self._entries and (held > limit or limit <= 0):
            dropped.append(self._entries.popitem(last=False)[1])
            held -= dropped[-1].nbytes
        return dropped

    def _forget(self, key: Hashable) -> None:
        """A network is gone. This may be called by the garbage collector at any time, so it waits for nobody."""
        self._gone.append(key)
        if self._lock.acquire(blocking=False):
            try:
                dropped = self._shrink(self.limit)
            finally:
                self._lock.release()
            del dropped


RESULTS = FoundAgain()
"""Those of this process."""

_told: set[str] = set()


def _tell_once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        logging.warning("Pastiche: %s", text)


def empty_with_comfyui() -> None:
    """Has ComfyUI's request to free its results ("Unload Models and Execution Cache", POST /free) empty RESULTS too, and every
    prompt that is queued look whether there is RAM for them, also where no node of ours is in it.

    ComfyUI has no hook for either; its web server tells of every answer before it goes out.
    """
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:  # nodes without ComfyUI's server
        return
    try:
        server.app.on_response_prepare.append(_answered)
    except RuntimeError as error:  # loaded after the server has started
        logging.debug("Pastiche: %s does not empty what is kept to be found again: %s", "POST /free", error)


async def _answered(request: Any, response: Any) -> None:
    path = request.path.removeprefix("/api")
    if request.method != "POST" or path not in ("/free", "/prompt") or response.status != 200:
        return
    if path == "/prompt":
        RESULTS.relieve()
        return
    asked = await request.json()  # has been read once, so it is there
    if isinstance(asked, dict) and asked.get("free_memory") and len(RESULTS):
        logging.info("Pastiche: %d results (%.1f MB) that were kept to be found again are let go.", len(RESULTS), RESULTS.nbytes / 1e6)
        RESULTS.clear()
