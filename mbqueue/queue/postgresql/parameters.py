"""Translate the placeholders in statements into psycopg's placeholders."""

from __future__ import annotations

import re
from functools import cache

from mbqueue.queue.dialect import POSTGRESQL, Sql, text_of

#: SQL for the time at which the transaction began, as a Unix timestamp.
SERVER_NOW = "CAST(extract(epoch FROM transaction_timestamp()) AS double precision)"

_QUOTED = re.compile(r"('(?:[^']|'')*')")
_NOW = re.compile(r"(?<![:\w]):now\b")
_NAME = re.compile(r"(?<![:\w]):([a-z_]+)")


@cache
def for_psycopg(statement: Sql, *, server_clock: bool) -> bytes:
    """Replace ``:name`` with ``%(name)s`` and ``?`` with ``%s``, except in quoted text.

    Args:
        server_clock: whether to replace ``:now`` with the server's time at the start of the transaction.
    """
    parts = _QUOTED.split(text_of(statement, POSTGRESQL).replace("%", "%%"))
    for number in range(0, len(parts), 2):
        part = _NOW.sub(SERVER_NOW, parts[number]) if server_clock else parts[number]
        parts[number] = _NAME.sub(r"%(\1)s", part).replace("?", "%s")
    return "".join(parts).encode()
