"""A TCP proxy for a PostgreSQL server that cuts a connection exactly where a test wants."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class CuttingProxy:
    """A proxy that forwards bytes, and cuts one connection at the next COMMIT after `armed` is set.

    With "before", the server never gets the COMMIT. With "after", the server commits, but the client never gets the
    answer.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.armed: str | None = None
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Refuse further connections."""
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        is_committing = threading.Event()

        def answers() -> None:
            with suppress(OSError):
                while data := server.recv(65536):
                    if is_committing.is_set():
                        break
                    client.sendall(data)
            self._cut(client, server)

        threading.Thread(target=answers, daemon=True).start()
        with suppress(OSError):
            while data := client.recv(65536):
                if self.armed and data.endswith(b"COMMIT\0"):
                    way, self.armed = self.armed, None
                    self.cuts += 1
                    if way == "before":
                        break
                    is_committing.set()
                server.sendall(data)
        if not is_committing.is_set():
            self._cut(client, server)

    @staticmethod
    def _cut(*ends: socket.socket) -> None:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
