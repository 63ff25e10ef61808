"""Members take jobs from one list, each in a thread of its own, until every job has ended."""

from __future__ import annotations

import threading
import time
from typing import Callable, Sequence

from pastiche_client import Failed, Interrupted, Refused, ServerError

from .jobs import Jobs
from .members import Made, Stopped
from .pairs import Job, SavedStyle, Unreadable
from .recipe import Recipe

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds between two attempts to reach a server
STRIKES = 3  # times in a row that a server may be lost without having settled a picture


class Hand:
    """One member at work: it uploads a picture once, and lets those ride along that the member will need again."""

    def __init__(self, member, recipe: Recipe, carried: str, keep: int):
        self.member, self._recipe, self._carried, self._keep = member, recipe, carried, keep
        self._uploaded: dict[str, str] = {}
        self._riding: dict[str, None] = {}

    def forget(self) -> None:
        """The member may have lost everything."""
        self._uploaded.clear()
        self._riding.clear()

    def make(self, job: Job) -> Made:
        """Raises Unreadable, Failed, Interrupted, Refused, Stopped, or another ServerError when the member is lost."""
        try:
            return self._make(job)
        except Refused:  # its input folder may have been emptied
            self.forget()
            return self._make(job)

    def _make(self, job: Job) -> Made:
        names = {}
        for side in ("content", "style"):
            picture = getattr(job, side)
            if isinstance(picture, SavedStyle):  # it is there, or ComfyUI says that it is not
                names[side] = picture.name
                continue
            name = picture.upload_name()
            if name not in self._uploaded:
                try:
                    self._uploaded[name] = self.member.upload(picture.read(), name)
                except Refused as error:  # too large, say
                    raise Failed(str(error)) from None
            names[side] = self._uploaded[name]
        mine = names[self._carried]
        self._riding.pop(mine, None)
        self._riding[mine] = None
        while len(self._riding) > max(self._keep, 1):
            del self._riding[next(iter(self._riding))]  # the one not needed for longest
        return self.member.picture(self._recipe.prompt(**names, carried=self._carried, kept=self._riding), self._recipe.result)


class Crew:
    """Does `jobs`. `save(job, made, member name, seconds)` gets every result, `tell(text)` what happens on the way."""

    def __init__(
        self, members: Sequence, jobs: Jobs, recipe: Recipe, save: Callable, tell: Callable[[str], None], carried: str, keep: int,
        patience: float,
    ):
        self._members, self._jobs, self._save, self._tell, self._patience = list(members), jobs, save, tell, patience
        self._hands = [Hand(member, recipe, carried, keep) for member in self._members]
        self._stop = threading.Event()
        self.error: BaseException | None = None  # what no server is to blame for: a full disk, a mistake of ours
        self.here: set = set()  # members connected at the moment

    def run(self, watch: Callable[[], None] = lambda: None) -> None:
        """Returns when every job has ended or every member has left; calls `watch` meanwhile. Ctrl-C goes through."""
        for member in self._members:
            self._jobs.join(member)
        threads = [threading.Thread(target=self._work, args=(hand,), name=hand.member.name, daemon=True) for hand in self._hands]
        try:
            for thread in threads:
                thread.start()
            # a member that is waited for, or still starting, holds up nobody
            while any(thread.is_alive() for thread in threads) and self._jobs.waits():
                watch()
                time.sleep(0.1)
        finally:
            self._stop.set()
            self._jobs.stop()
            for member in self._members:
                member.halt()
            deadline = time.monotonic() + 20
            for thread in threads:
                thread.join(max(0.1, deadline - time.monotonic()))
            for member in self._members:
                member.end()
        if self.error:
            raise self.error

    def _work(self, hand: Hand) -> None:
        member = hand.member
        try:
            self._stay(hand)
        except Stopped:
            pass
        except ServerError as error:
            self._tell(f"{member.name} is left out: {error}")
        except BaseException as error:
            self.error = error
            self._jobs.stop()
            for other in self._members:
                other.halt()
        finally:
            self.here.discard(member)
            self._jobs.leave(member)

    def _stay(self, hand: Hand) -> None:
        """Connects and works, again and again. Raises ServerError when the member is of no use."""
        missing, pause, strikes = time.monotonic(), FIRST_PAUSE, 0
        while self._jobs.waits():
            try:
                hand.member.open()
            except (Stopped, Refused):
                raise
            except ServerError as error:
                if pause == FIRST_PAUSE:
                    self._tell(f"{hand.member.name} does not answer, which is tried for {self._patience:.0f} s: {error}")
                if time.monotonic() - missing + pause > self._patience:
                    raise ServerError(f"it could not be reached for {time.monotonic() - missing:.0f} s. {error}") from None
                self._stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            hand.forget()
            self.here.add(hand.member)
            lost, useful = self._serve(hand)
            self.here.discard(hand.member)
            if lost is None:
                return
            strikes = 0 if useful else strikes + 1
            if strikes == STRIKES:
                raise ServerError(f"it was lost {STRIKES} times without a picture. {lost}")
            self._tell(f"{hand.member.name} was lost, its pictures go to the others. {lost}")
            missing, pause = time.monotonic(), FIRST_PAUSE
            self._stop.wait((strikes + 1) * FIRST_PAUSE)  # somebody else gets them first

    def _serve(self, hand: Hand) -> tuple[str | None, bool]:
        """Does jobs until there are none: (None, ...), or until the member is lost: (message, whether a job was settled).

        Raises Refused when the member cannot do them.
        """
        jobs, member, useful = self._jobs, hand.member, False
        while (job := jobs.take(member)) is not None:
            started = time.monotonic()
            try:
                made = hand.make(job)
            except Unreadable as error:
                jobs.fail(job, member, str(error), final=True)
            except (Failed, Interrupted) as error:
                jobs.fail(job, member, str(error))
            except Refused:
                jobs.give_back(job, member)
                raise
            except Stopped:
                jobs.give_back(job, member)
                raise
            except ServerError as error:
                useful |= jobs.give_back(job, member, lost=str(error))  # the job was to blame
                return str(error), useful
            except BaseException:
                jobs.give_back(job, member)
                raise
            else:
                try:
                    self._save(job, made, member.name, time.monotonic() - started)
                except BaseException:
                    jobs.give_back(job, member)
                    raise
                jobs.done(job)
            useful = True
        return None, useful
