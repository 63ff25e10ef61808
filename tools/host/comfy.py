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
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from .environment import ROOT, Host
from .websocket import Closed, WebSocket

PACK = "pastiche"
FOLDERS = ("custom_nodes", "input", "models", "output", "temp", "user/default/workflows", "user/default/subgraphs")
# What the front end finds of its user: no first-run dialogs, no minimap over the nodes, no missing files.
USER_FILES = {
    "comfy.settings.json": {"Comfy.InstalledVersion": "1.47.12", "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False},
    "comfy.templates.json": [],
    "user.css": "",
}


class ServerError(Exception):
    """What the server said or did, in words for the user."""


class Interrupted(ServerError):
    """The prompt was cancelled."""


@dataclass
class Progress:
    """One step forward. `value` of `maximum` in node `title`; `finished` of `total` nodes are done."""

    node: str
    title: str
    value: float
    maximum: float
    finished: int
    total: int


@dataclass
class Result:
    """What a prompt produced: the history entry's outputs by node id, and the saved images among them."""

    prompt_id: str
    outputs: dict[str, Any]
    cached: set[str] = field(default_factory=set)

    @property
    def images(self) -> list[dict]:
        """{"filename", "subfolder", "type", "node"} of every image, saved ones before previews."""
        found = [{**image, "node": node} for node, out in self.outputs.items() for image in out.get("images", [])]
        return sorted(found, key=lambda image: image["type"] != "output")


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


class Server:
    """A running ComfyUI on 127.0.0.1. Leaving the `with` block, Ctrl-C or exiting ends it and all its children."""

    def __init__(self, host: Host, base: Path, port: int | None = None, cpu: bool = True, arguments: list[str] = ()):
        self.host, self.base = host, base
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = base / "server.log"
        self._arguments = [*(["--cpu"] if cpu else []), *arguments]
        self._process: subprocess.Popen | None = None
        # proxies of the environment must not come between us and this machine
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

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

    # ---- requests ------------------------------------------------------------------------------

    def request(self, path: str, data: Any = None, headers: dict[str, str] | None = None, timeout: float = 60) -> bytes:
        """GET, or POST when there is `data` (bytes as they are, anything else as JSON)."""
        if data is not None and not isinstance(data, bytes):
            data, headers = json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})}
        call = urllib.request.Request(self.url + path, data, headers or {})
        try:
            with self._open(call, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise ServerError(_refusal(path, error.code, error.read())) from None
        except OSError as error:
            self.require_alive()
            raise ServerError(f"{path} was not answered: {error}") from None

    def get(self, path: str) -> Any:
        """A GET's JSON."""
        return json.loads(self.request(path))

    def object_info(self) -> dict[str, Any]:
        return self.get("/object_info")

    def interrupt(self) -> None:
        """Cancels the prompt that is running."""
        self.request("/interrupt", {})

    def upload(self, image: Path, name: str | None = None) -> str:
        """Puts an image into the input folder; returns the name for LoadImage."""
        image = Path(image)
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--{boundary}\r\n'
            f'Content-Disposition: form-data; name="image"; filename="{name or image.name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + image.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        answer = json.loads(self.request("/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}))
        return "/".join(part for part in (answer.get("subfolder"), answer["name"]) if part)

    def fetch(self, image: dict) -> bytes:
        """The file of one of Result.images."""
        return self.request("/view?" + urllib.parse.urlencode({k: image[k] for k in ("filename", "subfolder", "type")}))

    def download(self, image: dict, target: Path) -> Path:
        target = Path(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        part.write_bytes(self.fetch(image))
        part.replace(target)
        return target

    def run(
        self, prompt: dict[str, Any], on_progress: Callable[[Progress], None] | None = None, timeout: float = 3600
    ) -> Result:
        """Queues an API-format graph and waits for it. Raises Interrupted, or ServerError with the node's message."""
        client = uuid.uuid4().hex
        try:
            socket_ = WebSocket("127.0.0.1", self.port, f"/ws?clientId={client}")
        except OSError as error:
            self.require_alive()
            raise ServerError(f"no WebSocket to the server: {error}") from None
        try:
            answer = json.loads(self.request("/prompt", {"prompt": prompt, "client_id": client}))
            cached = self._follow(socket_, prompt, answer["prompt_id"], on_progress, time.monotonic() + timeout)
        finally:
            socket_.close()
        # the socket tells of the end a moment before the history knows
        for _ in range(100):
            history = self.get(f"/history/{answer['prompt_id']}")
            if history:
                return Result(answer["prompt_id"], history[answer["prompt_id"]]["outputs"], cached)
            time.sleep(0.05)
        raise ServerError(f"the server has no history of prompt {answer['prompt_id']}")

    def _follow(self, socket_: WebSocket, prompt: dict, prompt_id: str, on_progress, deadline: float) -> set[str]:
        finished: set[str] = set()
        cached: set[str] = set()
        current = None

        def tell(node: str, value: float, maximum: float) -> None:
            if on_progress:
                on_progress(Progress(node, _title(prompt, node), value, maximum, len(finished), len(prompt)))

        while True:
            try:
                message = socket_.receive(timeout=1)
            except TimeoutError:
                self.require_alive()
                if time.monotonic() > deadline:
                    raise ServerError(f"the prompt did not finish in time. {self.log_end()}") from None
                continue
            except (Closed, OSError):
                time.sleep(0.5)  # let a dying server become a dead one
                self.require_alive()
                raise ServerError(f"the connection to the server was lost. {self.log_end()}") from None
            if isinstance(message, bytes):  # a latent preview
                continue
            event = json.loads(message)
            kind, data = event["type"], event.get("data", {})
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "execution_cached":
                cached = set(data["nodes"])
                finished |= cached
            elif kind == "executing" and data.get("node") is None or kind == "execution_success":
                return cached
            elif kind == "executing":
                if current:
                    finished.add(current)
                current = data["node"]
                tell(current, 0, 1)
            elif kind == "progress":
                tell(data.get("node") or current, data["value"], data["max"])
            elif kind == "execution_error":
                where = f"{data.get('node_type')} ({_title(prompt, data.get('node_id'))})"
                raise ServerError(f"{where}: {data.get('exception_type')}: {data.get('exception_message', '').strip()}")
            elif kind == "execution_interrupted":
                raise Interrupted(f"cancelled in {data.get('node_type')}")


def _title(prompt: dict, node: str | None) -> str:
    entry = prompt.get((node or "").split(":")[0], {})
    return entry.get("_meta", {}).get("title") or entry.get("class_type", str(node))


def _refusal(path: str, code: int, body: bytes) -> str:
    """A sentence from an error answer; /prompt's list what is wrong with which node."""
    try:
        answer = json.loads(body)
        error = answer["error"]
    except (ValueError, KeyError, TypeError):
        return f"{path} was refused with status {code}: {body[:300].decode(errors='replace')}"
    lines = [error.get("message", "") if isinstance(error, dict) else str(error)]
    if isinstance(error, dict) and error.get("details"):
        lines[0] += f" ({error['details']})"
    for node, wrong in (answer.get("node_errors") or {}).items():
        for problem in wrong.get("errors", []):
            lines.append(f"{wrong.get('class_type')} (node {node}): {problem.get('message')}: {problem.get('details')}")
    return f"{path} was refused: " + "\n".join(lines)
