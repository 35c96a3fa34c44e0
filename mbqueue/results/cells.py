"""Escape text for CSV cells, so that no spreadsheet runs it, and for Markdown, so that it appears literally.

A spreadsheet may run a cell as a formula if it begins with ``=``, ``+``, ``-``, ``@``, a tab or a carriage return
(OWASP, CSV injection). So mbqueue puts an apostrophe before text that looks like a formula and is not a number. If the
text already has apostrophes before the formula, mbqueue adds one more, so that it reads its own CSV files back exactly.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-](?:inf|nan)")
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_GUARDED = re.compile(r"'+[=+\-@\t\r]")
_TO_QUOTE = re.compile(r'[,"\r\n]')
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|&#~])")


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table as CSV with ``\\n`` line ends. Floats are written without loss, with as few digits as possible."""
    lines = [columns, *rows]
    return "".join(",".join(_written(cell) for cell in line) + "\n" for line in lines)


def csv_rows(text: str) -> Iterable[list[str]]:
    """Yield the rows of CSV text, whether or not `csv_text` escaped its formulas.

    Raises:
        ValueError: if the text is not CSV.
    """
    try:
        for cells in csv.reader(io.StringIO(text, newline=""), strict=True):
            yield [cell[1:] if _GUARDED.match(cell) else cell for cell in cells]
    except csv.Error as error:
        raise ValueError(str(error)) from error


def _written(cell: object) -> str:
    text = repr(cell) if isinstance(cell, float) else str(cell)
    if _FORMULA.match(text) and not _NUMBER.fullmatch(text):
        text = f"'{text}"
    if _TO_QUOTE.search(text):
        return '"' + text.replace('"', '""') + '"'
    return text


def markdown(text: str) -> str:
    """Escape a text for Markdown, so that it appears literally, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def markdown_code(text: str) -> str:
    """Format a text as inline Markdown code, even if it contains backticks."""
    line = " ".join(text.split())
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    blank = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{blank}{line}{blank}{fence}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def spread(value: Mapping[str, float] | None, folds: int, *, sign: str = "±", none: str = "–") -> str:
    """Format a score's mean and, for more than one fold, its standard deviation, for example ``0.0300 ± 0.0012``."""
    if value is None:
        return none
    return f"{value['mean']:.4f}" if folds == 1 else f"{value['mean']:.4f} {sign} {value['std']:.4f}"
