"""The two streams: data on standard output, talk on standard error."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console


def print_line(text: str = "") -> None:
    """One line of data."""
    sys.stdout.write(text + "\n")


def print_json(content: Any) -> None:
    """One JSON document."""
    print_line(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False))


def say(text: str, *, style: str | None = None) -> None:
    """One line of talk, exactly as it is given."""
    Console(stderr=True, soft_wrap=True).print(text, style=style, markup=False, highlight=False)
