"""The output of ``mbqueue work``: a live line per session in a terminal, or plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from mbqueue.session.narration import Narration


class Screen:
    """A context manager that shows the progress of all sessions on standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True)
        self._rows: dict[str, Spinner] = {}
        # A separate thread redraws the lines, so that the spinners keep turning between messages.
        self._live = Live(get_renderable=self._draw, console=self._console, transient=True, refresh_per_second=8)
        self._is_moving = self._console.is_terminal

    def __enter__(self) -> Self:
        if self._is_moving:
            self._live.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._is_moving:
            self._live.stop()

    def report(self, label: str = "") -> Narration:
        """Create the object that reports one session's progress.

        Args:
            label: text before each of the session's messages; empty if there is only one session.
        """
        return Narration(
            lambda text, style: self._line(label, text, style),
            show=(lambda text: self._move(label, text)) if self._is_moving else None,
        )

    def _line(self, label: str, text: str, style: str | None) -> None:
        prefix = f"[{label}] " if label else ""
        now = time.strftime("%H:%M:%S")
        self._console.print(f"{now}  {prefix}{text}", style=style, markup=False, highlight=False)
        sys.stderr.flush()

    def _move(self, label: str, text: str) -> None:
        row = Text(f"{label}  {text}" if label else text, no_wrap=True, overflow="ellipsis")
        if label in self._rows:
            self._rows[label].update(text=row)
        else:
            self._rows = {**self._rows, label: Spinner("dots", row)}

    def _draw(self) -> Group:
        return Group(*self._rows.values())
