"""Train one fold of an experiment epoch by epoch, resume its training, and predict with its best model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mbqueue.clock import Clock, SystemClock
from mbqueue.data.batches import Distortion
from mbqueue.data.crystals import Crystals
from mbqueue.data.folds import epoch_batches
from mbqueue.data.graph_cache import GraphCache
from mbqueue.errors import CheckpointError, counted
from mbqueue.experiment import Spec
from mbqueue.storage.manifest import Manifest
from mbqueue.train.arithmetic import calculating
from mbqueue.train.arrivals import arriving
from mbqueue.train.checkpoint import Checkpoints
from mbqueue.train.conditions import Conditions
from mbqueue.train.family import family_of
from mbqueue.train.feeds import feed_of, host_batches, pack
from mbqueue.train.frozen import FrozenBackbone
from mbqueue.train.inference import Inference
from mbqueue.train.learner import Learner
from mbqueue.train.memory import OutOfMemory
from mbqueue.train.optim import open_for_training
from mbqueue.train.outcome import EpochOutcome, StepReport
from mbqueue.train.rows import split_rows
from mbqueue.train.saver import Save, Saver
from mbqueue.train.start import start_of
from mbqueue.train.state import deserialise
from mbqueue.train.stepper import Stepper


@dataclass(frozen=True, kw_only=True)
class _Writer:
    fence: int
    session: str
    checkpoint_seconds: float


class FoldRun:
    """One fold of one experiment, ready to train or predict.

    You can reuse a `FoldRun` for all epochs of the fold. Each call of `run_epoch` loads the newest commit, unless that
    commit's state is already in memory.

    Args:
        cache: the dataset's packed graphs; may be None for a head experiment.
        frozen: the pretrained backbone's outputs for the dataset, already prepared.
        checkpoints: the fold's commits.
        memory_file: a JSON file that records how many crystals fit on each device; None for no file.
        fingerprint_extra: additional entries of the fingerprint (the graph converter's version).
        on_note: called with a message for the user (a changed fingerprint, less memory than expected).
    """

    def __init__(
        self,
        *,
        spec: Spec,
        fold: int,
        crystals: Crystals,
        cache: GraphCache | None,
        frozen: FrozenBackbone,
        checkpoints: Checkpoints,
        device: torch.device,
        memory_file: Path | None = None,
        fingerprint_extra: Mapping[str, Any] | None = None,
        on_note: Callable[[str], None] = lambda _note: None,
        clock: Clock | None = None,
    ) -> None:
        self.spec, self.fold, self.device = spec, fold, device
        self.family = family_of(spec.model.pretrained)
        self.rows = split_rows(crystals.targets, spec, fold)
        self.steps_per_epoch = -(-len(self.rows.train) // spec.train.batch_size)
        self._crystals, self.checkpoints = crystals, checkpoints
        self._note, self._clock = on_note, clock or SystemClock()
        self._feed = feed_of(spec, self.family, crystals, cache, frozen)
        self._conditions = Conditions(
            spec, device, memory_file=memory_file, extra=fingerprint_extra or {}, on_note=on_note
        )
        self._inference = Inference(
            spec,
            fold,
            self.family,
            self._feed,
            crystals,
            conditions=self._conditions,
            device=device,
            clock=self._clock,
            on_note=on_note,
        )
        self._start = start_of(spec, self.family, crystals, frozen, self.rows.train)
        self.absent_elements = self._start.absent
        # The learner with the state of the newest commit; None if the commit must be loaded first.
        self._learner: Learner | None = None

    # -- training ------------------------------------------------------------------------------------------------

    def run_epoch(
        self,
        epoch: int,
        *,
        fence: int,
        session: str,
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
        save: Save,
        checkpoint_seconds: float = 300.0,
    ) -> EpochOutcome:
        """Train and validate one epoch, resuming from its newest commit; commit when the epoch ends or is stopped.

        Return at once if the epoch is already finished.

        Args:
            epoch: number of the epoch, from 1; the previous epoch must be finished.
            fence: fence of the lease under which commits are written.
            should_stop: called before every training step and every validation batch.
            on_step: called after every step.
            save: publishes a staged commit inside the queue's fence.
            checkpoint_seconds: seconds between two mid-epoch commits.

        Raises:
            NonFiniteLoss: if the loss or gradient is not finite; the newest commit does not change.
            DeviceTooSmall, DeviceBusy: if a single crystal does not fit on the device; the error names the crystal.
            CheckpointError: if no commit of the previous epoch exists.
            LeaseLost: if ``save`` finds that the session has lost its lease.
        """
        writer = _Writer(fence=fence, session=session, checkpoint_seconds=checkpoint_seconds)
        self._conditions.begin()
        self._inference.check_kernels(self.rows.train)
        with calculating(self.device, self._conditions.precision), Saver(self.checkpoints, save) as saver:
            learner = self._enter(epoch, session)
            if not (learner.complete and learner.epoch == epoch):
                # After an error, the state in memory matches no commit, so the next call must load a commit.
                self._learner = None
                learner.open_epoch(epoch, session)
                finished = self._train(learner, saver, writer, should_stop, on_step)
                finished = finished and self._validate(learner, should_stop)
                if learner.has_news:
                    learner.parent = saver.save_now(learner.state(), self._fields(learner, writer))
                self._learner = learner
            return self._outcome(learner)

    def _enter(self, epoch: int, session: str) -> Learner:
        """Return a learner with the state of the newest commit, ignoring commits of later epochs."""
        chain = self.checkpoints.chain(at_most_epoch=epoch)
        newest = chain[-1][0].manifest if chain else None
        learner = self._learner
        if learner is None or (learner.parent and learner.parent.sha256) != (newest and newest.sha256):
            learner = Learner(
                self.spec,
                self.fold,
                dataset_hash=self._crystals.hash,
                first=self._start.model,
                device=self.device,
                steps_per_epoch=self.steps_per_epoch,
            )
            if newest is not None:
                learner.restore(deserialise(chain[-1][1]), newest)
            changes = learner.compute_under(self._conditions.fingerprint(), session)
            if newest is not None and changes:
                self._tell_changes(changes, newest)
        if learner.finished_epochs < epoch - 1:
            place, finished = self.checkpoints.place.name, counted(learner.finished_epochs, "finished epoch")
            found = f"the newest intact commit in {place} contains only {finished}"
            raise CheckpointError(
                f"Epoch {epoch} of fold {self.fold} cannot start: "
                f"{found if newest else f'{place} contains no intact commit'}. "
                f"Train from epoch {learner.finished_epochs + 1} again."
            )
        return learner

    def _tell_changes(self, changes: dict[str, list[Any]], manifest: Manifest) -> None:
        told = ", ".join(f"{key} {old!r} → {new!r}" for key, (old, new) in changes.items())
        self._note(
            f"Fold {self.fold} resumes from {manifest.stem} under different conditions ({told}), "
            "so the last digits of its result may differ from those of an uninterrupted run."
        )

    def _fields(self, learner: Learner, writer: _Writer) -> dict[str, Any]:
        # Running out of memory may have changed the micro-batch size since the previous commit.
        learner.compute_under(self._conditions.fingerprint(), writer.session)
        return {
            **learner.manifest_fields(fence=writer.fence, session=writer.session, now=self._clock.now()),
            "fingerprint": learner.fingerprint,
            "absent_elements": list(self.absent_elements),
        }

    def _train(
        self,
        learner: Learner,
        saver: Saver,
        writer: _Writer,
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
    ) -> bool:
        """Run the epoch's remaining steps; return False if stopped between two steps."""
        train = self.spec.train
        steps = epoch_batches(
            self.rows.train,
            train.batch_size,
            self.spec.seed,
            self.fold,
            learner.epoch,
            sizes=self._feed.costs if train.group_by_size else None,
        )
        open_for_training(self.family, learner.model, learner.trained, head_only=learner.epoch <= train.unfreeze_epochs)
        learner.model.train()
        stepper = Stepper(
            learner,
            self._feed,
            self._start.objective,
            device=self.device,
            ids=self._crystals.ids,
            clock=self._clock,
            on_step=on_step,
        )
        last_commit = self._clock.monotonic()
        while learner.step < len(steps):
            limit = min(train.batch_size, self._conditions.training.limit)
            parts = [
                pack(rows, self._feed.costs, largest_count=limit, largest_cost=train.max_bonds)
                for rows in steps[learner.step :]
            ]
            ahead = host_batches(
                self._feed, parts, pinned=self.device.type == "cuda", distortion=self._distortion(learner.epoch)
            )
            shortage = None
            with contextlib.closing(ahead):
                try:
                    for batches in arriving(ahead, self.device):
                        if should_stop():
                            stepper.settle()
                            return False
                        stepper.step(batches)
                        learner.parent = saver.publish_if_ready() or learner.parent
                        now = self._clock.monotonic()
                        if now - last_commit >= writer.checkpoint_seconds and not saver.is_busy:
                            stepper.settle()
                            if learner.step < len(steps):
                                saver.start(learner.state(), self._fields(learner, writer))
                                last_commit = now
                except OutOfMemory as full:
                    shortage = full.shortage
            stepper.settle()
            # Free memory here, because inside the except block the error still refers to the failed step's tensors.
            if shortage is not None:
                self._conditions.training.make_room(shortage, self.device, self._crystals.ids)
        return True

    def _distortion(self, epoch: int) -> Distortion | None:
        train = self.spec.train
        if not (train.strain or train.jitter):
            return None
        # Each combination of seed, fold and epoch has its own random stream, from which `mbqueue.data` derives one
        # stream per row.
        stream = np.random.SeedSequence([self.spec.seed, self.fold, epoch]).generate_state(1, np.uint64)[0]
        return Distortion(strain=train.strain, jitter=train.jitter, seed=int(stream >> np.uint64(1)))

    def _validate(self, learner: Learner, should_stop: Callable[[], bool]) -> bool:
        """Validate the weights that the epoch keeps, and write the epoch's history row; return False if stopped."""
        began, own_mae = self._clock.monotonic(), 0.0
        if learner.needs_own_mae:
            own = self._validation(learner, should_stop)
            if own is None:
                return False
            own_mae = own[1]
        with learner.kept_weights(own_mae):
            found = self._validation(learner, should_stop)
        if found is None:
            return False
        learner.close_epoch(val_loss=found[0], val_mae=found[1], seconds=self._clock.monotonic() - began)
        return True

    def _validation(self, learner: Learner, should_stop: Callable[[], bool]) -> tuple[float, float] | None:
        """Compute the validation loss and MAE of the model's current weights; return None if stopped."""
        with calculating(self.device, "float32"):
            found = self._inference.outputs(learner.model, self.rows.validation, should_stop=should_stop)
        if found is None:
            return None
        target, objective = self._crystals.targets[self.rows.validation], self._start.objective
        output = torch.from_numpy(found)
        loss = float(objective.loss_sum(output, torch.from_numpy(target))) / len(target)
        return loss, float(np.abs(objective.prediction(output).numpy() - target).mean())

    def _outcome(self, learner: Learner) -> EpochOutcome:
        finished = learner.complete
        best_epoch = learner.best["epoch"] if learner.best else learner.epoch
        return EpochOutcome(
            finished=finished,
            history_row=dict(learner.history[-1]) if finished else None,
            best=dict(learner.best) if learner.best else None,
            improved=finished and best_epoch == learner.epoch,
        )

    # -- results -------------------------------------------------------------------------------------------------

    def finished_epochs(self) -> int:
        """Return the number of finished epochs in the newest intact commit."""
        newest = self.checkpoints.newest()
        return 0 if newest is None else newest.manifest.finished_epochs

    def history(self) -> list[dict[str, Any]]:
        """Return the history from the newest intact commit, with one row per finished epoch."""
        newest = self.checkpoints.newest()
        return [] if newest is None else newest.manifest.history

    def best_model(self) -> Any:
        """Return the best epoch's model on the CPU, with averaged weights if averaging is on.

        If the experiment has no epochs, return the initial model. The model's output is in the unit of the target, or
        logits for a class target.

        Raises:
            CheckpointError: if no epoch is finished.
        """
        model = self.family.copy_of(self._start.model)
        if self.spec.train.epochs:
            model.load_state_dict(self._best_weights())
        if self._start.objective.scale != 1.0:
            self.family.scale_output(model, self._start.objective.scale)
        return model

    def _best_weights(self) -> dict[str, Tensor]:
        chain = self.checkpoints.chain()
        if not chain or chain[-1][0].manifest.best is None:
            raise CheckpointError(f"Fold {self.fold} has no finished epoch in {self.checkpoints.place.name}.")
        state = deserialise(chain[0][1])
        return {**state.model, **state.average}

    def predict_test(
        self,
        model: nn.Module,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
        keep_in: Path | None = None,
    ) -> NDArray[np.float64] | None:
        """Predict the test rows, in the order of ``rows.test``; return None if stopped.

        An experiment without epochs uses the initial model, whose outputs for the undistorted crystals are already
        known. Arguments and errors are the same as in `Inference.predict`.
        """
        self._conditions.begin()
        self._inference.check_kernels(self.rows.train)
        stored = None if self.spec.train.epochs else self._start.outputs[self.rows.test] * self._start.objective.scale
        return self._inference.predict(
            model,
            self.rows.test,
            strains=self.spec.train.test_strains,
            stored=stored,
            should_stop=should_stop,
            on_progress=on_progress,
            keep_in=keep_in,
        )
