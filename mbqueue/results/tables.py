"""The two tables of a fold: its history (one row per epoch) and its predictions (one row per test crystal).

Each table is a CSV file that is replaced atomically. Numbers are written with as few digits as possible without losing
float64 precision. So repeated runs write identical files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbqueue import files
from mbqueue.errors import ResultsError, counted
from mbqueue.results.cells import csv_rows, csv_text
from mbqueue.results.members import members_in

#: Columns of history_fold_{i}.csv and their types. MAEs are in the unit of the target, losses in the unit of the loss.
#: ``lr`` is the learning rate of the epoch's last step. ``grad_norm`` is the mean over the epoch's steps, before
#: clipping. ``session`` lists the sessions that worked on the epoch, joined by ``+``.
HISTORY_TYPES: dict[str, type] = {
    "epoch": int,
    "train_loss": float,
    "train_mae": float,
    "val_loss": float,
    "val_mae": float,
    "lr": float,
    "grad_norm": float,
    "seconds": float,
    "structures_per_second": float,
    "session": str,
    "device": str,
}
HISTORY_COLUMNS = tuple(HISTORY_TYPES)
#: The only columns that may differ if you run an experiment twice.
TIMING_COLUMNS = ("seconds", "structures_per_second", "session", "device")
#: Maps the beginning of a result file's name to the file's description in RESULTS.md. ``{loader}`` is the loader of the
#: model's family.
FILE_NOTES = {
    "history": "one row per epoch: losses, MAEs, learning rate, gradient norm, time, session, device",
    "preds": "one row per test crystal: target, prediction, error",
    "model": "weights of the best epoch; {loader} loads them",
    "matbench": "the submission file of matbench, validated by matbench 0.6",
    "results": "everything on this page and more, as JSON",
}
#: The advice in errors about a file that was damaged after mbqueue wrote it.
RESTORE = "Restore it from a copy, or enqueue the experiment under another name."


def advised(error: ResultsError, advice: str) -> ResultsError:
    """Copy an error, but end its message with ``advice`` instead of `RESTORE`."""
    return ResultsError(f"{str(error).removesuffix(RESTORE)}{advice}")


PREDICTION_COLUMNS = ("id", "composition", "n_atoms", "y_true", "y_pred", "abs_error")


def history_file(folder: Path, fold: int) -> Path:
    return folder / f"history_fold_{fold}.csv"


def predictions_file(folder: Path, fold: int) -> Path:
    return folder / f"preds_fold_{fold}.csv"


def model_file(folder: Path, fold: int) -> Path:
    """The path of model_fold_{fold}.pth in a results folder. The family's library can load this file."""
    return folder / f"model_fold_{fold}.pth"


def fold_files(folder: Path, fold: int, spec: Mapping[str, Any]) -> list[Path]:
    """The files that a fold's predict job writes to a results folder. The job of a blend writes no model.

    Args:
        spec: the experiment's spec, as plain JSON values.
    """
    files_of = [history_file, predictions_file] if is_blend(spec) else [history_file, predictions_file, model_file]
    return [file_of(folder, fold) for file_of in files_of]


def is_blend(spec: Mapping[str, Any]) -> bool:
    """Whether an experiment's predictions are a weighted mean of other experiments' predictions."""
    return len(members_in(spec)) > 1


@dataclass(frozen=True)
class Predictions:
    """The predictions of one fold's test set, in the order of the dataset.

    Attributes:
        ids: crystal ids, [N], distinct.
        compositions: reduced formulas, [N].
        n_atoms: atoms in the cell, int64 [N].
        y_true: targets, float64 [N], in the unit of the target.
        y_pred: predictions, float64 [N], in the unit of the target.
    """

    ids: Sequence[str]
    compositions: Sequence[str]
    n_atoms: NDArray[np.int64]
    y_true: NDArray[np.float64]
    y_pred: NDArray[np.float64]

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.compositions), len(self.n_atoms), len(self.y_true), len(self.y_pred)}
        if len(lengths) != 1:
            raise ResultsError(f"The columns of a prediction table differ in length: {sorted(lengths)} rows.")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def abs_error(self) -> NDArray[np.float64]:
        """The absolute errors, |prediction − target|, float64 [N]."""
        return np.abs(np.asarray(self.y_pred, dtype=np.float64) - np.asarray(self.y_true, dtype=np.float64))


