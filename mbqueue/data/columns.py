"""Choose a table's id, structure and target columns, once for the whole table, and describe the choice."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbqueue.errors import UNDER_A_NEW_NAME, ColumnMissing, DataError, counted
from mbqueue.task import BAND_GAP, ENERGY_COLUMNS, options_for

ID_NAMES = ("id", "material_id", "mbid", "jid")
STRUCTURE_NAMES = ("structure", "cif")

_RENAME = "Rename a column (and run mbqueue retry for a failed experiment)"

#: The words by which pandas recognises a missing value, in lower case.
_MISSING = frozenset(("", "nan", "-nan", "na", "n/a", "#n/a", "#na", "#n/a n/a", "<na>", "null", "none")) | frozenset(
    ("1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan")
)


def is_missing(value: Any) -> bool:
    """Whether a cell marks a missing value: null, NaN, an empty cell, ``N/A`` and the like."""
    if isinstance(value, str):
        return value.strip().casefold() in _MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_no_id(value: Any) -> bool:
    """Whether a cell that should contain an id is null, NaN or blank. ``NA`` is a valid id."""
    return not value.strip() if isinstance(value, str) else is_missing(value)


def inexact_id(value: Any) -> str:
    """The reason why a cell cannot be an id; empty if it can.

    A parser may change the text of a value that is neither a string nor a whole number.
    """
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return ""
    return f"the id was read as {type(value).__name__}, so its text may differ from the file's; write ids as text"


@dataclass(frozen=True, kw_only=True)
class ColumnNames:
    """Names of columns that the user has chosen; empty if mbqueue should choose."""

    id: str = ""
    target: str = ""


class Columns:
    """The chosen columns of one table.

    Attributes:
        id, structure, target: names of the columns; None for a column that has not been found.
        row_names: text used in messages to say what identifies a row if there is no id column.
        targets_required: whether a table without a target column is rejected.
        passed_over: other columns that could be the target.
    """

    def __init__(
        self, wanted: ColumnNames, *, targets_required: bool, target_names: Sequence[str] = ENERGY_COLUMNS
    ) -> None:
        """``target_names``: names to try for the target column, in order of preference."""
        self.id: str | None = None
        self.structure: str | None = None
        self.target: str | None = None
        self.row_names = "the position"
        self.passed_over: tuple[str, ...] = ()
        self._wanted = wanted
        self._target_names = target_names
        self.targets_required = targets_required
        self._is_open = self._may_have_id = True
        self._seen: dict[Any, None] = {}  # column names in order of first appearance

    def choose(self, names: Sequence[Any], source: str, *, structures: Sequence[str] = STRUCTURE_NAMES) -> None:
        """Choose the columns from a table's header.

        Args:
            names: the header.
            source: the table's name, as shown in messages.
            structures: candidate names of the structure column, in order of preference; empty if none is needed.

        Raises:
            DataError: if a name occurs twice.
            ColumnMissing: if a needed column is missing.
        """
        told = [str(name) for name in names]
        twice = sorted({name for name in told if told.count(name) > 1})
        if twice:
            named = ", ".join(name or "without a name" for name in twice)
            raise DataError(f"{source} has more than one column {named}. Rename or remove one of them.")
        self._see(told, structures)
        self._is_open = False
        there = f"Its columns are: {', '.join(told)}."
        self._require_named(f"{source} has no column", there)
        if structures and self.structure is None:
            separated = " Separate the columns with commas." if len(told) == 1 and re.search(r"[;\t|]", told[0]) else ""
            raise ColumnMissing(f"{source} has no column {' or '.join(structures)}. {there}{separated}")
        self._require_target(f"{source} has no column", there, told)

    def cells(self, row: Mapping[Any, Any]) -> tuple[Any, Any, Any]:
        """Id, structure and target of a row.

        In a table without a header, the first row with a suitable column name decides which column is used for all
        rows.

        Raises:
            DataError: if the row has an id but earlier rows have none.
        """
        if self._is_open:
            self._seen |= dict.fromkeys(row)
            self._see(row.keys(), STRUCTURE_NAMES)
        is_named_otherwise = self.id is None and not self._may_have_id and not self._wanted.id
        if is_named_otherwise and (late := _chosen("", ID_NAMES, set(row))) is not None:
            raise DataError(
                f"The first rows have no {late}, but a later row has the {late} {row[late]!r:.60}. Add {late} to every "
                "row, or remove it from all."
            )
        return row.get(self.id), row.get(self.structure), row.get(self.target)

    def fix_id(self) -> None:
        """From now on, reject rows with an id if no id column has been found."""
        self._may_have_id = False

    def close(self, source: str) -> None:
        """Check that the rows contained every column that the user named, and the target column if one is required.

        Raises:
            ColumnMissing: if a column is missing from all rows.
        """
        seen = [str(name) for name in self._seen]
        there = f"The rows have: {', '.join(seen)}."
        self._require_named(f"No row of {source} has", there)
        if seen:
            self._require_target(f"No row of {source} has", there, seen)

    def _require_named(self, absent: str, there: str) -> None:
        for wanted, chosen, what in ((self._wanted.id, self.id, "id"), (self._wanted.target, self.target, "target")):
            if wanted and chosen is None:
                raise ColumnMissing(
                    f"{absent} {wanted}, which you named as the {what} column. {there} {_RENAME}, or name one of "
                    f"these with --{what}-column. {UNDER_A_NEW_NAME}"
                )

    def _require_target(self, absent: str, there: str, names: Sequence[str]) -> None:
        if self.target is None and self.targets_required:
            others = [name for name in names if name not in (self.id, self.structure)]
            advice = ""
            if self._target_names == ENERGY_COLUMNS:
                column = others[0] if len(others) == 1 else "COLUMN"
                gap = options_for(column, BAND_GAP)
                advice = (
                    "To enqueue an experiment, also describe the property, for example with: "
                    f"{gap} (or energy, for energies per atom). "
                )
            raise ColumnMissing(
                f"{absent} {' or '.join(self._target_names)}. {there} {_RENAME}, or name the target column with "
                f"--target-column. {advice}{UNDER_A_NEW_NAME}"
            )

    def take(self, names: Collection[str], source: str, *, chosen: tuple[str | None, str | None, str | None]) -> None:
        """Choose the columns of a table without a header; the user's choice takes precedence over ``chosen``.

        Raises:
            ColumnMissing: if the user has named a column that is not in ``names``.
        """
        self.id, self.structure, self.target = self._wanted.id or chosen[0], chosen[1], self._wanted.target or chosen[2]
        self._is_open = False
        for name in (self._wanted.id, self._wanted.target):
            if name and name not in names:
                raise ColumnMissing(
                    f"{source} has no header, so it has no column {name}. Its columns are {', '.join(names)}."
                )

    def names_id(self, heading: Iterable[str]) -> bool:
        """Whether a row can be a header because it contains the name of an id column."""
        return _chosen(self._wanted.id, ID_NAMES, set(heading)) is not None

    def described(self, targets: NDArray[np.float64]) -> str:
        """Describe the chosen columns and the targets, [N], which are nan where missing."""
        known = targets[np.isfinite(targets)]
        if self.target is None or not len(known):
            text = f"target: {self.target or 'none'}, no values"
        else:
            span = f"from {_signed(known.min())} to {_signed(known.max())}"
            text = f"target: {self.target}, {counted(len(known), 'value')} {span}"
            if len(known) < len(targets):
                text += f", {len(targets) - len(known):,} missing"
        if self.passed_over:
            text += f" (not {', '.join(self.passed_over)}; choose with --target-column)"
        return f"{text}; id: {self.id or self.row_names}; structure: {self.structure}"

    def _see(self, names: Iterable[Any], structures: Sequence[str]) -> None:
        there = set(names)
        first_target = self.target is None
        if self._may_have_id:
            self.id = self.id or _chosen(self._wanted.id, ID_NAMES, there)
        self.structure = self.structure or _chosen("", structures, there)
        self.target = self.target or _chosen(self._wanted.target, self._target_names, there)
        if first_target and self.target is not None:
            self.passed_over = tuple(name for name in self._target_names if name in there and name != self.target)
        self._is_open = None in (self.structure, self.target) or (self._may_have_id and self.id is None)


def _chosen(wanted: str, known: Sequence[str], there: set[Any]) -> str | None:
    return next((name for name in ([wanted] if wanted else known) if name in there), None)


def _signed(value: float) -> str:
    return re.sub(r"^-", "−", f"{value:.4g}")
