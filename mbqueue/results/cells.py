"""Text in files that people open: cells of a CSV that no spreadsheet runs, and Markdown that shows it as it is.

A CSV is read back exactly. A spreadsheet takes a cell for a formula when it begins with ``=``, ``+``, ``-`` or ``@``,
also after a tab or a carriage return (OWASP, CSV injection). So such a cell that is no number is written behind an
apostrophe, and one that begins with apostrophes before such a character behind one more.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-](?:inf|nan)")
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_GUARDED = re.compile(r"'+[=+\-@\t\r]")
_TO_QUOTE = re.compile(r'[,"\r\n]')
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|&#~])")


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV with lines that end in ``\\n``; floats have the fewest digits that read back the same."""
    lines = [columns, *rows]
    return "".join(",".join(_written(cell) for cell in line) + "\n" for line in lines)


def csv_rows(text: str) -> Iterable[list[str]]:
    """The rows of what `csv_text` gave, or of a table that was written without guarding formulas.

    Raises:
        ValueError: if it is no CSV.
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
    """A text as one line of Markdown that shows it as it is."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def markdown_code(text: str) -> str:
    """A text as code in a line of Markdown, whatever backticks are in it."""
    line = " ".join(text.split())
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    blank = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{blank}{line}{blank}{fence}"
