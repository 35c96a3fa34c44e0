"""TensorBoard event files of the training: losses and errors by step and by epoch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from mbqueue.errors import UsageError
from mbqueue.queue.jobs import Job, Kind
from mbqueue.session.report import Report

_BY_EPOCH = ("train_loss", "train_mae", "val_loss", "val_mae", "lr", "grad_norm", "structures_per_second")


class TensorBoardReport(Report):
    """Writes event files below ``folder``, one folder per fold: EXPERIMENT/fold_i.

    Scalars ``step/…`` are over the steps of all epochs, ``epoch/…`` over epochs. A step that is done again after a
    session was killed is written again; what the killed one wrote from there on is purged (``purge_step``).

    Raises:
        UsageError: when the package tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UsageError(
                "--tensorboard needs the package tensorboard. Install it with: pip install tensorboard (Colab has it), "
                "or leave the option out."
            )
        self._folder = folder
        self._writer: Any = None
        self._writes: tuple[str, int | None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._close()

    def advanced(self, job: Job, what: str, done: int, total: int, facts: Mapping[str, float]) -> None:
        if job.kind is Kind.TRAIN and what == "step" and job.epoch is not None:
            step = (job.epoch - 1) * total + done
            writer = self._writer_of(job, purge_step=step)
            for name, value in facts.items():
                writer.add_scalar(f"step/{name.replace('/', ' per ')}", value, step)

    def epoch_finished(self, job: Job, row: Mapping[str, Any], *, is_best: bool) -> None:  # noqa: ARG002
        writer = self._writer_of(job, purge_step=None)
        for name in _BY_EPOCH:
            writer.add_scalar(f"epoch/{name}", row[name], row["epoch"])
        writer.flush()

    def _writer_of(self, job: Job, *, purge_step: int | None) -> Any:
        """The writer of a job's fold; a new one hides what was written from ``purge_step`` on before."""
        if self._writes != (job.experiment, job.fold):
            # Imported only when asked for: it takes a second.
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

            self._close()
            self._writer = SummaryWriter(str(self._folder / job.experiment / f"fold_{job.fold}"), purge_step=purge_step)
            self._writes = (job.experiment, job.fold)
        return self._writer

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer, self._writes = None, None
