"""Collect the entries of a dataset (id, structure, target) in flat arrays, one entry at a time.

A structure is a dictionary in pymatgen's format. For an unusable entry, only its id and the reason are kept.
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
from mbqueue.errors import counted
from mbqueue.task import FORMATION_ENERGY, Target

#: Atoms closer together than this, in Å, count as overlapping. Overlapping atoms are often copies of one atom, because
#: a CIF rounds 1/3 to 0.333. The shortest real distance is 0.74 Å, in H₂.
OVERLAP = 0.3
#: The largest absolute value accepted for a target: far above any formation energy in eV/atom and any property in a
#: sensible unit, but small enough that the squares of targets fit into a float32.
LARGEST_TARGET = 1e6
#: Values that are accepted for a class in addition to the numbers 0 and 1.
_CLASSES = {True: 1.0, False: 0.0, "true": 1.0, "false": 0.0, "True": 1.0, "False": 0.0}
#: Cells with a smaller volume per atom, in Å³, count as flat. The later density check is stricter.
MIN_VOLUME_PER_ATOM = 0.1
#: The smallest accepted volume per atom, in Å³. A denser cell must have duplicate atoms or a wrong lattice. In the
#: Materials Project, C3N4 has the smallest volume per atom, 5.57 Å³, followed by diamond with 5.71 Å³. Metallic
#: hydrogen would have 3 Å³ per atom.
SMALLEST_VOLUME_PER_ATOM = 2.5
#: The largest accepted density, in g/cm³. Among 37,248 crystals in the Materials Project, plutonium is the densest,
#: with 24.6 g/cm³. The densest stable element is osmium, with 22.0 g/cm³.
LARGEST_DENSITY = 30.0
#: The largest accepted number of periodic images to search for neighbours within 6 Å. A search needs more images only
#: if the cell is extremely skewed or thin, or its atoms are extremely far apart.
MAX_IMAGES = 2_000_000
#: The largest accepted number of 6 Å cubes, or of copies of atoms, in the box around all atoms of a crystal. The
#: converter allocates memory for every cube and every copied atom. Ten million cubes fill a cubic box with edges of
#: 1,300 Å.
MAX_CUBES = 10_000_000
#: The largest accepted number of bonds, or of angles, in one crystal. A diamond cell of 2,000 atoms has 0.3 million
#: bonds and 0.5 million angles. With a larger limit, a batch's indices could exceed 32 bits.
MAX_BONDS = 10_000_000
#: Occupancies this close to 1 count as 1 (pymatgen's tolerance).
_OCCUPANCY_TOLERANCE = 1e-8


#: Unicode categories that an id must not contain, because the characters are invisible or get lost in CSV or UTF-8
#: files: control and format characters, surrogates, private-use and unassigned characters, line and paragraph
#: separators.
_UNFIT_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
#: Invisible characters in allowed Unicode categories: joiners, fillers, blank letters and notes, variation selectors.
_INVISIBLE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0\U00016fe4\U0001d159"
) | frozenset(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))


class Unusable(Exception):
    """An entry cannot be used, for the reason in the message."""


class Gatherer:
    """A collector that turns entries into ``Crystals``.

    Attributes:
        offenders: (id, reason) of every unusable entry, in order.
        targets_required: whether an entry without a target is unusable; if not, its target is nan.
    """

    def __init__(self, *, targets_required: bool = True, target: Target = FORMATION_ENERGY.target) -> None:
        self._kind = target.kind
        self.offenders: list[tuple[str, str]] = []
        self.targets_required = targets_required
        self._names: dict[str, str] = {}  # normalised id → id as given
        self._ids: list[str] = []
        self._targets = array("d")
        self._counts = array("q")
        self._numbers = bytearray()
        self._coords = array("d")
        self._lattices = array("d")

    def __len__(self) -> int:
        return len(self._ids)

    def refuse(self, name: str, reason: str) -> None:
        self.offenders.append((_shown(name), _writable(reason)))

    def add(self, name: str, structure: Any, target: Any) -> None:
        """Add an entry, or record why it cannot be used."""
        shape = unicodedata.normalize("NFC", " ".join(name.split()))  # `split` removes no-break spaces too
        if shape in self._names:
            self.refuse(name, _likeness(name, self._names[shape]))
            return
        if not all(map(_is_fit, name)):
            self.refuse(
                name,
                "the id has control characters, invisible characters, or characters that cannot be saved to a file",
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
        # Suggest an empty cell only if targets are optional.
        hint = "" if self.targets_required else "; leave the cell empty if there is no target"
        if self._kind == "class":
            return _class_of(target, hint)
        try:
            # `float` would convert True to 1 and "1_0" to 10.
            value = float(target) if not isinstance(target, bool) and "_" not in str(target) else None
        except (TypeError, ValueError, OverflowError):
            value = None
        if value is None:
            raise Unusable(f"the target {target!r:.100} is not a number{hint}")
        if not abs(value) <= LARGEST_TARGET:
            beyond = f", beyond ±{LARGEST_TARGET:g}; use a larger unit" if math.isfinite(value) else ""
            raise Unusable(f"the target is {value:g}{beyond}")
        return value


def _class_of(target: Any, hint: str) -> float:
    try:
        value = _CLASSES[target] if isinstance(target, bool) or target in _CLASSES else float(target)
    except (TypeError, ValueError):
        value = math.nan
    if value not in (0.0, 1.0):
        raise Unusable(f"the target {target!r:.100} is not a class: give 0 or 1, or true or false{hint}")
    return value


def _shown(name: str) -> str:
    return "".join(one if _is_fit(one) else one.encode("unicode_escape").decode() for one in name)


def _is_fit(character: str) -> bool:
    """Whether an id may contain this character."""
    return " " <= character <= "~" or not (
        unicodedata.category(character) in _UNFIT_CATEGORIES or character in _INVISIBLE
    )


def _likeness(name: str, other: str) -> str:
    if name == other:
        return "the id occurs twice"
    if name.split() == other.split():
        return f"the id differs from {other!r} only in whitespace"
    return f"the id {name!a} is the same text as the id {other!a}, in a different Unicode form"


def _writable(text: str) -> str:
    """Escape lone surrogates in ``text``, because JSON allows them, but UTF-8 cannot encode them."""
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
        raise Unusable(f"the structure is not in pymatgen's format ({type(error).__name__}: {error})") from None
    if not numbers:
        raise Unusable("the structure has no atoms")
    if coords.shape != (len(numbers), 3):
        raise Unusable("the structure does not have three coordinates for each atom")
    check_density(numbers, check_geometry(coords, matrix))
    return numbers, coords, matrix


def check_geometry(coords: NDArray[np.float64], matrix: NDArray[np.float64]) -> float:
    """Check that a graph of the cell can be made; return the volume, Å³.

    Raises:
        Unusable: if no graph can be made.
    """
    if not np.isfinite(coords).all():
        atom = int(np.flatnonzero(~np.isfinite(coords).all(axis=1))[0])
        raise Unusable(f"the coordinates of atom {atom} are not finite")
    if not np.isfinite(matrix).all():
        raise Unusable("the lattice contains a number that is not finite")
    n_atoms = len(coords)
    volume, images, all_images, cubes, most, overlap = examine(coords, matrix, OVERLAP)
    if not volume >= MIN_VOLUME_PER_ATOM * n_atoms:
        raise Unusable(f"the cell of {volume:.3g} Å³ is too small for {counted(n_atoms, 'atom')}")
    if images > MAX_IMAGES:
        raise Unusable("the cell is too skewed or too thin; give the reduced (Niggli) cell")
    if not (all_images <= MAX_IMAGES and cubes <= MAX_CUBES):
        raise Unusable("the atoms are too far apart; wrap the coordinates into the cell, and reduce the vacuum")
    if most > MAX_BONDS:
        n_bonds, n_angles, overlap = count_neighbors(coords, matrix, OVERLAP, MAX_BONDS)
        if max(n_bonds, n_angles) > MAX_BONDS:
            raise Unusable(f"the atoms are too close: there are more than {MAX_BONDS:,} bonds or angles")
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
            f"the cell is denser than any crystal ({volume / len(numbers):.3g} Å³ per atom, {density:.3g} g/cm³); are "
            "atoms listed twice, or is the cell wrong?"
        )


def _lattice_matrix(lattice: Any) -> NDArray[np.float64]:
    pbc = lattice.get("pbc", True)
    if not (all(pbc) if isinstance(pbc, list | tuple) else pbc in (None, True)):
        raise Unusable(
            "the structure is not periodic in all three directions (pbc), but CHGNet was trained on periodic crystals; "
            "make the structure periodic, with at least 12 Å of vacuum"
        )
    if "matrix" in lattice:
        matrix = np.array(lattice["matrix"], np.float64).reshape(-1)
        if matrix.shape != (9,):
            raise Unusable("the lattice is not a 3×3 matrix")
        return matrix.reshape(3, 3)
    from pymatgen.core import Lattice  # noqa: PLC0415  only old files give lattices by lengths and angles

    return np.array(Lattice.from_dict(lattice).matrix, np.float64)


def _atomic_number(species: Any) -> int:
    if len(species) == 1:
        symbol, occupancy = species[0]["element"], species[0].get("occu", 1)
    else:
        symbols = {part["element"] for part in species}
        if len(symbols) != 1:
            raise Unusable(
                f"the structure is disordered ({', '.join(sorted(map(str, symbols))) or 'nothing'} share a site)"
            )
        symbol, occupancy = symbols.pop(), sum(part["occu"] for part in species)
    number = ATOMIC_NUMBERS.get(symbol)
    if number is None:
        raise Unusable(f"{symbol!r} is not an element")
    if abs(occupancy - 1) > _OCCUPANCY_TOLERANCE:
        raise Unusable(f"the structure is disordered ({symbol} has an occupancy of {occupancy:g})")
    if number > MAX_ATOMIC_NUMBER:
        raise Unusable(f"CHGNet does not support {symbol} (Z = {number}), only elements up to Z = {MAX_ATOMIC_NUMBER}")
    return number
