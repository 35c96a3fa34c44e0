"""The results that training returns to its caller: of a step and of an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A finished step, for progress reports.

    Attributes:
        epoch: from 1.
        step: steps done in the epoch, from 1.
        steps_per_epoch: steps in all.
        loss: mean over the step's structures.
        mae: mean absolute error of the step's structures, in the unit of the target.
        lr: learning rate.
        grad_norm: norm of the gradient before clipping.
        structures: number of structures in the step.
        seconds: duration of the step, including the wait for data.
    """

    epoch: int
    step: int
    steps_per_epoch: int
    loss: float
    mae: float
    lr: float
    grad_norm: float
    structures: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EpochOutcome:
    """The outcome of work on an epoch.

    Attributes:
        finished: whether the epoch is trained, validated and committed; if not, it was stopped.
        epoch: from 1.
        step: steps of the epoch that are committed.
        steps_per_epoch: steps in all.
        commit: stem of the newest commit; None when there is none yet.
        history_row: the epoch's row, if finished.
        best: epoch, val_mae and commit of the best finished epoch, if any.
        improved: whether this epoch is the best one.
    """

    finished: bool
    epoch: int
    step: int
    steps_per_epoch: int
    commit: str | None
    history_row: dict[str, Any] | None
    best: dict[str, Any] | None
    improved: bool
