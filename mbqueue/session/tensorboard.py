"""Write TensorBoard event files: losses and errors by step and by epoch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from mbqueue.errors import UsageError
from mbqueue.queue.jobs import Job, Kind
from mbqueue.session.report import Report

#: The subfolder for the values of each epoch, which TensorBoard shows as a separate run.
_EPOCHS = "epochs"
_BY_EPOCH = ("train_loss", "train_mae", "val_loss", "val_mae", "lr", "grad_norm", "structures_per_second")


class TensorBoardReport(Report):
    """Writes TensorBoard event files below ``folder``, for steps and epochs.

    Step values go to EXPERIMENT/fold_i, with step numbers that keep increasing across epochs. Epoch values go to
    EXPERIMENT/fold_i/epochs. Steps that are repeated after a kill or a rewind replace the earlier steps
    (``purge_step``). ``purge_step`` also hides the values of all later steps in the same run, so epoch values have a
    run of their own.

    Raises:
        UsageError: if the package tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UsageError(
                "--tensorboard needs the package tensorboard. Install it with: pip install tensorboard (Colab has it), "
                "or leave the option out."
            )
        self._folder = folder
        self._runs: dict[Path, _Run] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._close()

    def advanced(self, job: Job, what: str, done: int, total: int, facts: Mapping[str, float]) -> None:
        if job.kind is Kind.TRAIN and what == "step" and job.epoch is not None:
            values = {f"step/{name.replace('/', ' per ')}": value for name, value in facts.items()}
            self._run(self._folder_of(job)).add(values, (job.epoch - 1) * total + done)

    def epoch_finished(self, job: Job, row: Mapping[str, Any], *, is_best: bool) -> None:  # noqa: ARG002
        run = self._run(self._folder_of(job) / _EPOCHS)
        run.add({f"epoch/{name}": row[name] for name in _BY_EPOCH}, row["epoch"])
        run.flush()

    def _folder_of(self, job: Job) -> Path:
        return self._folder / job.experiment / f"fold_{job.fold}"

    def _run(self, folder: Path) -> _Run:
        """Return the TensorBoard run of a folder; close the runs of other folds."""
        if folder not in self._runs:
            if not any(folder in (one.parent, one / _EPOCHS) for one in self._runs):
                self._close()
            self._runs[folder] = _Run(folder)
        return self._runs[folder]

    def _close(self) -> None:
        for run in self._runs.values():
            run.close()
        self._runs.clear()


class _Run:
    """A TensorBoard run that shows the values of each step only once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._newest = 0

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add the values of a step; hide earlier values of the same and later steps."""
        if self._writer is None or step <= self._newest:
            # Importing TensorBoard takes a second, so import it only when needed.
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

            self.close()
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        self._newest = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
