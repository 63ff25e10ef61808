"""A stand-in for ComfyUI's API: uploads, queue, WebSocket, history, and a cache that keeps what the next prompt names.

    with StandIn() as server: server.url, server.finished, ...

Its pictures are PNG files that say in a text chunk which content and style they were made of. Standard library only; run
as a program with --port N it serves until it is ended, as ComfyUI's main.py does.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import struct
import threading
import time
import urllib.parse
import uuid
import zlib

TAKES = {"LoadImage": "image", "PasticheStyleLibrary": "style"}  # inputs that name what a result is made of


def png(text: str) -> bytes:
    """A grey pixel, and a text."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))

    head = struct.pack("!IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"tEXt", b"made\0" + text.encode())
            + chunk(b"IDAT", zlib.compress(b"\0\x80")) + chunk(b"IEND", b""))


def made_of(data: bytes) -> str:
    """What a PNG of `png` says."""
    start = data.index(b"made\0") + 5
    return data[start : data.index(b"IDAT") - 8].decode()


class StandIn:
    """`delay`: seconds a prompt. `on_prompt(number)` is called as a prompt begins. Set `garbage` or `refuses` for other answers."""

    def __init__(self, delay: float = 0.0, on_prompt=lambda number: None, port: int = 0):
        self.delay, self.on_prompt = delay, on_prompt
        self.garbage: bytes | None = None
        self.refuses: str | None = None
        self.inputs: dict[str, bytes] = {}
        self.ran: list[tuple[str, str]] = []  # (title, the pictures it depends on) of every node that was computed
        self.finished: list[str] = []  # "content+style", a prompt each
        self.interrupts: list[str | None] = []
        self.prompts: dict[str, dict] = {}
        self._files: dict[str, bytes] = {}
        self._history: dict[str, dict] = {}
        self._pending: list[tuple] = []
        self._running: list[tuple] = []
        self._cache: set[str] = set()
        self._interrupted: set[str] = set()
        self._sockets: dict[str, tuple] = {}
        self._changed = threading.Condition()
        self._alive = True
        self._connections: set = set()
        outer = self

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, request, address):  # a connection that was cut
                pass

            def process_request(self, request, address):
                outer._connections.add(request)
                super().process_request(request, address)

        class Handler(_Handler):
            stand_in = outer

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.die()

    def die(self) -> None:
        """As if killed: every connection ends, nobody listens."""
        with self._changed:
            if not self._alive:
                return
            self._alive = False
            self._changed.notify_all()
        self._server.shutdown()  # first: while it listens, the port stays taken
        self._server.server_close()
        for connection in list(self._connections):
            try:
                connection.shutdown(2)
            except OSError:
                pass

    # ---- what the handler asks for ----

    def queue(self, prompt: dict, prompt_id: str, client: str) -> None:
        with self._changed:
            self.prompts[prompt_id] = prompt
            self._pending.append((0, prompt_id, prompt, {"client_id": client}, []))
            self._changed.notify_all()

    def delete(self, ids: list[str]) -> None:
        with self._changed:
            self._pending = [entry for entry in self._pending if entry[1] not in ids]

    def interrupt(self, prompt_id: str | None) -> None:
        with self._changed:
            self.interrupts.append(prompt_id)
            self._interrupted |= {entry[1] for entry in self._running if prompt_id in (None, entry[1])}
            self._changed.notify_all()

    # ---- the worker ----

    def _work(self) -> None:
        number = 0
        while True:
            with self._changed:
                while self._alive and not self._pending:
                    self._changed.wait()
                if not self._alive:
                    return
                entry = self._pending.pop(0)
                self._running = [entry]
            number += 1
            self.on_prompt(number)
            status, outputs = self._run(entry)
            with self._changed:
                if not self._alive:
                    return
                self._history[entry[1]] = {"prompt": entry, "outputs": outputs, "status": {"messages": status}}
                self._running = []
            self._send(entry, *(status[-1] if status else ("executing", {"node": None})))

    def _run(self, entry: tuple) -> tuple[list, dict]:
        _, prompt_id, prompt, _, _ = entry
        signatures = {key: self._signature(prompt, key) for key in prompt}
        self._cache &= {signature for signature, _ in signatures.values()}
        needed = [key for key in prompt if any(key in _above(prompt, end) for end in prompt if prompt[end]["class_type"] == "SaveImage")]
        self._send(entry, "execution_cached", {"nodes": [key for key in prompt if signatures[key][0] in self._cache]})
        outputs = {}
        for key in sorted(needed, key=lambda key: len(_above(prompt, key))):
            signature, pictures = signatures[key]
            title = prompt[key].get("_meta", {}).get("title", "")
            if signature not in self._cache:
                self._send(entry, "executing", {"node": key})
                if any(self.inputs.get(name, b"").startswith(b"BROKEN") for name in pictures):
                    return [("execution_error", {"node_id": key, "node_type": prompt[key]["class_type"], "exception_type": "OSError",
                                                 "exception_message": "cannot identify image file"})], outputs
                if prompt[key]["class_type"] == "SaveImage":
                    end = time.monotonic() + self.delay
                    while time.monotonic() < end:
                        with self._changed:
                            self._changed.wait(min(0.02, self.delay))
                            if prompt_id in self._interrupted:
                                return [("execution_interrupted", {"node_type": "SaveImage"})], outputs
                            if not self._alive:
                                return [], {}
                self.ran.append((title, "+".join(pictures)))
                self._cache.add(signature)
            if prompt[key]["class_type"] == "SaveImage":
                name = f"../../result_{len(self._files):05}_.png"  # nobody may take this for a path
                self._files[name] = png("+".join(pictures))
                self.finished.append("+".join(pictures))
                outputs[key] = {"images": [{"filename": name, "subfolder": "", "type": "output"}]}
        return [], outputs

    def _signature(self, prompt: dict, key: str) -> tuple[str, list[str]]:
        """What decides the node's result, and the uploaded pictures it depends on in the order of their loaders' ids."""
        above = sorted(_above(prompt, key), key=lambda node: int(node.split("_")[0]))
        pictures = [prompt[node]["inputs"][TAKES[prompt[node]["class_type"]]] for node in above if prompt[node]["class_type"] in TAKES]
        plain = [(prompt[node]["class_type"], sorted((n, str(v)) for n, v in prompt[node]["inputs"].items())) for node in above]
        return json.dumps([key, plain]), pictures

    def _send(self, entry: tuple, kind: str, data: dict) -> None:
        text = json.dumps({"type": kind, "data": {**data, "prompt_id": entry[1]}}).encode()
        connection, lock = self._sockets.get(entry[3]["client_id"], (None, None))
        if connection is None:
            return
        head = struct.pack("!BB", 0x81, len(text)) if len(text) < 126 else struct.pack("!BBH", 0x81, 126, len(text))
        try:
            with lock:
                connection.sendall(head + text)
        except OSError:
            pass


