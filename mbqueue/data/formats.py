"""Read datasets in several formats: each reader chooses ``Columns``, and adds entries to a ``Gatherer``.

``docs/how-to/data.md`` lists the formats.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbqueue.data.ase_files import read_database, read_extxyz
from mbqueue.data.cif import read_cif
from mbqueue.data.columns import ID_NAMES, Columns, inexact_id, is_missing, is_no_id
from mbqueue.data.entries import Gatherer, Unusable
from mbqueue.data.json_tables import JsonTable
from mbqueue.data.json_values import RepeatedKey, parse_json
from mbqueue.data.poscar import read_poscar
from mbqueue.data.source import Progress, Source, lines_of, opened
from mbqueue.errors import ColumnMissing, DataError, counted
from mbqueue.task import Task

Reader = Callable[[Gatherer, Columns, Path, Progress | None], None]


def reader_of(path: Path) -> Reader | None:
    """The reader for a file, chosen by its name; None if the format is unknown."""
    name = path.name.removesuffix(".gz").removesuffix(".bz2")
    tables: dict[str, Reader] = {".json": read_json, ".jsonl": read_json_lines, ".csv": read_csv}
    of_ase: dict[str, Reader] = {".extxyz": read_extxyz, ".xyz": read_extxyz, ".db": read_database}
    readers = tables | of_ase
    return readers.get(Path(name).suffix)


def read_json(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None) -> None:
    """Read a JSON table. Without an id column, a row's id is its index or key or, if it has neither, its position."""
    for number, entry in enumerate(JsonTable(path, columns, progress).entries()):
        columns.fix_id()
        name, source = (entry.key, columns.row_names) if columns.id is None else (entry.id, f"column {columns.id}")
        if is_no_id(name):
            gatherer.refuse(f"row {number}", f"there is no id in {source}")
        else:
            add(gatherer, name, entry.structure, entry.target)


def read_official(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None, task: Task) -> None:
    """Read matminer's file for a task, and name the rows as matbench does (…-000001 for index 0)."""
    for number, entry in enumerate(JsonTable(path, columns, progress).entries()):
        position = entry.key if isinstance(entry.key, int) else number
        gatherer.add(task.id_of(position), entry.structure, entry.target)
    columns.row_names = "the position, written as in matbench"


def read_json_lines(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None) -> None:
    """Read one JSON object per line, with an id, a structure and a target."""
    with opened(path, progress) as stream:
        for number, line in enumerate(lines_of(stream, path), 1):
            text = line.removeprefix(codecs.BOM_UTF8).strip()
            if not text:
                continue
            try:
                row = parse_json(text)
            except RepeatedKey as error:
                gatherer.refuse(f"line {number}", str(error))
                continue
            except ValueError as error:
                gatherer.refuse(f"line {number}", f"the line is not JSON ({error})")
                continue
            name, structure, target = columns.cells(row) if isinstance(row, dict) else (None, None, None)
            if is_no_id(name):
                wanted = columns.id or ", ".join(ID_NAMES)
                gatherer.refuse(
                    f"line {number}", f"the line is not an object with {'' if columns.id else 'one of '}{wanted}"
                )
            else:
                add(gatherer, name, structure, target)


def read_csv(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None) -> None:
    """Read a CSV table with a header and a column of structures in CIF, POSCAR or JSON format."""
    with opened(path, progress) as stream:
        heading, rows = _csv_table(columns, stream, path)
        for number, row in enumerate(rows, 1):
            if len(row) != len(heading):
                gatherer.refuse(f"row {number}", uneven(len(row), len(heading)))
                continue
            name, structure, target = columns.cells(dict(zip(heading, row, strict=True)))
            if is_no_id(name):
                gatherer.refuse(f"row {number}", f"column {columns.id} is empty")
            else:
                add(gatherer, name, structure, target)


def read_csv_header(columns: Columns, path: Path) -> None:
    """Choose the columns of a CSV table, without reading its rows."""
    with opened(path) as stream:
        _csv_table(columns, stream, path)


def _csv_table(columns: Columns, stream: Source, path: Path) -> tuple[list[str], Iterator[list[str]]]:
    decoded = (
        line.decode("utf-8-sig" if not number else "utf-8") for number, line in enumerate(lines_of(stream, path))
    )
    rows = _csv_rows(decoded, path)
    heading = [name.strip() for name in next(rows, [])]
    columns.choose(heading, str(path), structures=("cif", "structure"))
    if columns.id is None:
        raise ColumnMissing(f"{path} has no column {' or '.join(ID_NAMES)}. Its columns are: {', '.join(heading)}.")
    return heading, rows


