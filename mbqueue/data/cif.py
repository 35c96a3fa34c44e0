"""Read crystals from CIF files with pymatgen, and check the result against the file.

If a file is ambiguous, pymatgen guesses. If the file has no symmetry operations, pymatgen treats the asymmetric unit as
the whole cell. Pymatgen reads the first letters of an atom's label as the element, and an occupancy of ``.`` as 0. This
module therefore treats pymatgen's warnings as errors (``parser_warnings``), rejects ambiguous files, and compares the
composition with the file's formula.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from mbqueue.data.cif_syntax import CifBlock, blocks_of
from mbqueue.data.density import density_of
from mbqueue.data.elements import ATOMIC_NUMBERS
from mbqueue.data.entries import Unusable
from mbqueue.data.parser_warnings import heard
from mbqueue.data.space_groups import space_group_of
from mbqueue.data.symmetry import Sites, Symmetry, check_symmetry, check_taken, operations_of, parse_operation
from mbqueue.errors import counted

#: The largest accepted volume per atom, in Å³, for a CIF that does not state the number of atoms in its cell. A CIF
#: with a larger volume per atom probably lists only the asymmetric unit. Among 37,248 crystals in the Materials
#: Project, cesium has the largest volume per atom, 123 Å³. A separate limit for each element would detect only a few
#: more incomplete files.
LARGEST_VOLUME_PER_ATOM = 250.0
#: The lowest plausible density, in g/cm³. The least dense crystals in the Materials Project are two hydrogen crystals,
#: with 0.039 and 0.107 g/cm³, and helium, with 0.46 g/cm³.
SMALLEST_DENSITY = 0.03
#: The largest accepted volume per atom, in Å³, for any CIF: one atom in a cube with edges of 30 Å. Lengths in pm would
#: give volumes of millions of Å³.
_LARGEST_BOX = 27_000.0

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?(\(\d+\))?\Z")
#: An element at the start of a type symbol or label; it must not be followed by a letter (``OH`` and ``CA1`` are
#: ambiguous).
_ELEMENT = re.compile(r"([A-Z][a-z]?)(?![A-Za-z])")
_AMOUNT = re.compile(r"([A-Z][a-z]?)(\d+\.?\d*|\.\d+|)\Z")
_GROUP = re.compile(r"\(([A-Za-z\d. ]*)\)(\d*\.?\d*)")
_BORDER = re.compile(r"(?<=[A-Za-z\d.])(?=[A-Z])")
_CELL = tuple(
    f"_cell_{name}" for name in ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
)
_COORDINATES = tuple(f"_atom_site_fract_{axis}" for axis in "xyz")
_OPERATIONS = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz")
_MAGNETIC_OPERATIONS = ("_space_group_symop_magn_operation.xyz", "_space_group_symop_magn_operation_xyz")
_FORMULA = "_chemical_formula_sum"
_UNITS_PER_CELL = "_cell_formula_units_z"
#: The largest accepted relative difference between the composition and the file's formula, which may be rounded
#: (``Al0.67``).
_FORMULA_TOLERANCE = 0.01
#: The largest accepted relative differences from the file's volume and density. Small differences occur because cell
#: parameters are rounded and atomic masses have been revised.
_VOLUME_TOLERANCE, _DENSITY_TOLERANCE = 0.02, 0.1
#: If the computed density differs from the file's density by at most this fraction, the cell has the right number of
#: atoms.
_DENSITY_PROOF = 0.03


def read_cif(text: str, name: str) -> dict[str, Any]:
    """Read one crystal, and return it in the format of pymatgen's ``Structure.as_dict()``.

    Args:
        name: the entry's id; it selects a data block if more than one contains atoms.

    Raises:
        Unusable: if the file cannot be read, contradicts itself or is ambiguous.
    """
    from pymatgen.core import Structure  # noqa: PLC0415  it takes a second to import, and JSON needs none of it
    from pymatgen.io.cif import CifParser  # noqa: PLC0415

    block = _chosen(blocks_of(text), name)
    _check_cell(block)
    elements = _check_atoms(block)
    group = space_group_of(block)
    listed = [parse_operation(text) for tag in _OPERATIONS for text in block.listed(tag)]
    if not listed and group.number is not None:
        _created_group(group.number)
    with heard("pymatgen") as kept:
        parser = CifParser.from_str(block.text, check_cif=False)
        try:
            structures = parser.parse_structures(primitive=False, on_error="raise")
        finally:
            kept.extend(parser.warnings)
    if len(structures) != 1:
        raise Unusable(f"pymatgen found {len(structures)} crystals in data block {block.name!r}")
    structure = Structure.from_sites(structures[0], properties=structures[0].properties)
    counts = _counts(structure)
    if set(counts) != elements:
        raise Unusable(f"pymatgen read the elements {_listed(counts)}, but the file names {_listed(elements)}")
    is_confirmed = _check_volume(block, structure, is_confirmed=_check_formula(block, counts))
    if not is_confirmed:
        _check_multiplicities(block, len(structure))
    rotations, translations = operations_of(parser.symmetry_operations)
    is_listed = bool(listed)
    if parser.feature_flags["magcif"]:
        is_listed = any(block.listed(tag) for tag in _MAGNETIC_OPERATIONS)
    elif listed:
        check_taken(listed, rotations, translations)
    symmetry = Symmetry(
        rotations=rotations,
        translations=translations,
        number=group.number,
        names=group.names,
        settings=() if is_listed else group.settings(),
    )
    check_symmetry(symmetry, np.asarray(structure.lattice.matrix), _sites(block), is_confirmed=is_confirmed)
    return structure.as_dict()  # type: ignore[no-any-return]


@cache
def _created_group(number: int) -> Any:
    """Pymatgen's space group with this number.

    Pymatgen reuses a group that is still in memory. Creating a cubic group takes up to 0.7 seconds, so keep each group
    for later files.
    """
    from pymatgen.symmetry.groups import SpaceGroup  # noqa: PLC0415  as in `read_cif`

    return SpaceGroup.from_int_number(number)


def _sites(block: CifBlock) -> Sites:
    kinds = block.columns.get("_atom_site_type_symbol") or block.columns["_atom_site_label"]
    coords = [[_number(value, tag) for value in block.columns[tag]] for tag in _COORDINATES]
    elements = tuple(found[1] for kind in kinds if (found := _ELEMENT.match(kind)))
    return Sites(elements=elements, coords=np.array(coords).T)


def _check_multiplicities(block: CifBlock, n_atoms: int) -> None:
    multiplicities = block.columns.get("_atom_site_symmetry_multiplicity", [])
    if multiplicities and all(value.isdecimal() for value in multiplicities):
        expected = sum(map(int, multiplicities))
        if expected != n_atoms:
            raise Unusable(
                f"the cell has {counted(n_atoms, 'atom')}, but the values of _atom_site_symmetry_multiplicity add up "
                f"to {expected}. Give all symmetry operations, or {_FORMULA} and _cell_formula_units_Z"
            )


def _chosen(blocks: list[CifBlock], name: str) -> CifBlock:
    found = [block for block in blocks if block.has_atoms]
    if len(found) > 1:
        named = [block for block in found if block.name == name]
        if len(named) != 1:
            raise Unusable(
                f"the CIF has {len(found)} crystals ({', '.join(block.name for block in found[:8])}), and the id does "
                "not name exactly one of them; use the name of a data block as the id, or put each crystal in a "
                "separate file or row"
            )
        found = named
    if not found:
        raise Unusable("the CIF lists no atoms with fractional coordinates (_atom_site_fract_x, _y, _z)")
    return found[0]


def _number(value: str, tag: str) -> float:
    if not _NUMBER.match(value):
        raise Unusable(f"{tag} is {value[:40]!r}, which is not a number")
    return float(value.partition("(")[0])


def _check_cell(block: CifBlock) -> None:
    for tag in _CELL:
        if tag not in block.items:
            raise Unusable(f"the CIF has no {tag}")
        if not 0 < _number(block.items[tag], tag) < (180 if "angle" in tag else math.inf):
            allowed = "between 0 and 180" if "angle" in tag else "positive"
            raise Unusable(f"{tag} is {block.items[tag][:40]!r}, but must be {allowed}")


def _check_atoms(block: CifBlock) -> set[str]:
    """Check that each atom has an unambiguous element, coordinates and occupancy; return the elements."""
    if set(_COORDINATES) - set(block.columns):
        raise Unusable("the atoms are not in a loop_ with _atom_site_fract_x, _y and _z")
    labels = block.columns.get("_atom_site_label")
    if labels is None:
        raise Unusable("the atoms have no _atom_site_label")
    kinds = block.columns.get("_atom_site_type_symbol", labels)
    occupancies = block.columns.get("_atom_site_occupancy", ["1"] * len(labels))
    groups = block.columns.get("_atom_site_disorder_group", ["."] * len(labels))
    flags = block.columns.get("_atom_site_calc_flag", ["."] * len(labels))
    coords = [block.columns[tag] for tag in _COORDINATES]
    if len({len(column) for column in (labels, kinds, occupancies, groups, flags, *coords)}) != 1:
        raise Unusable("the columns of the atoms have different lengths")
    elements = set()
    for row, label in enumerate(labels):
        found = _ELEMENT.match(kinds[row])
        if found is None or found[1] not in ATOMIC_NUMBERS:
            which = "type" if kinds is not labels else "label"
            raise Unusable(
                f"the {which} {kinds[row][:40]!r} of atom {label[:40]!r} does not clearly begin with an element's "
                "symbol; write the element in _atom_site_type_symbol"
            )
        elements.add(_hydrogen(found[1]))
        for tag, column in zip(_COORDINATES, coords, strict=True):
            _number(column[row], f"{tag} of atom {label[:40]!r}")
        if occupancies[row] in (".", "?"):
            raise Unusable(
                f"the occupancy of atom {label[:40]!r} is unknown ({occupancies[row]!r}); write 1 if the site is full"
            )
        if _number(occupancies[row], f"_atom_site_occupancy of atom {label[:40]!r}") <= 0:
            raise Unusable(
                f"atom {label[:40]!r} has an occupancy of {occupancies[row]}; remove it if the site is empty"
            )
        if groups[row] not in (".", "?", "0"):
            raise Unusable(f"atom {label[:40]!r} is disordered: it belongs to a group in _atom_site_disorder_group")
        if flags[row].lower() == "dum":
            raise Unusable(f"atom {label[:40]!r} is a dummy atom (_atom_site_calc_flag is dum)")
    return elements


def _hydrogen(symbol: str) -> str:
    return "H" if symbol in ("D", "T") else symbol


def _counts(structure: Any) -> dict[str, float]:
    counts: dict[str, float] = {}
    for element, amount in structure.composition.element_composition.items():
        symbol = _hydrogen(element.symbol)
        counts[symbol] = counts.get(symbol, 0) + float(amount)
    return counts


def _listed(symbols: set[str] | Mapping[str, float]) -> str:
    return ", ".join(sorted(symbols)) or "none"


def _formula(text: str | None) -> dict[str, float] | None:
    """The amount of each element in a formula such as ``Na1 Cl1`` or ``Mg(OH)2``; None for any other text."""
    if text is None:
        return None
    while (group := _GROUP.search(text)) is not None:
        inner = _formula(group[1])
        if inner is None:
            return None
        times = float(group[2] or 1)
        flat = "".join(f" {symbol}{amount * times:.12g}" for symbol, amount in inner.items())
        text = f"{text[: group.start()]}{flat} {text[group.end() :]}"
    amounts: dict[str, float] = {}
    for part in _BORDER.sub(" ", text).split():
        found = _AMOUNT.match(part)
        if found is None or found[1] not in ATOMIC_NUMBERS:
            return None
        symbol = _hydrogen(found[1])
        amounts[symbol] = amounts.get(symbol, 0) + float(found[2] or 1)
    return amounts


def _written(amounts: Mapping[str, float]) -> str:
    return " ".join(f"{symbol}{amount:g}" for symbol, amount in sorted(amounts.items()))


def _check_formula(block: CifBlock, counts: Mapping[str, float]) -> bool:
    """Compare the cell's composition with the file's formula; return whether the formula confirms the number of atoms.

    Usually, the formula describes one formula unit, of which the cell contains Z. In a CIF that pymatgen wrote, the
    formula describes the whole cell, and ``_chemical_formula_structural`` describes one formula unit.
    """
    told = block.value(_FORMULA)
    unit = _formula(block.value("_chemical_formula_structural"))
    formula = unit if told is None else _formula(told)
    if formula is None:
        if told is not None:
            raise Unusable(f"the {_FORMULA} {told[:60]!r} is not a chemical formula")
        return False
    found = _written(counts)
    if set(formula) != set(counts) or min(formula.values()) <= 0:
        raise Unusable(f"the cell contains {found}, but the formula is {_written(formula)}")
    ratios = [counts[symbol] / formula[symbol] for symbol in formula]
    if max(ratios) > min(ratios) * (1 + _FORMULA_TOLERANCE):
        raise Unusable(f"the cell contains {found}, but the formula is {_written(formula)}")
    units = block.value(_UNITS_PER_CELL)
    if units is None or told is None:
        return False
    z = _number(units, "_cell_formula_units_Z")
    if z < 1:
        return False  # for a cell with half a formula unit (LiO for Li2O2), pymatgen writes Z = 0
    expected = 1.0 if _is_of_whole_cell(formula, unit, z) else z
    if abs(ratios[0] - expected) > _FORMULA_TOLERANCE * expected:
        raise Unusable(
            f"the cell contains {found}, which is {ratios[0]:g} times the {_FORMULA}, {_written(formula)}, but "
            f"_cell_formula_units_Z is {z:g}"
        )
    return True


def _is_of_whole_cell(formula: Mapping[str, float], unit: Mapping[str, float] | None, z: float) -> bool:
    """Whether a formula describes a whole cell with ``z`` formula units; pymatgen rounds ``z`` down."""
    if unit is None or set(unit) != set(formula):
        return False
    ratios = {formula[symbol] / unit[symbol] for symbol in unit}
    return len(ratios) == 1 and int(ratios.pop()) == z


def _check_volume(block: CifBlock, structure: Any, *, is_confirmed: bool) -> bool:
    """Compare the cell's volume and density with those in the file; return whether the number of atoms is confirmed."""
    volume = float(structure.volume)
    told = block.value("_cell_volume")
    if told is not None:
        stated = _number(told, "_cell_volume")
        if abs(volume - stated) > _VOLUME_TOLERANCE * stated:
            raise Unusable(f"the cell has a volume of {volume:.5g} Å³, but _cell_volume is {told}")
    numbers = np.array([site.specie.Z for site in structure if site.is_ordered], np.int64)
    if len(numbers) < len(structure):
        return is_confirmed  # `parse_structure` rejects disordered structures
    density = density_of(numbers, volume)
    told = block.value("_exptl_crystal_density_diffrn")
    if told is not None:
        stated = _number(told, "_exptl_crystal_density_diffrn")
        if abs(density - stated) > _DENSITY_TOLERANCE * stated:
            raise Unusable(
                f"the cell has a density of {density:.4g} g/cm³, but _exptl_crystal_density_diffrn is {told}; the cell "
                "has too few or too many atoms"
            )
        is_confirmed |= abs(density - stated) <= _DENSITY_PROOF * stated
    if volume / len(numbers) > _LARGEST_BOX:
        raise Unusable(f"the cell has {volume / len(numbers):.4g} Å³ per atom; are its lengths in Å?")
    if not is_confirmed and (volume / len(numbers) > LARGEST_VOLUME_PER_ATOM or density < SMALLEST_DENSITY):
        raise Unusable(
            f"the cell is less dense than any crystal ({volume / len(numbers):.4g} Å³ per atom, {density:.2g} g/cm³); "
            f"are atoms missing? If not, give {_FORMULA} and _cell_formula_units_Z"
        )
    return is_confirmed
