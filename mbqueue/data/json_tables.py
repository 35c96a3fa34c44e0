"""Read JSON tables in the layouts of matminer, pandas, monty and CHGNet, entry by entry."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mbqueue.data.columns import STRUCTURE_NAMES, Columns, is_missing
from mbqueue.data.json_stream import CutShort, JsonStream, NotJson
from mbqueue.data.json_values import RepeatedKey
from mbqueue.data.source import Progress, opened
from mbqueue.errors import DataError, counted

SHAPES = (
    "a list of objects or structures; an object that maps ids to structures or rows; an object of columns, as in "
    "CHGNet's datasets; the output of pandas' DataFrame.to_json() with any orient; or a DataFrame that monty wrote"
)


class Entry(NamedTuple):
    """One row of a table.

    Attributes:
        key: the row's name, from the table's index or from a key; its position if it has no name.
        id, structure, target: the row's values in the chosen columns.
    """

    key: Any
    id: Any
    structure: Any
    target: Any


class JsonTable:
    """A table in a JSON file."""

    def __init__(self, path: Path, columns: Columns, progress: Progress | None = None) -> None:
        self._path = path
        self._columns = columns
        self._open: Callable[[], AbstractContextManager[JsonStream]] = lambda: _opened(path, progress)

    def entries(self) -> Iterator[Entry]:
        """Yield each row of the table, in order.

        Raises:
            DataError: if the file is damaged, is not a table, or has a different layout.
            SourceAway: if the system cannot read the file.
        """
        try:
            yield from self._entries()
        except CutShort as error:
            raise DataError(
                f"{self._path} is truncated: its JSON ends too early. Download or copy the file again."
            ) from error
        except RepeatedKey as error:
            raise DataError(f"{self._path} cannot be read: {error}.") from error
        except NotJson as error:
            raise DataError(f"{self._path} is not a JSON table ({error}). It must be {SHAPES}.") from error

    def _entries(self) -> Iterator[Entry]:
        with self._open() as stream:
            if stream.peek() == "[":
                yield from self._rows(stream)
                stream.end()
                return
            outline = yield from self._first_pass(stream)
        if outline is not None:
            yield from self._by(outline)

    def _first_pass(self, stream: JsonStream) -> Generator[Entry, None, dict[str, Any] | None]:
        """Yield the rows of pandas' split layout, if the column names precede the rows, as in matminer's files.

        Returns:
            None if the rows were read; otherwise, the table's keys with the whole values of ``index``, ``columns`` and
            ``schema``, and the first character of every other value.
        """
        outline: dict[str, Any] = {}
        is_read = False
        for key in stream.members():
            outline[key] = stream.peek()
            if (key, outline[key]) in (("index", "["), ("columns", "["), ("schema", "{")):
                outline[key] = stream.value()
            elif key == "data" and outline[key] == "[" and {"index", "columns"} <= set(outline):
                yield from self._split(stream, outline)
                is_read = True
            else:
                stream.skip()
        stream.end()
        return None if is_read else outline

    def _by(self, outline: Mapping[str, Any]) -> Iterator[Entry]:
        """Read the rows in a second pass; the first pass has collected all keys."""
        names = [key for key in outline if not key.startswith("@")]
        if outline.get("data") == '"':
            self._open = _text_of(self._values("data"))
            yield from self._entries()
        elif outline.get("data") == "[" or "columns" in outline:
            for stream in self._at("data"):
                if "columns" in outline:
                    if stream.peek() != "[":
                        raise NotJson("'data' is not a list")
                    yield from self._split(stream, outline)
                else:
                    yield from self._rows(stream, index=_index_of(outline.get("schema")))
        elif {"lattice", "sites"} <= set(outline):
            with self._open() as stream:
                yield Entry(0, *self._columns.cells({STRUCTURE_NAMES[0]: stream.value()}))
        elif all(outline[name] == "[" for name in names) or set(names) & set(STRUCTURE_NAMES):
            yield from self._column_wise(names)
        else:
            yield from self._by_key(names)

    def _rows(self, stream: JsonStream, *, index: Sequence[str] = ()) -> Iterator[Entry]:
        """Yield the rows of a list: objects, structures (as objects or text) or, from ``orient="values"``, lists.

        ``index`` names the columns that were the table's index in pandas.
        """
        if len(index) == 1:
            self._columns.row_names = "the index" if index[0] == "index" else f"the index {index[0]}"
        for number in stream.items():
            opening = stream.peek()
            row = stream.value()
            if opening == "[":
                named = {str(position): cell for position, cell in enumerate(row)}
                if number == 0:
                    self._choose_by_content(named)
                yield Entry(number, *self._columns.cells(named))
            elif opening in '{"':
                cells = self._columns.cells(_as_row(row))
                if len(index) > 1 and self._columns.id is None:
                    raise DataError(
                        f"The index of {self._path} has {len(index)} levels ({', '.join(index)}). Name the id column "
                        "with --id-column."
                    )
                yield Entry(row.get(index[0]) if index and opening == "{" else number, *cells)
            else:
                raise NotJson(f"row {number} is {row!r:.40}, which is neither an object nor a list")

    def _split(self, stream: JsonStream, outline: Mapping[str, Any]) -> Iterator[Entry]:
        """Yield the rows of pandas' split layout, in which a row is a list of cells, in the order of ``columns``."""
        columns, index = outline["columns"], outline.get("index")
        for key, names in (("columns", columns), ("index", index)):
            if not isinstance(names, list | None):
                raise NotJson(f"{key!r} is not a list")
        self._columns.choose(columns, str(self._path))
        names = [str(name) for name in columns]
        chosen = [self._columns.id, self._columns.structure, self._columns.target]
        positions = [len(names) if name is None else names.index(name) for name in chosen]
        if index is not None:
            self._columns.row_names = "the index"
        count = 0
        for number in stream.items():
            row = stream.value()
            if not isinstance(row, list) or len(row) != len(names):
                raise DataError(f"Row {number} of {self._path} does not have one cell for each of the columns {names}.")
            if index is not None and number >= len(index):
                raise DataError(f"{self._path} has more rows than its index, which has {len(index)}.")
            row.append(None)
            yield Entry(number if index is None else index[number], *(row[position] for position in positions))
            count += 1
        if index is not None and count < len(index):
            raise DataError(
                f"{self._path} has {counted(count, 'row')}, but its index has {len(index)}. Check which rows are "
                "missing."
            )

    def _column_wise(self, names: list[str]) -> Iterator[Entry]:
        """Yield the rows of a table that stores one column per key, as a list or as an object from index to cell."""
        self._columns.choose(names, str(self._path))
        ids, targets = (self._column(name) for name in (self._columns.id, self._columns.target))
        assert self._columns.structure is not None, "`choose` ensures it"
        count = 0
        for stream in self._at(self._columns.structure):
            by_key = stream.peek() == "{"
            if by_key:
                self._columns.row_names = "the index"
            for key in stream.members() if by_key else stream.items():
                cells = [None if column is None else column.get(key) for column in (ids, targets)]
                yield Entry(key, cells[0], stream.value(), cells[1])
                count += 1
        for name, column in ((self._columns.id, ids), (self._columns.target, targets)):
            if column is not None and len(column) != count:
                raise DataError(
                    f"{self._path} has {counted(count, 'cell')} in column {self._columns.structure}, but {len(column)} "
                    f"in {name}. Check which cells are missing."
                )

    def _column(self, name: str | None) -> Mapping[Any, Any] | None:
        if name is None:
            return None
        content = self._values(name)
        if isinstance(content, list):
            return dict(enumerate(content))
        if not isinstance(content, dict):
            raise NotJson(f"{name!r} is neither a list nor an object")
        return content

    def _by_key(self, names: list[str]) -> Iterator[Entry]:
        """Yield the rows of an object that maps ids to rows or structures.

        Objects may be nested, as in CHGNet's MPtrj dataset.
        """
        self._columns.row_names = "the key"
        with self._open() as stream:
            for key in stream.members():
                if key not in names:
                    stream.skip()
                    continue
                row = stream.value()
                if not isinstance(row, dict | str):
                    raise NotJson(f"{key!r} is {row!r:.40}, which is neither a structure nor an object")
                if isinstance(row, dict) and not _is_row(row) and row and all(map(_is_row, row.values())):
                    for inner, content in row.items():
                        yield Entry(inner, *self._columns.cells(_as_row(content)))
                else:
                    yield Entry(key, *self._columns.cells(_as_row(row)))

    def _choose_by_content(self, named: Mapping[str, Any]) -> None:
        """Choose the columns of a table without column names, according to the cells of its first row."""

        def only(fits: Callable[[Any], bool]) -> str | None:
            found = [name for name, cell in named.items() if fits(cell)]
            return found[0] if len(found) == 1 else None

        structure = only(lambda cell: isinstance(cell, dict) or _is_structure_text(cell))
        number = only(lambda cell: type(cell) in (int, float) and not is_missing(cell))
        text = only(lambda cell: isinstance(cell, str) and not is_missing(cell) and not _is_structure_text(cell))
        self._columns.take(named, str(self._path), chosen=(text, structure, number))
        if self._columns.structure is None:
            raise NotJson("the rows are lists without column names, so exactly one cell of a row must be a structure")
        if self._columns.target is None and self._columns.targets_required:
            raise NotJson(
                "the rows are lists without column names, and the first row does not have exactly one number; give the "
                "target's position (from 0) with --target-column, or as column in [target] of the experiment"
            )

    def _at(self, wanted: str) -> Iterator[JsonStream]:
        """Yield the stream at the value of the key ``wanted`` in the outermost object."""
        with self._open() as stream:
            for key in stream.members():
                if key == wanted:
                    yield stream
                else:
                    stream.skip()

    def _values(self, wanted: str) -> Any:
        return next(stream.value() for stream in self._at(wanted))


