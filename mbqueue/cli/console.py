"""Print data to standard output and messages to standard error, even if a stream is limited to ASCII or is closed."""

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

#: Exit codes. 75 is EX_TEMPFAIL in sysexits.h. mbqueue exits with 75 if a session has ended but work is left.
FAILURE, USAGE, WORK_LEFT = 1, 2, 75
#: Error codes for a write to a stream whose reader or terminal is gone.
_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET}


def print_line(text: str = "") -> None:
    sys.stdout.write(text + "\n")


def print_json(content: Any) -> None:
    print_line(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False))


def say(text: str, *, style: str | None = None) -> None:
    """Print a message to standard error, without interpreting markup."""
    Console(stderr=True, soft_wrap=True).print(text, style=style, markup=False, highlight=False)


def tolerate_narrow_streams() -> None:
    """Print ? for characters that a terminal or pipe cannot show, such as → in an ASCII locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def outliving_readers() -> Iterator[None]:
    """Keep running after the terminal or pipe at standard output or error has been closed, for example by `head`.

    All later output is dropped; otherwise, the flush at exit would fail and change the exit code. If the disk is full,
    some lines will be missing from the log.
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
    """A stream that drops output that it cannot write."""

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
        """Write the pending output, or drop it if it cannot be written."""
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
