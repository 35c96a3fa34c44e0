"""Load datasets by name or path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mbqueue.data.source import Progress
from mbqueue.errors import DataError, InvalidCrystals, UsageError, counted
from mbqueue.experiment import SAMPLE_DATASET
from mbqueue.task import FORMATION_ENERGY, TASKS, Target, Task

if TYPE_CHECKING:
    from mbqueue.data.columns import Columns
    from mbqueue.data.crystals import Crystals
    from mbqueue.data.entries import Gatherer

SAMPLE_FILE = Path(__file__).parent / "sample" / "flla_sample.jsonl.gz"

_SUFFIXES = (".json", ".json.gz", ".json.bz2", ".jsonl", ".jsonl.gz", ".jsonl.bz2", ".csv", ".extxyz", ".xyz", ".db")
_FORMS = (
    ".json, .json.gz or .json.bz2 (a table that matminer, pandas or monty wrote), .jsonl or .jsonl.gz (id, structure, "
    "target), .csv with a column of structures, .extxyz, an ase .db, or a folder with id_prop.csv and CIFs or POSCARs"
)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The crystals of a dataset, and their source.

    Attributes:
        crystals: the usable crystals, in the order of the source.
        columns: a sentence that describes the chosen columns and the targets.
        dropped: (id, reason) of each crystal left out, in order; empty unless ``drop_invalid`` was set.
        source: the dataset's name or path, as shown in messages.
        official: whether the dataset is the complete dataset of a matbench task, in matbench's order.
    """

    crystals: Crystals
    columns: str
    dropped: list[tuple[str, str]]
    source: str
    official: bool


def check_dataset(name_or_path: str, *, project_root: Path | None = None, targets_required: bool = True) -> None:
    """Check, as far as possible without reading the data, whether ``load`` would fail.

    The check avoids slow imports. A matbench task passes the check even if its dataset has not been downloaded.

    Raises:
        UsageError: if there is no dataset with this name or path, or the file's format is unknown.
        DataError: if a file is empty, or a folder has no ``id_prop.csv`` and targets are required.
    """
    if name_or_path in TASKS or name_or_path == SAMPLE_DATASET:
        return
    path = _path_of(name_or_path, project_root)
    if not path.exists():
        raise UsageError(
            f"There is no dataset {name_or_path!r}, and no file or folder {path}. Put it there, or give the name of a "
            f"matbench task (mbqueue tasks lists them), {SAMPLE_DATASET!r}, or another path."
        )
    if path.is_dir():
        if targets_required and not (path / "id_prop.csv").is_file():
            raise DataError(f"The folder {path} has no id_prop.csv. Give {_FORMS}.")
    elif not path.name.endswith(_SUFFIXES):
        raise UsageError(f"The format of {path} is unknown. Give {_FORMS}.")
    elif path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")


def check_columns(name_or_path: str, *, project_root: Path | None = None, target: Target, id_column: str = "") -> None:
    """Check a dataset as ``check_dataset`` does, and also check the columns of a CSV table or an ``id_prop.csv``.

    In formats other than CSV, any row may contain the target, so the columns are checked only when a session reads all
    rows.

    Raises:
        UsageError, DataError: if ``check_dataset`` fails, or a column occurs twice.
        ColumnMissing: if a column is missing.
        SourceAway: if the system cannot read the file.
    """
    check_dataset(name_or_path, project_root=project_root)
    path = _path_of(name_or_path, project_root)
    if name_or_path in {*TASKS, SAMPLE_DATASET} or not (path.is_dir() or path.suffix == ".csv"):
        return
    from mbqueue.data import folders, formats  # noqa: PLC0415  as in `load`

    columns = _columns(target, id_column, targets_required=True)
    if path.is_dir():
        formats.read_listing(columns, path / folders.LISTING)
    else:
        formats.read_csv_header(columns, path)


def is_at_hand(name_or_path: str, *, project_root: Path | None = None) -> bool:
    """Whether a dataset is on this machine, so that ``load`` needs no download."""
    if name_or_path == SAMPLE_DATASET:
        return True
    if name_or_path in TASKS:
        from mbqueue.data.official import official_file  # noqa: PLC0415  checking the sample does not need it

        try:
            return official_file(name_or_path).path.exists()
        except DataError:
            return False
    return _path_of(name_or_path, project_root).exists()


