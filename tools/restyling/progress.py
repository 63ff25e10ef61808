"""How far a run is, and how long it will take: a line that redraws itself on a terminal, elsewhere a line a picture."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import deque

_WIDTH = 24


class ProgressLine:
    """`done` counts pictures, of which `skipped` were there before."""

    def __init__(self, total: int, skipped: int = 0, clock=time.monotonic):
        self._total, self._count, self._clock = total, skipped, clock
        self._ends = deque([clock()], maxlen=60)  # of the last pictures: servers come and go
        self._terminal = sys.stdout.isatty()
        self._lock = threading.Lock()
        self._drawn = False

    def done(self, text: str) -> None:
        with self._lock:
            self._count += 1
            self._ends.append(self._clock())
            if not self._terminal:
                print(f"{self.words()}  {text}", flush=True)
        self.draw()

    def tell(self, text: str) -> None:
        """A line of its own."""
        with self._lock:
            self._erase()
            print(text, flush=True)

    def words(self) -> str:
        return f"{self._count}/{self._total}{self._left()}"

    def _left(self) -> str:
        rate = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) if len(self._ends) > 1 else 0
        todo = self._total - self._count
        return f", {duration(rate * todo)} left" if rate and todo > 0 else ""

    def draw(self, servers: int | None = None) -> None:
        if not self._terminal:
            return
        with self._lock:
            share = self._count / max(self._total, 1)
            filled = round(_WIDTH * share)
            line = f"[{'#' * filled}{'.' * (_WIDTH - filled)}] {share:4.0%}  {self.words()}"
            if servers is not None:
                line += f", {servers} server{'s' * (servers != 1)}"
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", flush=True)
            self._drawn = True

    def close(self) -> None:
        with self._lock:
            if self._drawn:
                print(flush=True)
                self._drawn = False

    def _erase(self) -> None:
        if self._drawn:
            print("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="")
            self._drawn = False


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
