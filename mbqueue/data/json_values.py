"""Parse JSON values. An object with a duplicate key is rejected, because parsers silently keep the last value."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import orjson

from mbqueue.data.machine_code import compiled

#: A message quotes at most this many characters of a key.
_SHOWN = 60
#: The deepest nesting that orjson accepts.
_DEEPEST = 1024
#: Constants of the FNV-1a hash.
_OFFSET, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


class RepeatedKey(ValueError):
    """A JSON object contains the same key twice.

    Attributes:
        key: the repeated key.
    """

    def __init__(self, key: str, where: str = "") -> None:
        """``where``: the start of the text that contains the object, for the message; empty if unknown."""
        self.key = key
        there = f"in the value that starts with {where}" if where else "in one object"
        super().__init__(f"the key {key[:_SHOWN]!r} appears twice {there}; remove one of the two")


def parse_json(text: bytes | memoryview) -> Any:
    """Parse a JSON value, including NaN and Infinity, which Python writes although JSON does not allow them.

    Raises:
        RepeatedKey: if an object in the value contains the same key twice.
        ValueError: if the text is not JSON.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return _parse_slowly(text)
    if _may_repeat_a_key(np.frombuffer(text, np.uint8)):
        _parse_slowly(text)
    return value


def _parse_slowly(text: bytes | memoryview) -> Any:
    try:
        return json.loads(bytes(text), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("the brackets are nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        keys = sorted(key for key, _ in pairs)
        raise RepeatedKey(next(key for key, following in itertools.pairwise(keys) if key == following))
    return members


@compiled
def _end_of_string(text: Any, position: Any) -> Any:
    """The position of the closing quotation mark of the string whose text starts at ``position``."""
    while text[position] != 0x22:
        position += 2 if text[position] == 0x5C else 1
    return position


@compiled
def _count_keys(text: Any) -> Any:
    n_keys, position = 0, 0
    while position < len(text):
        if text[position] == 0x22:
            position = _end_of_string(text, position + 1)
        elif text[position] == 0x3A:
            n_keys += 1
        position += 1
    return n_keys


@compiled
def _may_repeat_a_key(text: Any) -> Any:
    """Whether an object in ``text`` (valid JSON) could contain the same key twice.

    The answer is yes if two keys of an object have the same hash, or if any key contains an escape.
    """
    n_keys, size = _count_keys(text), 2
    while size < 2 * n_keys:
        size *= 2
    seen = np.zeros(size, np.uint64)
    owners = np.zeros(_DEEPEST + 1, np.uint64)  # for each depth, the number of the open object or list
    depth = n_opened = position = 0
    begin = end = 0  # start and end of the last string
    while position < len(text):
        byte = text[position]
        if byte == 0x22:
            begin = position + 1
            position = end = _end_of_string(text, begin)
        elif byte in (0x5B, 0x7B):
            n_opened += 1
            depth += 1
            owners[depth] = n_opened
        elif byte in (0x5D, 0x7D):
            depth -= 1
        elif byte == 0x3A:
            key = (_OFFSET ^ owners[depth]) * _PRIME
            for at in range(begin, end):
                if text[at] == 0x5C:
                    return True
                key = (key ^ np.uint64(text[at])) * _PRIME
            slot = np.int64(key >> np.uint64(20)) & (size - 1)
            while seen[slot]:
                if seen[slot] == key:
                    return True
                slot = (slot + 1) & (size - 1)
            seen[slot] = key
        position += 1
    return False
