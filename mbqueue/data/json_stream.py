"""A JSON document read from its begin to its end, in bounded memory.

The reader is asked for members, items and values in the order in which they stand. Where a value ends is found by a
compiled scanner; it is parsed by orjson, by itself. What stands between values is checked, so a document is read as
JSON or not at all; of what is passed over, only brackets and strings are followed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from mbqueue.data import source
from mbqueue.data.json_values import RepeatedKey, parse_json
from mbqueue.data.machine_code import compiled
from mbqueue.data.source import Source

_CHUNK = 4 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACE = re.compile(rb"[ \t\r\n]*")
#: A number or a word, up to what ends it.
_BARE = re.compile(rb"[^\s,:{}\[\]\"]*")
_LONGEST_BARE = 1000
#: How much of the text a message shows.
_SHOWN = 30
#: Deeper brackets are refused; those of a structure are seven deep.
_DEEPEST = 1000


class NotJson(Exception):
    """Why a document is no JSON."""


class CutShort(NotJson):
    """A document ends in the middle."""


@compiled
def _end_of_value(text: Any, place: Any, state: Any) -> Any:
    """Where the object, list or string ends that is read at ``place``; -1 when it ends beyond ``text``, -2 when its
    brackets do not match or are nested too deeply.

    ``state`` (depth, 1 in a string, 1 after a backslash, then the open brackets) is carried from one piece of the
    document to the next.
    """
    depth, in_string, escaped = state[0], state[1], state[2]
    deepest = len(state) - 3
    end = len(text)
    while place < end:
        byte = text[place]
        place += 1
        if in_string:
            if escaped:
                escaped = 0
            elif byte == 0x5C:
                escaped = 1
            elif byte == 0x22:
                in_string = 0
                if depth == 0:
                    return place
        elif byte == 0x22:
            in_string = 1
        elif byte in (0x5B, 0x7B):
            if depth == deepest:
                return -2
            state[3 + depth] = byte
            depth += 1
        elif byte in (0x5D, 0x7D):
            depth -= 1
            if depth < 0 or state[3 + depth] != byte - 2:
                return -2
            if depth == 0:
                return place
    state[0], state[1], state[2] = depth, in_string, escaped
    return -1


class JsonStream:
    """One document; an iteration over members or items takes each value before asking for the next.

    Every method raises ``NotJson`` where the document is none, ``CutShort`` where it ends too early, and
    ``RepeatedKey`` where an object has one key twice.
    """

    def __init__(self, stream: Source) -> None:
        """Reads nothing yet."""
        self._stream = stream
        self._text = b""
        self._bytes = np.empty(0, np.uint8)
        self._place = 0
        self._at_begin = True
        self._state = np.zeros(3 + _DEEPEST, np.int64)

    def peek(self) -> str:
        """The first character of what comes next, blanks passed over; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self._place)
            self._place = found.end() if found else self._place
            if self._place < len(self._text):
                return chr(self._text[self._place])
            if not self._refill():
                return ""

    def members(self) -> Iterator[str]:
        """The keys of the object that comes next; none twice."""
        seen: set[str] = set()
        for _ in self._parts("{", "}"):
            if self.peek() != '"':
                raise NotJson(f"a key has to stand where {self._shown()} stands")
            key: str = self.value()
            if key in seen:
                raise RepeatedKey(key)
            seen.add(key)
            self._take(":")
            yield key

    def items(self) -> Iterator[int]:
        """The positions in the list that comes next."""
        return self._parts("[", "]")

    def value(self) -> Any:
        """Parse what comes next."""
        begin, end = self._span()
        try:
            return parse_json(memoryview(self._text)[begin:end])
        except RepeatedKey as error:
            raise RepeatedKey(error.key, _readable(self._text[begin : begin + 2 * _SHOWN])) from None
        except ValueError as error:
            raise NotJson(str(error)) from error

    def skip(self) -> None:
        """Pass over what comes next; only its brackets and strings are followed."""
        self._span(keep=False)

    def end(self) -> None:
        """Raise unless nothing is left."""
        if self.peek():
            raise NotJson(f"{self._shown()} stands behind its end")

    def _parts(self, opening: str, closing: str) -> Iterator[int]:
        self._take(opening)
        number = 0
        while self.peek() != closing:
            if number:
                self._take(",")
            if self.peek() == closing:
                raise NotJson(f"a comma stands before {closing!r}")
            yield number
            number += 1
        self._take(closing)

    def _take(self, character: str) -> None:
        found = self.peek()
        if not found:
            raise CutShort("it ends in the middle")
        if found != character:
            raise NotJson(f"{character!r} has to stand where {self._shown()} stands")
        self._place += 1

    def _shown(self) -> str:
        return _readable(self._text[self._place : self._place + _SHOWN])

    def _span(self, *, keep: bool = True) -> tuple[int, int]:
        """Where in the text the value begins and ends that comes next; it is passed over, and dropped unless kept."""
        first = self.peek()
        if not first:
            raise CutShort("it ends in the middle")
        if first not in '{["':
            return self._bare()
        begin, scanned = self._place, self._place
        state = self._state
        state[:3] = 0
        while (end := _end_of_value(self._bytes, scanned, state)) < 0:
            if end == -2:
                raise NotJson("brackets do not match, or are nested too deeply")
            length = len(self._text) - begin
            if length > source.LONGEST_ROW and keep:
                raise NotJson("a value does not end")
            self._place = begin if keep else len(self._text)
            if not self._refill():
                raise CutShort("it ends in the middle")
            begin, scanned = 0, length if keep else 0
        self._place = end
        return begin, end

    def _bare(self) -> tuple[int, int]:
        while True:
            found = _BARE.match(self._text, self._place)
            end = found.end() if found else self._place
            if end < len(self._text) or end - self._place > _LONGEST_BARE or not self._refill():
                break
        if end == self._place or end - self._place > _LONGEST_BARE:
            raise NotJson(f"a value has to stand where {self._shown()} stands")
        begin, self._place = self._place, end
        return begin, end

    def _refill(self) -> bool:
        """Read on; what lies before the place is dropped. Whether there was anything."""
        chunk = self._stream.read(_CHUNK)
        if self._at_begin:
            chunk = chunk.removeprefix(_BYTE_ORDER_MARK)
            self._at_begin = False
        self._text = self._text[self._place :] + chunk
        self._bytes = np.frombuffer(self._text, np.uint8)
        self._place = 0
        return bool(chunk)


def _readable(text: bytes) -> str:
    return repr(text.decode(errors="replace"))
