"""Read the space group that a CIF names, and look up its settings in spglib's tables."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from mbqueue.data.cif_syntax import CifBlock
from mbqueue.data.entries import Unusable
from mbqueue.data.symmetry import Operations

#: CIF tags in lower case, with an underscore where newer dictionaries have a dot.
_NUMBERS = ("_space_group_it_number", "_symmetry_int_tables_number")
_HERMANN_MAUGUIN = (
    *("_symmetry_space_group_name_h-m", "_space_group_name_h-m_alt", "_space_group_name_h-m_full"),
    *("_space_group_name_h-m_ref", "_symmetry_pdbx_full_space_group_name_h-m"),
)
_HALL = ("_space_group_name_hall", "_symmetry_space_group_name_hall")
_LARGEST_HALL_NUMBER = 530
#: A choice of origin or axes after a Hermann-Mauguin symbol; the ICSD calls the origins S and Z.
_CHOICE = re.compile(r"(?::\s*([12SZHR])|\s([SZHR]))\s*\Z", re.IGNORECASE)
_ORIGINS = {"S": "1", "Z": "2"}
#: Further symbols by space group number: centred settings that International Tables do not list, and symbols from
#: before 1992. In 1992, the symbol ``e`` was introduced for a glide plane along two axes.
_FURTHER = {
    **{1: ("A1", "B1", "C1", "F1", "I1"), 2: ("A-1", "B-1", "C-1", "F-1", "I-1")},
    39: ("Abm2", "Bma2", "B2cm", "C2mb", "Cm2a", "Ac2m"),
    41: ("Aba2", "Bba2", "B2cb", "C2cb", "Cc2a", "Ac2a"),
    64: ("Cmca", "Ccmb", "Abma", "Acam", "Bbcm", "Bmab"),
    67: ("Cmma", "Cmmb", "Abmm", "Acmm", "Bmcm", "Bmam"),
    68: ("Ccca", "Cccb", "Abaa", "Acaa", "Bbcb", "Bbab"),
}
_MONOCLINIC = range(3, 16)
#: Cubic groups for which older files write ``3`` instead of ``-3``, as in Fm3m.
_CUBIC_WITH_INVERSION = (*range(200, 207), *range(221, 231))


@dataclass(frozen=True, kw_only=True)
class SpaceGroup:
    """The space group that a CIF names.

    Attributes:
        number: space group number; None if the file has neither the number nor a known name.
        symbols: the group's Hermann-Mauguin symbols, as given in the file.
        hall: the group's Hall symbols, as given in the file.
    """

    number: int | None
    symbols: tuple[str, ...]
    hall: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The space-group symbols given in the file, and the group's standard symbol."""
        standard = () if self.number is None else (_standard_symbols()[self.number],)
        return (*self.symbols, *self.hall, *standard)

    def settings(self) -> tuple[Operations, ...]:
        """The rotations and translations of each setting that the file allows.

        A Hall symbol identifies exactly one setting. A Hermann-Mauguin symbol does not specify the origin, unless a
        choice follows the symbol (``:2``, ``S``, ``Z``). A space group number specifies neither origin nor axes.
        """
        found = [(hall, kind) for hall, kind in enumerate(_settings(), 1) if kind.number == self.number]
        keys = {_hall_key(name) for name in self.hall}
        named = [one for one in found if _hall_key(one[1].hall_symbol) in keys]
        if not named:
            spelled = {_symbol_key(symbol) for symbol in self.symbols}
            named = [one for one in found if spelled & _spellings(one[1])] or found
            for symbol in self.symbols:
                if (choice := _CHOICE.search(symbol)) is not None:
                    letter = (choice[1] or choice[2]).upper()
                    origin = _ORIGINS.get(letter, letter)
                    named = [one for one in named if one[1].choice.startswith(origin)] or named
        return tuple(_operations(hall) for hall, _ in named)


