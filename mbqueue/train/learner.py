"""Training state in memory: the model, its optimizer, and the counts of epochs and steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from mbqueue.clock import utc_text
from mbqueue.errors import CheckpointMisfit
from mbqueue.experiment import Spec
from mbqueue.storage.manifest import Manifest
from mbqueue.storage.names import stem_of
from mbqueue.train.arithmetic import device_name, differences
from mbqueue.train.family import family_of
from mbqueue.train.optim import (
    ADVICE,
    WeightAverage,
    WeightSoup,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from mbqueue.train.state import TrainState, random_states, restore_random_states, seed_everything, to_host
from mbqueue.train.step import StepResult


class Learner:
    """A fold's training state between two steps; it starts at step 0.

    Args:
        first: the initial model, which the learner copies.
        device: the device for the copy.
    """

    def __init__(
        self, spec: Spec, fold: int, *, dataset_hash: str, first: nn.Module, device: torch.device, steps_per_epoch: int
    ) -> None:
        self._spec, self._fold, self._dataset_hash, self._device = spec, fold, dataset_hash, device
        self.steps_per_epoch = steps_per_epoch
        seed_everything(spec.seed * 8 + fold)
        family = family_of(spec.model.pretrained)
        self.model = family.copy_of(first).to(device)
        self.trained = family.trained_parameters(self.model, spec.model.trainable)
        self.optimizer = make_optimizer(family, self.model, self.trained, spec.train)
        self.average = WeightAverage(self.trained, spec.train.ema_decay) if spec.train.ema_decay else None
        self.soup = (
            WeightSoup(self.trained, spec.train.soup, of_best=spec.train.soup_of == "best") if spec.train.soup else None
        )
        self.epoch, self.step, self.complete, self.steps_done = 0, 0, True, 0
        self._begun = 0  # steps that have begun, but are not counted yet
        self.sums = _no_sums()
        self.best: dict[str, Any] | None = None
        self.history: list[dict[str, Any]] = []
        self.changes: list[dict[str, Any]] = []
        self.fingerprint: dict[str, Any] = {}
        self.seconds = 0.0
        self.sessions: list[str] = []
        self.parent: Manifest | None = None

    def restore(self, state: TrainState, manifest: Manifest) -> None:
        """Load the state of a commit.

        Raises:
            CheckpointMisfit: if the state does not fit the model.
        """
        try:
            self.model.load_state_dict(state.model)
        except RuntimeError as error:
            raise CheckpointMisfit(
                f"The weights of the commit {manifest.stem} do not fit the model: {error}. {ADVICE}"
            ) from error
        restore_optimizer(self.optimizer, self.trained, state.optimizer)
        if self.average is not None:
            self.average.restore(state.average)
        if self.soup is not None:
            self.soup.restore(state.average, state.ends, state.end_maes)
        self.epoch, self.step, self.complete = state.epoch, state.step, state.complete
        self.steps_done, self.sums = state.steps_done, dict(state.sums)
        self.best = dict(manifest.best) if manifest.best else None
        self.history = [dict(row) for row in manifest.history]
        self.changes, self.fingerprint = list(manifest.fingerprint_changes), dict(manifest.fingerprint)
        self.seconds, self.sessions = manifest.epoch_seconds, list(manifest.epoch_sessions)
        self.parent = manifest
        restore_random_states(state.random, self._device)

    def compute_under(self, fingerprint: dict[str, Any], session: str) -> dict[str, list[Any]]:
        """Set the fingerprint for the next steps; record its changes and return them as {key: [old, new]}."""
        changes = differences(self.fingerprint, fingerprint)
        if changes:
            self.changes.append({"epoch": self.epoch, "step": self.step, "session": session, "changes": changes})
        self.fingerprint = fingerprint
        return changes

    @property
    def finished_epochs(self) -> int:
        """The number of epochs trained and validated."""
        return self.epoch if self.complete else self.epoch - 1

    @property
    def has_news(self) -> bool:
        """Whether the learner has made progress since the newest commit."""
        if self.parent is None:
            return self.step > 0
        return self.step > 0 and self.parent.work != (self.epoch, self.complete, self.step)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self._rate_of(self.steps_done + self._begun)

    def _rate_of(self, step: int) -> float:
        return learning_rate(self._spec.train, step, self._spec.train.epochs * self.steps_per_epoch)

    def open_epoch(self, epoch: int, session: str) -> None:
        """Start an epoch or continue an unfinished epoch, and add ``session`` to the epoch's sessions."""
        if self.complete:
            self.epoch, self.step, self.complete = epoch, 0, False
            self.sums, self.seconds, self.sessions = _no_sums(), 0.0, []
        if session not in self.sessions:
            self.sessions.append(session)

    def begin(self) -> None:
        """Record that the next optimizer step has begun."""
        self._begun += 1
        if self.average is not None:
            self.average.update(self.steps_done + self._begun)

    def count(self, result: StepResult, seconds: float) -> None:
        """Count the oldest uncounted step, and add its result and its duration in seconds to the epoch's sums."""
        self._begun -= 1
        self.step += 1
        self.steps_done += 1
        self.sums["loss"] += result.loss
        self.sums["abs_error"] += result.abs_error
        self.sums["grad_norm"] += result.grad_norm
        self.sums["structures"] += result.structures
        self.seconds += seconds

    @property
    def needs_own_mae(self) -> bool:
        """Whether the current weights must be validated in addition to the averaged weights."""
        return self.soup is not None and self.soup.of_best

    def kept_weights(self, own_mae: float = 0.0) -> AbstractContextManager[None]:
        """Put the epoch's final weights (current or averaged) into the model within a ``with`` block.

        Args:
            own_mae: validation MAE of the current weights, if `needs_own_mae`.
        """
        if self.soup is not None:
            self.soup.stir(own_mae)
        average = self.average or self.soup
        return nullcontext() if average is None else average.applied()

    def close_epoch(self, *, val_loss: float, val_mae: float, seconds: float) -> None:
        """Finish a validated epoch: add its history row, and record it as the best epoch if its MAE is the lowest."""
        self.seconds += seconds
        self.complete = True
        if self.soup is not None:
            self.soup.keep()
        structures = self.sums["structures"]
        self.history.append(
            {
                "epoch": self.epoch,
                "train_loss": self.sums["loss"] / structures,
                "train_mae": self.sums["abs_error"] / structures,
                "val_loss": val_loss,
                "val_mae": val_mae,
                "lr": self._rate_of(self.steps_done - 1),
                "grad_norm": self.sums["grad_norm"] / self.steps_per_epoch,
                "seconds": self.seconds,
                "structures_per_second": structures / self.seconds if self.seconds > 0 else 0.0,
                "session": "+".join(self.sessions),
                "device": device_name(self._device),
            }
        )
        if self.best is None or val_mae < self.best["val_mae"]:
            self.best = {"epoch": self.epoch, "val_mae": val_mae}

    def state(self) -> TrainState:
        """Copy the state to host memory. Before you call this method, call `Stepper.settle` to count all steps."""
        assert not self._begun
        optimizer = optimizer_tensors(self.optimizer, self.trained)
        average = self.average or self.soup
        return TrainState(
            spec_hash=self._spec.hash,
            dataset_hash=self._dataset_hash,
            fold=self._fold,
            epoch=self.epoch,
            step=self.step,
            complete=self.complete,
            steps_done=self.steps_done,
            sums=dict(self.sums),
            # Leave out the commit's name, because it differs between two runs of the same training.
            best={"epoch": self.best["epoch"], "val_mae": self.best["val_mae"]} if self.best else None,
            model=to_host(self.model.state_dict()),
            optimizer={name: to_host(tensors) for name, tensors in optimizer.items()},
            average=to_host(average.tensors) if average else {},
            random=random_states(self._device),
            ends=[to_host(end) for end in self.soup.ends] if self.soup else [],
            end_maes=list(self.soup.end_maes) if self.soup else [],
        )

    def manifest_fields(self, *, fence: int, session: str, now: float) -> dict[str, Any]:
        """Return the manifest fields that describe this state, including the best commit."""
        if self.best is not None and "commit" not in self.best:
            self.best["commit"] = stem_of(epoch=self.epoch, step=None, fence=fence)
        return {
            "experiment": self._spec.name,
            "spec_hash": self._spec.hash,
            "dataset_hash": self._dataset_hash,
            "fold": self._fold,
            "epoch": self.epoch,
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "complete": self.complete,
            "fence": fence,
            "parent": self.parent.stem if self.parent else None,
            "parent_sha256": self.parent.sha256 if self.parent else None,
            "session": session,
            "written_at": utc_text(now),
            "best": dict(self.best) if self.best else None,
            "history": [dict(row) for row in self.history],
            "fingerprint_changes": list(self.changes),
            "epoch_sessions": list(self.sessions),
            "epoch_seconds": self.seconds,
        }


def _no_sums() -> dict[str, float]:
    return {"loss": 0.0, "abs_error": 0.0, "grad_norm": 0.0, "structures": 0}
