"""Gather a dataset's entries (id, structure as pymatgen's dictionary, target) into flat arrays, one at a time.

For an unusable entry, only its id and the reason are kept.
"""

from __future__ import annotations

import math
import unicodedata
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbqueue.data.columns import is_missing
from mbqueue.data.crystals import Crystals
from mbqueue.data.density import density_of
from mbqueue.data.elements import ATOMIC_NUMBERS, MAX_ATOMIC_NUMBER
from mbqueue.data.geometry import count_neighbors, examine
from mbqueue.task import FORMATION_ENERGY, Target

#: Two atoms closer than this, Å, count as overlapping. Often they are copies of one atom that differ because a CIF
#: rounds 1/3 to 0.333. The shortest real distance is that of H₂, 0.74.
OVERLAP = 0.3
#: No formation energy in eV/atom and no property in a sensible unit exceeds this. The square of a larger target would
#: overflow float32.
LARGEST_TARGET = 1e6
#: Words that stand for a class, in addition to numbers.
_CLASSES = {True: 1.0, False: 0.0, "true": 1.0, "false": 0.0, "True": 1.0, "False": 0.0}
#: Cells below this volume per atom, Å³, count as flat; other checks run before the density check.
MIN_VOLUME_PER_ATOM = 0.1
#: Å³ per atom. Of 37,248 crystals in the Materials Project, C3N4 is the densest by this measure, 5.57, followed by
#: diamond, 5.71; metallic hydrogen would have 3. A denser cell has duplicate atoms or a wrong lattice.
SMALLEST_VOLUME_PER_ATOM = 2.5
#: g/cm³. The densest of 37,248 crystals in the Materials Project is plutonium, 24.6. Among stable elements, it is
#: osmium, 22.0.
LARGEST_DENSITY = 30.0
#: Cells so skewed or thin that more periodic images than this are within 6 Å are rejected.
MAX_IMAGES = 2_000_000
#: The converter stores a number for each cube of 6 Å, and coordinates of each copy of an atom. This many cubes fill a
#: box of 1,300 Å.
MAX_CUBES = 10_000_000
#: The most bonds, and angles, in one crystal. A diamond cell of 2,000 atoms has 0.3 million bonds and 0.5 million
#: angles. A batch counts bonds and angles in 32 bits.
MAX_BONDS = 10_000_000
#: Occupancies this close to 1 count as 1 (pymatgen's tolerance).
_OCCUPANCY_TOLERANCE = 1e-8


#: Unicode's categories of characters that a CSV does not preserve, that UTF-8 cannot encode or that are invisible:
#: control and format characters, surrogates, private and unassigned ones, separators of lines and paragraphs.
_UNFIT_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
#: Invisible characters in other categories: joiners, fillers, blank letters and notes, variation selectors.
_INVISIBLE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0\U00016fe4\U0001d159"
) | frozenset(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))


class Unusable(Exception):
    """An entry cannot be used; the error's message is the reason."""


