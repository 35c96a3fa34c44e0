"""Find the best epoch in a fold's history, and decide whether training stops early.

A history consists of the rows of ``history_fold_i.csv`` in epoch order, as read by `mbqueue.results.tables`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def best_epoch(history: Sequence[Mapping[str, Any]]) -> tuple[int, float] | None:
    """(epoch, MAE) of the earliest epoch with the lowest validation MAE; None if there are no epochs."""
    if not history:
        return None
    best = min(history, key=lambda row: (row["val_mae"], row["epoch"]))
    return best["epoch"], best["val_mae"]


def is_out_of_patience(patience: int, *, epoch: int, best: int) -> bool:
    """Whether a fold stops after ``epoch`` because no epoch was better than ``best`` for ``patience`` epochs.

    With a patience of 0, a fold never stops early.
    """
    return 0 < patience <= epoch - best
