"""A headless Chromium through Playwright, for tests and for making the workflow files.

    with Browser() as page:
        page.open("http://127.0.0.1:8188")
        page.wait_for("() => window.app?.graph")
        total = page.evaluate("(a, b) => a + b", 1, 2)          # any JSON in, any JSON out, promises awaited
        page.click(200, 300, modifiers=["Shift"])               # real mouse events, CSS pixels of the window
        page.key("Control+z"); page.type("hello")
        page.do(lambda page: page.get_by_text("Run").click())   # anything else of Playwright's own page
        assert not page.errors                                  # console errors and uncaught exceptions so far

The system's Chromium is used; Playwright downloads none. `frontend.Frontend` adds what concerns ComfyUI's own page.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, Callable, Iterator

from .environment import find_chromium

_FLAGS = ["--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]


class BrowserError(Exception):
    """The browser could not be started, or a script in the page failed."""


class Browser:
    """One browser with one page and a profile of its own, gone afterwards.

    Playwright keeps an event loop running in the thread that uses it, where asyncio.run then fails;
    so it lives in a thread of its own, and every method hands its work over.
    """

    def __init__(self, size: tuple[int, int] = (1600, 1000), executable: str | None = None):
        self.size = size
        self.console: list[tuple[str, str]] = []  # (level, text) in order
        self._executable = executable or find_chromium()
        self._thread: ThreadPoolExecutor | None = None

    def __enter__(self) -> Browser:
        if self._executable is None:
            raise BrowserError("No Chromium or Chrome on the PATH; install one or name it in the variable CHROMIUM.")
        self._thread = ThreadPoolExecutor(1, "browser")
        try:
            self.do(self._start)
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrowserError):
            self.do(lambda _: self._stack.close())
        self._thread.shutdown(wait=False)

    def _start(self, _) -> None:
        from playwright.sync_api import sync_playwright

        with contextlib.ExitStack() as stack:
            playwright = stack.enter_context(sync_playwright())
            root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
            browser = playwright.chromium.launch(executable_path=self._executable, args=[*_FLAGS, *root])
            stack.callback(browser.close)
            self._page = browser.new_page(viewport={"width": self.size[0], "height": self.size[1]})
            self._page.on("console", self._notice)
            self._page.on("pageerror", lambda error: self.console.append(("error", error.stack or error.message)))
            self._page.on("dialog", self._refuse)
            self._stack = stack.pop_all()

    def _notice(self, message) -> None:
        address = message.location.get("url", "") if message.text.startswith("Failed to load") else ""
        self.console.append((message.type, f"{message.text} {address}".strip()))

    def _refuse(self, dialog) -> None:
        if dialog.type == "beforeunload":  # a graph that was not saved
            return dialog.accept()
        self.console.append(("error", f"the page opened a dialog: {dialog.message}"))
        dialog.dismiss()

    def do(self, work: Callable[[Any], Any], timeout: float = 120) -> Any:
        """Runs `work(page)` on Playwright's page. Raises BrowserError."""
        try:
            return self._thread.submit(lambda: work(getattr(self, "_page", None))).result(timeout)
        except FutureTimeout:
            raise BrowserError(f"the browser did not answer within {timeout:.0f} s") from None
        except Exception as error:
            if type(error).__module__.startswith("playwright"):
                raise BrowserError(str(error)) from None
            raise

    @property
    def errors(self) -> list[str]:
        """Console errors and uncaught exceptions so far."""
        return [text for level, text in self.console if level == "error"]

    # ---- the page ------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        self.do(lambda page: page.goto(url, timeout=60_000))

    def evaluate(self, function: str, *arguments: Any) -> Any:
        """Calls the JavaScript `function` (source of a function, may be async) and returns its JSON value."""
        return self.do(lambda page: page.evaluate(f"(list) => ({function})(...list)", list(arguments)))

    def wait_for(self, function: str, *arguments: Any, timeout: float = 30) -> Any:
        """Calls `function` until its value is truthy and returns that."""
        source = f"(list) => ({function})(...list)"

        def wait(page):
            return page.wait_for_function(source, arg=list(arguments), timeout=timeout * 1000, polling=100).json_value()

        return self.do(wait, timeout + 30)

    def screenshot(self, path: str | Path, clip: tuple[float, float, float, float] | None = None) -> Path:
        """A picture of the window, or of `clip` (x, y, width, height); PNG, or JPEG when the name says so."""
        path = Path(path)
        options: dict[str, Any] = {"quality": 88} if path.suffix in (".jpg", ".jpeg") else {}
        if clip:
            options["clip"] = dict(zip(("x", "y", "width", "height"), clip))
        self.do(lambda page: page.screenshot(path=path, **options))
        return path

    def pixel_ratio(self, ratio: float) -> None:
        """Device pixels per CSS pixel, as on a screen of high density."""
        size = {"width": self.size[0], "height": self.size[1], "deviceScaleFactor": ratio, "mobile": False}
        self.do(lambda page: page.context.new_cdp_session(page).send("Emulation.setDeviceMetricsOverride", size))

    # ---- real input ----------------------------------------------------------------------------

    def move(self, x: float, y: float) -> None:
        self.do(lambda page: page.mouse.move(x, y))

    def click(self, x: float, y: float, button: str = "left", count: int = 1, modifiers: list[str] = ()) -> None:
        """`count` 2 is a double click; `modifiers` of "Shift", "Control", "Alt", "Meta" are held."""

        def work(page):
            with _held(page, modifiers):
                page.mouse.click(x, y, button=button, click_count=count)

        self.do(work)

    def drag(self, start: tuple[float, float], end: tuple[float, float], button: str = "left", modifiers: list[str] = ()) -> None:
        def work(page):
            with _held(page, modifiers):
                page.mouse.move(*start)
                page.mouse.down(button=button)
                page.mouse.move(*end, steps=8)
                page.mouse.up(button=button)

        self.do(work)

    def wheel(self, x: float, y: float, dy: float) -> None:
        def work(page):
            page.mouse.move(x, y)
            page.mouse.wheel(0, dy)

        self.do(work)

    def key(self, name: str) -> None:
        """A key by its DOM name, with modifiers before it: "Enter", "a", "Control+Shift+z", ..."""
        self.do(lambda page: page.keyboard.press(name))

    def type(self, text: str) -> None:
        """Text into the focused element."""
        self.do(lambda page: page.keyboard.insert_text(text))


@contextlib.contextmanager
def _held(page, modifiers: list[str]) -> Iterator[None]:
    for name in modifiers:
        page.keyboard.down(name)
    try:
        yield
    finally:
        for name in modifiers:
            page.keyboard.up(name)
