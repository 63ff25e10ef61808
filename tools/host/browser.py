"""A headless Chromium, driven over the DevTools protocol with the standard library.

    with Browser() as page:
        page.open("http://127.0.0.1:8188")
        page.wait_for("() => window.app?.graph")
        total = page.evaluate("(a, b) => a + b", 1, 2)         # any JSON in, any JSON out, promises awaited
        page.click(200, 300)                                    # real mouse events, CSS pixels of the window
        page.drag((100, 100), (300, 250))
        page.key("Escape"); page.type("hello")
        page.screenshot("shot.png")
        assert not page.errors                                  # console errors and uncaught exceptions so far

`frontend.Frontend` adds what concerns ComfyUI's own page.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from .environment import find_chromium
from .websocket import WebSocket

_FLAGS = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-dev-shm-usage", "--force-device-scale-factor=1", "--remote-debugging-port=0",
)
_BUTTONS = {"left": 1, "right": 2, "middle": 4}
_KEYS = {"Enter": 13, "Escape": 27, "Backspace": 8, "Delete": 46, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class BrowserError(Exception):
    """The browser could not be started, or a script in the page failed."""


class Browser:
    """One browser with one page and a profile of its own, gone afterwards."""

    def __init__(self, size: tuple[int, int] = (1600, 1000), executable: str | None = None):
        self.size = size
        self.console: list[tuple[str, str]] = []  # (level, text) in order
        self._executable = executable or find_chromium()
        self._process: subprocess.Popen | None = None
        self._socket: WebSocket | None = None
        self._sent = 0

    def __enter__(self) -> Browser:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        if self._executable is None:
            raise BrowserError("No Chromium or Chrome on the PATH; install one or name it in the variable CHROMIUM.")
        self._profile = Path(tempfile.mkdtemp(prefix="pastiche-browser-"))
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        window = f"--window-size={self.size[0]},{self.size[1]}"
        self._process = subprocess.Popen(
            [self._executable, *_FLAGS, *root, window, f"--user-data-dir={self._profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=os.name != "nt",
        )
        try:
            self._attach(time.monotonic() + 30)
        except BaseException:
            self.stop()
            raise

    def _attach(self, deadline: float) -> None:
        told = self._profile / "DevToolsActivePort"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BrowserError(f"{self._executable} did not start (exit status {self._process.poll()}).")
            try:
                port = int(told.read_text().splitlines()[0])
                with direct(f"http://127.0.0.1:{port}/json/list", timeout=5) as answer:
                    page = next(target for target in json.load(answer) if target["type"] == "page")
                break
            except (OSError, IndexError, ValueError, StopIteration):
                time.sleep(0.1)
        self._socket = WebSocket("127.0.0.1", port, "/" + page["webSocketDebuggerUrl"].split("/", 3)[3])
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        width, height = self.size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if self._socket is not None:
            self._socket.close()
        if os.name == "nt":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
        else:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, timeout: float = 60, **parameters: Any) -> dict:
        """One DevTools command and its result."""
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": parameters}))
        deadline = time.monotonic() + timeout
        while True:
            try:
                message = json.loads(self._socket.receive(max(0.01, deadline - time.monotonic())))
            except TimeoutError:
                raise BrowserError(f"{method} was not answered within {timeout:.0f} s") from None
            if message.get("id") == self._sent:
                if "error" in message:
                    raise BrowserError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._notice(message)

    def _notice(self, event: dict) -> None:
        data = event.get("params", {})
        if event.get("method") == "Runtime.consoleAPICalled":
            text = " ".join(str(part.get("value", part.get("description", ""))) for part in data["args"])
            self.console.append((data["type"], text))
        elif event.get("method") == "Runtime.exceptionThrown":
            self.console.append(("error", _describe(data["exceptionDetails"])))
        elif event.get("method") == "Log.entryAdded":
            entry = data["entry"]
            self.console.append((entry["level"], f"{entry['text']} {entry.get('url', '')}".strip()))
        elif event.get("method") == "Page.javascriptDialogOpening":
            raise BrowserError(f"the page opened a dialog: {data['message']}")

    @property
    def errors(self) -> list[str]:
        """Console errors and uncaught exceptions so far."""
        return [text for level, text in self.console if level == "error"]

    # ---- the page ------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("() => document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, function: str, *arguments: Any, timeout: float = 60) -> Any:
        """Calls the JavaScript `function` (source of a function, may be async) and returns its JSON value."""
        expression = f"({function})({', '.join(json.dumps(argument) for argument in arguments)})"
        result = self.call("Runtime.evaluate", timeout, expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise BrowserError(_describe(result["exceptionDetails"]))
        return result["result"].get("value")

    def wait_for(self, function: str, *arguments: Any, timeout: float = 30) -> Any:
        """Calls `function` until its value is truthy and returns that."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                value = self.evaluate(function, *arguments)
            except BrowserError as error:
                if "context" not in str(error):  # a navigation replaced the page meanwhile
                    raise
                value = None
            if value:
                return value
            if time.monotonic() > deadline:
                raise BrowserError(f"after {timeout:.0f} s still not: {function}")
            time.sleep(0.1)

    def screenshot(self, path: str | Path, clip: tuple[float, float, float, float] | None = None) -> Path:
        """A picture of the window, or of `clip` (x, y, width, height); PNG, or JPEG when the name says so."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"format": "jpeg", "quality": 88} if path.suffix in (".jpg", ".jpeg") else {"format": "png"}
        if clip:
            options["clip"] = {**dict(zip(("x", "y", "width", "height"), clip)), "scale": 1}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))
        return path

    # ---- real input ----------------------------------------------------------------------------

    def move(self, x: float, y: float, held: str | None = None) -> None:
        """Moves the mouse, with the button `held` down if one is named."""
        self._mouse("mouseMoved", x, y, held or "none", _BUTTONS.get(held, 0))

    def press(self, x: float, y: float, button: str = "left", count: int = 1, modifiers: int = 0) -> None:
        self._mouse("mousePressed", x, y, button, _BUTTONS[button], count, modifiers)

    def release(self, x: float, y: float, button: str = "left", count: int = 1, modifiers: int = 0) -> None:
        self._mouse("mouseReleased", x, y, button, 0, count, modifiers)

    def click(self, x: float, y: float, button: str = "left", count: int = 1, modifiers: int = 0) -> None:
        """`count` 2 is a double click. `modifiers`: 1 Alt, 2 Ctrl, 4 Meta, 8 Shift, added up."""
        self.move(x, y)
        for number in range(1, count + 1):
            self.press(x, y, button, number, modifiers)
            self.release(x, y, button, number, modifiers)

    def drag(self, start: tuple[float, float], end: tuple[float, float], button: str = "left", steps: int = 8) -> None:
        self.move(*start)
        self.press(*start, button)
        for i in range(1, steps + 1):
            self.move(*(a + (b - a) * i / steps for a, b in zip(start, end)), held=button)
        self.release(*end, button)

    def wheel(self, x: float, y: float, dy: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=dy)

    def key(self, name: str, modifiers: int = 0) -> None:
        """A key by its DOM name: "Enter", "Escape", "Delete", "a", ..."""
        code = _KEYS.get(name, ord(name[0].upper()))
        common = {"key": name, "code": name if len(name) > 1 else f"Key{name.upper()}", "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": name} if len(name) == 1 and not modifiers else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Text into the focused element."""
        self.call("Input.insertText", text=text)

    def _mouse(self, kind: str, x: float, y: float, button: str, buttons: int, count: int = 0, modifiers: int = 0) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=count, modifiers=modifiers)


def _describe(details: dict) -> str:
    return details.get("exception", {}).get("description") or details.get("text", "unknown error")
