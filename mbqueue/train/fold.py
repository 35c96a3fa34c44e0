"""One fold of one experiment: built, resumed, trained epoch by epoch, and asked for its predictions."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from mbqueue.errors import CheckpointError, NonFiniteLoss
from mbqueue.experiment import Spec
from mbqueue.files import sha256_of_json
from mbqueue.storage.manifest import Manifest
from mbqueue.train.arithmetic import calculating
from mbqueue.train.arrivals import arriving
from mbqueue.train.checkpoint import Checkpoints
from mbqueue.train.conditions import Conditions
from mbqueue.train.family import family_of
from mbqueue.train.feeds import FeatureFeed, Feed, GraphFeed, Rows, host_batches, pack
from mbqueue.train.frozen import FrozenBackbone
from mbqueue.train.gpu_path import CHECKED_CRYSTALS, check_once
from mbqueue.train.kept import Kept
from mbqueue.train.learner import Learner
from mbqueue.train.memory import OutOfMemory
from mbqueue.train.optim import open_for_training
from mbqueue.train.outcome import EpochOutcome, StepReport
from mbqueue.train.predict import opposite_strains
from mbqueue.train.rows import split_rows
from mbqueue.train.saver import Save, Saver
from mbqueue.train.start import start_of
from mbqueue.train.step import infer, listed
from mbqueue.train.stepper import Stepper


@dataclass(frozen=True, kw_only=True)
class _Lease:
    """Under which lease, and how often, commits are written."""

    fence: int
    session: str
    checkpoint_seconds: float


class FoldRun:
    """One fold of one experiment, ready to train or predict.

    It may be kept for all epochs of the fold: each `run_epoch` first looks whether the newest commit is still the
    one it continues, and reads that when it is not.

    Args:
        spec: the experiment.
        fold: 0 to 4.
        crystals: the dataset.
        cache: its packed graphs; None will do for a head experiment.
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
        self.family = family_of(spec.model.pretrained)
        self.rows = split_rows(crystals.targets, spec, fold)
        self.steps_per_epoch = -(-len(self.rows.train) // spec.train.batch_size)
        self._crystals, self._checkpoints = crystals, checkpoints
        self._note, self._clock = on_note, clock or SystemClock()
        self._feed: Feed
        if spec.model.trainable == "head":
            self._feed = FeatureFeed(self.family, frozen, crystals.atomic_numbers, crystals.targets)
        else:
            assert cache is not None, "only a head experiment does without graphs"
            self._feed = GraphFeed(self.family, cache)
        self._conditions = Conditions(
            spec, device, memory_file=memory_file, extra=fingerprint_extra or {}, on_note=on_note
        )
        self._start = start_of(spec, self.family, crystals, frozen, self.rows.train)
        self.absent_elements = self._start.absent
        # The learner of the newest commit; None when that has to be read first.
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
        """Train and validate one epoch, from wherever its newest commit is; commit at its end, or when stopped.

        An epoch that is finished already is not done again: its outcome comes at once.

        Args:
            epoch: from 1; the one before must be finished.
            fence: of the lease under which commits are written.
            session: name of the working session.
            should_stop: asked before every step and every batch of the validation.
            on_step: told after every step.
            save: publishes a staged commit inside the queue's fence.
            checkpoint_seconds: between two commits in mid-epoch.

        Raises:
            NonFiniteLoss: nothing of it is kept; the last commit stands.
            DeviceTooSmall, DeviceBusy: naming the crystal.
            CheckpointError: when the epoch before is not there.
            LeaseLost: from ``save``.
        """
        lease = _Lease(fence=fence, session=session, checkpoint_seconds=checkpoint_seconds)
        self._conditions.begin()
        self._check_kernels()
        with calculating(self.device, self._conditions.precision), Saver(self._checkpoints, save) as saver:
            learner = self._enter(epoch, session)
            if not (learner.complete and learner.epoch == epoch):
                # Whatever ends the work early leaves a state that no commit has, so the next call reads one.
                self._learner = None
                learner.open_epoch(epoch, session)
                finished = self._train(learner, saver, lease, should_stop, on_step)
                finished = finished and self._validate(learner, should_stop)
                if learner.has_news:
                    learner.parent = saver.save_now(learner.state(), self._facts(learner, lease))
                self._learner = learner
            return self._outcome(learner)

    def _check_kernels(self) -> None:
        """Let a GPU use its kernels if they give what plain torch gives for the first crystals of the fold."""
        if self.device.type != "cuda" or self.spec.model.trainable == "head":
            return
        check_once(
            self.device,
            self._conditions.precision,
            self.family.load_pretrained(self.spec.model.pretrained).to(self.device),
            self.family.predict,
            self._feed.load(self.rows.train[:CHECKED_CRYSTALS]).to(self.device),
            self._note,
        )

    def _enter(self, epoch: int, session: str) -> Learner:
        """The learner at the newest commit of at most this epoch."""
        commit = self._checkpoints.newest(at_most_epoch=epoch)
        newest = None if commit is None else commit.manifest
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
            if commit is not None:
                learner.restore(self._checkpoints.load(commit), commit.manifest)
            changes = learner.compute_under(self._conditions.fingerprint(), session)
            if newest is not None and changes:
                self._tell_changes(changes, newest)
        if learner.finished_epochs < epoch - 1:
            raise CheckpointError(
                f"Epoch {epoch} of fold {self.fold} cannot start: the newest whole commit in "
                f"{self._checkpoints.where} has finished {learner.finished_epochs} epochs. "
                f"Train from epoch {learner.finished_epochs + 1} again."
            )
        return learner

    def _tell_changes(self, changes: dict[str, list[Any]], manifest: Manifest) -> None:
        told = ", ".join(f"{key} {old!r} → {new!r}" for key, (old, new) in changes.items())
        self._note(
            f"Fold {self.fold} goes on from {manifest.stem} under other conditions ({told}): "
            "the result may differ in its last digits from an uninterrupted run's."
        )

    def _facts(self, learner: Learner, lease: _Lease) -> dict[str, Any]:
        # Since the commit before, the device may have run out of memory.
        learner.compute_under(self._conditions.fingerprint(), lease.session)
        return {
            **learner.facts(fence=lease.fence, session=lease.session, now=self._clock.now()),
            "fingerprint": learner.fingerprint,
            "absent_elements": list(self.absent_elements),
        }

    def _train(
        self,
        learner: Learner,
        saver: Saver,
        lease: _Lease,
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
    ) -> bool:
        """The epoch's remaining steps; False when asked to stop between two of them."""
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
                        if now - last_commit >= lease.checkpoint_seconds and not saver.is_busy:
                            stepper.settle()
                            if learner.step < len(steps):
                                saver.start(learner.state(), self._facts(learner, lease))
                                last_commit = now
                except OutOfMemory as full:
                    shortage = full.shortage
            stepper.settle()
            if shortage is not None:  # and nothing refers to the failed step any more
                self._conditions.training.make_room(shortage, self.device, self._crystals.ids)
        return True

    def _distortion(self, epoch: int) -> Distortion | None:
        train = self.spec.train
        if not (train.strain or train.jitter):
            return None
        # One stream per seed, fold and epoch; within it the data room gives each row its own.
        stream = np.random.SeedSequence([self.spec.seed, self.fold, epoch]).generate_state(1, np.uint64)[0]
        return Distortion(strain=train.strain, jitter=train.jitter, seed=int(stream >> np.uint64(1)))

    def _validate(self, learner: Learner, should_stop: Callable[[], bool]) -> bool:
        """Finish the epoch: validate the weights that are kept, and write its row; False when asked to stop."""
        began = self._clock.monotonic()
        averaged = learner.average.applied() if learner.average else contextlib.nullcontext()
        with averaged, calculating(self.device, "float32"):
            found = self._infer(learner.model, self.rows.validation, should_stop)
        if found is None:
            return False
        target, objective = self._crystals.targets[self.rows.validation], self._start.objective
        output = torch.from_numpy(found)
        learner.close_epoch(
            val_loss=float(objective.loss_sum(output, torch.from_numpy(target))) / len(target),
            val_mae=float(np.abs(objective.prediction(output).numpy() - target).mean()),
            seconds=self._clock.monotonic() - began,
        )
        return True

    def _outcome(self, learner: Learner) -> EpochOutcome:
        finished = learner.complete
        best_epoch = learner.best["epoch"] if learner.best else learner.epoch
        return EpochOutcome(
            finished=finished,
            epoch=learner.epoch,
            step=learner.step,
            steps_per_epoch=self.steps_per_epoch,
            commit=learner.parent.stem if learner.parent else None,
            history_row=dict(learner.history[-1]) if finished else None,
            best=dict(learner.best) if learner.best else None,
            improved=finished and best_epoch == learner.epoch,
        )

    # -- results -------------------------------------------------------------------------------------------------

    def finished_epochs(self) -> int:
        """How many epochs the newest whole commit has finished."""
        newest = self._checkpoints.newest()
        return 0 if newest is None else newest.manifest.finished_epochs

    def history(self) -> list[dict[str, Any]]:
        """One row per finished epoch, as the newest whole commit has it."""
        newest = self._checkpoints.newest()
        return [] if newest is None else newest.manifest.history

    def best_model(self) -> Any:
        """The best epoch's model (averaged weights when averaging is on), on the CPU; with no epochs, the first one.

        Its output is in the unit of the target; of a class, logits.

        Raises:
            CheckpointError: when no epoch is finished.
        """
        model = self.family.copy_of(self._start.model)
        if self.spec.train.epochs:
            model.load_state_dict(self._best_weights())
        if self._start.objective.scale != 1.0:
            self.family.scale_output(model, self._start.objective.scale)
        return model

    def _best_weights(self) -> dict[str, Tensor]:
        chain = self._checkpoints.chain()
        if not chain or chain[-1].manifest.best is None:
            raise CheckpointError(f"No epoch of fold {self.fold} is finished in {self._checkpoints.where}.")
        state = self._checkpoints.load(chain[0])
        return {**state.model, **state.average}

    def predict_test(
        self,
        model: nn.Module,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
        keep_in: Path | None = None,
    ) -> NDArray[np.float64] | None:
        """Predictions of the test rows, in the order of ``rows.test``; None when asked to stop.

        With ``train.test_strains`` they are means over the crystals as they are and under small strains. Without epochs
        the model is the pretrained one, and what it says of the crystals as they are comes from what is stored.

        Args:
            model: usually `best_model`, in the unit of the target; it is moved to the device.
            should_stop: asked before every batch.
            on_progress: told crystals done and in all, each as often as there are strains.
            keep_in: folder that keeps what is computed, so that a prediction which is cut off goes on where it was.

        Raises:
            DeviceTooSmall, DeviceBusy: naming the crystal.
            NonFiniteLoss: naming the crystals whose prediction is not finite.
        """
        self._conditions.begin()
        self._check_kernels()
        in_unit = replace(self._start.objective, scale=1.0)
        distortions = opposite_strains(self.spec.train.test_strains)
        total = np.zeros(len(self.rows.test))
        done, whole = 0, len(self.rows.test) * len(distortions)
        key = self._key_of(model) if keep_in is not None else ""

        def count(n: int) -> None:
            nonlocal done
            done += n
            on_progress(done, whole)

        count(0)
        with calculating(self.device, "float32"):
            for number, distortion in enumerate(distortions):
                if should_stop():
                    return None
                if distortion is None and not self.spec.train.epochs:
                    outputs = self._start.outputs[self.rows.test] * self._start.objective.scale
                    found: NDArray[np.float64] | None = self._finite(outputs, self.rows.test)
                else:
                    kept = None
                    if keep_in is not None:
                        kept = Kept(keep_in / f"{number}.bin", f"{key} {distortion}", clock=self._clock)
                    found = self._infer(model.to(self.device), self.rows.test, should_stop, distortion, count, kept)
                if found is None:
                    return None
                total += in_unit.prediction(torch.from_numpy(found)).numpy()
        return total / len(distortions)

    def _infer(
        self,
        model: nn.Module,
        rows: Rows,
        should_stop: Callable[[], bool],
        distortion: Distortion | None = None,
        on_done: Callable[[int], None] = lambda _more: None,
        kept: Kept | None = None,
    ) -> NDArray[np.float64] | None:
        model.eval()
        there = kept.outputs if kept is not None else np.empty(0, np.float32)

        def done(part: list[Tensor]) -> None:
            if kept is not None:
                kept.add(part[0].numpy())
            on_done(len(part[0]))

        if len(there):
            on_done(len(there))
        if len(there) == len(rows):
            return self._finite(there.astype(np.float64), rows)
        found = infer(
            self._feed,
            rows[len(there) :],
            lambda batch: [self._feed.predict(model, batch)],
            batch_size=self.spec.train.batch_size,
            max_bonds=self.spec.train.max_bonds,
            device=self.device,
            memory=self._conditions.inference,
            ids=self._crystals.ids,
            distortion=distortion,
            should_stop=should_stop,
            on_part=done,
        )
        if kept is not None:
            kept.write()
        if found is None:
            return None
        return self._finite(np.concatenate([there, found[0]]).astype(np.float64), rows)

    def _key_of(self, model: nn.Module) -> str:
        """Of what the model's outputs for the test rows depend on, but for the strains."""
        return sha256_of_json(
            {
                "model": hashlib.sha256(self.family.model_bytes(model, self.spec.predicts)).hexdigest(),
                "dataset": self._crystals.hash,
                "fold": self.fold,
                "batches": [self.spec.train.batch_size, self.spec.train.max_bonds],
                "conditions": self._conditions.fingerprint(),
            }
        )

    def _finite(self, output: NDArray[np.float64], rows: Rows) -> NDArray[np.float64]:
        """The output for ``rows``, if it is finite."""
        bad = rows[~np.isfinite(output)]
        if len(bad):
            raise NonFiniteLoss(
                f"Fold {self.fold}: the predictions of {len(bad)} of {len(rows)} crystals are not finite, so they are "
                f"not kept: {listed([self._crystals.ids[row] for row in bad])}. When these are nearly all, training "
                "diverged: enqueue the experiment under another name with a lower train.lr. Else look at their "
                "distances."
            )
        return output
