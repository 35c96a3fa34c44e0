"""Readers of the file formats that data sets come in."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from mbqueue.data.entries import Gatherer

Progress = Callable[[int, int], None]


def parse_json(text: bytes) -> Any:
    """A JSON value; NaN and Infinity, which JSON has not but Python writes, are read as such."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)


def read_into(gatherer: Gatherer, path: Path, progress: Progress | None) -> None:
    """Read JSON lines."""
    with gzip.open(path) as stream:
        for line in stream:
            entry = parse_json(line)
            gatherer.add(entry["id"], entry["structure"], entry["e_form"])
