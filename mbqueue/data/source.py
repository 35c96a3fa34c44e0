"""Open, decompress and read dataset files in bounded memory."""

from __future__ import annotations

import bz2
import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from mbqueue.errors import DataError, SourceAway

Progress = Callable[[int, int], None]

#: The longest accepted row or line of a dataset, in bytes. A 2,000-atom cell takes 0.5 MB.
LONGEST_ROW = 1 << 28


class Source(Protocol):
    """An open file with the two methods that dataset readers need."""

    def read(self, length: int = -1, /) -> bytes:
        """Read up to ``length`` bytes; return no bytes at the end."""
        ...

    def readline(self, length: int = -1, /) -> bytes:
        """Read the next line, but at most ``length`` bytes; return no bytes at the end."""
        ...


@contextmanager
def opened(path: Path, progress: Progress | None = None) -> Iterator[Source]:
    """Open a plain, .gz or .bz2 file for reading, and decompress it.

    ``progress`` is called with the number of bytes of the file that have been read, and with the size of the file.

    Raises:
        DataError: if the file is empty or truncated, or cannot be decompressed.
        SourceAway: if the system cannot read the file.
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
        raise DataError(f"{path} is cut short or damaged ({error}). Download or copy the file again.") from error
    except OSError as error:
        if error.errno is None:  # for damaged data, bz2 raises an OSError without an errno
            raise DataError(f"{path} is cut short or damaged ({error}). Download or copy the file again.") from error
        raise SourceAway(f"{path} cannot be read: {error}.") from error


def lines_of(stream: Source, path: Path) -> Iterator[bytes]:
    """Yield the lines of an open file, in bounded memory.

    Raises:
        DataError: if a line is longer than any entry could be.
    """
    number = 0
    while line := stream.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            raise DataError(
                f"Line {number} of {path} is longer than {LONGEST_ROW >> 20} MiB. Check that you gave the right file."
            )
        yield line


class _Watched:
    """A stream that reports its position in the file."""

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
        position = self._raw.tell()
        if position != self._told:
            self._told = position
            self._progress(position, self._size)
