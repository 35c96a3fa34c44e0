"""The two streams: data on standard output, messages on standard error."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from rich.console import Console

#: Error codes of a stream whose reader or terminal is gone.
_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET}


def print_line(text: str = "") -> None:
    """Print a line of data."""
    sys.stdout.write(text + "\n")


def print_json(content: Any) -> None:
    """Print a JSON document."""
    print_line(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False))


def say(text: str, *, style: str | None = None) -> None:
    """Print a message, exactly as given."""
    Console(stderr=True, soft_wrap=True).print(text, style=style, markup=False, highlight=False)


def tolerate_narrow_streams() -> None:
    """Print ? instead of failing if a terminal or pipe cannot show a character (such as → in an ASCII locale)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def outliving_readers() -> Iterator[None]:
    """Keep running when the reader of a stream goes away (a closed terminal, `head`).

    Later output is dropped until the process ends: the last flush would fail, too, and change the exit code. On a full
    disk, a log loses lines.
    """
    before = sys.stdout, sys.stderr
    ours = [_Outliving(stream) for stream in before]
    sys.stdout, sys.stderr = (cast("TextIO", stream) for stream in ours)
    try:
        yield
    finally:
        for stream in ours:
            stream.end()
        sys.stdout, sys.stderr = before


class _Outliving:
    """A stream that drops what it cannot write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def end(self) -> None:
        """Drop the pending output that could not be written."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop_all()

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if error.errno in _GONE:
                self._drop_all()
        except ValueError:
            if not self._stream.closed:
                raise

    def _drop_all(self) -> None:
        with suppress(OSError, ValueError):  # the stream may have no file descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._stream.fileno())
            finally:
                os.close(nowhere)