def write_history(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Durably replace the history of a fold with ``rows``, one per finished epoch.

    Raises:
        ResultsError: if the columns of a row differ from ``HISTORY_TYPES``, or the epochs are not 1, 2, 3, … The file
            stays unchanged.
    """
    lines = []
    for number, row in enumerate(rows, start=1):
        if set(row) != set(HISTORY_COLUMNS):
            odd = ", ".join(sorted(set(row) ^ set(HISTORY_COLUMNS)))
            raise ResultsError(
                f"Row {number} for {path.name} has missing or unknown columns: {odd}. {path} is unchanged."
            )
        if row["epoch"] != number:
            raise ResultsError(
                f"Row {number} for {path.name} has epoch {row['epoch']}, but the epochs must be 1, 2, 3, … in order. "
                f"{path} is unchanged."
            )
        lines.append([kind(row[column]) for column, kind in HISTORY_TYPES.items()])
    files.write_text(path, csv_text(HISTORY_COLUMNS, lines))


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read a history file: one row per epoch, with the types of ``HISTORY_TYPES``.

    Raises:
        ResultsError: if the file is missing or damaged.
    """
    rows: list[dict[str, Any]] = []
    for number, cells in _read(path, HISTORY_COLUMNS):
        try:
            row = {column: kind(cell) for (column, kind), cell in zip(HISTORY_TYPES.items(), cells, strict=True)}
        except ValueError as error:
            raise _damaged(path, number, str(error)) from error
        if row["epoch"] != len(rows) + 1:
            raise _damaged(path, number, f"epoch {row['epoch']} follows epoch {len(rows)}")
        rows.append(row)
    return rows


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Durably replace the predictions of a fold.

    Raises:
        ResultsError: if an id occurs twice or a number is not finite. The file stays unchanged.
    """
    if len(set(predictions.ids)) != len(predictions):
        seen: set[str] = set()
        doubled = next(i for i in predictions.ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise ResultsError(f"Crystal {doubled} appears twice among the predictions for {path.name}.")
    y_true = np.asarray(predictions.y_true, dtype=np.float64)
    y_pred = np.asarray(predictions.y_pred, dtype=np.float64)
    bad = np.flatnonzero(~(np.isfinite(y_true) & np.isfinite(y_pred)))
    if bad.size:
        first = int(bad[0])
        raise ResultsError(
            f"{path.name} would contain {counted(bad.size, 'row')} with numbers that are not finite. The first is "
            f"crystal {predictions.ids[first]}: target {y_true[first]}, prediction {y_pred[first]}. Nothing was "
            "written. Check the fold's training history."
        )
    columns = (
        predictions.ids,
        predictions.compositions,
        np.asarray(predictions.n_atoms).tolist(),
        y_true.tolist(),
        y_pred.tolist(),
        predictions.abs_error.tolist(),
    )
    files.write_text(path, csv_text(PREDICTION_COLUMNS, list(zip(*columns, strict=True))))


def read_predictions(path: Path) -> Predictions:
    """Read the predictions of a fold from a file.

    Raises:
        ResultsError: if the file is missing or damaged.
    """
    ids, compositions, n_atoms, y_true, y_pred = [], [], [], [], []
    for number, cells in _read(path, PREDICTION_COLUMNS):
        try:
            ids.append(cells[0])
            compositions.append(cells[1])
            n_atoms.append(int(cells[2]))
            y_true.append(float(cells[3]))
            y_pred.append(float(cells[4]))
        except ValueError as error:
            raise _damaged(path, number, str(error)) from error
        if not (math.isfinite(y_true[-1]) and math.isfinite(y_pred[-1])):
            raise _damaged(path, number, "a number is not finite")
    if len(set(ids)) != len(ids):
        raise ResultsError(f"{path} lists a crystal twice. {RESTORE}")
    return Predictions(ids, compositions, np.array(n_atoms, np.int64), np.array(y_true), np.array(y_pred))


def _read(path: Path, columns: Sequence[str]) -> Iterable[tuple[int, list[str]]]:
    """Yield the line number and cells of each line below the header. Each line has as many cells as the header."""
    try:
        text = path.read_bytes().decode()  # text mode would treat a carriage return as a line end
    except FileNotFoundError as error:
        raise ResultsError(f"There is no file {path}. `mbqueue status` shows the fold's progress.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} cannot be read: {error}.") from error
    if not text.endswith("\n"):
        raise ResultsError(f"{path} ends in the middle of a line. {RESTORE}")
    try:
        lines = list(csv_rows(text))
    except ValueError as error:
        raise ResultsError(f"{path} is not a table: {error}. {RESTORE}") from error
    if not lines or lines[0] != list(columns):
        raise ResultsError(f"{path} does not start with the columns {', '.join(columns)}; mbqueue did not write it.")
    for number, cells in enumerate(lines[1:], start=2):
        if len(cells) != len(columns):
            raise _damaged(path, number, f"{len(cells)} cells instead of {len(columns)}")
        yield number, cells


def _damaged(path: Path, number: int, why: str) -> ResultsError:
    return ResultsError(f"{path}, line {number}: {why}. {RESTORE}")
