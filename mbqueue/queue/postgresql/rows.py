"""Rows with values by name and by position, as sqlite3.Row has them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

from psycopg import Cursor
from psycopg.rows import RowMaker, no_result


class Record(tuple[Any, ...]):
    """One row; each set of columns has a subclass of its own."""

    __slots__ = ()
    positions: ClassVar[dict[str, int]]

    def __getitem__(self, key: Any, /) -> Any:
        return tuple.__getitem__(self, self.positions[key] if isinstance(key, str) else key)

    def keys(self) -> list[str]:
        """The names of the columns."""
        return list(self.positions)


def records(cursor: Cursor[Any]) -> RowMaker[Any]:
    """The row factory for psycopg."""
    if cursor.description is None:
        return no_result
    return _kind(tuple(column.name for column in cursor.description))


@cache
def _kind(names: Sequence[str]) -> type[Record]:
    positions = {name: position for position, name in enumerate(names)}
    return type("Record", (Record,), {"__slots__": (), "positions": positions})
