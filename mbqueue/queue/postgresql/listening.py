"""Being woken by the server when there may be something to claim."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg
from psycopg import Connection

from mbqueue.queue.postgresql.schema import CHANNEL

#: How long one who listens waits at most: what falls due by itself, a lease or a rest, is told by nobody.
LONGEST_WAIT_SECONDS = 10.0
#: How long a wait takes to notice that it is over for another reason.
_SLICE_SECONDS = 0.25
#: How long the proof that news arrive may take.
_PROOF_SECONDS = 2.0
#: After a proof that failed, the next one is tried so much later: it may have been a moment's slowness.
_PROOF_AGAIN_SECONDS = 300.0


class Listener:
    """One connection that listens, for the one thread that waits.

    Behind a pooler that hands a connection out by the transaction, LISTEN succeeds and nothing ever arrives. So news
    are trusted only when a notification sent on another connection has come.
    """

    def __init__(self, connect: Callable[[], Connection[Any]], schema: str) -> None:
        self._connect, self._schema = connect, schema
        self._connection: Connection[Any] | None = None
        self._next_proof = 0.0

    def wait(self, is_over: Callable[[float], bool]) -> bool:
        """Wait for news; False when there is nobody to listen to, and the caller must look by himself.

        Returns at once when it has only begun to listen, for there may be news from before.
        """
        try:
            if self._connection is None:
                return time.monotonic() >= self._next_proof and self._begin()
            end = time.monotonic() + LONGEST_WAIT_SECONDS
            while not is_over(0.0) and time.monotonic() < end:
                if self._heard(self._schema, _SLICE_SECONDS):
                    return True
        except psycopg.Error:  # the server is away; the next claim waits for it
            self.close()
            return False
        return True

    def close(self) -> None:
        """Listen no more, until the next wait."""
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
