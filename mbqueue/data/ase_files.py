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
from mbqueue.errors import DataError, counted

#: Matches a part of a comment line that ase does not split: an escaped character, or text in quotes or brackets.
_TOGETHER = r"""\\.?|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\{(?:[^}\\]|\\.)*\}|\[(?:[^\]\\]|\\.)*\]"""
#: Matches an equals sign or a word in a comment line.
_PART = re.compile(rf"=|(?:{_TOGETHER}|[^ \t\r\n\f\v=])+")
#: The group ``open`` matches a quotation mark or bracket that is never closed. ase would treat the rest of the line as
#: quoted text.
_OPEN = re.compile(rf"{_TOGETHER}|(?P<open>[\"'{{\[])")
#: A value that every program reads in the same way: without quotes, or in one pair of quotes.
_TEXT = re.compile(r"""(?P<bare>[^\s\\"'{}\[\]]*)|"(?P<double>(?:[^"\\]|\\")*)"|'(?P<single>[^'\\]*)'""")
#: The columns of each atom if the comment line has no Properties.
_PROPERTIES = "species:S:1:pos:R:3"
#: Element symbols by atomic number; the keys are strings, because the file contains text.
_SYMBOLS_BY_Z = {str(number): symbol for number, symbol in enumerate(SYMBOLS, 1)}
#: The columns that give an atom's element: ase's name for each column, and the column's name in files.
_SHOWN = {"symbols": "species", "numbers": "Z"}
_DIMENSIONS = 3
#: Keys of a comment line that describe the cell and the columns. All other keys are the crystal's key-value pairs.
_OF_LINES = ("Properties", "Lattice", "pbc")
#: The line number and the text that stand for the end of the file.
_END = (0, "")


class _Row(NamedTuple):
    """One crystal in a file.

    Attributes:
        atoms: ase's ``Atoms``; None if there is a problem.
        cells: the crystal's key-value pairs, as ase reads them.
        key: the crystal's name in the file; None if it has no name.
        comment: the text of the key-value pairs in an extended XYZ file; otherwise empty.
        problem: the reason why the atoms are unusable; empty if they are usable.
    """

    atoms: Any
    cells: Mapping[str, Any]
    key: Any = None
    comment: str = ""
    problem: str = ""


class _Frame(NamedTuple):
    """The lines of one crystal in extended XYZ.

    Attributes:
        line: line number of the crystal's first line, from 1.
        lines: the line with the number of atoms, the comment line and the lines of the atoms.
        vectors: the lines that describe the cell, which follow the atoms.
    """

    line: int
    lines: list[str]
    vectors: list[str]


def read_extxyz(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None) -> None:
    """Read an extended XYZ file, whose comment lines contain ids and targets, as in ``id=a e_form=0.1``."""
    from ase.io.extxyz import key_val_str_to_dict, read_xyz  # noqa: PLC0415  only ase's files need it

    def rows() -> Iterator[_Row]:
        for frame in _frames(path):
            comment = "" if frame.vectors else frame.lines[1].strip()  # with VEC lines, ase ignores the comment
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
    try:
        with path.open(encoding="utf-8-sig") as stream:
            lines = enumerate(stream, 1)
            at, line = next(lines, _END)
            while line.strip():
                if not line.strip().isdecimal():
                    raise Unusable(f"line {at} must be the number of atoms, but is {line.strip()[:40]!r}")
                count = int(line)
                taken = [line, *(text for _, text in islice(lines, count + 1))]
                if len(taken) < count + 2:
                    there = max(len(taken) - 2, 0)
                    raise Unusable(f"the file ends after {there} of {counted(count, 'atom')} announced in line {at}")
                begin, vectors = at, []
                at, line = next(lines, _END)
                while line.lstrip().startswith("VEC"):
                    vectors.append(line)
                    at, line = next(lines, _END)
                yield _Frame(begin, taken, vectors)
            if any(text.strip() for _, text in lines):
                raise Unusable(f"line {at} is empty, but more crystals follow; remove the empty line")
    except UnicodeDecodeError as error:
        raise Unusable(f"the file is not UTF-8 text ({error})") from error


