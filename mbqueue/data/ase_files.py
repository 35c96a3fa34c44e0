"""Read crystals from ase's files: extended XYZ and SQLite databases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mbqueue.data.columns import Columns, inexact_id, is_no_id
from mbqueue.data.entries import Gatherer, Unusable
from mbqueue.data.parser_warnings import heard
from mbqueue.data.source import Progress
from mbqueue.errors import DataError

#: Parts of a comment line that a backslash, quotes or brackets keep together, as ase reads them.
_TOGETHER = r"""\\.?|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\{(?:[^}\\]|\\.)*\}|\[(?:[^\]\\]|\\.)*\]"""
#: An equals sign or a word of a comment line.
_PART = re.compile(rf"=|(?:{_TOGETHER}|[^ \t\r\n\f\v=])+")
#: A quotation mark or bracket without its partner, to which ase adds the rest of the line.
_OPEN = re.compile(rf"{_TOGETHER}|(?P<open>[\"'{{\[])")
#: A text that every program reads in the same way: bare, or in quotes.
_TEXT = re.compile(r"""(?P<bare>[^\s\\"'{}\[\]]*)|"(?P<double>(?:[^"\\]|\\")*)"|'(?P<single>[^'\\]*)'""")


class _Row(NamedTuple):
    """One crystal of a file.

    Attributes:
        atoms: as ase reads it.
        cells: the crystal's key-value pairs, as ase reads them.
        key: the crystal's name in the file; None if it has no name.
        comment: the text of the pairs in extended XYZ; else empty.
    """

    atoms: Any
    cells: Mapping[str, Any]
    key: Any = None
    comment: str = ""


def read_extxyz(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None) -> None:
    """Frames with their id and target in the comment line, as ``id=…`` and ``e_form=…``."""
    from ase.io import iread  # noqa: PLC0415  only ase's files need it
    from ase.io.extxyz import key_val_str_to_dict  # noqa: PLC0415

    comments: list[str] = []

    def parse(comment: str) -> Any:
        comments.append(comment)
        return key_val_str_to_dict(comment)

    def rows() -> Iterator[_Row]:
        for atoms in iread(path, index=":", format="extxyz", do_not_split_by_at_sign=True, properties_parser=parse):
            yield _Row(atoms, _cells(atoms, atoms.info), comment=comments.pop() if comments else "")

    _read(gatherer, columns, path, rows())
    _check_end(path)
    if progress is not None:
        progress(path.stat().st_size, path.stat().st_size)


def _check_end(path: Path) -> None:
    """Raise ``DataError`` if an empty line, at which ase stops, is followed by more."""
    with path.open() as lines:
        for count in lines:
            if not count.strip():
                break
            if count.lstrip().startswith("VEC"):  # the cell of the crystal before
                continue
            for _ in range(int(count.split()[0]) + 1):
                next(lines, None)
        if any(line.strip() for line in lines):
            raise DataError(
                f"{path} has an empty line before its last crystal, and ase ignores what follows. Remove it."
            )


def read_database(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None) -> None:
    """Rows with id and target as key-value pairs; rows without an id are named by their number in the database."""
    from ase.db import connect  # noqa: PLC0415  as above

    def rows() -> Iterator[_Row]:
        with connect(path, type="db", append=True) as database:
            total = database.count()
            for number, row in enumerate(database.select(), 1):
                atoms = row.toatoms()
                yield _Row(atoms, _cells(atoms, row.key_value_pairs), key=row.id)
                if progress is not None:
                    progress(number, total)

    columns.row_names = "the number in the database"
    _read(gatherer, columns, path, rows())


def _read(gatherer: Gatherer, columns: Columns, path: Path, rows: Iterator[_Row]) -> None:
    number = 0
    try:
        with heard("ase"):
            for number, row in enumerate(rows):
                name, _, target = columns.cells(row.cells)
                columns.fix_id()
                columns.structure = "Atoms"
                if columns.id is None:
                    name = number if row.key is None else row.key
                try:
                    written = _written(row.comment)
                    name, target = _as_written(written, columns, name, target)
                except Unusable as unusable:
                    gatherer.refuse(f"row {number}", str(unusable))
                    continue
                if is_no_id(name):
                    gatherer.refuse(f"row {number}", f"it has no {columns.id}")
                elif why := inexact_id(name):
                    gatherer.refuse(str(name), why)
                elif repeated := _repeated(written):
                    gatherer.refuse(str(name), f"its comment line gives {repeated} twice; remove one of the two")
                elif "occupancy" in row.atoms.info:
                    gatherer.refuse(str(name), "it has partial occupancies, so it is disordered")
                else:
                    gatherer.add(str(name), _as_dict(row.atoms), target)
    except Unusable as unusable:
        raise DataError(f"{path} cannot be read after row {number}: {unusable}.") from unusable


def _written(comment: str) -> list[tuple[str, str | None]]:
    """Each key of an extended XYZ comment line with the text of its value; None for a key without a value.

    Raises:
        Unusable: if a quotation mark or bracket in the line is not closed.
    """
    unclosed = next((found["open"] for found in _OPEN.finditer(comment) if found["open"]), None)
    if unclosed is not None:
        raise Unusable(f"its comment line has {unclosed} without its partner; put the text in double quotes")
    pairs: list[tuple[str, str | None]] = []
    before = ""
    for part in _PART.findall(comment):
        if before == "=" or (part == "=" and pairs):
            key, text = pairs.pop()
            pairs.append((key, (text + part if text is not None else "")))
        else:
            pairs.append((part, None))
        before = part
    return [(_text(key) or key, text) for key, text in pairs]


def _text(written: str) -> str | None:
    """The text of a value in a comment line; None if programs read it differently."""
    found = _TEXT.fullmatch(written)
    if found is None:
        return None
    return (found["bare"] or found["double"] or found["single"] or "").replace('\\"', '"')


def _repeated(written: list[tuple[str, str | None]]) -> str:
    """The first key that is given twice, for which ase keeps the last value; empty if there is none."""
    counts = Counter(key for key, _ in written)
    return next((key for key, text in written if text is not None and counts[key] > 1), "")


def _as_written(written: list[tuple[str, str | None]], columns: Columns, name: Any, target: Any) -> tuple[Any, Any]:
    """Id and target by the text of the file: ase reads ``007`` as 7, ``1e5`` as 100000.0 and ``1_0`` as 10.

    Raises:
        Unusable: if the text of the id is ambiguous.
    """
    texts = dict(written)
    if (of_target := texts.get(columns.target or "")) is not None and not isinstance(target, bool):
        target = _text(of_target) if _text(of_target) is not None else target
    if (of_id := texts.get(columns.id or "")) is not None:
        name = _text(of_id)
        if name is None or name.startswith("_JSON "):
            raise Unusable(
                f"its {columns.id} {of_id:.60} is no plain text, and programs read it differently; write it in double "
                "quotes, without backslashes"
            )
    elif columns.id in texts:
        name = None
    return name, target


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