class Gatherer:
    """Gathers entries into ``Crystals``.

    Attributes:
        offenders: (id, reason) of every unusable entry, in order.
        targets_required: whether an entry without a target is an offender; if not, its target is nan.
    """

    def __init__(self, *, targets_required: bool = True, target: Target = FORMATION_ENERGY.target) -> None:
        """Start without entries."""
        self._kind = target.kind
        self.offenders: list[tuple[str, str]] = []
        self.targets_required = targets_required
        self._names: dict[str, str] = {}  # by a form that similar ids share
        self._ids: list[str] = []
        self._targets = array("d")
        self._counts = array("q")
        self._numbers = bytearray()
        self._coords = array("d")
        self._lattices = array("d")

    def __len__(self) -> int:
        """Number of usable entries so far."""
        return len(self._ids)

    def refuse(self, name: str, reason: str) -> None:
        """Record an entry that cannot be used or read."""
        self.offenders.append((_shown(name), _writable(reason)))

    def add(self, name: str, structure: Any, target: Any) -> None:
        """Add an entry, or record why it cannot be used."""
        shape = unicodedata.normalize("NFC", " ".join(name.split()))  # split also removes no-break spaces
        if shape in self._names:
            self.refuse(name, _likeness(name, self._names[shape]))
            return
        if not all(map(_is_fit, name)):
            self.refuse(
                name,
                "its id has control characters, invisible characters, or characters that cannot be saved to a file",
            )
            return
        try:
            value = self._target(target)
            numbers, coords, matrix = parse_structure(structure)
        except Unusable as unusable:
            self.refuse(name, str(unusable))
            return
        self._names[shape] = name
        self._ids.append(name)
        self._targets.append(value)
        self._counts.append(len(numbers))
        self._numbers += numbers
        self._coords.frombytes(coords.tobytes())
        self._lattices.frombytes(matrix.tobytes())

    def crystals(self) -> Crystals:
        """The gathered crystals."""
        return Crystals(
            ids=self._ids,
            targets=np.array(self._targets, np.float64),
            atom_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(self._counts, np.int64))]),
            atomic_numbers=np.frombuffer(bytes(self._numbers), np.uint8),
            frac_coords=np.array(self._coords, np.float64).reshape(-1, 3),
            lattices=np.array(self._lattices, np.float64).reshape(-1, 3, 3),
        )

    def _target(self, target: Any) -> float:
        if is_missing(target):
            if self.targets_required:
                raise Unusable("the target is missing")
            return math.nan
        if self._kind == "class":
            return _class_of(target)
        try:
            # Python would read True as 1 and "1_0" as 10.
            value = float(target) if not isinstance(target, bool) and "_" not in str(target) else None
        except (TypeError, ValueError, OverflowError):
            value = None
        if value is None:
            raise Unusable(f"the target {target!r:.100} is not a number; if it is missing, leave the cell empty")
        if not abs(value) <= LARGEST_TARGET:
            beyond = f", beyond ±{LARGEST_TARGET:g}: give it in a larger unit" if math.isfinite(value) else ""
            raise Unusable(f"the target is {value:g}{beyond}")
        return value


def _class_of(target: Any) -> float:
    """The class, 1 or 0, from a number or a word."""
    try:
        value = _CLASSES[target] if isinstance(target, bool) or target in _CLASSES else float(target)
    except (TypeError, ValueError):
        value = math.nan
    if value not in (0.0, 1.0):
        raise Unusable(
            f"the target {target!r:.100} is not a class: give 0 or 1, or true or false; if it is missing, leave "
            "the cell empty"
        )
    return value


def _shown(name: str) -> str:
    """An id with unprintable characters escaped."""
    return "".join(one if _is_fit(one) else one.encode("unicode_escape").decode() for one in name)


def _is_fit(character: str) -> bool:
    """Whether a character may be in an id: a visible character or a blank that files preserve."""
    return " " <= character <= "~" or not (
        unicodedata.category(character) in _UNFIT_CATEGORIES or character in _INVISIBLE
    )


def _likeness(name: str, other: str) -> str:
    """The reason why two similar ids cannot both be in a dataset."""
    if name == other:
        return "the id occurs twice"
    if name.split() == other.split():
        return f"its id differs from {other!r} only in whitespace"
    return f"its id {name!a} is the same text as the id {other!a}, in another form of Unicode"


def _writable(text: str) -> str:
    """``text`` with lone surrogates escaped, which JSON allows but UTF-8 does not."""
    return text.encode(errors="backslashreplace").decode()


def parse_structure(structure: Any) -> tuple[bytes, NDArray[np.float64], NDArray[np.float64]]:
    """Atomic numbers, fractional coordinates [n, 3] and lattice [3, 3] of a ``Structure.as_dict()``.

    Raises:
        Unusable: if the structure is not a ``Structure.as_dict()``, or CHGNet does not support the crystal.
    """
    if structure is None:
        raise Unusable("the structure is missing")
    try:
        sites = structure["sites"]
        matrix = _lattice_matrix(structure["lattice"])
        numbers = bytes([_atomic_number(site["species"]) for site in sites])
        coords = np.array([site["abc"] for site in sites], np.float64)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise Unusable(f"it is not a pymatgen structure ({type(error).__name__}: {error})") from None
    if not numbers:
        raise Unusable("it has no atoms")
    if coords.shape != (len(numbers), 3):
        raise Unusable("it does not have three coordinates for each atom")
    check_density(numbers, check_geometry(coords, matrix))
    return numbers, coords, matrix


