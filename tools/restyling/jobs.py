"""The list that the members of a crew take their jobs from. Every job ends once: done, or failed with a message."""

from __future__ import annotations

import threading
from collections import deque
from typing import Hashable

from .pairs import Job

TRIES = 2  # members on which a job may fail
LOSSES = 3  # times that a server may be lost over a job


class Jobs:
    """`take` gives a member one row after the other, when there is no more half of what another has before it.

    A member is anything hashable. It must call `join` first, and for every job taken `done`, `fail` or `give_back`.
    """

    def __init__(self, rows: list[list[Job]]):
        self._rows = deque(deque(row) for row in rows)
        self._mine: dict[Hashable, deque[Job]] = {}
        self._again: list[Job] = []  # failed once, to be tried by somebody else
        self._taken: dict[int, Job] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self.finished = 0
        self.failed: list[tuple[Job, str]] = []
        self._messages: dict[int, str] = {}
        self.total = sum(map(len, rows))

    def join(self, member: Hashable) -> None:
        with self._changed:
            self._mine.setdefault(member, deque())

    def take(self, member: Hashable) -> Job | None:
        """The next job; waits while others might give one back. None when all have ended, or after `stop`."""
        with self._changed:
            while not self._stopped:
                job = self._next(member)
                if job is not None:
                    self._taken[id(job)] = job
                    return job
                if not self._taken and not self._again:
                    return None
                self._changed.wait()
        return None

    def waits(self) -> bool:
        """Whether there is anything left to do."""
        with self._changed:
            return not self._stopped and self.finished + len(self.failed) < self.total

    def done(self, job: Job) -> None:
        with self._changed:
            self._untake(job)
            self.finished += 1

    def fail(self, job: Job, member: Hashable, message: str, final: bool = False) -> bool:
        """Another member tries it, unless it is final or has been tried enough. True when it has failed for good."""
        with self._changed:
            self._untake(job)
            job.tried.add(member)
            self._messages[id(job)] = message
            if not final and len(job.tried) < TRIES and self._mine.keys() - job.tried:
                self._again.append(job)
                return False
            self.failed.append((job, message))
            return True

    def give_back(self, job: Job, member: Hashable, lost: str | None = None) -> bool:
        """The job, and what this member had before it, go to the others. `lost` is the message of a server that was lost.

        True when the job has failed for good: too many servers were lost over it.
        """
        with self._changed:
            self._untake(job)
            row = self._mine[member]
            self._mine[member] = deque()
            if lost is not None:
                job.lost.append(member)
            # one that is lost over and over may be the one to blame, unless there is no other
            blamed = len(job.lost) >= LOSSES and len(set(job.lost)) >= min(2, len(self._mine))
            if blamed:
                self.failed.append((job, f"the server was lost {len(job.lost)} times over it. The last: {lost}"))
            else:
                row.appendleft(job)
            if row:
                self._rows.appendleft(row)
            return blamed

    def leave(self, member: Hashable) -> None:
        """The member takes no more; what it had goes to the others."""
        with self._changed:
            row = self._mine.pop(member, None)
            if row:
                self._rows.appendleft(row)
            for job in [job for job in self._again if not self._mine.keys() - job.tried]:
                self._again.remove(job)
                self.failed.append((job, self._messages[id(job)]))
            self._changed.notify_all()

    def stop(self) -> None:
        """Nobody gets another job."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _untake(self, job: Job) -> None:
        del self._taken[id(job)]  # a KeyError here is a job that ends twice
        self._changed.notify_all()

    def _next(self, member: Hashable) -> Job | None:
        mine = self._mine[member]
        if not mine:
            if self._rows:
                mine.extend(self._rows.popleft())
            else:
                other = max(self._mine.values(), key=len)
                mine.extendleft(other.pop() for _ in range((len(other) + 1) // 2))
        if mine:
            return mine.popleft()
        for job in self._again:
            if member not in job.tried:
                self._again.remove(job)
                return job
        return None