def space_group_of(block: CifBlock) -> SpaceGroup:
    """The space group that a data block names.

    Raises:
        Unusable: if a space group number does not exist, or two statements in the block contradict each other.
    """
    stated: dict[int, str] = {}
    for tag, value in block.statements(*_NUMBERS):
        if not (value.isdecimal() and 1 <= int(value) <= 230):
            raise Unusable(f"the space group number {value[:40]!r} is not between 1 and 230")
        stated.setdefault(int(value), f"{tag} is {int(value)}")
    for tags, find in ((_HERMANN_MAUGUIN, number_of), (_HALL, number_of_hall)):
        for tag, name in block.statements(*tags):
            if (number := find(name)) is not None:
                stated.setdefault(number, f"{tag} is {name[:40]!r}, which is space group {number}")
    if len(stated) > 1:
        raise Unusable(f"the space group is contradictory: {', but '.join(list(stated.values())[:2])}")
    return SpaceGroup(
        number=next(iter(stated), None),
        symbols=tuple(name for _, name in block.statements(*_HERMANN_MAUGUIN)),
        hall=tuple(name for _, name in block.statements(*_HALL)),
    )


def number_of(symbol: str) -> int | None:
    """The space group number of a Hermann-Mauguin symbol, in any usual setting and spelling; None if unknown.

    A choice of origin or axes may follow the symbol, as in ``F d -3 m :2``, ``F d -3 m S``, ``R -3 m H`` and
    ``R-3m(h)``.
    """
    key, known = _symbol_key(symbol), _hermann_mauguin()
    return known.get(key) or (known.get(key[:-1]) if key.endswith(("h", "r", "s", "z")) else None)


def _symbol_key(symbol: str) -> str:
    text = re.sub(r"\((\d)\)", r"\1", symbol.partition(":")[0])  # SHELX writes P2(1)/c
    return _key(re.sub(r"\([^)]*\)", "", _CHOICE.sub("", text)))


def number_of_hall(symbol: str) -> int | None:
    """The space group number of a Hall symbol; None if spglib's table does not contain the symbol."""
    return _hall().get(_hall_key(symbol))


@cache
def _operations(hall_number: int) -> Operations:
    from spglib import get_symmetry_from_database  # noqa: PLC0415  only CIFs need it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = get_symmetry_from_database(hall_number)
    assert found is not None
    return found["rotations"].astype(np.float64), found["translations"].astype(np.float64)


@cache
def _hermann_mauguin() -> dict[str, int]:
    found: dict[str, set[int]] = {}
    given = [(kind.number, _spellings(kind)) for kind in _settings()]
    for number, spellings in (*given, *((number, set(map(_key, texts))) for number, texts in _FURTHER.items())):
        for spelling in spellings:
            found.setdefault(spelling, set()).add(number)
    return {spelling: min(numbers) for spelling, numbers in found.items() if len(numbers) == 1}


@cache
def _spellings(kind: Any) -> set[str]:
    """The normalised Hermann-Mauguin symbols of one setting."""
    spellings = set()
    for text in (kind.international_full, kind.international.rpartition("=")[2]):
        spellings.add(_key(text))
        if kind.number in _MONOCLINIC:  # P 1 21/n 1 is also written P 21/n
            lattice, *axes = text.split()
            spellings.add(_key(lattice + "".join(axis for axis in axes if axis != "1")))
    if kind.number in _CUBIC_WITH_INVERSION:
        spellings |= {spelling.replace("-3", "3") for spelling in spellings}
    return spellings


@cache
def _hall() -> dict[str, int]:
    return {_hall_key(kind.hall_symbol): kind.number for kind in _settings()}


@cache
def _standard_symbols() -> dict[int, str]:
    return {kind.number: kind.international_short for kind in reversed(_settings())}


@cache
def _settings() -> list[Any]:
    """Every setting in International Tables, with each group's standard setting first."""
    from spglib import get_spacegroup_type  # noqa: PLC0415  only CIFs need it

    with warnings.catch_warnings():
        # Every call of spglib 2.8 warns that later versions will raise errors.
        warnings.simplefilter("ignore", DeprecationWarning)
        return [get_spacegroup_type(hall_number) for hall_number in range(1, _LARGEST_HALL_NUMBER + 1)]


def _hall_key(symbol: str) -> str:
    """Normalise a Hall symbol, but keep single blanks, because ``P 32`` has one axis and ``P 3 2`` has two axes."""
    return " ".join(symbol.replace("_", " ").split()).lower()


def _key(symbol: str) -> str:
    return re.sub(r"[\s_]", "", symbol).lower()
