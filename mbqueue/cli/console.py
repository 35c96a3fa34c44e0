"""The two streams: data on standard output, talk on standard error."""

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

#: What the system says of a stream whose reader, or whose terminal, is gone.
_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET}


def print_line(text: str = "") -> None:
    """One line of data."""
    sys.stdout.write(text + "\n")


def print_json(content: Any) -> None:
    """One JSON document."""
    print_line(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False))


def say(text: str, *, style: str | None = None) -> None:
    """One line of talk, exactly as it is given."""
    Console(stderr=True, soft_wrap=True).print(text, style=style, markup=False, highlight=False)


def tolerate_narrow_streams() -> None:
    """Let a terminal or a pipe that cannot show a character (→ in an ASCII locale) get a ? instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def outliving_readers() -> Iterator[None]:
    """Let whoever reads the two streams go away (a terminal is closed, `head` has seen enough) without an error.

    What is written after that is dropped, to the end of the process: the last flush would fail, too, and change its
    exit code. A log on a full disk lacks lines.
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
    """A stream that drops what cannot be written."""

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
        """Drop what could not be written until now."""
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
        with suppress(OSError, ValueError):  # it may have no file beneath it
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._stream.fileno())
            finally:
                os.close(nowhere)
