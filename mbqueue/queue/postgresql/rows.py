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
    result = cursor.pgresult
    if result is None or not result.nfields:
        return no_result
    # Not cursor.description: it makes an object of each column, which takes longer than reading the row.
    return _kind(tuple(result.fname(column) or b"" for column in range(result.nfields)))


@cache
def _kind(names: Sequence[bytes]) -> type[Record]:
    positions = {name.decode(): position for position, name in enumerate(names)}
    return type("Record", (Record,), {"__slots__": (), "positions": positions})