def read_listing(columns: Columns, path: Path) -> list[tuple[str, Any, str]]:
    """Id, target and problem (empty if there is none) of each row of an ``id_prop.csv``.

    Without a header, the file must have two columns; with a header, it may have any columns.
    """
    with opened(path) as stream:
        lines = decoded_text(b"".join(lines_of(stream, path))).splitlines(keepends=True)
        rows = [row for row in _csv_rows(iter(lines), path) if any(row)]
    heading = [name.strip() for name in rows[0]] if rows else []
    if columns.names_id(heading):
        columns.choose(heading, str(path), structures=())
        names = heading
        rows = rows[1:]
    else:
        names = ["column 1", "column 2"]
        columns.take(names, str(path), chosen=("column 1", None, "column 2"))
    found: list[tuple[str, Any, str]] = []
    for number, row in enumerate(rows, 1):
        cells = row + [""] * (len(row) == 1 and len(names) == 2)
        if len(cells) != len(names):
            found.append((f"row {number}", None, uneven(len(row), len(names), headless=names is not heading)))
            continue
        name, _, target = columns.cells(dict(zip(names, cells, strict=True)))
        told = target.strip() if target is not None else None
        found.append((f"row {number}", None, "the row has no id") if is_no_id(name) else (name, told, ""))
    return found


def uneven(found: int, expected: int, *, headless: bool = False) -> str:
    limit = "a file without a header may have only" if headless else "the header has"
    return (
        f"the row has {counted(found, 'cell')}, but {limit} {expected}; write numbers with a decimal point, and put "
        "quotation marks around texts with commas"
    )


def add(gatherer: Gatherer, given: Any, structure: Any, target: Any) -> None:
    """Add an entry with the given id; ``structure`` may be text."""
    name = str(given)
    if why := inexact_id(given):
        gatherer.refuse(name, why)
        return
    if isinstance(structure, str):
        try:
            structure = structure_in(structure, name)
        except Unusable as unusable:
            gatherer.refuse(name, str(unusable))
            return
    gatherer.add(name, structure, target)


def structure_in(text: str, name: str) -> Any:
    """Parse a structure in JSON, CIF or POSCAR format to a ``Structure.as_dict()``; return None if there is no text.

    Raises:
        Unusable: if the text cannot be parsed, or is ambiguous.
    """
    plain = _plain(text)
    if is_missing(plain):
        return None
    if plain.lstrip().startswith(("{", '"{')):
        try:
            content = parse_json(plain.encode(errors="surrogatepass"))
        except RepeatedKey as error:
            raise Unusable(f"in the structure, {error}") from None
        except ValueError as error:
            raise Unusable(f"the structure is not JSON ({error})") from None
        return structure_in(content, name) if isinstance(content, str) else content
    form, read = ("POSCAR", read_poscar) if _looks_like_poscar(plain) else ("CIF", lambda cif: read_cif(cif, name))
    try:
        return read(plain)
    except Unusable as unusable:
        raise Unusable(f"the {form} cannot be used: {unusable}") from None


def decoded_text(content: bytes) -> str:
    """Decode a file in UTF-8 or UTF-16; all line ends become newlines, and invalid bytes become ``�``."""
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return _plain(content.decode("utf-16" if wide else "utf-8", errors="replace"))


def _plain(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _looks_like_poscar(text: str) -> bool:
    """Whether a text is probably a POSCAR: its second line is a number (the scale), and it is not a CIF."""
    lines = text.split("\n", 2)
    return len(lines) > 2 and "data_" not in text.lower() and lines[1].strip()[:1] in tuple("+-.0123456789")


def _csv_rows(lines: Iterator[str], path: Path) -> Iterator[list[str]]:
    reader = csv.reader(lines, strict=True)
    with _long_fields():
        try:
            yield from (row for row in reader if row)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: line {reader.line_num + 1} is not in UTF-8 ({error}). Save the table in UTF-8."
            ) from error
        except csv.Error as error:
            closed = " The file is cut short, or a quotation mark is not closed." if "end of data" in str(error) else ""
            raise DataError(f"{path} is not a valid CSV table: line {reader.line_num}: {error}.{closed}") from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """Allow CSV fields of any length: a CIF of 2,000 atoms exceeds the csv module's limit."""
    before = csv.field_size_limit(1 << 30)
    try:
        yield
    finally:
        csv.field_size_limit(before)
