"""A minimal WebSocket client (RFC 6455) on the standard library: plain ws://, no extensions."""

from __future__ import annotations

import base64
import os
import socket
import struct

_TEXT, _BINARY, _CLOSE, _PING, _PONG = 1, 2, 8, 9, 10


class Closed(ConnectionError):
    """The peer ended the connection."""


class WebSocket:
    """`receive` returns str for text, bytes for binary messages; raises TimeoutError or Closed."""

    def __init__(self, host: str, port: int, path: str, timeout: float = 10):
        self._socket = socket.create_connection((host, port), timeout)
        self._buffer = b""
        self._parts: list[bytes] = []
        self._kind = _TEXT
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self._buffer:
            self._fill()
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.splitlines()[0]:
            raise Closed(f"no WebSocket at {path}: {head.splitlines()[0].decode(errors='replace')}")

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
        if len(data) < start + length:
            return None
        self._buffer = data[start + length :]
        return bool(data[0] & 0x80), data[0] & 0x0F, data[start : start + length]

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
