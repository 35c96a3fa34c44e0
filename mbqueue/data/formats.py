"""Readers of the forms in which data sets come; each feeds a ``Gatherer``.

A table in JSON (``.json``, ``.json.gz``, ``.json.bz2``), JSON lines (``.jsonl``, ``.jsonl.gz``), a table with CIF texts
(``.csv``) and a folder of CIF files with ``id_prop.csv``.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mbqueue.data.cif import read_cif
from mbqueue.data.entries import Gatherer, Unusable
from mbqueue.data.json_rows import JsonTable, Progress, lines_of, opened, parse_json
from mbqueue.data.poscar import read_poscar
from mbqueue.errors import DataError, SourceAway
from mbqueue.task import Task

ID_NAMES = ("id", "material_id", "mbid", "jid")
STRUCTURE_NAME = "structure"
CIF_NAME = "cif"

Reader = Callable[[Gatherer, Path, Progress | None], None]


def reader_of(path: Path) -> Reader | None:
    """The reader for a file or folder, by its name; None for a form that is not known."""
    if path.is_dir():
        return read_folder
    name = path.name.removesuffix(".gz").removesuffix(".bz2")
    readers: dict[str, Reader] = {".json": read_json, ".jsonl": read_json_lines, ".csv": read_csv}
    return readers.get(Path(name).suffix)


def read_json(gatherer: Gatherer, path: Path, progress: Progress | None) -> None:
    """A table in JSON; rows without an id of their own are named by the table's index."""
    for number, index, entry in _json_entries(gatherer, path, progress):
        name = _first(entry, ID_NAMES)
        gatherer.add(str(number if index is None else index) if name is None else str(name), *_cells(gatherer, entry))


def read_official(gatherer: Gatherer, path: Path, progress: Progress | None, task: Task) -> None:
    """matminer's file of a task, its rows named as matbench names them (index 0: …-000001)."""
    for number, index, entry in _json_entries(gatherer, path, progress):
        place = index if isinstance(index, int) else number
        gatherer.add(task.id_of(place), *_cells(gatherer, entry))


def read_json_lines(gatherer: Gatherer, path: Path, progress: Progress | None) -> None:
    """One JSON object a line: an id, a structure, a target."""
    with opened(path, progress) as stream:
        for number, line in enumerate(lines_of(stream, path), 1):
            if not line.strip():
                continue
            try:
                entry = parse_json(line)
            except ValueError as error:
                gatherer.refuse(f"line {number}", f"it is not JSON ({error})")
                continue
            name = _first(entry, ID_NAMES) if isinstance(entry, dict) else None
            if name is None:
                gatherer.refuse(f"line {number}", f"it is not an object with one of {', '.join(ID_NAMES)}")
            else:
                gatherer.add(str(name), *_cells(gatherer, entry))


def read_csv(gatherer: Gatherer, path: Path, progress: Progress | None) -> None:
    """A table with a heading, of which one column holds CIF texts."""
    with opened(path, progress) as stream, _long_fields():
        numbered = enumerate(lines_of(stream, path))
        lines = (line.decode("utf-8-sig" if not number else "utf-8") for number, line in numbered)
        try:
            rows = csv.DictReader(lines)
            _check_columns(gatherer, path, rows.fieldnames or [], (CIF_NAME,), ID_NAMES)
            for number, row in enumerate(rows, 1):
                name = _first(row, ID_NAMES)
                if name is not None:
                    _add_parsed(
                        gatherer, str(name), _plain(row[CIF_NAME] or ""), "cif", _first(row, gatherer.target_names)
                    )
                else:
                    gatherer.refuse(f"row {number}", f"it has nothing in column {' or '.join(ID_NAMES)}")
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not a table in CSV and UTF-8 ({error}).") from error