@contextmanager
def _opened(path: Path, progress: Progress | None) -> Iterator[JsonStream]:
    with opened(path, progress) as source:
        yield JsonStream(source)


def _text_of(text: str) -> Callable[[], AbstractContextManager[JsonStream]]:
    content = text.encode(errors="surrogatepass")

    @contextmanager
    def open_text() -> Iterator[JsonStream]:
        yield JsonStream(io.BytesIO(content))

    return open_text


def _index_of(schema: Any) -> list[str]:
    """The index columns of a table that pandas wrote with ``orient="table"``; empty if there are none.

    pandas lists the index as the primary key, unless the index contains duplicates.
    """
    if not isinstance(schema, dict):
        return []
    key, fields = schema.get("primaryKey"), schema.get("fields")
    if isinstance(key, str):
        return [key]
    if isinstance(key, list):
        return [str(name) for name in key]
    names = (
        [str(column.get("name")) for column in fields if isinstance(column, dict)] if isinstance(fields, list) else []
    )
    return [name for name in names if re.fullmatch(r"index|level_\d+", name)]


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and (_is_structure(value) or not set(STRUCTURE_NAMES).isdisjoint(value))


def _is_structure(value: Mapping[str, Any]) -> bool:
    return "lattice" in value and "sites" in value


def _is_structure_text(value: Any) -> bool:
    return isinstance(value, str) and (value.lstrip().startswith("{") or "_cell_length_a" in value)


def _as_row(value: Any) -> Mapping[str, Any]:
    """Return the row as a mapping; a value that is only a structure becomes a row with one cell."""
    if isinstance(value, str) or _is_structure(value):
        return {STRUCTURE_NAMES[0]: value}
    return value  # type: ignore[no-any-return]
