"""Check that the symmetry operations that a parser applied match the CIF."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbqueue.data.entries import Unusable
from mbqueue.errors import counted

#: The number of units per lattice vector: the least common multiple of 1 to 12. Any fraction with a denominator up to
#: 12 is therefore a whole number of units.
_UNITS = 27720
_LARGEST_DENOMINATOR = 12
#: The largest difference between a rounded translation, such as 0.33, and the exact fraction.
_TRANSLATION_TOLERANCE = 0.005
#: The largest relative change that a symmetry operation may make to the cell's metric. Even an exact operation can
#: change the metric slightly, because cell parameters are rounded.
_METRIC_TOLERANCE = 0.03
#: The largest distance, in Å, between two images that count as one atom, and the largest difference, in Å, between two
#: distances that count as equal.
_SAME_ATOM, _SAME_DISTANCE = 0.05, 0.02
#: The order of the point group for each range of space groups, as (last space group, order), from International
#: Tables A.
_POINT_GROUP_ORDERS = (
    *((1, 1), (9, 2), (46, 4), (74, 8), (82, 4), (122, 8), (142, 16), (146, 3), (161, 6), (167, 12), (174, 6)),
    *((190, 12), (194, 24), (199, 12), (220, 24), (230, 48)),
)
#: The number of lattice points in a cell, by the letter of the lattice; for R, the cell has hexagonal axes.
_LATTICE_POINTS = {"P": 1, "A": 2, "B": 2, "C": 2, "I": 2, "F": 4, "R": 3, "H": 3}
#: The largest difference, in degrees, between an angle of a hexagonal cell and 90 or 120 degrees.
_ANGLE_TOLERANCE = 0.5
#: Random weights. The weighted sum of a symmetry operation's entries identifies the operation.
_WEIGHTS = np.random.default_rng(0).integers(1 << 60, size=12)

#: Rotations [n, 3, 3] and translations [n, 3].
Operations = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Symmetry:
    """The symmetry operations that a parser applied, and the space group that the file names.

    Attributes:
        rotations: rotation matrices of fractional coordinates, [n, 3, 3].
        translations: translations in lattice vectors, [n, 3].
        number: number of the space group that the file names, or None.
        names: the group's names in the file (Hermann-Mauguin, Hall), and its standard name.
        settings: the operations of each setting of the group that the file allows, including the applied setting; empty
            if the file lists its operations.
    """

    rotations: NDArray[np.float64]
    translations: NDArray[np.float64]
    number: int | None
    names: tuple[str, ...]
    settings: tuple[Operations, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sites:
    """The atoms that a file lists: elements [n], fractional coordinates [n, 3]."""

    elements: tuple[str, ...]
    coords: NDArray[np.float64]


def check_symmetry(symmetry: Symmetry, lattice: NDArray[np.float64], sites: Sites, *, is_confirmed: bool) -> None:
    """Check that the operations form a group, fit the cell and are unambiguous.

    Args:
        lattice: rows are lattice vectors, Å, [3, 3].
        is_confirmed: whether another check has confirmed the number of atoms in the cell.

    Raises:
        Unusable: if a check fails; the message is the reason.
    """
    rotations = _check_rotations(symmetry.rotations)
    _check_group(rotations, symmetry.translations)
    _check_metric(rotations, lattice)
    _check_setting(symmetry, lattice, sites, is_confirmed=is_confirmed)
    if is_confirmed:
        return
    number = symmetry.number
    confirm = "Give all symmetry operations, or _chemical_formula_sum and _cell_formula_units_Z"
    n_point = len(np.unique(rotations.reshape(-1, 9), axis=0))
    if number is not None and n_point != (expected := point_group_order(number)):
        raise Unusable(
            f"space group {number} has {counted(expected, 'point-group operation')}, but the file lists {n_point}. "
            f"{confirm}"
        )
    n_points = int((rotations == np.eye(3, dtype=np.int64)).all(axis=(1, 2)).sum())
    for name in symmetry.names:
        expected = _lattice_points(name, lattice)
        if n_points < expected:
            raise Unusable(
                f"space group {name!r} has {expected} lattice points in this cell, but the file's operations give only "
                f"{n_points}. {confirm}"
            )
        if len(rotations) == 1 and number is None and "".join(name.split()).upper() != "P1":
            raise Unusable(f"the symmetry operations are those of P 1, but the file names {name!r}. {confirm}")


def _lattice_points(name: str, lattice: NDArray[np.float64]) -> int:
    """Number of lattice points in a cell, from the first letter of a space group's name; 1 by default."""
    letter = name.strip().lstrip("-").strip()[:1].upper()
    if letter == "R":
        lengths = np.linalg.norm(lattice, axis=1)
        cosines = [lattice[i] @ lattice[j] / (lengths[i] * lengths[j]) for i, j in ((1, 2), (0, 2), (0, 1))]
        angles = np.degrees(np.arccos(np.clip(cosines, -1, 1)))
        if not np.allclose(angles, (90, 90, 120), atol=_ANGLE_TOLERANCE):
            return 1
    return _LATTICE_POINTS.get(letter, 1)


