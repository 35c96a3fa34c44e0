"""Statements that a connection has planned once: PREPARE when one comes again, EXECUTE from then on.

Planning a claim takes the server longer than doing it. The names are of one connection and never used twice, so behind
a pooler, where the next transaction may find another connection, a statement can be missing but never be another one;
then the transaction is repeated and nothing is prepared any more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from psycopg import ClientCursor, Connection, errors

from mbqueue.queue.database import Parameters
from mbqueue.queue.postgresql.dialect import translate
from mbqueue.queue.postgresql.times import ServerTime

#: What says that a planned statement is not there, or no longer fits the tables.
OUTDATED = (errors.InvalidSqlStatementName, errors.FeatureNotSupported)

# Not of None: the server could not always tell what it stands for.
_TYPES: dict[type, str] = {int: "bigint", float: "double precision", ServerTime: "double precision", str: "text"}
#: What PREPARE takes; LOCK and ALTER, for example, it does not.
_PLANNABLE = re.compile(rb"\s*(SELECT|INSERT|UPDATE|DELETE|WITH|VALUES)\b", re.IGNORECASE)
_PLACEHOLDER = re.compile(rb"%(?:\((\w+)\)s|s|%)")
#: A statement and the types of what is filled in.
Shape = tuple[str, tuple[str, ...]]


def is_direct(connection: Connection[Any]) -> bool:
    """Whether the server itself is at the other end, as far as can be told: it names itself as it did at first."""
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    return row is not None and bool(row[0] == connection.info.backend_pid)


class Plans:
    """The planned statements of one connection.

    Args:
        owner: what no other connection is called by.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._seen: set[Shape] = set()
        self._names: dict[Shape, str] = {}
        self._new: dict[Shape, str] = {}
        self._count = 0

    def text(self, cursor: ClientCursor[Any], statement: str, parameters: Parameters) -> str:
        """What to send for a statement; two commands when it is just being planned."""
        places = _places(statement)
        values = [parameters[place] for place in places] if isinstance(parameters, Mapping) else list(parameters)
        if not _PLANNABLE.match(translate(statement)) or any(type(value) not in _TYPES for value in values):
            return cursor.mogrify(translate(statement), parameters)
        shape = statement, tuple(_TYPES[type(value)] for value in values)
        name = self._names.get(shape) or self._new.get(shape)
        if name is None and shape not in self._seen:
            self._seen.add(shape)
            return cursor.mogrify(translate(statement), parameters)
        before = ""
        if name is None:
            self._count += 1
            name = self._new[shape] = f'"{self._owner} {self._count}"'
            types = f" ({', '.join(shape[1])})" if values else ""
            before = f"PREPARE {name}{types} AS {_numbered(statement)};"
        marks = f" ({', '.join(['%s'] * len(values))})" if values else ""
        return before + cursor.mogrify(f"EXECUTE {name}{marks}".encode(), values)

    def keep(self) -> None:
        """What was to be planned since the last call was sent and has succeeded."""
        self._names.update(self._new)
        self._new.clear()

    def forget(self) -> None:
        """It may have failed: let it be planned again, under another name."""
        self._new.clear()


@cache
def _places(statement: str) -> tuple[str, ...]:
    """The names of the parameters, in order; nothing for positional ones."""
    names = (match[1] for match in _PLACEHOLDER.finditer(translate(statement)) if match[1])
    return tuple(dict.fromkeys(name.decode() for name in names))


@cache
def _numbered(statement: str) -> str:
    """The statement with ``$1``, ``$2`` … for the parameters, one for each name."""
    numbers = {name.encode(): number for number, name in enumerate(_places(statement), start=1)}
    count = iter(range(1, 10**6))

    def numbered(match: re.Match[bytes]) -> bytes:
        if match[0] == b"%%":
            return b"%"
        return b"$%d" % (numbers[match[1]] if match[1] else next(count))

    return _PLACEHOLDER.sub(numbered, translate(statement)).decode()
