"""A ComfyUI that takes part in the work: somebody's, attached to, or one started for it.

    open()                    connects or starts; raises ServerError
    upload(bytes, name)       a picture; the name for LoadImage
    picture(prompt, result)   runs a prompt; the PNG that its node `result` saved, and the titles of the nodes that ran
    halt()                    whatever waits for the server raises Stopped
    end()                     ends what was started
"""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass

from host.comfy import Server
from pastiche_client import ComfyUI, Failed, ServerError

_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class Stopped(ServerError):
    """The user ended the run."""


@dataclass
class Made:
    data: bytes
    ran: list[str]


class Attached(ComfyUI):
    """A ComfyUI at an address. Nothing of anybody else's prompts is touched."""

    def __init__(self, url: str, timeout: float = 3600):
        super().__init__(url)
        self._prepare(timeout)

    def _prepare(self, timeout: float) -> None:
        self.stopping = threading.Event()
        self._timeout = timeout
        self._owed: set[str] = set()  # prompts still to be cancelled there

    @property
    def name(self) -> str:
        return self.url

    def open(self) -> None:
        self._ids(["queue_running"], timeout=10)
        for prompt in list(self._owed):
            self.cancel(prompt)

    def end(self) -> None:
        """Nothing was started."""

    def halt(self) -> None:
        """What waits for the server raises Stopped, and cancels its prompt."""
        self.stopping.set()

    def cancel(self, prompt_id: str, timeout: float = 10) -> None:
        self._owed.add(prompt_id)
        super().cancel(prompt_id, timeout)
        self._owed.discard(prompt_id)

    def require_alive(self) -> None:
        if self.stopping.is_set():
            raise Stopped("stopped")
        super().require_alive()

    def picture(self, prompt: dict, result: str) -> Made:
        """Raises ServerError as `run` does, Failed where the result is not one PNG."""
        ran = []

        def step(progress) -> None:
            if self.stopping.is_set():
                raise Stopped("stopped")
            if not ran or ran[-1] != (progress.node, progress.title):
                ran.append((progress.node, progress.title))

        images = [image for image in self.run(prompt, step, self._timeout).images if image["node"] == result]
        if len(images) != 1:
            raise Failed(f"the node that saves the result gave {len(images)} pictures, not one")
        try:
            data = self.fetch(images[0])
        except KeyError as error:
            raise ServerError(f"/history names a picture without {error}") from None
        if not data.startswith(_PNG) or _PNG_END not in data[-64:]:
            raise Failed(f"the result is no whole PNG file ({len(data)} bytes): the workflow must save with Save Image")
        return Made(data, [title for _, title in ran])


class Own(Attached, Server):
    """A headless ComfyUI of our own; `open` starts it, and starts it again where it has ended. `end` removes its folder."""

    def __init__(self, host, base, cpu: bool, timeout: float = 3600):
        Server.__init__(self, host, base, cpu=cpu)
        self._prepare(timeout)

    @property
    def name(self) -> str:
        return "own server"

    def open(self) -> None:
        Server.stop(self)
        self.start()

    def end(self) -> None:
        Server.stop(self)
        shutil.rmtree(self.base, ignore_errors=True)