def point_group_order(number: int) -> int:
    """Order of a space group's point group: the number of its operations, not counting translations."""
    return next(order for last, order in _POINT_GROUP_ORDERS if number <= last)


def operations_of(parsed: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rotations [n, 3, 3] and translations [n, 3] of pymatgen's ``SymmOp``."""
    matrices = np.array([operation.affine_matrix for operation in parsed], np.float64)
    return matrices[:, :3, :3], matrices[:, :3, 3]


def parse_operation(text: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rotation [3, 3] and translation [3] of an operation in a CIF, such as ``-x, y+1/2, 0.5-z``.

    Raises:
        Unusable: if the text is not a symmetry operation.
    """
    rotation, translation = np.zeros((3, 3)), np.zeros(3)
    parts = text.replace(" ", "").lower().split(",")
    try:
        for row, part in zip(range(3), parts, strict=True):
            for term in part.replace("-", "+-").removeprefix("+").split("+"):
                sign, bare = (-1, term[1:]) if term.startswith("-") else (1, term)
                if bare in ("x", "y", "z") and not rotation[row]["xyz".index(bare)]:
                    rotation[row]["xyz".index(bare)] = sign
                else:
                    translation[row] += sign * float(Fraction(bare))
    except (ValueError, ZeroDivisionError):
        raise Unusable(f"the symmetry operation {text[:60]!r} is not valid") from None
    return rotation, translation


def check_taken(
    listed: list[tuple[NDArray[np.float64], NDArray[np.float64]]],
    rotations: NDArray[np.float64],
    translations: NDArray[np.float64],
) -> None:
    """Check that the parser applied the operations ``listed`` in the file."""
    if len(rotations) != len(listed):
        applied = counted(len(rotations), "symmetry operation")
        raise Unusable(f"pymatgen applied {applied}, but the file lists {len(listed)}")
    for number, (rotation, translation) in enumerate(listed):
        if not (
            np.array_equal(rotation, rotations[number]) and np.allclose(translation, translations[number], atol=1e-6)
        ):
            raise Unusable(f"pymatgen changed symmetry operation {number + 1} of the file")


def _check_rotations(rotations: NDArray[np.float64]) -> NDArray[np.int64]:
    whole = np.rint(rotations).astype(np.int64)
    if not np.allclose(rotations, whole, atol=1e-6) or not (np.abs(np.rint(np.linalg.det(whole))) == 1).all():
        raise Unusable("a symmetry operation is not a rotation or reflection of the lattice")
    return whole


def _check_group(rotations: NDArray[np.int64], translations: NDArray[np.float64]) -> None:
    shifts = np.array([[_units(float(value)) for value in row] for row in translations], np.int64)
    known = _keys(rotations, shifts)
    products = np.einsum("aij,bjk->abik", rotations, rotations).reshape(-1, 3, 3)
    moved = (np.einsum("aij,bj->abi", rotations, shifts) + shifts[:, None]).reshape(-1, 3)
    missing = int((~np.isin(_keys(products, moved), known)).sum())
    if missing:
        raise Unusable(
            f"the {len(rotations)} symmetry operations do not form a group ({counted(missing, 'product')} of two "
            f"operations {'is' if missing == 1 else 'are'} not in the list); operations are missing or wrong"
        )


def _units(translation: float) -> int:
    fraction = Fraction(translation).limit_denominator(_LARGEST_DENOMINATOR)
    near = abs(float(fraction) - translation) <= _TRANSLATION_TOLERANCE
    return round((fraction if near else translation) * _UNITS)


def _keys(rotations: NDArray[np.int64], shifts: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number for each operation, int64 [n]. Operations that differ by whole lattice vectors have the same number."""
    keys: NDArray[np.int64] = np.concatenate([rotations.reshape(-1, 9), shifts % _UNITS], axis=1) @ _WEIGHTS
    return keys


def _check_setting(symmetry: Symmetry, lattice: NDArray[np.float64], sites: Sites, *, is_confirmed: bool) -> None:
    """Check that no other setting of the space group would give a different crystal.

    If the number of atoms is confirmed, settings with a different number of atoms are ignored.
    """
    applied = _orbits((symmetry.rotations, symmetry.translations), lattice, sites)
    for setting in symmetry.settings:
        if not _fit(np.rint(setting[0]).astype(np.int64), lattice):
            continue
        other = _orbits(setting, lattice, sites)
        have_same_counts = [len(orbit) for orbit in other] == [len(orbit) for orbit in applied]
        if is_confirmed and _counts(other, sites) != _counts(applied, sites):
            continue
        if not have_same_counts or not _have_same_distances(applied, other, lattice, sites):
            raise Unusable(
                f"several settings (origins or axes) of space group {symmetry.number} fit this cell but give different "
                "crystals, and the file does not say which setting it uses. List all symmetry operations"
            )


def _orbits(operations: Operations, lattice: NDArray[np.float64], sites: Sites) -> list[NDArray[np.float64]]:
    """The fractional coordinates of each site's images under the operations, beginning with the site itself."""
    rotations, translations = operations
    orbits = []
    for site in sites.coords:
        kept = site[None]
        for image in rotations @ site + translations:
            apart = image - kept
            if np.linalg.norm((apart - np.rint(apart)) @ lattice, axis=1).min() > _SAME_ATOM:
                kept = np.vstack([kept, image])
        orbits.append(kept)
    return orbits


def _counts(orbits: list[NDArray[np.float64]], sites: Sites) -> Counter[str]:
    counts: Counter[str] = Counter()
    for element, orbit in zip(sites.elements, orbits, strict=True):
        counts[element] += len(orbit)
    return counts


def _have_same_distances(
    one: list[NDArray[np.float64]], other: list[NDArray[np.float64]], lattice: NDArray[np.float64], sites: Sites
) -> bool:
    """Whether the distances from each listed atom to all images of each site are the same in both structures."""
    from pymatgen.core import Lattice  # noqa: PLC0415  only CIFs without operations need it

    cell = Lattice(lattice)
    return all(
        np.allclose(
            np.sort(cell.get_all_distances(sites.coords, one[number])),
            np.sort(cell.get_all_distances(sites.coords, other[number])),
            atol=_SAME_DISTANCE,
        )
        for number in range(len(sites.elements))
    )


def _check_metric(rotations: NDArray[np.int64], lattice: NDArray[np.float64]) -> None:
    if not _fit(rotations, lattice):
        raise Unusable(
            "the symmetry operations do not fit the cell, because they would change the cell's lengths or angles. Do "
            "the operations refer to other axes, such as rhombohedral instead of hexagonal ones?"
        )


def _fit(rotations: NDArray[np.int64], lattice: NDArray[np.float64]) -> bool:
    """Whether the operations preserve the cell's lengths and angles."""
    metric = lattice @ lattice.T
    lengths = np.sqrt(np.diag(metric))
    changed = np.einsum("aji,jk,akl->ail", rotations, metric, rotations)
    return bool((np.abs(changed - metric) <= _METRIC_TOLERANCE * np.outer(lengths, lengths)).all())