def check_geometry(coords: NDArray[np.float64], matrix: NDArray[np.float64]) -> float:
    """Volume of a cell, Å³; raise ``Unusable`` if no graph can be made from it."""
    if not np.isfinite(coords).all():
        atom = int(np.flatnonzero(~np.isfinite(coords).all(axis=1))[0])
        raise Unusable(f"the coordinates of atom {atom} are not finite")
    if not np.isfinite(matrix).all():
        raise Unusable("its lattice is not finite")
    n_atoms = len(coords)
    volume, images, all_images, cubes, most, overlap = examine(coords, matrix, OVERLAP)
    if not volume >= MIN_VOLUME_PER_ATOM * n_atoms:
        raise Unusable(f"its cell of {volume:.3g} Å³ is too small for {n_atoms} atoms")
    if images > MAX_IMAGES:
        raise Unusable("its cell is too skewed or too thin; give its reduced (Niggli) cell")
    if not (all_images <= MAX_IMAGES and cubes <= MAX_CUBES):
        raise Unusable("its atoms are too far apart; wrap their coordinates into the cell, and reduce its empty space")
    if most > MAX_BONDS:
        n_bonds, n_angles, overlap = count_neighbors(coords, matrix, OVERLAP, MAX_BONDS)
        if max(n_bonds, n_angles) > MAX_BONDS:
            raise Unusable(f"its atoms are too close: it has more than {MAX_BONDS:,} bonds or angles")
    if overlap >= 0:
        first, second = divmod(overlap, n_atoms)
        if first == second:
            raise Unusable(f"atom {first} overlaps its own periodic image")
        raise Unusable(f"atoms {first} and {second} overlap")
    return float(volume)


def check_density(numbers: bytes, volume: float) -> None:
    """Raise ``Unusable`` for a cell of ``volume`` Å³ that is denser than any crystal."""
    density = density_of(np.frombuffer(numbers, np.uint8), volume)
    if volume < SMALLEST_VOLUME_PER_ATOM * len(numbers) or density > LARGEST_DENSITY:
        raise Unusable(
            f"it has {volume / len(numbers):.3g} Å³ per atom and {density:.3g} g/cm³, denser than any crystal: are "
            "atoms listed twice, or is its cell wrong?"
        )


def _lattice_matrix(lattice: Any) -> NDArray[np.float64]:
    pbc = lattice.get("pbc", True)
    if not (all(pbc) if isinstance(pbc, list | tuple) else pbc in (None, True)):
        raise Unusable(
            "it is not periodic in all three directions (pbc), and CHGNet was trained on periodic crystals; make "
            "it periodic with at least 12 Å of vacuum"
        )
    if "matrix" in lattice:
        matrix = np.array(lattice["matrix"], np.float64).reshape(-1)
        if matrix.shape != (9,):
            raise Unusable("its lattice is not a 3×3 matrix")
        return matrix.reshape(3, 3)
    from pymatgen.core import Lattice  # noqa: PLC0415  only old files give lattices by lengths and angles

    return np.array(Lattice.from_dict(lattice).matrix, np.float64)


def _atomic_number(species: Any) -> int:
    if len(species) == 1:
        symbol, occupancy = species[0]["element"], species[0].get("occu", 1)
    else:
        symbols = {part["element"] for part in species}
        if len(symbols) != 1:
            raise Unusable(f"it is disordered ({', '.join(sorted(map(str, symbols))) or 'nothing'} share a site)")
        symbol, occupancy = symbols.pop(), sum(part["occu"] for part in species)
    number = ATOMIC_NUMBERS.get(symbol)
    if number is None:
        raise Unusable(f"{symbol!r} is not an element")
    if abs(occupancy - 1) > _OCCUPANCY_TOLERANCE:
        raise Unusable(f"it is disordered ({symbol} occupies a site to {occupancy:g})")
    if number > MAX_ATOMIC_NUMBER:
        raise Unusable(f"CHGNet does not know {symbol} (Z = {number}; the largest is {MAX_ATOMIC_NUMBER})")
    return number
