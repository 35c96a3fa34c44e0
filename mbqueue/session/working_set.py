"""The data, frozen backbone and fold that a session keeps loaded for its next job."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mbqueue.data.cache_lock import building
from mbqueue.drive.outcomes import enqueued_record
from mbqueue.drive.published import PublishedFold
from mbqueue.experiment import Spec
from mbqueue.queue.jobs import LOADED_NOTE, Experiment, Job, Kind, Lease, State
from mbqueue.session.compiling import Compiling
from mbqueue.session.crystal_copies import CrystalCopies
from mbqueue.session.loading import LoadedData, load_data
from mbqueue.session.sources import DataRequest
from mbqueue.storage.mounted import Drive
from mbqueue.storage.places import place_of
from mbqueue.train.backbone import is_prepared, kinds_needed, open_frozen, prepare_frozen
from mbqueue.train.checkpoint import Checkpoints
from mbqueue.train.fold import FoldRun
from mbqueue.train.frozen import FrozenBackbone
from mbqueue.train.shared_frozen import fetch_shards, send_shards

if TYPE_CHECKING:
    from mbqueue.session.session import Session


class WorkingSet:
    """The data and model that a session keeps loaded on its device, ready for the next epoch."""

    def __init__(
        self, session: Session, device: torch.device, *, compiling: Compiling, crystal_copies: CrystalCopies
    ) -> None:
        self.device = device
        self._session, self._compiling, self._crystal_copies = session, compiling, crystal_copies
        self._data: LoadedData | None = None
        self._fold: tuple[tuple[int, int], FoldRun] | None = None

    def await_kernels(self) -> None:
        """Wait until the GPU's kernels are compiled; return at once if there is no GPU."""
        self._compiling.wait()

    def data_for(self, job: Job, experiment: Experiment, spec: Spec) -> LoadedData:
        """Load the experiment's crystals and graphs, unless they are already loaded, and return them.

        Raises:
            Stopped: if the session is asked to stop while the crystals are read or converted.
        """
        # If the spec limits the number of crystals, the choice depends on the seed, so compare the crystals' hash too.
        data = self._data
        if data is None or data.data_spec != spec.data or data.crystals.hash != experiment.dataset_hash:
            self._fold, self._data = None, None
            data = load_data(
                self._session.project,
                DataRequest(data=spec.data, seed=spec.seed, target=spec.predicts),
                dataset_hash=experiment.dataset_hash,
                progress=lambda what: self._session.stoppable_progress_of(job, what),
                should_stop=self._session.should_stop,
                note=self._session.report.note,
                store=self._session.store,
                keep=self._crystal_copies.keep,
            )
            if data is None:
                raise self._session.stopped()
            self._data = data
        return data

    def frozen_for(self, job: Job, spec: Spec, data: LoadedData) -> FrozenBackbone:
        """Return the pretrained backbone's outputs for all crystals; compute those that are missing.

        Raises:
            Stopped: if the session is asked to stop; the next session reuses finished shards.
        """
        frozen = open_frozen(spec, data.crystals, self._session.project.cache_dir)
        with building(frozen.folder):
            self._complete(frozen, job, spec, data)
        return frozen

    def _complete(self, frozen: FrozenBackbone, job: Job, spec: Spec, data: LoadedData) -> None:
        advanced = self._session.progress_of(job, "pretrained energies")
        if self._session.store is not None:  # also replaces local outputs that differ from the store's
            fetch_shards(
                self._session.store,
                frozen,
                kinds_needed(spec),
                should_stop=self._session.should_stop,
                on_progress=advanced,
            )
        if not is_prepared(spec, frozen):
            finished = prepare_frozen(
                spec,
                data.graphs,
                frozen,
                device=self.device,
                should_stop=self._session.should_stop,
                on_progress=advanced,
                on_note=self._session.note_once,
            )
            if not finished:
                raise self._session.stopped()
        store = self._session.store if job.kind is Kind.PREPARE else None
        should_stop = self._session.should_stop
        if store is not None and not send_shards(store, frozen, kinds_needed(spec), should_stop=should_stop):
            raise self._session.stopped()

    def _checkpoints(self, lease: Lease, experiment: Experiment, fold: int) -> Checkpoints:
        identity = experiment.identity(fold)
        folder = self._session.project.checkpoints_dir(experiment.name, fold)
        return Checkpoints(
            place_of(self._session.project, self._session.store, identity),
            identity,
            lambda stem, why: self._session.damaged(lease, f"{stem} was set aside: {why}"),
            near=None if self._session.store is None else folder,
            mirror=None
            if self._session.publisher is None
            else PublishedFold(Drive(self._session.project.root), identity),
            note=self._session.report.note,
            enqueued=enqueued_record(
                experiment, self._session.queue.jobs(experiment=experiment.name, state=State.COMMITTED)
            ),
            hold_on=self._session.hold_on,
        )

    @property
    def fold_key(self) -> tuple[int, int] | None:
        """The (experiment id, fold) of the loaded model; None if no model is loaded."""
        return self._fold[0] if self._fold else None

    def forget_fold(self) -> None:
        """Drop the loaded fold, so that the next job loads it again."""
        self._fold = None

    def is_kept_for_others(self) -> bool:
        """Wait until the crystals are copied for other machines, or copying fails; return False if asked to stop."""
        return self._crystal_copies.settled(self._session.should_stop)

    def fold_run(self, lease: Lease, experiment: Experiment, spec: Spec) -> FoldRun:
        """Load the fold of a lease's job, unless it is already loaded, and return it."""
        job = lease.job
        assert job.fold is not None
        key = (experiment.id, job.fold)
        if self._fold is None or self._fold[0] != key:
            self._fold = None
            if spec.model.trainable != "head":
                self._compiling.also(spec.train.precision, spec.model.pretrained)
            data = self.data_for(job, experiment, spec)
            checkpoints = self._checkpoints(lease, experiment, job.fold)
            self._session.while_held(lease, checkpoints.sweep)
            frozen = self.frozen_for(job, spec, data)
            self.await_kernels()
            self._fold = (
                key,
                FoldRun(
                    spec=spec,
                    fold=job.fold,
                    crystals=data.crystals,
                    cache=data.graphs,
                    frozen=frozen,
                    checkpoints=checkpoints,
                    device=self.device,
                    memory_file=self._session.project.device_limits,
                    fingerprint_extra={**data.fingerprint, "frozen": frozen.digest(kinds_needed(spec))},
                    on_note=self._session.note_once,
                    clock=self._session.clock,
                ),
            )
            self._session.note_on(job, LOADED_NOTE)
        return self._fold[1]
