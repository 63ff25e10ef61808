"""The WebSocket client against a peer that speaks the protocol byte by byte."""

import base64
import hashlib
import socket
import threading

import pytest
from pastiche_client import Closed, WebSocket


class Peer:
    """Accepts one connection, does the handshake, then runs `act(connection)`."""

    def __init__(self, act, status=b"101 Switching Protocols"):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.failure = None
        self.thread = threading.Thread(target=self._serve, args=(act, status), daemon=True)
        self.thread.start()

    def _serve(self, act, status):
        try:
            connection, _ = self.listener.accept()
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(4096)
                key = next(line.split(b": ")[1] for line in head.split(b"\r\n") if line.startswith(b"Sec-WebSocket-Key"))
                accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
                connection.sendall(b"HTTP/1.1 " + status + b"\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n")
                act(connection)
        except BaseException as error:  # looked at by the test
            self.failure = error

    def finish(self):
        self.thread.join(5)
        self.listener.close()
        assert self.failure is None and not self.thread.is_alive(), self.failure


def exactly(connection, count):
    data = b""
    while len(data) < count:
        data += connection.recv(count - len(data))
    return data


def read_frame(connection):
    """(opcode, payload) of a client's frame, which must be masked."""
    first, second = exactly(connection, 2)
    assert first & 0x80 and second & 0x80
    length = second & 0x7F
    if length >= 126:
        length = int.from_bytes(exactly(connection, 2 if length == 126 else 8), "big")
    mask = exactly(connection, 4)
    return first & 0x0F, bytes(byte ^ mask[i % 4] for i, byte in enumerate(exactly(connection, length)))


def frame(opcode, payload, final=True):
    head = bytes([(0x80 if final else 0) | opcode])
    if len(payload) < 126:
        return head + bytes([len(payload)]) + payload
    if len(payload) < 1 << 16:
        return head + bytes([126]) + len(payload).to_bytes(2, "big") + payload
    return head + bytes([127]) + len(payload).to_bytes(8, "big") + payload


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 200_001])
def test_messages_of_every_length_class_both_ways(size):
    text = ("aé" * size)[:size]

    def act(connection):
        opcode, payload = read_frame(connection)
        assert (opcode, payload) == (1, text.encode())
        connection.sendall(frame(1, payload) + frame(2, payload))

    peer = Peer(act)
    client = WebSocket("127.0.0.1", peer.port, "/ws")
    client.send(text)
    assert client.receive(5) == text
    assert client.receive(5) == text.encode()
    peer.finish()


def test_fragments_pings_and_slow_bytes():
    def act(connection):
        data = frame(1, b"one ", final=False) + frame(9, b"p") + frame(0, b"two ", final=False) + frame(0, b"three")
        for i in range(len(data)):
            connection.sendall(data[i : i + 1])
        assert read_frame(connection) == (10, b"p")

    peer = Peer(act)
    client = WebSocket("127.0.0.1", peer.port, "/")
    assert client.receive(5) == "one two three"
    peer.finish()


def test_timeout_loses_nothing_and_close_is_told():
    go_on = threading.Event()

    def act(connection):
        data = frame(1, b"whole")
        connection.sendall(data[:4])
        go_on.wait(5)
        connection.sendall(data[4:] + frame(8, b""))

    peer = Peer(act)
    client = WebSocket("127.0.0.1", peer.port, "/")
    with pytest.raises(TimeoutError):
        client.receive(0.1)
    go_on.set()
    assert client.receive(5) == "whole"
    with pytest.raises(Closed):
        client.receive(5)
    peer.finish()


def test_refused_handshake_is_told():
    peer = Peer(lambda connection: None, status=b"403 Forbidden")
    with pytest.raises(Closed, match="403"):
        WebSocket("127.0.0.1", peer.port, "/ws")
    peer.finish()
