"""Wake up when the server announces that there may be a job to claim."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg
from psycopg import Connection

from mbqueue.queue.postgresql.schema import CHANNEL

#: The longest wait, kept short because the server does not announce expired leases or due retries.
LONGEST_WAIT_SECONDS = 10.0
#: How often to check, while waiting, whether the caller wants to stop waiting.
_SLICE_SECONDS = 0.25
#: How long the test notification may take to arrive.
_PROOF_SECONDS = 2.0
#: How long to wait before sending another test notification if the first one did not arrive. The server may only have
#: been slow for a moment.
_PROOF_AGAIN_SECONDS = 300.0


class Listener:
    """A connection on which one thread waits for announcements.

    Behind a pooler that assigns connections per transaction, LISTEN succeeds, but no notification ever arrives. So this
    class trusts LISTEN only after it has received a test notification from another connection.
    """

    def __init__(self, connect: Callable[[], Connection[Any]], schema: str) -> None:
        self._connect, self._schema = connect, schema
        self._connection: Connection[Any] | None = None
        self._next_proof = 0.0

    def wait(self, is_over: Callable[[float], bool]) -> bool:
        """Wait for an announcement; False if listening does not work and the caller must poll.

        The first wait returns at once, because the thread may have missed earlier announcements.
        """
        try:
            if self._connection is None:
                return time.monotonic() >= self._next_proof and self._begin()
            end = time.monotonic() + LONGEST_WAIT_SECONDS
            while not is_over(0.0) and time.monotonic() < end:
                if self._heard(self._schema, _SLICE_SECONDS):
                    return True
        except psycopg.Error:  # the server is unreachable; the next claim waits for the server
            self.close()
            return False
        return True

    def close(self) -> None:
        """Stop listening until the next wait."""
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
        self._connection = None

    def _begin(self) -> bool:
        self._connection = self._connect()
        self._connection.execute(f"LISTEN {CHANNEL}".encode())
        token = secrets.token_hex(8)
        with self._connect() as other:
            other.execute("SELECT pg_notify(%s, %s)", (CHANNEL, token))
        if self._heard(token, _PROOF_SECONDS):
            return True
        self._next_proof = time.monotonic() + _PROOF_AGAIN_SECONDS
        self.close()
        return False

    def _heard(self, payload: str, seconds: float) -> bool:
        assert self._connection is not None
        return any(news.payload == payload for news in self._connection.notifies(timeout=seconds))
