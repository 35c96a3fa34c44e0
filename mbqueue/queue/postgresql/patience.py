"""Retry while the server is unreachable, for at most `PATIENCE_SECONDS`."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.pq import PGconn, Ping

from mbqueue.errors import QueueError
from mbqueue.queue.postgresql.address import Address
from mbqueue.queue.postgresql.client import Interrupted, unreachable

_log = logging.getLogger("mbqueue")
Result = TypeVar("Result")
#: A function that sleeps for the given number of seconds, and returns True to stop retrying.
Wait = Callable[[float], bool]

#: How long a method keeps retrying while the server is unreachable.
PATIENCE_SECONDS = 300.0
#: The first and the longest delay between two attempts. The delay doubles after each attempt.
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.05, 5.0

#: What servers and poolers report if all their connections are in use. libpq gives no error code when connecting fails.
_CROWDED = ("too many connections", "too many clients", "connection slots are reserved", "no more connections")


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


class Patience:
    """Retries calls while the server is unreachable. Logs when an outage begins and when it ends."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_away = False
        # Use a separate generator, because checkpoints contain the state of Python's `random` module.
        self._random = random.Random()

    def attempt(self, call: Callable[[], Result], wait: Wait = _sleep) -> Result:
        """Run ``call``, such as one transaction, and retry it whenever it raises `Interrupted`.

        Raises:
            QueueError: if the server was unreachable for too long, or ``wait`` returned True.
        """
        end, delay = None, FIRST_DELAY_SECONDS
        while True:
            try:
                result = call()
            except Interrupted as interrupted:
                end = time.monotonic() + PATIENCE_SECONDS if end is None else end
                if time.monotonic() + delay > end:
                    raise QueueError(
                        f"{interrupted} Retrying for {PATIENCE_SECONDS:.0f} s did not help. Committed work is safe. "
                        "Once the server answers, resume with: mbqueue work"
                    ) from interrupted
                if delay > 1.0 and not self._is_away:
                    self._is_away = True
                    _log.warning("%s Trying again for up to %.0f s.", interrupted, PATIENCE_SECONDS)
                if wait(delay * self._random.uniform(0.5, 1.0)):
                    raise
            else:
                if self._is_away:
                    self._is_away = False
                    _log.warning("%s is responding again.", self._name)
                return result
            delay = min(2 * delay, LONGEST_DELAY_SECONDS)


def reached(address: Address, call: Callable[[], Result], wait: Wait | None) -> Result:
    """Run ``call``, which connects to a server. With ``wait``, retry while the server is unreachable.

    Raises:
        QueueError: if the server cannot be reached, or refuses the connection.
    """

    def once() -> Result:
        try:
            return call()
        except psycopg.Error as error:
            raise unreachable(address.shown, error) from error

    def unless_away() -> Result:
        try:
            return call()
        except psycopg.Error as error:
            if _is_temporary(address, error):
                raise Interrupted(str(unreachable(address.shown, error))) from error
        return once()  # the server may be back; if it still refuses the connection, this call raises the error

    return once() if wait is None else Patience(address.shown).attempt(unless_away, wait)


def _is_temporary(address: Address, error: psycopg.Error) -> bool:
    """Whether the server is unreachable or accepts no connections now; False if it only refuses this user."""
    if any(sign in str(error) for sign in _CROWDED):
        return True
    return PGconn.ping(make_conninfo(**address.options).encode()) in {Ping.REJECT, Ping.NO_RESPONSE}
