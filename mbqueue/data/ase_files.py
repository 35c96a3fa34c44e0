"""Read crystals from ase's files: extended XYZ and SQLite databases."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mbqueue.data.columns import Columns, inexact_id, is_no_id
from mbqueue.data.entries import Gatherer, Unusable
from mbqueue.data.parser_warnings import heard
from mbqueue.data.source import Progress
from mbqueue.errors import DataError

#: A crystal, its cells, its key in the file, and which of its keys is given twice.
_Row = tuple[Any, Mapping[str, Any], Any, str]
_QUOTED = re.compile(r"""("[^"]*"|'[^']*'|\{[^}]*\}|\[[^\]]*\])""")
_KEY = re.compile(r"(?:^|\s)([A-Za-z_][\w.-]*)\s*=")


def read_extxyz(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None) -> None:
    """Frames with their id and target in the comment line, as ``id=…`` and ``e_form=…``."""
    from ase.io import iread  # noqa: PLC0415  only ase's files need it

    frames = iread(path, index=":", format="extxyz", do_not_split_by_at_sign=True)
    repeated = _repeated_keys(path)
    rows = ((atoms, _cells(atoms, atoms.info), None, next(repeated, "")) for atoms in frames)
    _read(gatherer, columns, path, rows)
    if progress is not None:
        progress(path.stat().st_size, path.stat().st_size)


def read_database(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None) -> None:
    """Rows with id and target as key-value pairs; rows without an id are named by their number in the database."""
    from ase.db import connect  # noqa: PLC0415  as above

    def rows() -> Iterator[_Row]:
        with connect(path, type="db", append=True) as database:
            total = database.count()
            for number, row in enumerate(database.select(), 1):
                atoms = row.toatoms()
                yield atoms, _cells(atoms, row.key_value_pairs), row.id, ""
                if progress is not None:
                    progress(number, total)

    _read(gatherer, columns, path, rows())


def _repeated_keys(path: Path) -> Iterator[str]:
    """For each frame the key that its comment line gives twice, of which ase keeps the last value; or nothing."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if not line.strip().isdecimal():
                continue  # an empty line or a vector of the cell, after the atoms
            keys = sorted(_KEY.findall(_QUOTED.sub("", next(stream, ""))))
            yield next((key for key, following in itertools.pairwise(keys) if key == following), "")
            for _ in range(int(line)):
                next(stream, "")


def _read(gatherer: Gatherer, columns: Columns, path: Path, rows: Iterator[_Row]) -> None:
    number = 0
    try:
        with heard("ase"):
            for number, (atoms, cells, key, repeated) in enumerate(rows):
                name, _, target = columns.cells(cells)
                columns.fix_id()
                columns.structure = "Atoms"
                if columns.id is None:
                    name = number if key is None else key
                if is_no_id(name):
                    gatherer.refuse(f"row {number}", f"it has no {columns.id}")
                elif why := inexact_id(name):
                    gatherer.refuse(str(name), why)
                elif repeated:
                    gatherer.refuse(str(name), f"its comment line gives {repeated} twice; remove one of the two")
                elif "occupancy" in atoms.info:
                    gatherer.refuse(str(name), "it has partial occupancies, so it is disordered")
                else:
                    gatherer.add(str(name), _as_dict(atoms), target)
    except Unusable as unusable:
        raise DataError(f"{path} cannot be read after row {number}: {unusable}.") from unusable


def _cells(atoms: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """The key-value pairs of a crystal in the file, including its calculator's results."""
    results = atoms.calc.results if atoms.calc is not None else {}
    return {key: _plain(value) for key, value in {**results, **named}.items()}


def _plain(value: Any) -> Any:
    """Convert a NumPy number or string to Python's type."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _as_dict(atoms: Any) -> dict[str, Any]:
    coords = atoms.get_scaled_positions(wrap=False) if atoms.cell.rank == 3 else atoms.positions
    return {
        "lattice": {"matrix": atoms.cell.tolist(), "pbc": atoms.pbc.tolist()},
        "sites": [
            {"species": [{"element": symbol, "occu": 1}], "abc": position}
            for symbol, position in zip(atoms.get_chemical_symbols(), coords.tolist(), strict=True)
        ],
    }