def _above(prompt: dict, key: str) -> set[str]:
    links = [value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list)]
    return {key}.union(*(_above(prompt, link) for link in links))


class _Handler(http.server.BaseHTTPRequestHandler):
    stand_in: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        server, address = self.stand_in, urllib.parse.urlsplit(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(address.query).items()}
        if address.path == "/ws":
            self._socket(query["clientId"])
        elif address.path == "/queue":
            with server._changed:
                self._answer({"queue_running": server._running, "queue_pending": server._pending})
        elif address.path.startswith("/history/"):
            name = address.path.rsplit("/", 1)[1]
            self._answer({name: server._history[name]} if name in server._history else {})
        elif address.path == "/view":
            data = server._files.get(query["filename"])
            self._answer(data if data is not None else {}, 200 if data is not None else 404)
        else:
            self._answer({}, 200 if address.path == "/system_stats" else 404)

    def do_POST(self) -> None:
        server, body = self.stand_in, self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/upload/image":
            name = body.split(b'name="image"; filename="')[1].split(b'"')[0].decode()
            server.inputs[name] = body.split(b"Content-Type: application/octet-stream\r\n\r\n")[1].rsplit(b"\r\n--", 1)[0]
            self._answer({"name": name, "subfolder": "", "type": "input"})
            return
        data = json.loads(body)
        if self.path == "/prompt":
            asked = [node["inputs"]["image"] for node in data["prompt"].values() if node["class_type"] == "LoadImage"]
            missing = [name for name in asked if name not in server.inputs]
            refusal = server.refuses or (f"Invalid image file: {missing[0]}" if missing else None)
            if refusal:
                self._answer({"error": {"message": refusal}, "node_errors": {}}, 400)
                return
            prompt_id = data.get("prompt_id") or str(uuid.uuid4())
            server.queue(data["prompt"], prompt_id, data["client_id"])
            self._answer({"prompt_id": prompt_id, "number": 0, "node_errors": {}})
        elif self.path == "/queue":
            server.delete(data.get("delete", []))
            self._answer({})
        elif self.path == "/interrupt":
            server.interrupt(data.get("prompt_id"))
            self._answer({})
        else:
            self._answer({}, 404)

    def _answer(self, data, status: int = 200) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        if self.stand_in.garbage is not None:
            body = self.stand_in.garbage
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _socket(self, client: str) -> None:
        accept = base64.b64encode(hashlib.sha1((self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest())
        self.connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n")
        self.stand_in._sockets[client] = (self.connection, threading.Lock())
        self.close_connection = True
        while self.connection.recv(4096):
            pass


if __name__ == "__main__":
    import sys

    with StandIn(port=int(sys.argv[sys.argv.index("--port") + 1])):
        threading.Event().wait()
