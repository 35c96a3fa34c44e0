"""Large JSON files row by row, in bounded memory.

A compiled scanner follows brackets and strings and notes where the outer ones open and close; each row is then cut
out and parsed by itself, and so is all that stands between them: a file is read as JSON or not at all. Read this way:
the ``split`` form that matminer writes (``{"index": […], "columns": […], "data": [[…], …]}``, members in any order),
and a plain list of rows.
"""

from __future__ import annotations

import bz2
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import orjson

from mbqueue.data.machine_code import compiled
from mbqueue.errors import DataError, SourceAway

Progress = Callable[[int, int], None]

_CHUNK = 4 << 20
_KEY = re.compile(rb'("(?:[^"\\]|\\.)*")\s*:\s*$')
#: Rows open below depth 1 (plain list) or 2 (split form): no deeper bracket matters.
_DEEPEST = 2
_SPACE = b" \t\r\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OPENING, _CLOSING = b"[{", b"]}"
#: No row or line of a data set is longer than this, bytes; a 2,000-atom cell takes 0.5 MB.
_LONGEST_ROW = 1 << 28


def parse_json(text: bytes | bytearray | memoryview) -> Any:
    """A JSON value; NaN and Infinity, which JSON has not but Python writes, are read as such.

    Raises:
        ValueError: when it is not JSON.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        try:
            return json.loads(bytes(text))
        except RecursionError:
            raise ValueError("its brackets are nested too deeply") from None


class Source(Protocol):
    """What is asked of an open file."""

    def read(self, length: int = -1, /) -> bytes:
        """Up to ``length`` bytes; none at the end."""
        ...

    def readline(self, length: int = -1, /) -> bytes:
        """The next line, of which no more than ``length`` bytes; nothing at the end."""
        ...


@contextmanager
def opened(path: Path, progress: Progress | None = None) -> Iterator[Source]:
    """The decompressed content of a plain, .gz or .bz2 file; ``progress`` is told bytes of the file, read and all.

    Raises:
        DataError: when the file is empty, is no such archive or ends too early.
        SourceAway: when the system cannot read it.
    """
    try:
        with path.open("rb") as raw:
            size = path.stat().st_size
            if not size:
                raise DataError(f"{path} is empty.")
            stream: Source = raw
            if path.suffix == ".gz":
                stream = gzip.GzipFile(fileobj=raw)
            elif path.suffix == ".bz2":
                stream = bz2.BZ2File(raw)
            yield _Watched(stream, raw, size, progress) if progress else stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is cut short or damaged ({error}). Get it again.") from error
    except OSError as error:
        if error.errno is None:  # so bz2 says that it is damaged
            raise DataError(f"{path} is cut short or damaged ({error}). Get it again.") from error
        raise SourceAway(f"{path} cannot be read: {error}.") from error


def lines_of(stream: Source, path: Path) -> Iterator[bytes]:
    """The lines of an open file, in bounded memory.

    Raises:
        DataError: when a line is longer than any entry could be.
    """
    number = 0
    while line := stream.readline(_LONGEST_ROW + 1):
        number += 1
        if len(line) > _LONGEST_ROW:
            raise DataError(f"Line {number} of {path} is longer than {_LONGEST_ROW >> 20} MiB. Is it another file?")
        yield line


class _Watched:
    """A stream that tells how far the file beneath it has been read."""

    def __init__(self, stream: Source, raw: IO[bytes], size: int, progress: Progress) -> None:
        self._stream, self._raw, self._size, self._progress = stream, raw, size, progress
        self._told = -1

    def read(self, length: int = -1, /) -> bytes:
        part = self._stream.read(length)
        self._tell()
        return part

    def readline(self, length: int = -1, /) -> bytes:
        line = self._stream.readline(length)
        self._tell()
        return line

    def _tell(self) -> None:
        place = self._raw.tell()
        if place != self._told:
            self._told = place
            self._progress(place, self._size)


@compiled
def _outer_brackets(text: Any, begin: int, state: Any) -> Any:
    """Brackets at depth 0 to 2 in ``text[begin:]``: places int64 [n], depth inside of each int64 [n].

    ``state`` (depth, 1 in a string, 1 after a backslash) is carried from one piece of the file to the next.
    """
    places, depths = np.empty(1024, np.int64), np.empty(1024, np.int64)
    count, place, end = 0, begin, len(text)
    depth, in_string, escaped = state[0], state[1], state[2]
    while place < end:
        if in_string:
            character = text[place]
            if escaped:
                escaped = 0
            elif character == 0x5C:
                escaped = 1
            elif character == 0x22:
                in_string = 0
            place += 1
            continue
        # Digits and most of what stands between them come before all brackets.
        while place < end and text[place] < 0x5B and text[place] != 0x22:
            place += 1
        if place == end:
            break
        character = text[place]
        opens = character == 0x5B or character == 0x7B  # noqa: PLR1714  Numba has no quick `in`
        closes = character == 0x5D or character == 0x7D  # noqa: PLR1714
        in_string = int(character == 0x22)
        depth += int(opens)
        if (opens or closes) and depth <= _DEEPEST + 1:
            if count == len(places):
                more_places, more_depths = np.empty(2 * count, np.int64), np.empty(2 * count, np.int64)
                for event in range(count):
                    more_places[event], more_depths[event] = places[event], depths[event]
                places, depths = more_places, more_depths
            places[count], depths[count] = place, depth
            count += 1
        depth -= int(closes)
        place += 1
    state[0], state[1], state[2] = depth, in_string, escaped
    return places[:count], depths[:count]


class JsonTable:
    """A table in a JSON file, row by row.

    Attributes:
        columns: names of the columns of the split form; None as long as they have not come, and for a plain list.
        index: names of the rows of the split form; None like ``columns``.
    """

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        """Opens nothing yet."""
        self.columns: list[Any] | None = None
        self.index: list[Any] | None = None
        self._path = path
        self._progress = progress
        self._buffer = bytearray()
        self._begin = 0
        self._key = b""
        self._keys: set[bytes] = set()
        self._row_depth = self._n_rows = 0
        self._is_list = self._closed = False

    @property
    def names_known(self) -> bool:
        """Whether rows can be told apart and cells be named."""
        return self._is_list or (self.columns is not None and self.index is not None)

    def rows(self, *, names_only: bool = False) -> Iterator[Any]:
        """Each row: a list of cells (split form) or whatever the list holds.

        ``names_only`` yields nothing and only takes ``columns`` and ``index``, which may stand after the data.

        Raises:
            DataError: when the file is damaged, or is JSON of another shape.
        """
        state = np.zeros(3, np.int64)
        scanned = 0  # bytes of the buffer that the scanner has seen
        self._restart()
        with opened(self._path, self._progress) as stream:
            while chunk := stream.read(_CHUNK):
                self._buffer += chunk
                places, depths = _outer_brackets(np.frombuffer(bytes(self._buffer), np.uint8), scanned, state)
                for place, depth in zip(places.tolist(), depths.tolist(), strict=True):
                    begin = self._row_ending(place, depth)
                    if begin is not None and not names_only:
                        yield self._parse(begin, place + 1)
                del self._buffer[: self._begin]
                self._begin, scanned = 0, len(self._buffer)
                if scanned > _LONGEST_ROW:
                    raise self._wrong_shape("a row does not end")
        if not self._row_depth:
            raise self._wrong_shape("it has no brackets")
        if not self._closed:
            raise DataError(f"{self._path} is cut short: its JSON ends in the middle. Get it again.")
        if self._buffer.strip(_SPACE):
            raise self._wrong_shape("something stands outside of the outermost brackets")

    def _restart(self) -> None:
        self._buffer.clear()
        self._keys.clear()
        self._key, self._begin, self._row_depth, self._n_rows = b"", 0, 0, 0
        self._is_list = self._closed = False

    def _row_ending(self, place: int, depth: int) -> int | None:
        """Follow one outer bracket; where the row began that it ends, None if it ends none.

        ``_begin`` is where what is being read began: a row, a member, or what stands between them.
        """
        bracket = self._buffer[place]
        opens = bracket in _OPENING
        if depth == 0 or (depth == 1 and opens):
            self._check_start(place)
        elif depth == 1:
            self._end_table(place)
        elif depth == 2 and not self._is_list:
            if opens:
                self._key = self._key_before(place)
                self._begin = place
                if self._key == b"data":
                    self._begin_rows(bracket)
            else:
                self._end_member(place)
        elif depth == self._row_depth and (self._is_list or self._key == b"data"):
            begin, self._begin = self._begin, place + (not opens)
            if not opens:
                self._n_rows += 1
                return begin
            self._check_gap(begin, place, b"," if self._n_rows else b"")
        return None

    def _check_start(self, place: int) -> None:
        before = self._buffer[:place].removeprefix(_BYTE_ORDER_MARK).strip(_SPACE)
        if self._closed or before or self._buffer[place] in _CLOSING:
            raise self._wrong_shape("something stands outside of the outermost brackets")
        self._is_list = self._buffer[place] == 0x5B
        self._row_depth = 2 if self._is_list else 3
        self._begin = place + 1

    def _end_table(self, place: int) -> None:
        if self._is_list:
            self._end_rows(place)
        else:
            self._check_members(self._buffer[self._begin : place + 1])
        self._closed = True
        self._begin = place + 1

    def _key_before(self, place: int) -> bytes:
        between = bytes(self._buffer[self._begin : place])
        found = _KEY.search(between)
        if found is None:
            raise self._wrong_shape("a value has no key")
        self._check_members(between + b"0}")
        key: str = parse_json(found[1])
        if key.encode() in self._keys:
            raise self._wrong_shape(f"{key!r} is given twice")
        self._keys.add(key.encode())
        return key.encode()

    def _check_members(self, rest: bytes | bytearray) -> None:
        """Raise unless ``rest``, after the last member that was read, would end an object."""
        try:
            parse_json((b'{"":0' if self._keys else b"{") + rest)
        except ValueError as error:
            where = f"after {self._key.decode()!r}" if self._keys else "before its first list"
            raise self._wrong_shape(f"{where}: {error}") from error

    def _end_member(self, place: int) -> None:
        if self._key == b"data":
            self._end_rows(place)
        else:
            value = self._parse(self._begin, place + 1)
            if self._key in (b"columns", b"index"):
                if not isinstance(value, list):
                    raise self._wrong_shape(f"{self._key.decode()!r} is not a list")
                setattr(self, self._key.decode(), value)
        self._begin = place + 1

    def _begin_rows(self, bracket: int) -> None:
        if bracket != _OPENING[0]:
            raise self._wrong_shape("'data' is not a list")
        self._begin += 1

    def _end_rows(self, place: int) -> None:
        if self._buffer[place] != _CLOSING[0]:
            raise self._wrong_shape(f"after row {self._n_rows - 1} its list ends with a bracket of another kind")
        self._check_gap(self._begin, place, b"")

    def _check_gap(self, begin: int, end: int, expected: bytes) -> None:
        """Raise unless ``expected``, and space, is all that stands around the row that comes now."""
        found = bytes(self._buffer[begin:end].strip(_SPACE))
        if found != expected:
            shown = found[:40].decode(errors="replace") + ("…" if len(found) > 40 else "")
            wanted = "a comma" if expected else "nothing"
            raise self._wrong_shape(f"at row {self._n_rows} stands {shown!r} outside of brackets and not {wanted}")

    def _parse(self, begin: int, end: int) -> Any:
        try:
            return parse_json(self._buffer[begin:end])
        except ValueError as error:
            raise self._wrong_shape(str(error)) from error

    def _wrong_shape(self, why: str) -> DataError:
        return DataError(
            f"{self._path} is not a table in JSON ({why}). It has to be a list of entries, or an object with "
            "'index', 'columns' and 'data' as matminer and pandas (orient='split') write it."
        )