def _check_atoms(frame: _Frame, properties: str) -> None:
    """Check the elements and columns of a crystal's atoms, because ase accepts invalid ones.

    ase reads CO as Co, ignores the species if there is a Z, and ignores surplus values. ``properties`` gives the
    columns of each atom, in order, as ``name:type:width``.
    """
    from ase.io.extxyz import parse_properties  # noqa: PLC0415  as above

    named, _, fields, _ = parse_properties(properties)
    meanings = [meaning for meaning, _ in named.values()]
    if twice := next((meaning for meaning in meanings if meanings.count(meaning) > 1), ""):
        raise Unusable(
            f"the Properties in the comment line contain {_SHOWN.get(twice, twice)} twice; remove one of the two"
        )
    widths = dict(named.values())
    elements = widths.keys() & _SHOWN.keys()
    if not elements or any(widths[meaning] != 1 for meaning in elements) or widths.get("positions") != _DIMENSIONS:
        raise Unusable("the Properties in the comment line must contain species:S:1 or Z:I:1, and pos:R:3")
    places = {meaning: fields.names.index(name) for name, (meaning, _) in named.items() if meaning in elements}
    for at, line in enumerate(frame.lines[2:], frame.line + 2):
        values = line.split()
        if len(values) != len(fields):
            raise Unusable(
                f"line {at} has {counted(len(values), 'value')}, but {properties} defines "
                f"{counted(len(fields), 'column')}"
            )
        symbol, number = (values[places[of]] if of in places else None for of in ("symbols", "numbers"))
        if symbol is not None and symbol not in SYMBOLS:
            raise Unusable(f"line {at} has the species {symbol[:40]!r}; write an element's symbol, such as Fe")
        if number is not None and number not in _SYMBOLS_BY_Z:
            raise Unusable(f"line {at} has the Z {number[:40]!r}; write an atomic number, such as 26")
        if symbol is not None and number is not None and _SYMBOLS_BY_Z[number] != symbol:
            raise Unusable(f"line {at} has the species {symbol}, but the atomic number of {_SYMBOLS_BY_Z[number]}")


def read_database(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None) -> None:
    """Read an ase database, with ids and targets in key-value pairs. The default id of a row is its row number."""
    from ase.db import connect  # noqa: PLC0415  as above

    def rows() -> Iterator[_Row]:
        with connect(path, type="db", append=True) as database:
            total = database.count()
            for number, row in enumerate(database.select(), 1):
                atoms = row.toatoms()
                yield _Row(atoms, _cells(atoms, row.key_value_pairs), key=row.id)
                if progress is not None:
                    progress(number, total)

    columns.row_names = "the row number in the database"
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
                    gatherer.refuse(f"row {number}", f"the crystal has no {columns.id}")
                elif why := inexact_id(name):
                    gatherer.refuse(str(name), why)
                elif repeated := _repeated(written):
                    gatherer.refuse(str(name), f"the comment line has the key {repeated} twice; remove one of the two")
                elif row.problem:
                    gatherer.refuse(str(name), row.problem)
                elif "occupancy" in row.atoms.info:
                    gatherer.refuse(str(name), "the structure is disordered: it has partial occupancies")
                else:
                    gatherer.add(str(name), _as_dict(row.atoms), target)
    except Unusable as unusable:
        raise DataError(f"{path} cannot be read after row {number}: {unusable}.") from unusable


def _written(comment: str) -> list[tuple[str, str | None]]:
    """Split an extended XYZ comment line into keys and the texts of their values; None for a key without a value."""
    unclosed = next((found["open"] for found in _OPEN.finditer(comment) if found["open"]), None)
    if unclosed is not None:
        raise Unusable(f"the comment line does not close {unclosed}; put the whole text in double quotes")
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
    """Return a comment line's value without quotes; None if programs read the value in different ways."""
    found = _TEXT.fullmatch(written)
    if found is None:
        return None
    return (found["bare"] or found["double"] or found["single"] or "").replace('\\"', '"')


def _repeated(written: list[tuple[str, str | None]]) -> str:
    """The first key that occurs twice, or an empty string. If a key occurs twice, ase keeps only the last value."""
    counts = Counter(key for key, _ in written)
    return next((key for key, text in written if text is not None and counts[key] > 1), "")


def _as_written(written: list[tuple[str, str | None]], columns: Columns, name: Any, target: Any) -> tuple[Any, Any]:
    """Return id and target exactly as they are in the file, because ase converts them.

    ase reads ``007`` as 7, ``1e5`` as 100000.0 and ``1_0`` as 10.
    """
    texts = dict(written)
    if (of_target := texts.get(columns.target or "")) is not None and not isinstance(target, bool):
        target = _text(of_target) if _text(of_target) is not None else target
    if (of_id := texts.get(columns.id or "")) is not None:
        name = _text(of_id)
        if name is None or name.startswith("_JSON "):
            raise Unusable(
                f"programs read the {columns.id} {of_id:.60} in different ways; write it in double quotes, without "
                "backslashes"
            )
    elif columns.id in texts:
        name = None
    return name, target


def _cells(atoms: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    results = atoms.calc.results if atoms.calc is not None else {}
    return {key: _plain(value) for key, value in {**results, **named}.items()}


def _plain(value: Any) -> Any:
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
