"""One fold of one experiment: built, resumed, trained epoch by epoch, and asked for its predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chgnet.model import CHGNet
from numpy.typing import NDArray

from mbqueue.clock import Clock, SystemClock, utc_text
from mbqueue.data.batches import Distortion
from mbqueue.data.cache import GraphCache
from mbqueue.data.crystals import Crystals
from mbqueue.data.folds import epoch_order, test_rows, train_rows, validation_split
from mbqueue.errors import CheckpointError
from mbqueue.experiment import Spec
from mbqueue.train.arithmetic import calculating, device_name, differences, fingerprint
from mbqueue.train.checkpoint import Checkpoints, Manifest
from mbqueue.train.feeds import FeatureFeed, Feed, GraphFeed, Rows, host_batches, pack
from mbqueue.train.frozen import FrozenBackbone
from mbqueue.train.memory import DeviceMemory
from mbqueue.train.optim import (
    WeightAverage,
    learning_rate,
    make_optimizer,
    open_for_training,
    optimizer_tensors,
    restore_optimizer,
    trained_parameters,
)
from mbqueue.train.outcome import EpochOutcome, StepReport
from mbqueue.train.pretrained import copy_of, load_pretrained
from mbqueue.train.references import compositions, fit_references, set_references
from mbqueue.train.saver import Save, Saver
from mbqueue.train.state import TrainState, random_states, restore_random_states, seed_everything, to_host
from mbqueue.train.step import OutOfMemory, StepResult, infer, loss_sum, make_room, optimizer_step


@dataclass(frozen=True, kw_only=True)
class FoldRows:
    """Which rows of the dataset a fold trains on, validates on and is tested on; ascending, disjoint."""

    train: Rows
    validation: Rows
    test: Rows


def split_rows(n: int, spec: Spec, fold: int) -> FoldRows:
    """The fold's rows; nothing is held out for validation when there is no epoch to choose."""
    outer = train_rows(n, fold)
    train, validation = outer, outer[:0]
    if spec.train.epochs:
        train, validation = validation_split(outer, spec.train.validation, spec.seed, fold)
    return FoldRows(train=np.sort(train), validation=np.sort(validation), test=test_rows(n, fold))


