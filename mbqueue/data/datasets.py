"""Data sets by name or path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mbqueue.data import folds
from mbqueue.data.crystals import Crystals
from mbqueue.data.entries import Gatherer
from mbqueue.data.formats import read_into
from mbqueue.errors import DataError, InvalidCrystals
from mbqueue.experiment import OFFICIAL_DATASET, SAMPLE_DATASET

SAMPLE_FILE = Path(__file__).parent / "sample" / "flla_sample.jsonl.gz"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Crystals and where they are from.

    Attributes:
        crystals: what can be used.
        dropped: (id, reason) of what was left out, in order; empty unless that was asked for.
        source: name or path, for people.
        official: whether this is matbench's own ``matbench_mp_e_form``, whole and in its order.
    """

    crystals: Crystals
    dropped: list[tuple[str, str]]
    source: str
    official: bool


def load(
    name_or_path: str,
    *,
    project_root: Path | None = None,
    limit: int = 0,
    seed: int = 0,
    drop_invalid: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Read a data set."""
    path = SAMPLE_FILE if name_or_path == SAMPLE_DATASET else (project_root or Path()) / name_or_path
    gatherer = Gatherer()
    read_into(gatherer, path, progress)
    if gatherer.offenders and not drop_invalid:
        raise InvalidCrystals(name_or_path, gatherer.offenders)
    crystals = gatherer.crystals()
    if not len(crystals):
        raise DataError(f"{path} holds no crystals that can be used.")
    if 0 < limit < len(crystals):
        crystals = crystals.select(folds.drawn_rows(len(crystals), limit, seed))
    official = name_or_path == OFFICIAL_DATASET and not limit and not gatherer.offenders
    return Dataset(crystals=crystals, dropped=gatherer.offenders, source=name_or_path, official=official)
