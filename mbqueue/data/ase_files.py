"""Crystals in files of ase: extended XYZ, and its databases in SQLite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mbqueue.data.columns import Columns, is_no_id
from mbqueue.data.entries import Gatherer, Unusable
from mbqueue.data.parser_warnings import heard
from mbqueue.data.source import Progress
from mbqueue.errors import DataError


def read_extxyz(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None) -> None:
    """Frames with their id and target in the comment line, as ``id=…`` and ``e_form=…``."""
    from ase.io import iread  # noqa: PLC0415  only its own files need it

    frames = iread(path, index=":", format="extxyz", do_not_split_by_at_sign=True)
    rows = ((atoms, _cells(atoms, atoms.info), None) for atoms in frames)
    _read(gatherer, columns, path, rows)
    if progress is not None:
        progress(path.stat().st_size, path.stat().st_size)


def read_database(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None) -> None:
    """Rows with id and target as key-value pairs; without an id they are named by their number in the database."""
    from ase.db import connect  # noqa: PLC0415  as above

    def rows() -> Iterator[tuple[Any, Mapping[str, Any], Any]]:
        with connect(path, type="db", append=True) as database:
            total = database.count()
            for number, row in enumerate(database.select(), 1):
                atoms = row.toatoms()
                yield atoms, _cells(atoms, row.key_value_pairs), row.id
                if progress is not None:
                    progress(number, total)

    _read(gatherer, columns, path, rows())


def _read(gatherer: Gatherer, columns: Columns, path: Path, rows: Iterator[tuple[Any, Mapping[str, Any], Any]]) -> None:
    number = 0
    try:
        with heard("ase"):
            for number, (atoms, cells, key) in enumerate(rows):
                name, _, target = columns.cells(cells)
                columns.fix_id()
                columns.structure = "Atoms"
                if columns.id is None:
                    name = number if key is None else key
                if is_no_id(name):
                    gatherer.refuse(f"row {number}", f"it has no {columns.id}")
                elif "occupancy" in atoms.info:
                    gatherer.refuse(str(name), "it has occupancies, so it is disordered")
                else:
                    gatherer.add(str(name), _as_dict(atoms), target)
    except Unusable as unusable:
        raise DataError(f"{path} cannot be read beyond row {number}: {unusable}.") from unusable


def _cells(atoms: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a crystal in the file, numbers of its calculator included."""
    results = atoms.calc.results if atoms.calc is not None else {}
    return {key: _plain(value) for key, value in {**results, **named}.items()}


def _plain(value: Any) -> Any:
    """A number or text of numpy as Python's own."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _as_dict(atoms: Any) -> dict[str, Any]:
    coords = atoms.get_scaled_positions(wrap=False) if atoms.cell.rank == 3 else atoms.positions
    return {
        "lattice": {"matrix": atoms.cell.tolist(), "pbc": atoms.pbc.tolist()},
        "sites": [
            {"species": [{"element": symbol, "occu": 1}], "abc": place}
            for symbol, place in zip(atoms.get_chemical_symbols(), coords.tolist(), strict=True)
        ],
    }