class FoldRun:
    """One fold of one experiment, ready to train or predict.

    It may be kept for all epochs of the fold: each `run_epoch` first looks whether the newest commit is still the
    one it continues, and re-reads it when it is not.

    Args:
        spec: the experiment.
        fold: 0 to 4.
        crystals: the dataset.
        cache: its packed graphs; not needed for a head experiment.
        frozen: what the pretrained backbone gives for it, prepared.
        checkpoints: the fold's commits.
        device: where to compute.
        memory_file: JSON file that remembers, per device, what fits; None remembers nothing.
        fingerprint_extra: what else byte-equality depends on (the graph converter's version).
        on_note: told, in a sentence, what a person should know (another fingerprint, less memory than hoped).
        clock: measures the epochs.
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
        self.rows = split_rows(len(crystals), spec, fold)
        self.steps_per_epoch = -(-len(self.rows.train) // spec.train.batch_size)
        self._crystals, self._checkpoints = crystals, checkpoints
        self._note, self._clock = on_note, clock or SystemClock()
        self._extra = dict(fingerprint_extra or {})
        self._feed: Feed
        if spec.model.trainable == "head":
            self._feed = FeatureFeed(frozen, crystals.atomic_numbers, crystals.targets)
        else:
            assert cache is not None, "only a head experiment does without graphs"
            self._feed = GraphFeed(cache)
        kind = f"{device_name(device)}|{spec.model.trainable}|{spec.train.precision}"
        self._memory = DeviceMemory(memory_file, f"{kind}|train")
        self._infer_memory = DeviceMemory(memory_file, f"{kind}|infer")
        self._model, self._absent = self._first_model(frozen)
        self._parent: Manifest | None = None
        self._is_clean = False  # whether the state in memory is that of the newest commit

    # -- building and resuming -----------------------------------------------------------------------------------

    def _first_model(self, frozen: FrozenBackbone) -> tuple[CHGNet, tuple[int, ...]]:
        """The pretrained model with references fitted on the training rows, and the elements those lack."""
        model = load_pretrained(self.spec.model.pretrained)
        shares = compositions(self._crystals.atomic_numbers, self._crystals.atom_offsets)
        train = self.rows.train
        references = fit_references(shares[train], self._crystals.targets[train], frozen.energies()[train])
        set_references(model, references)
        return model, references.absent

    def _start(self) -> None:
        """The state before the first step."""
        seed_everything(self.spec.seed * 8 + self.fold)
        self._live = copy_of(self._model).to(self.device)
        self._trained = trained_parameters(self._live, self.spec.model.trainable)
        self._optimizer = make_optimizer(self._live, self._trained, self.spec.train)
        decay = self.spec.train.ema_decay
        self._average = WeightAverage(self._trained, decay) if decay else None
        self._epoch, self._step, self._complete, self._steps_done = 0, 0, True, 0
        self._sums = _no_sums()
        self._best: dict[str, Any] | None = None
        self._history: list[dict[str, Any]] = []
        self._changes: list[dict[str, Any]] = []
        self._epoch_seconds, self._epoch_sessions = 0.0, list[str]()
        self._parent = None

    def _resume(self, manifest: Manifest, session: str) -> None:
        """Take the state of a commit."""
        state = self._checkpoints.load(manifest)
        if (state.spec_hash, state.dataset_hash, state.fold) != (self.spec.hash, self._crystals.hash, self.fold):
            raise CheckpointError(
                f"The commit {manifest.stem} in {self._checkpoints.folder} belongs to another spec, dataset or fold. "
                "Give the changed experiment a new name."
            )
        self._start()
        self._live.load_state_dict(state.model)
        restore_optimizer(self._optimizer, self._trained, state.optimizer)
        if self._average is not None:
            self._average.restore(state.average)
        self._epoch, self._step, self._complete = state.epoch, state.step, state.complete
        self._steps_done, self._sums = state.steps_done, dict(state.sums)
        self._best = dict(manifest.best) if manifest.best else None
        self._history = [dict(row) for row in manifest.history]
        self._changes = list(manifest.fingerprint_changes)
        self._epoch_seconds, self._epoch_sessions = manifest.epoch_seconds, list(manifest.epoch_sessions)
        self._parent = manifest
        restore_random_states(state.random)
        changes = differences(manifest.fingerprint, self._fingerprint())
        if changes:
            self._changes.append({"epoch": state.epoch, "step": state.step, "session": session, "changes": changes})
            told = ", ".join(f"{key} {old!r} → {new!r}" for key, (old, new) in changes.items())
            self._note(
                f"Fold {self.fold} goes on from {manifest.stem} under other conditions ({told}): "
                "the result may differ in its last digits from an uninterrupted run's."
            )

    def _enter(self, epoch: int, session: str) -> None:
        """Bring the state in memory to the newest commit of at most this epoch, if it is not there already."""
        newest = self._checkpoints.newest(at_most_epoch=epoch)
        if not (self._is_clean and (newest and newest.stem) == (self._parent and self._parent.stem)):
            self._start() if newest is None else self._resume(newest, session)
        self._is_clean = False
        reached = self._epoch if self._complete else self._epoch - 1
        if reached < epoch - 1:
            raise CheckpointError(
                f"Epoch {epoch} of fold {self.fold} cannot start: the newest whole commit in "
                f"{self._checkpoints.folder} ends in epoch {reached}. Train from epoch {reached + 1} again."
            )

    def finished_epochs(self) -> int:
        """How many epochs the newest whole commit has finished."""
        newest = self._checkpoints.newest()
        return 0 if newest is None else newest.epoch if newest.complete else newest.epoch - 1

    def _fingerprint(self) -> dict[str, Any]:
        limit = min(self._memory.limit, self.spec.train.batch_size)
        return {**fingerprint(self.device, self.spec.train.precision), "micro_batch": limit, **self._extra}

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
        """Train and validate one epoch, from wherever its newest commit is; commit at its end, or when stopped.

        Args:
            epoch: from 1; the one before must be finished.
            fence: of the lease under which commits are written.
            session: name of the working session.
            should_stop: asked before every step and every batch of the validation.
            on_step: told after every step.
            save: publishes a staged commit inside the queue's fence.
            checkpoint_seconds: between two commits in mid-epoch.

        Raises:
            NonFiniteLoss: before the weights are touched; the last commit stands.
            DeviceTooSmall: naming the crystal.
            CheckpointError: when the epoch before is not there.
            LeaseLost: from ``save``.
        """
        with calculating(self.device, self.spec.train.precision), Saver(self._checkpoints, save) as saver:
            self._enter(epoch, session)
            if self._complete and self._epoch == epoch:
                self._is_clean = True
                return self._outcome(finished=True)
            if self._complete:
                self._epoch, self._step, self._complete = epoch, 0, False
                self._sums, self._epoch_seconds, self._epoch_sessions = _no_sums(), 0.0, []
            if session not in self._epoch_sessions:
                self._epoch_sessions.append(session)
            facts = {"fence": fence, "session": session}
            finished = self._train(should_stop, on_step, saver, facts, checkpoint_seconds) and self._validate(
                should_stop
            )
            if finished or self._steps_since_commit():
                self._parent = saver.save_now(self._state(), self._facts(**facts))
            self._is_clean = True
            return self._outcome(finished=finished)

    def _steps_since_commit(self) -> bool:
        if self._parent is None:
            return self._step > 0
        return (self._parent.epoch, self._parent.step) != (self._epoch, self._step) and self._step > 0

    def _train(
        self,
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
        saver: Saver,
        facts: Mapping[str, Any],
        checkpoint_seconds: float,
    ) -> bool:
        """The epoch's remaining steps; False when asked to stop between two of them."""
        train = self.spec.train
        order = epoch_order(self.rows.train, self.spec.seed, self.fold, self._epoch)
        steps = [order[start : start + train.batch_size] for start in range(0, len(order), train.batch_size)]
        distortion = self._distortion()
        head_only = self._epoch <= train.unfreeze_epochs
        open_for_training(self._live, self._trained, head_only=head_only)
        parameters = [p for p in self._trained.values() if p.requires_grad]
        self._live.train()
        last_commit = before = self._clock.monotonic()
        while self._step < len(steps):
            limit = min(train.batch_size, self._memory.limit)
            parts = [
                pack(rows, self._feed.costs, largest_count=limit, largest_cost=train.max_bonds)
                for rows in steps[self._step :]
            ]
            ahead = host_batches(self._feed, parts, pinned=self.device.type == "cuda", distortion=distortion)
            with contextlib.closing(ahead):
                try:
                    while self._step < len(steps):
                        if should_stop():
                            return False
                        rate = learning_rate(train, self._steps_done, train.epochs * self.steps_per_epoch)
                        result = optimizer_step(
                            self._live,
                            self._feed,
                            next(ahead),
                            spec=train,
                            optimizer=self._optimizer,
                            parameters=parameters,
                            rate=rate,
                            device=self.device,
                            ids=self._crystals.ids,
                        )
                        now = self._clock.monotonic()
                        self._count(result, now - before)
                        on_step(self._report(result, rate, now - before))
                        before = now
                        self._parent = saver.publish_if_ready() or self._parent
                        if now - last_commit >= checkpoint_seconds and not saver.is_busy and self._step < len(steps):
                            saver.start(self._state(), self._facts(**facts))
                            last_commit = now
                except OutOfMemory as full:
                    make_room(full, self._memory, self.device, self._crystals.ids)
                    self._note(
                        f"{device_name(self.device)} ran out of memory with {len(full.crystals)} crystals at once; "
                        f"from now on at most {self._memory.limit} go together, with the same effective batch."
                    )
        return True

    def _distortion(self) -> Distortion | None:
        train = self.spec.train
        if not (train.strain or train.jitter):
            return None
        # One stream per seed, fold and epoch; within it the data room gives each row its own.
        stream = np.random.SeedSequence([self.spec.seed, self.fold, self._epoch]).generate_state(1, np.uint64)[0]
        return Distortion(strain=train.strain, jitter=train.jitter, seed=int(stream >> np.uint64(1)))

    def _count(self, result: StepResult, seconds: float) -> None:
        self._step += 1
        self._steps_done += 1
        if self._average is not None:
            self._average.update(self._steps_done)
        self._sums["loss"] += result.loss
        self._sums["abs_error"] += result.abs_error
        self._sums["grad_norm"] += result.grad_norm
        self._sums["structures"] += result.structures
        self._epoch_seconds += seconds

    def _report(self, result: StepResult, rate: float, seconds: float) -> StepReport:
        return StepReport(
            epoch=self._epoch,
            step=self._step,
            steps_per_epoch=self.steps_per_epoch,
            loss=result.loss / result.structures,
            mae=result.abs_error / result.structures,
            lr=rate,
            grad_norm=result.grad_norm,
            structures=result.structures,
            seconds=seconds,
        )

    def _validate(self, should_stop: Callable[[], bool]) -> bool:
        """Finish the epoch: validate the weights that are kept, and write its row; False when asked to stop."""
        began = self._clock.monotonic()
        with self._average.applied() if self._average else contextlib.nullcontext():
            predicted = self._infer(self._live, self.rows.validation, should_stop)
        if predicted is None:
            return False
        target = self._crystals.targets[self.rows.validation]
        val_mae = float(np.abs(predicted - target).mean())
        val_loss = float(loss_sum(self.spec.train, torch.from_numpy(predicted), torch.from_numpy(target))) / len(target)
        self._epoch_seconds += self._clock.monotonic() - began
        self._complete = True
        structures = self._sums["structures"]
        row = {
            "epoch": self._epoch,
            "train_loss": self._sums["loss"] / structures,
            "train_mae": self._sums["abs_error"] / structures,
            "val_loss": val_loss,
            "val_mae": val_mae,
            "lr": learning_rate(self.spec.train, self._steps_done - 1, self.spec.train.epochs * self.steps_per_epoch),
            "grad_norm": self._sums["grad_norm"] / self.steps_per_epoch,
            "seconds": self._epoch_seconds,
            "structures_per_second": structures / self._epoch_seconds if self._epoch_seconds > 0 else 0.0,
            "session": "+".join(self._epoch_sessions),
            "device": device_name(self.device),
        }
        self._history.append(row)
        if self._best is None or val_mae < self._best["val_mae"]:
            self._best = {"epoch": self._epoch, "val_mae": val_mae}
        return True

    def _state(self) -> TrainState:
        """A copy of the state in host memory."""
        best = self._best
        optimizer = optimizer_tensors(self._optimizer, self._trained)
        return TrainState(
            spec_hash=self.spec.hash,
            dataset_hash=self._crystals.hash,
            fold=self.fold,
            epoch=self._epoch,
            step=self._step,
            complete=self._complete,
            steps_done=self._steps_done,
            sums=dict(self._sums),
            best={"epoch": best["epoch"], "val_mae": best["val_mae"]} if best else None,
            model=to_host(self._live.state_dict()),
            optimizer={name: to_host(tensors) for name, tensors in optimizer.items()},
            average=to_host(self._average.tensors) if self._average else {},
            random=random_states(),
        )

    def _facts(self, *, fence: int, session: str) -> dict[str, Any]:
        """The manifest of the current state, without size and hash."""
        facts: dict[str, Any] = {
            "experiment": self.spec.name,
            "spec_hash": self.spec.hash,
            "dataset_hash": self._crystals.hash,
            "fold": self.fold,
            "epoch": self._epoch,
            "step": self._step,
            "steps_per_epoch": self.steps_per_epoch,
            "complete": self._complete,
            "fence": fence,
            "parent": self._parent.stem if self._parent else None,
            "session": session,
            "written_at": utc_text(self._clock.now()),
            "history": [dict(row) for row in self._history],
            "fingerprint": self._fingerprint(),
            "fingerprint_changes": list(self._changes),
            "epoch_sessions": list(self._epoch_sessions),
            "epoch_seconds": self._epoch_seconds,
            "absent_elements": list(self._absent),
        }
        if self._best is not None and "commit" not in self._best:
            self._best["commit"] = f"e{self._epoch:04d}-done-f{fence:04d}"
        facts["best"] = dict(self._best) if self._best else None
        return facts

    def _outcome(self, *, finished: bool) -> EpochOutcome:
        patience = self.spec.train.patience
        best_epoch = self._best["epoch"] if self._best else self._epoch
        return EpochOutcome(
            finished=finished,
            epoch=self._epoch,
            step=self._step,
            steps_per_epoch=self.steps_per_epoch,
            commit=self._parent.stem if self._parent else None,
            history_row=dict(self._history[-1]) if finished else None,
            best=dict(self._best) if self._best else None,
            improved=finished and best_epoch == self._epoch,
            stop_early=finished and bool(patience) and self._epoch - best_epoch >= patience,
        )

    # -- results -------------------------------------------------------------------------------------------------

    @property
    def absent_elements(self) -> tuple[int, ...]:
        """Atomic numbers without a crystal in the fit of the element references; their reference is 0."""
        return self._absent

    def history(self) -> list[dict[str, Any]]:
        """One row per finished epoch, as the newest whole commit has it; columns as `HISTORY_COLUMNS`."""
        newest = self._checkpoints.newest()
        return [] if newest is None else newest.history

    def best_model(self) -> CHGNet:
        """The model of the best epoch (averaged weights when averaging is on), on the CPU; before any, the first one.

        Raises:
            CheckpointError: when no epoch is finished, or the best one's commit is gone.
        """
        model = copy_of(self._model)
        if not self.spec.train.epochs:
            return model
        newest = self._checkpoints.newest()
        if newest is None or newest.best is None:
            raise CheckpointError(f"No epoch of fold {self.fold} is finished in {self._checkpoints.folder}.")
        best = self._checkpoints.find(newest.best["commit"])
        if best is None:
            raise CheckpointError(
                f"The best epoch's commit {newest.best['commit']} is not in {self._checkpoints.folder}."
            )
        state = self._checkpoints.load(best)
        model.load_state_dict({**state.model, **state.average})
        return model

    def predict_test(
        self, model: CHGNet, *, should_stop: Callable[[], bool] = lambda: False
    ) -> NDArray[np.float64] | None:
        """Formation energies of the test rows, eV/atom, in the order of ``rows.test``; None when asked to stop."""
        with calculating(self.device, self.spec.train.precision):
            return self._infer(model.to(self.device), self.rows.test, should_stop)

    def _infer(self, model: CHGNet, rows: Rows, should_stop: Callable[[], bool]) -> NDArray[np.float64] | None:
        model.eval()
        found = infer(
            self._feed,
            rows,
            lambda batch: [self._feed.predict(model, batch)],
            batch_size=self.spec.train.batch_size,
            max_bonds=self.spec.train.max_bonds,
            device=self.device,
            memory=self._infer_memory,
            ids=self._crystals.ids,
            should_stop=should_stop,
        )
        return None if found is None else found[0].astype(np.float64)


def _no_sums() -> dict[str, float]:
    return {"loss": 0.0, "abs_error": 0.0, "grad_norm": 0.0, "structures": 0}
