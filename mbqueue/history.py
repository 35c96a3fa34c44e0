"""The history of a fold: which epoch is best, and whether training should stop early.

A history is the rows of ``history_fold_i.csv``, in the order of the epochs, as `mbqueue.results.tables` has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def best_epoch(history: Sequence[Mapping[str, Any]]) -> tuple[int, float] | None:
    """(epoch, MAE) of the earliest epoch with the lowest validation MAE, or None without epochs."""
    if not history:
        return None
    best = min(history, key=lambda row: (row["val_mae"], row["epoch"]))
    return best["epoch"], best["val_mae"]


def is_out_of_patience(patience: int, *, epoch: int, best: int) -> bool:
    """Whether a fold stops after ``epoch``, since no epoch was better than ``best`` for ``patience`` epochs.

    With a patience of 0 it never stops.
    """
    return 0 < patience <= epoch - best
