"""Starts, feeds and reliably stops a headless ComfyUI. Standard library only.

    base = make_base(folder)
    with Server(host, base) as server:
        name = server.upload("photo.jpg")
        result = server.run(prompt, on_progress=print)
        for image in result.images: server.download(image, "result.png")
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from pastiche_client import ComfyUI, Interrupted, Progress, Result, ServerError  # noqa: F401: for those who import this

from .environment import ROOT, Host

PACK = "pastiche"
FOLDERS = ("custom_nodes", "input", "models", "output", "temp", "user/default/workflows", "user/default/subgraphs")
# What the front end finds of its user: no first-run dialogs, no minimap over the nodes, no missing files.
USER_FILES = {
    "comfy.settings.json": {"Comfy.InstalledVersion": "1.47.12", "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False},
    "comfy.templates.json": [],
    "user.css": "",
}


def make_base(folder: Path, pack: bool = True) -> Path:
    """Makes or completes a ComfyUI base directory at `folder`, this repository linked in as a custom node."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, content in USER_FILES.items():
        (folder / "user" / "default" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    if pack:
        link = folder / "custom_nodes" / PACK
        if link.is_symlink():
            link.unlink()
        elif link.exists():
            shutil.rmtree(link)
        try:
            link.symlink_to(ROOT, target_is_directory=True)
        except OSError:  # Windows without the privilege for links
            shutil.copytree(ROOT, link, ignore=shutil.ignore_patterns(".*", "tests", "tools", "output", "__pycache__"))
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    """In the child: Linux ends it when this program is killed and can clean up nothing. Elsewhere no such thing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Server(ComfyUI):
    """A running ComfyUI on 127.0.0.1. Leaving the `with` block, Ctrl-C or exiting ends it and all its children."""

    def __init__(self, host: Host, base: Path, port: int | None = None, cpu: bool = True, arguments: list[str] = ()):
        self.host, self.base = host, base
        super().__init__(f"http://127.0.0.1:{port or free_port()}")
        self.log = base / "server.log"
        self._arguments = [*(["--cpu"] if cpu else []), *arguments]
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self, timeout: float = 300) -> None:
        """Returns when the server answers. Raises ServerError when the port is taken or the server ends."""
        with socket.socket() as probe:
            if os.name != "nt":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError:
                raise ServerError(f"Port {self.port} is taken by another program: choose another with --port.")
        command = [
            str(self.host.python), "-u", "main.py", "--base-directory", str(self.base), "--listen", "127.0.0.1",
            "--port", str(self.port), "--disable-api-nodes", "--database-url", "sqlite:///:memory:",
            "--use-pytorch-cross-attention", "--disable-auto-launch", *self._arguments,
        ]
        if os.name == "nt":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        else:
            group = {"start_new_session": True, "preexec_fn": _die_with_parent}
        atexit.register(self.stop)
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.host.comfyui, env=self.host.variables(), stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, **group,
            )
        deadline = time.monotonic() + timeout
        try:
            while True:
                self.require_alive()
                try:
                    self._open(f"{self.url}/system_stats", timeout=5).close()
                    return
                except OSError:
                    if time.monotonic() > deadline:
                        raise ServerError(f"ComfyUI did not answer within {timeout:.0f} s. {self.log_end()}")
                    time.sleep(0.2)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server and every process it started; does nothing when it has ended."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is None:
            return
        for ask, patience in (("SIGTERM", 5), ("SIGKILL", 10)):
            self._signal(process, ask)
            try:
                process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                continue
        self._signal(process, "SIGKILL")  # children that outlived it

    @staticmethod
    def _signal(process: subprocess.Popen, name: str) -> None:
        if os.name == "nt":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
            return
        try:
            os.killpg(process.pid, getattr(signal, name))
        except ProcessLookupError:
            pass

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def log_end(self, lines: int = 25) -> str:
        text = self.log.read_text(errors="replace").splitlines()[-lines:] if self.log.exists() else []
        return "\n".join([f"The end of its log ({self.log}):", *(f"    {line}" for line in text)])

    def require_alive(self) -> None:
        """Raises ServerError with the log's end when the server has ended."""
        if self._process is None:
            raise ServerError("The server is not running.")
        code = self._process.poll()
        if code is not None:
            raise ServerError(f"ComfyUI ended unexpectedly (exit status {code}). {self.log_end()}")
