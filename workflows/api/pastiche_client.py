"""Runs graphs in a ComfyUI that is already running, from a script. Standard library only: copy this file where you like.

    comfy = ComfyUI("http://127.0.0.1:8188")
    graph = load("styleid_mini")                  # workflows/api/styleid_mini.json, or a path: any graph in API format
    graph.picture("Content", comfy.upload("photo.jpg"))
    graph.set("Style injection", gamma=0.4)       # nodes go by their titles: graph.titles lists them
    result = comfy.run(graph, print)              # prints progress
    for image in result.images:
        comfy.download(image, "out.png")
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

HERE = Path(__file__).resolve().parent
_TEXT, _CLOSE, _PING, _PONG = 1, 8, 9, 10
_LARGEST = 1 << 28  # bytes; latent previews are far below
_SILENCE = 10.0  # seconds without a word after which the queue is asked


class ServerError(Exception):
    """What the server said or did, in words for the user."""


class Interrupted(ServerError):
    """The prompt was cancelled."""


class Failed(ServerError):
    """A node of the prompt raised an error; the server goes on."""


class Refused(ServerError):
    """The server answered with an error status."""


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


class Graph(dict):
    """A graph in API format, {id: {"class_type", "inputs", "_meta": {"title"}}}, whose nodes go by their titles."""

    @property
    def titles(self) -> dict[str, dict[str, Any]]:
        """The plain inputs (no links) of every node, by title."""
        return {
            _title(self, key): {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}
            for key, node in self.items()
        }

    def set(self, title: str, **inputs: Any) -> None:
        """Sets plain inputs of the nodes of a title. Raises ValueError when there is no such node or input."""
        for node in self._titled(title):
            for name, value in inputs.items():
                if name not in node["inputs"] or isinstance(node["inputs"][name], list):
                    plain = [n for n, v in node["inputs"].items() if not isinstance(v, list)]
                    raise ValueError(f"{title!r} has no input {name!r} to set; it has {', '.join(plain)}")
                node["inputs"][name] = value

    def picture(self, title: str, image: str) -> None:
        """Puts an uploaded picture where the graph has a Sample Picture or Load Image of this title. Raises ValueError."""
        for node in self._titled(title):
            if node["class_type"] not in ("PasticheSamplePicture", "LoadImage"):
                raise ValueError(f"{title!r} is a {node['class_type']}, not a picture")
            node.update(class_type="LoadImage", inputs={"image": image})  # both give IMAGE, then MASK

    def _titled(self, title: str) -> list[dict]:
        found = [node for key, node in self.items() if _title(self, key) == title]
        if not found:
            raise ValueError(f"no node has the title {title!r}; there are {', '.join(map(repr, self.titles))}")
        return found


def load(name: str | Path) -> Graph:
    """A graph beside this file by its name ("styleid_mini"), or any API-format file by its path."""
    path = HERE / f"{name}.json"
    return Graph(json.loads((path if path.is_file() else Path(name)).read_text(encoding="utf-8")))


class ComfyUI:
    """A running ComfyUI at `url`."""

    def __init__(self, url: str = "http://127.0.0.1:8188"):
        self.url = url.rstrip("/")
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"url is {url!r}, not an address such as http://127.0.0.1:8188 (https is not supported)")
        self.host_name, self.port = parts.hostname, parts.port or 80
        # proxies of the environment must not come between us and a machine nearby
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def require_alive(self) -> None:
        """Raises ServerError when the server is known to have ended; here nothing is known."""

    def log_end(self) -> str:
        """The end of the server's log, where it is at hand."""
        return ""

    def request(self, path: str, data: Any = None, headers: dict[str, str] | None = None, timeout: float = 60) -> bytes:
        """GET, or POST when there is `data` (bytes as they are, anything else as JSON)."""
        if data is not None and not isinstance(data, bytes):
            data, headers = json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})}
        call = urllib.request.Request(self.url + path, data, headers or {})
        try:
            with self._open(call, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(_refusal(path, error.code, _rest(error))) from None
        except (OSError, http.client.HTTPException) as error:  # the latter: cut short, or no HTTP at all
            self.require_alive()
            raise ServerError(f"{path} was not answered: {error or type(error).__name__}") from None

    def get(self, path: str, data: Any = None, headers: dict[str, str] | None = None, timeout: float = 60) -> Any:
        """The JSON of a GET, or of a POST when there is `data`."""
        body = self.request(path, data, headers, timeout)
        try:
            return json.loads(body)
        except ValueError:
            raise ServerError(f"{path} was answered with something else than JSON; is {self.url} a ComfyUI?") from None

    def object_info(self) -> dict[str, Any]:
        return self.get("/object_info")

    def interrupt(self) -> None:
        """Cancels the prompt that is running."""
        self.request("/interrupt", {})

    def cancel(self, prompt_id: str, timeout: float = 10) -> None:
        """Cancels one prompt, wherever it is by now, and nobody else's."""
        self.request("/queue", {"delete": [prompt_id]}, timeout=timeout)
        if prompt_id in self._ids(["queue_running"], timeout):
            self.request("/interrupt", {"prompt_id": prompt_id}, timeout=timeout)

    def _ids(self, which: list[str], timeout: float = 60) -> list[str]:
        """Prompts that the server runs ("queue_running") or will run ("queue_pending"), at one moment."""
        queue = self.get("/queue", timeout=timeout)
        try:
            return [entry[1] for name in which for entry in queue[name]]
        except (LookupError, TypeError):
            raise ServerError(f"/queue was answered with something else than a queue; is {self.url} a ComfyUI?") from None

    def upload(self, image: Path | bytes, name: str | None = None) -> str:
        """Puts an image, a file or its bytes, into the input folder; returns the name for LoadImage."""
        data, name = (image, name or "image.png") if isinstance(image, bytes) else (Path(image).read_bytes(), name or Path(image).name)
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--{boundary}\r\n'
            f'Content-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
        answer = self.get("/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
        try:
            return "/".join(part for part in (answer.get("subfolder"), answer["name"]) if part)
        except (AttributeError, LookupError):
            raise ServerError(f"/upload/image was answered without a name: {str(answer)[:200]}") from None

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
        """Queues an API-format graph and waits for it; cancels it when the waiting ends early, by Ctrl-C or in `on_progress`.

        Raises Interrupted, Failed with the node's message, Refused, or another ServerError when the server is lost.
        """
        client, prompt_id = uuid.uuid4().hex, str(uuid.uuid4())
        try:
            socket_ = WebSocket(self.host_name, self.port, f"/ws?clientId={client}")
        except OSError as error:
            self.require_alive()
            raise ServerError(f"no WebSocket to the server: {error}") from None
        try:
            answer = self.get("/prompt", {"prompt": prompt, "client_id": client, "prompt_id": prompt_id})
            try:
                prompt_id = answer["prompt_id"]
            except (LookupError, TypeError):
                raise ServerError(f"/prompt was answered without a prompt_id: {str(answer)[:200]}") from None
            cached = self._follow(socket_, prompt, prompt_id, on_progress, time.monotonic() + timeout)
        except (Interrupted, Failed, Refused):
            raise
        except BaseException:
            try:
                self.cancel(prompt_id, timeout=3)
            except ServerError:  # then there is nobody to ask
                pass
            raise
        finally:
            socket_.close()
        # the socket tells of the end a moment before the history knows
        for _ in range(100):
            entry = self._history(prompt_id)
            if entry:
                return Result(prompt_id, entry["outputs"], cached)
            time.sleep(0.05)
        raise ServerError(f"the server has no history of prompt {prompt_id}")

    def _history(self, prompt_id: str) -> dict | None:
        """What the server keeps of a finished prompt. Raises Failed or Interrupted as it ended."""
        history = self.get(f"/history/{prompt_id}")
        entry = history.get(prompt_id) if isinstance(history, dict) else None
        if entry is None:
            return None
        if not isinstance(entry, dict) or not isinstance(entry.get("outputs"), dict):
            raise ServerError(f"/history was answered without outputs: {str(entry)[:200]}")
        for kind, data in (entry.get("status") or {}).get("messages") or []:
            _raise_end(kind, data, (entry.get("prompt") or [None, None, {}])[2])
        return entry

    def _left(self, prompt_id: str, connected: bool) -> bool:
        """Whether a prompt of which nothing is heard is still to be waited for; False when it has finished."""
        if prompt_id in self._ids(["queue_running", "queue_pending"]):
            return True
        if self._history(prompt_id):
            return False
        if connected:
            raise Interrupted("somebody deleted the prompt from the server's queue")
        raise ServerError(f"the server no longer knows the prompt. {self.log_end()}")

    def _follow(self, socket_: WebSocket, prompt: dict, prompt_id: str, on_progress, deadline: float) -> set[str]:
        finished: set[str] = set()
        cached: set[str] = set()
        current = None

        def tell(node: str, value: float, maximum: float) -> None:
            if on_progress:
                on_progress(Progress(node, _title(prompt, node), value, maximum, len(finished), len(prompt)))

        connected, heard = True, time.monotonic()
        while True:
            try:
                if not connected:
                    time.sleep(1)
                    raise TimeoutError
                message = socket_.receive(timeout=1)
                heard = time.monotonic()
            except TimeoutError:
                self.require_alive()
                if time.monotonic() > deadline:
                    raise ServerError(f"the prompt did not finish in time. {self.log_end()}") from None
                if not connected or time.monotonic() - heard > _SILENCE:
                    if not self._left(prompt_id, connected):
                        return cached
                    heard = time.monotonic()
                continue
            except (OSError, UnicodeDecodeError):  # Closed is one
                time.sleep(0.5)  # let a dying server become a dead one
                self.require_alive()
                connected = False  # the server may still work on it: from here on it is asked
                try:
                    if self._left(prompt_id, connected):
                        continue
                    return cached
                except (Failed, Interrupted):
                    raise
                except ServerError as error:
                    raise ServerError(f"the connection to the server was lost ({error}). {self.log_end()}") from None
            if isinstance(message, bytes):  # a latent preview
                continue
            try:
                event = json.loads(message)
                kind, data = event["type"], event.get("data") or {}
                about = data.get("prompt_id")
            except (ValueError, LookupError, TypeError, AttributeError):
                raise ServerError(f"the server sent something else than an event: {message[:100]!r}") from None
            if about != prompt_id:
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
            else:
                _raise_end(kind, data, prompt)


def _raise_end(kind: str, data: dict, prompt: dict) -> None:
    """The error that an event stands for, if it is one."""
    if kind == "execution_error":
        where = f"{data.get('node_type')} ({_title(prompt, data.get('node_id'))})"
        raise Failed(f"{where}: {data.get('exception_type')}: {data.get('exception_message', '').strip()}")
    if kind == "execution_interrupted":
        raise Interrupted(f"cancelled in {data.get('node_type')}")


def _rest(error: urllib.error.HTTPError) -> bytes:
    """The body of an error answer, as far as it arrived."""
    try:
        return error.read()
    except (OSError, http.client.HTTPException):
        return b""


def _title(prompt: dict, node: str | None) -> str:
    entry = prompt.get(node) or prompt.get((node or "").split(":")[0], {})
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


# ---- the WebSocket that tells of progress (RFC 6455: plain ws://, no extensions) -----------------


class Closed(ConnectionError):
    """The peer ended the connection."""


class WebSocket:
    """`receive` returns str for text, bytes for binary messages; raises TimeoutError or Closed."""

    def __init__(self, host: str, port: int, path: str, timeout: float = 10):
        self._socket = socket.create_connection((host, port), timeout)
        self._buffer = bytearray()
        self._parts: list[bytes] = []
        self._kind = _TEXT
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self._buffer:
            self._fill()
        head, _, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        self._buffer = bytearray(rest)
        first = (head.splitlines() or [b""])[0]
        if b" 101 " not in first:
            raise Closed(f"no WebSocket at {path}: {first.decode(errors='replace')}")

    def receive(self, timeout: float | None = None) -> str | bytes:
        """The next message. After a TimeoutError receiving can go on: nothing that has arrived is lost."""
        self._socket.settimeout(timeout)
        while True:
            frame = self._parse()
            if frame is None:
                self._fill()
                continue
            final, opcode, payload = frame
            if opcode == _PING:
                self._send(_PONG, payload)
            elif opcode == _CLOSE:
                raise Closed("the server closed the WebSocket")
            elif opcode != _PONG:
                if opcode:  # 0 continues the message begun before
                    self._kind = opcode
                self._parts.append(payload)
                if final:
                    message, self._parts = b"".join(self._parts), []
                    return message.decode() if self._kind == _TEXT else message

    def send(self, text: str) -> None:
        self._send(_TEXT, text.encode())

    def close(self) -> None:
        try:
            self._send(_CLOSE, b"")
        except OSError:
            pass
        self._socket.close()

    def _fill(self) -> None:
        data = self._socket.recv(1 << 16)
        if not data:
            raise Closed("the connection was lost")
        self._buffer += data

    def _parse(self) -> tuple[bool, int, bytes] | None:
        """One whole frame off the buffer, or None when more bytes are needed."""
        data = self._buffer
        if len(data) < 2:
            return None
        length, start = data[1] & 0x7F, 2
        if length >= 126:
            start = 4 if length == 126 else 10
            if len(data) < start:
                return None
            length = int.from_bytes(data[2:start], "big")
        if length > _LARGEST:
            raise Closed(f"the server announced a message of {length} bytes")
        if len(data) < start + length:
            return None
        frame = bool(data[0] & 0x80), data[0] & 0x0F, bytes(data[start : start + length])
        del data[: start + length]
        return frame

    def _send(self, opcode: int, payload: bytes) -> None:
        length = len(payload)
        if length < 126:
            head = struct.pack("!BB", 0x80 | opcode, 0x80 | length)
        elif length < 1 << 16:
            head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, length)
        else:
            head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, length)
        mask = os.urandom(4)
        stream = (mask * (length // 4 + 1))[:length]
        masked = (int.from_bytes(payload, "big") ^ int.from_bytes(stream, "big")).to_bytes(length, "big")
        self._socket.sendall(head + mask + masked)