def read_folder(gatherer: Gatherer, path: Path, progress: Progress | None) -> None:
    """``id_prop.csv`` (id, target; no heading) and a file ``id.cif`` for each, as for CGCNN; ALIGNN's ids are names of
    files, ``.cif`` or ``.vasp`` (POSCAR).
    """
    listing = path / "id_prop.csv"
    with opened(listing) as stream:
        try:
            rows = [row for row in csv.reader(io.StringIO(stream.read().decode("utf-8-sig"))) if any(row)]
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{listing} is not a table in CSV and UTF-8 ({error}).") from error
    for number, row in enumerate(rows, 1):
        name, target = row[0].strip(), row[1].strip() if len(row) > 1 else None
        if not name:
            gatherer.refuse(f"row {number}", "it has no id")
            continue
        file = path / name if name.endswith((".cif", ".vasp")) else path / f"{name}.cif"
        try:
            text = _decoded(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):  # a null byte is in no name
            gatherer.refuse(name, f"there is no file {file.name}")
            continue
        except OSError as error:  # which says nothing of the crystal
            raise SourceAway(f"{file} cannot be read just now ({error}).") from error
        _add_parsed(gatherer, name, text, "poscar" if file.suffix == ".vasp" else "cif", target)
        if progress is not None:
            progress(number, len(rows))


def _json_entries(
    gatherer: Gatherer, path: Path, progress: Progress | None
) -> Iterator[tuple[int, Any, Mapping[str, Any]]]:
    """Number, index value (None for a plain list) and named cells of each row."""
    table = JsonTable(path, progress)
    rows = table.rows()
    begun = list(islice(rows, 1))
    if begun and not table.names_known:
        for _ in table.rows(names_only=True):
            pass
        begun, rows = [], table.rows()
    if table.columns is not None:
        _check_columns(gatherer, path, table.columns, (STRUCTURE_NAME,))
    count = 0
    for number, row in enumerate(chain(begun, rows)):
        yield number, *_named(path, table, number, row)
        count += 1
    if table.index is not None and count < len(table.index):
        raise DataError(f"{path} has {count} rows and its index names {len(table.index)}. Which rows are missing?")


def _check_columns(gatherer: Gatherer, path: Path, found: Sequence[Any], *needed: tuple[str, ...]) -> None:
    """Raise unless a table has a column of each kind; one of targets too, where they are required."""
    for wanted in (*needed, gatherer.target_names)[: None if gatherer.targets_required else len(needed)]:
        if not set(wanted) & set(map(str, found)):
            raise DataError(f"{path} has no column {' or '.join(wanted)}. It has: {', '.join(map(str, found))}.")


def _named(path: Path, table: JsonTable, number: int, row: Any) -> tuple[Any, Mapping[str, Any]]:
    if isinstance(row, dict):
        return None, row
    if not isinstance(row, list) or table.columns is None or len(row) != len(table.columns):
        raise DataError(f"Row {number} of {path} has not the cells that its columns {table.columns} say.")
    if table.index is not None and number >= len(table.index):
        raise DataError(f"{path} has more rows than its index names ({len(table.index)}).")
    return table.index[number] if table.index is not None else None, dict(zip(table.columns, row, strict=True))


def _cells(gatherer: Gatherer, entry: Mapping[str, Any]) -> tuple[Any, Any]:
    return entry.get(STRUCTURE_NAME), _first(entry, gatherer.target_names)


def _first(entry: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if entry.get(name) not in (None, ""):
            return entry[name]
    return None


def _add_parsed(gatherer: Gatherer, name: str, text: str, form: str, target: Any) -> None:
    """Add an entry whose structure pymatgen has to read."""
    try:
        structure = read_poscar(text) if form == "poscar" else read_cif(text, name)
    except Unusable as unusable:
        gatherer.refuse(name, f"its {form.upper()} cannot be used: {unusable}")
        return
    gatherer.add(name, structure, target)


def _decoded(content: bytes) -> str:
    """The text of a structure file, whatever its byte-order mark and line ends; what is no text becomes ``�``."""
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return _plain(content.decode("utf-16" if wide else "utf-8", errors="replace"))


def _plain(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def _long_fields() -> Iterator[None]:
    """Fields of CSV of any length: a CIF of 2,000 atoms is longer than the module's limit."""
    before = csv.field_size_limit(1 << 30)
    try:
        yield
    finally:
        csv.field_size_limit(before)
