"""A small transaction pooler: each transaction runs on whichever server connection is free, as in PgBouncer."""

from __future__ import annotations

import queue
import socket
import struct
import threading
from contextlib import suppress

_NO_ENCRYPTION = {80877103, 80877104}  # request codes for TLS and GSS encryption


class TransactionPooler:
    """Pools this many connections to a server for its clients, with trust authentication.

    Attributes:
        used: for each transaction, (number of the client, number of the server connection).
    """

    def __init__(self, port: int, *, connections: int) -> None:
        self._target, self._connections = port, connections
        self._free: queue.SimpleQueue[tuple[int, socket.socket]] = queue.SimpleQueue()
        self._greeting: bytes | None = None
        self._starting = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.used: list[tuple[int, int]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more clients, and close the free connections to the server."""
        self._listening.close()
        with suppress(queue.Empty):
            while True:
                self._free.get_nowait()[1].close()

    def _accept(self) -> None:
        with suppress(OSError):
            number = 0
            while True:
                client, _ = self._listening.accept()
                number += 1
                threading.Thread(target=self._serve, args=(client, number), daemon=True).start()

    def _serve(self, client: socket.socket, number: int) -> None:
        with suppress(OSError, EOFError), client:
            startup = _startup(client)
            while struct.unpack("!I", startup[4:8])[0] in _NO_ENCRYPTION:
                client.sendall(b"N")
                startup = _startup(client)
            with self._starting:
                if self._greeting is None:
                    for one in range(self._connections):
                        server = socket.create_connection(("127.0.0.1", self._target))
                        server.sendall(startup)
                        self._greeting = _until_ready(server)[0]
                        self._free.put((one, server))
            client.sendall(self._greeting)
            while True:
                message = _message(client)
                if message[:1] == b"X":
                    return
                one, server = self._free.get()
                self.used.append((number, one))
                try:
                    self._run(client, server, message)
                finally:
                    self._free.put((one, server))

    @staticmethod
    def _run(client: socket.socket, server: socket.socket, message: bytes) -> None:
        """Run one transaction, or the part of it that the client sent before disconnecting."""
        status = b"I"
        try:
            while True:
                server.sendall(message)
                answer, status = _until_ready(server)
                client.sendall(answer)
                if status == b"I":
                    return
                message = _message(client)
        finally:
            if status != b"I":
                server.sendall(b"Q" + struct.pack("!I", 13) + b"ROLLBACK\0")
                _until_ready(server)


def _exactly(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = source.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def _startup(client: socket.socket) -> bytes:
    size = _exactly(client, 4)
    return size + _exactly(client, struct.unpack("!I", size)[0] - 4)


def _message(source: socket.socket) -> bytes:
    head = _exactly(source, 5)
    return head + _exactly(source, struct.unpack("!I", head[1:])[0] - 4)


def _until_ready(server: socket.socket) -> tuple[bytes, bytes]:
    """The server's messages up to ReadyForQuery, and the state of its transaction."""
    said = b""
    while True:
        message = _message(server)
        said += message
        if message[:1] == b"Z":
            return said, message[5:6]
