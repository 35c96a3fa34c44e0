"""Read folders of CIF or POSCAR files, in the layouts of CGCNN, ALIGNN and VASP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mbqueue.data.cif import read_cif
from mbqueue.data.columns import Columns
from mbqueue.data.entries import Gatherer, Unusable
from mbqueue.data.formats import decoded_text, read_listing
from mbqueue.data.poscar import read_poscar
from mbqueue.data.source import Progress
from mbqueue.errors import DataError, SourceAway

LISTING = "id_prop.csv"
_SUFFIXES = (".cif", ".vasp", ".poscar")
#: VASP's file names, in one folder per crystal.
_VASP_NAMES = ("POSCAR", "CONTCAR")


def read_folder(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None) -> None:
    """Read the file of each id in ``id_prop.csv``. Without ``id_prop.csv``, read all files in the folder.

    The file of a crystal is ``ID.cif``, ``ID.vasp``, ``ID.poscar``, ``ID/POSCAR`` or ``ID/CONTCAR``. An id can also be
    the full name of the file.

    Raises:
        DataError: if the folder has no ``id_prop.csv`` and targets are required.
    """
    listed = (path / LISTING).is_file()
    if not listed and gatherer.targets_required:
        raise DataError(f"The folder {path} has no {LISTING} with ids and targets.")
    rows = read_listing(columns, path / LISTING) if listed else _every_file(path)
    columns.structure, columns.row_names = "one file each", "the name of the file"
    names_of: dict[str, str] = {}
    for number, (name, target, why) in enumerate(rows, 1):
        try:
            structure = _structure_of(path, name, why, names_of)
        except Unusable as unusable:
            gatherer.refuse(name, str(unusable))
        else:
            gatherer.add(name, structure, target)
        if progress is not None:
            progress(number, len(rows))


def _structure_of(folder: Path, name: str, why: str, names_of: dict[str, str]) -> Any:
    if why:
        raise Unusable(why)
    file = _file_of(folder, name)
    owner = names_of.setdefault(os.path.realpath(file), name)
    if owner != name:
        raise Unusable(f"the file {file.name} also belongs to the id {owner}")
    return _read(file, name)


def _file_of(folder: Path, name: str) -> Path:
    names = [f"{name}{suffix}" for suffix in _SUFFIXES] + [f"{name}/{file}" for file in _VASP_NAMES]
    if name.endswith(_SUFFIXES) or Path(name).name.startswith(_VASP_NAMES):
        names.insert(0, name)
    try:
        found = [folder / file for file in names if (folder / file).is_file()]
    except ValueError:  # the id contains a null byte
        found = []
    if not found:
        others = f" (or {', '.join(names[1:])})" if names[0] != name else ""
        blanks = "; remove the blanks around the id" if name != name.strip() else ""
        raise Unusable(f"there is no file {names[0]}{others}{blanks}")
    if len(found) > 1:
        raise Unusable(f"several files belong to this id: {', '.join(str(f.relative_to(folder)) for f in found)}")
    return found[0]


def _read(file: Path, name: str) -> Any:
    try:
        text = decoded_text(file.read_bytes())
    except OSError as error:  # the error may be temporary, so do not reject the crystal
        raise SourceAway(f"{file} cannot be read at the moment ({error}).") from error
    try:
        return read_cif(text, name.removesuffix(".cif")) if file.suffix == ".cif" else read_poscar(text)
    except Unusable as unusable:
        raise Unusable(f"the {'CIF' if file.suffix == '.cif' else 'POSCAR'} cannot be used: {unusable}") from None


def _every_file(folder: Path) -> list[tuple[str, Any, str]]:
    odd = [
        (
            str(file.relative_to(folder)),
            None,
            f"the file must not be compressed, and its name must end in {' or '.join(_SUFFIXES)}, in lower case",
        )
        for file in sorted(folder.rglob("*"))
        if file.suffix not in _SUFFIXES and file.name.lower().removesuffix(".gz").endswith(_SUFFIXES)
    ]
    return [(name, None, "") for name in dict.fromkeys(_names_in(folder))] + odd


def _names_in(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        relative = file.relative_to(folder)
        if file.suffix in _SUFFIXES:
            yield str(relative.with_suffix(""))
        elif file.name in _VASP_NAMES and relative.parent != Path():
            yield str(relative.parent)
        elif file.name.startswith(_VASP_NAMES):
            yield str(relative)
