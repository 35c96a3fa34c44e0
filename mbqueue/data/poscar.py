"""Read crystals from POSCAR files (VASP 5 and 6) with pymatgen, after a check that the lines are unambiguous.

pymatgen names the species of a VASP 4 file H, He, Li, …, ignores surplus lines, and splits numbers that run together.
This module rejects VASP 4 files, surplus lines and numbers that run together. Pymatgen also fails if comments follow
the numbers of the cell, so this module removes such comments.
"""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import Any

from mbqueue.data.elements import ATOMIC_NUMBERS
from mbqueue.data.entries import Unusable
from mbqueue.data.parser_warnings import heard
from mbqueue.errors import counted

#: First letters of the line that names the kind of coordinates (``Direct``, ``Fractional`` or ``Cartesian``).
_MODES = "dDfFcCkK"
_CARTESIAN = "cCkK"
#: The flags that say whether VASP may move an atom along an axis.
_FLAGS = frozenset(("T", "F", ".TRUE.", ".FALSE."))
_LATTICE_LINES = slice(2, 5)
_SPECIES_LINE = 5
#: An element in a POSCAR of VASP 5 and 6: ``Mg``, ``Mg_pv``, ``Mg_pv/f474ac0d``.
_SPECIES = re.compile(r"([A-Z][a-z]?)(_[A-Za-z\d.]+)*(/\w*)?\Z")
_SYMBOL = re.compile(r"([A-Z][a-z]?)(?![A-Za-z])")


def read_poscar(text: str) -> dict[str, Any]:
    """Read one crystal, and return it in the format of pymatgen's ``Structure.as_dict()``.

    Raises:
        Unusable: if the file cannot be read or is ambiguous.
    """
    from pymatgen.core import Structure  # noqa: PLC0415  it takes a second to import, and JSON needs none of it

    written = text.split("\n")
    lines = [line.split("#")[0].split("!")[0].strip() for line in written]
    if len(lines) > 1:
        lines[1] = _scale(lines[1])
    _check_lines(lines)
    with heard("pymatgen"):
        structure = Structure.from_str(
            "\n".join([written[0], *lines[1:_SPECIES_LINE], *written[_SPECIES_LINE:]]), fmt="poscar"
        )
    return structure.as_dict()  # type: ignore[no-any-return]


def _scale(line: str) -> str:
    """The scale from line 2, without any text that follows it."""
    first, second = [*line.split(), "", ""][:2]
    try:
        float(second)
    except ValueError:
        return first
    raise Unusable(
        "line 2 has several scales; apply them to the cell and to Cartesian coordinates, and write 1.0 in line 2"
    )


def _check_lines(lines: list[str]) -> None:
    """Check that the lines follow the POSCAR format, and that the listed atoms match the counts."""
    if len(lines) < _SPECIES_LINE + 3:
        raise Unusable("the file ends before the coordinates")
    scale = _numbers(lines[1], 1, "the scale in line 2")[0]
    for line in lines[_LATTICE_LINES]:
        _numbers(line, 3, "a lattice vector")
    symbols, counts, position = _species(lines)
    if lines[position][:1] in ("s", "S"):
        flags, position = 3, position + 1
    else:
        flags = 0
    mode = lines[position] if position < len(lines) else ""
    if mode[:1] not in tuple(_MODES):
        raise Unusable(f"line {position + 1} is {mode[:40]!r} instead of Direct or Cartesian")
    if mode[0] in _CARTESIAN and scale < 0:
        raise Unusable("pymatgen misreads Cartesian coordinates with a negative scale; write a positive scale")
    expected = [symbol for symbol, count in zip(symbols, counts, strict=True) for _ in range(count)]
    atoms = lines[position + 1 : position + 1 + len(expected)]
    for number, (symbol, line) in enumerate(zip_longest(expected, atoms), 1):
        if line is None:
            raise Unusable(f"the counts add up to {counted(len(expected), 'atom')}, but the file lists {len(atoms)}")
        _check_atom(line.split(), symbol, flags, f"atom {number}")
    rest = lines[position + 1 + len(expected)] if position + 1 + len(expected) < len(lines) else ""
    if rest and not rest.lower().startswith("l"):
        raise Unusable(
            f"the counts add up to {counted(len(expected), 'atom')}, but another line follows: {rest[:40]!r}"
        )


def _species(lines: list[str]) -> tuple[list[str], list[int], int]:
    """The element symbols, the counts of atoms, and the index of the next line."""
    position = _SPECIES_LINE
    symbols: list[str] = []
    while position < len(lines) and lines[position] and not lines[position][0].isdigit():
        for word in lines[position].split():
            found = _SPECIES.match(word)
            if found is None or found[1] not in ATOMIC_NUMBERS:
                raise Unusable(f"{word[:40]!r} in line {position + 1} is not an element")
            symbols.append(found[1])
        position += 1
    if not symbols:
        raise Unusable(
            "the file names no elements (VASP 4); add a line with the elements, in order, before the line of counts"
        )
    counts: list[int] = []
    n_lines = position - _SPECIES_LINE
    for line in lines[position : position + n_lines]:
        if not all(word.isdecimal() for word in line.split()):
            raise Unusable(f"{line[:40]!r} is not a line of atom counts")
        counts += [int(word) for word in line.split()]
    if len(symbols) != len(counts):
        raise Unusable(f"the file lists {counted(len(symbols), 'element')}, but {counted(len(counts), 'atom count')}")
    return symbols, counts, position + n_lines


def _check_atom(words: list[str], symbol: str, flags: int, what: str) -> None:
    _numbers(" ".join(words[:3]), 3, f"the position of {what}")
    told = words[3 : 3 + flags]
    if len(told) != flags or set(told) - _FLAGS:
        raise Unusable(f"{what} has {' '.join(told)!r} instead of three flags, each T or F")
    named = _SYMBOL.match(words[3 + flags]) if len(words) > 3 + flags else None
    if named is not None and named[1] in ATOMIC_NUMBERS and named[1] != symbol:
        raise Unusable(f"{what} is {symbol} according to the element line, but {named[1]} on its own line")


def _numbers(line: str, count: int, what: str) -> list[float]:
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        values = []
    if len(values) != count:
        raise Unusable(f"{what} is {line[:60]!r}, not {counted(count, 'number')}")
    return values
