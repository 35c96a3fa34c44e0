"""Read crystals from ase's files: extended XYZ and SQLite databases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mbqueue.data.columns import Columns, inexact_id, is_no_id
from mbqueue.data.elements import SYMBOLS
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
#: The columns of an atom in extended XYZ, if its comment line names none.
_PROPERTIES = "species:S:1:pos:R:3"
#: Symbols by the text of their atomic number.
_SYMBOLS_BY_Z = {str(number): symbol for number, symbol in enumerate(SYMBOLS, 1)}
#: The columns that name an element, by ase's name.
_SHOWN = {"symbols": "species", "numbers": "Z"}
_DIMENSIONS = 3
#: Keys of a comment line that describe the crystal's lines.
_OF_LINES = ("Properties", "Lattice", "pbc")
#: The end of a file as a numbered line.
_END = (0, "")


class _Row(NamedTuple):
    """One crystal of a file.

    Attributes:
        atoms: as ase reads it; None if there is a problem.
        cells: the crystal's key-value pairs, as ase reads them.
        key: the crystal's name in the file; None if it has no name.
        comment: the text of the pairs in extended XYZ; else empty.
        problem: why the atoms cannot be used; else empty.
    """

    atoms: Any
    cells: Mapping[str, Any]
    key: Any = None
    comment: str = ""
    problem: str = ""


class _Frame(NamedTuple):
    """The lines of one crystal in extended XYZ.

    Attributes:
        line: number of the first line in the file, from 1.
        lines: the count of atoms, the comment line and the atoms.
        vectors: lines after the atoms that give the cell.
    """

    line: int
    lines: list[str]
    vectors: list[str]


def read_extxyz(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None) -> None:
    """Frames with their id and target in the comment line, as ``id=…`` and ``e_form=…``."""
    from ase.io.extxyz import key_val_str_to_dict, read_xyz  # noqa: PLC0415  only ase's files need it

    def rows() -> Iterator[_Row]:
        for frame in _frames(path):
            comment = "" if frame.vectors else frame.lines[1].strip()  # ase reads no pairs beside vectors
            pairs = key_val_str_to_dict(comment) if comment else {}
            try:
                _check_atoms(frame, str(pairs.get("Properties", _PROPERTIES)))
            except Unusable as unusable:
                cells = {key: _plain(value) for key, value in pairs.items() if key not in _OF_LINES}
                yield _Row(None, cells, comment=comment, problem=str(unusable))
                continue
            text = StringIO("".join(frame.lines + frame.vectors))
            for atoms in read_xyz(text, index=0, properties_parser=lambda _, pairs=pairs: pairs):
                yield _Row(atoms, _cells(atoms, atoms.info), comment=comment)

    _read(gatherer, columns, path, rows())
    if progress is not None:
        progress(path.stat().st_size, path.stat().st_size)


def _frames(path: Path) -> Iterator[_Frame]:
    """The crystals of an extended XYZ file.

    Raises:
        Unusable: if the file is cut short, has a wrong count of atoms, or has an empty line between crystals.
    """
    try:
        with path.open(encoding="utf-8-sig") as stream:
            lines = enumerate(stream, 1)
            at, line = next(lines, _END)
            while line.strip():
                if not line.strip().isdecimal():
                    raise Unusable(f"line {at} is {line.strip()[:40]!r} instead of a number of atoms")
                count = int(line)
                taken = [line, *(text for _, text in islice(lines, count + 1))]
                if len(taken) < count + 2:
                    there = max(len(taken) - 2, 0)
                    raise Unusable(f"it is cut short: it ends after {there} of the {count} atoms from line {at}")
                begin, vectors = at, []
                at, line = next(lines, _END)
                while line.lstrip().startswith("VEC"):
                    vectors.append(line)
                    at, line = next(lines, _END)
                yield _Frame(begin, taken, vectors)
            if any(text.strip() for _, text in lines):
                raise Unusable(f"line {at} is an empty line before its last crystal; remove it")
    except UnicodeDecodeError as error:
        raise Unusable(f"it is not text in UTF-8 ({error})") from error


def _check_atoms(frame: _Frame, properties: str) -> None:
    """Check the atoms of a crystal, because ase reads CO as Co, ignores a species beside Z, and skips other values.

    Args:
        frame: the crystal.
        properties: the columns of an atom, as ``name:type:number of columns`` in order.

    Raises:
        Unusable: if the columns are ambiguous, or an atom does not have one value for each, or no exact element.
    """
    from ase.io.extxyz import parse_properties  # noqa: PLC0415  as above

    named, _, fields, _ = parse_properties(properties)
    meanings = [meaning for meaning, _ in named.values()]
    if twice := next((meaning for meaning in meanings if meanings.count(meaning) > 1), ""):
        raise Unusable(f"its Properties name the {_SHOWN.get(twice, twice)} twice; remove one of the two")
    widths = dict(named.values())
    elements = widths.keys() & _SHOWN.keys()
    if not elements or any(widths[meaning] != 1 for meaning in elements) or widths.get("positions") != _DIMENSIONS:
        raise Unusable("its Properties must name one column of species or Z and three of pos")
    places = {meaning: fields.names.index(name) for name, (meaning, _) in named.items() if meaning in elements}
    for at, line in enumerate(frame.lines[2:], frame.line + 2):
        values = line.split()
        if len(values) != len(fields):
            raise Unusable(f"line {at} has {len(values)} values, but {properties} names {len(fields)}")
        symbol, number = (values[places[of]] if of in places else None for of in ("symbols", "numbers"))
        if symbol is not None and symbol not in SYMBOLS:
            raise Unusable(f"line {at} has the species {symbol[:40]!r} instead of an element's symbol, as in Fe")
        if number is not None and number not in _SYMBOLS_BY_Z:
            raise Unusable(f"line {at} has the Z {number[:40]!r} instead of an atomic number, as in 26")
        if symbol is not None and number is not None and _SYMBOLS_BY_Z[number] != symbol:
            raise Unusable(f"line {at} has the species {symbol}, but the Z of {_SYMBOLS_BY_Z[number]}")


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
                elif row.problem:
                    gatherer.refuse(str(name), row.problem)
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