def load(
    name_or_path: str,
    *,
    project_root: Path | None = None,
    limit: int = 0,
    seed: int = 0,
    drop_invalid: bool = False,
    targets_required: bool = True,
    target: Target = FORMATION_ENERGY.target,
    id_column: str = "",
    progress: Progress | None = None,
) -> Dataset:
    """Read a dataset; first download it if it is a matbench dataset that is not on this machine.

    Args:
        name_or_path: a matbench task, ``sample``, or a file or folder (see ``formats``).
        project_root: base of relative paths; by default the working directory.
        limit: keep only this many randomly chosen crystals, in the dataset's order; 0 keeps all.
        seed: the random seed for ``limit``.
        drop_invalid: leave out unusable entries instead of raising ``InvalidCrystals``.
        targets_required: whether an entry without a target is invalid; if not, its target is nan (for prediction).
        target: the target's kind and column.
        id_column: name of the id column; empty to choose a known name (``columns``).
        progress: called with (bytes done, total bytes), first for the download, then for reading.

    Raises:
        UsageError: if there is no dataset with this name or path.
        InvalidCrystals: if entries cannot be used and ``drop_invalid`` is not set; the error lists all such entries.
        DataError: if the dataset cannot be downloaded or read, is malformed, or contains no usable crystal.
    """
    # Import slow modules here, because `mbqueue enqueue` only checks the dataset and must be fast.
    from mbqueue.data.entries import Gatherer  # noqa: PLC0415
    from mbqueue.data.folds import drawn_rows  # noqa: PLC0415

    check_dataset(name_or_path, project_root=project_root, targets_required=targets_required)
    task = TASKS.get(name_or_path)
    wanted = target if task is None else task.target
    columns = _columns(wanted, id_column, targets_required=targets_required)
    gatherer = Gatherer(targets_required=targets_required, target=wanted)
    if task is not None:
        path = _read_official(gatherer, columns, task, progress)
    else:
        path = SAMPLE_FILE if name_or_path == SAMPLE_DATASET else _path_of(name_or_path, project_root)
        _read(gatherer, columns, path, progress)
    if gatherer.offenders and not drop_invalid:
        told = "" if columns.structure is None else columns.described(gatherer.crystals().targets)
        raise InvalidCrystals(name_or_path, gatherer.offenders, told)
    if not len(gatherer):
        raise DataError(f"{path} contains no usable crystal.")
    crystals = gatherer.crystals()
    told = columns.described(crystals.targets)
    whole = not gatherer.offenders
    if 0 < limit < len(crystals):
        whole = False
        crystals = crystals.select(drawn_rows(len(crystals), limit, seed))
    return Dataset(
        crystals=crystals,
        columns=told,
        dropped=gatherer.offenders,
        source=name_or_path,
        official=task is not None and whole,
    )


def _columns(target: Target, id_column: str, *, targets_required: bool) -> Columns:
    from mbqueue.data.columns import ColumnNames, Columns  # noqa: PLC0415  as in `load`

    return Columns(
        ColumnNames(id=id_column, target=target.column), targets_required=targets_required, target_names=target.columns
    )


def _read_official(gatherer: Gatherer, columns: Columns, task: Task, progress: Progress | None) -> Path:
    from mbqueue.data import formats, official  # noqa: PLC0415  as in `load`

    file = official.official_file(task.dataset)
    path = official.fetch(file, progress=progress)
    formats.read_official(gatherer, columns, path, progress, task)
    count = len(gatherer) + len(gatherer.offenders)
    if count != file.n:
        raise DataError(
            f"{path} has {counted(count, 'entry', 'entries')} instead of {file.n}. Remove the file and try again."
        )
    return path


def _read(gatherer: Gatherer, columns: Columns, path: Path, progress: Progress | None) -> None:
    from mbqueue.data import folders, formats  # noqa: PLC0415  as in `load`

    reader = folders.read_folder if path.is_dir() else formats.reader_of(path)
    assert reader is not None, "check_dataset accepts only known formats"
    reader(gatherer, columns, path, progress)
    columns.close(str(path))


def _path_of(name_or_path: str, project_root: Path | None) -> Path:
    return (project_root or Path()) / Path(name_or_path).expanduser()
