"""Enqueue experiments, control them, and show their status."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbqueue.api.base import OpenedProject, tell
from mbqueue.clock import local_day
from mbqueue.dashboard.snapshot import Status
from mbqueue.errors import ExperimentExists, SourceAway, SpecError, StoreError, UsageError
from mbqueue.queue.jobs import Event, State
from mbqueue.queue.opening import anything, open_queue
from mbqueue.search.summary import summaries
from mbqueue.search.trials import experiments_of

if TYPE_CHECKING:
    from mbqueue.experiment import Spec
    from mbqueue.queue.enqueueing import EnqueueOutcome
    from mbqueue.queue.store import Queue


class Queueing(OpenedProject):
    def enqueue(
        self,
        experiment: str | Path,
        *,
        folds: Iterable[int] | None = None,
        epochs: int | None = None,
        dataset: str | Path | None = None,
        priority: int = 0,
        settings: Mapping[str, Any] | None = None,
        name: str | None = None,
        drop_invalid: bool = False,
    ) -> EnqueueOutcome:
        """Add an experiment to the queue. Enqueueing the same experiment again only adds new folds.

        If the file describes a search (with [search]), enqueue only the first trial; sessions start the other trials.

        Args:
            experiment: the experiment's name in jobs/, or a TOML file.
            folds, epochs, dataset, drop_invalid: values that replace those in the file.
            priority: experiments with a higher priority run first.
            settings: values for other keys of the file, such as ``{"train.lr": 3e-4}``.
            name: a different name for the experiment, used in the queue and the results folder.

        Raises:
            SpecError: if the file or a key is wrong.
            ExperimentExists: if an experiment with a different spec has this name; the message lists the differences.
            UsageError, DataError: if the experiment or its dataset does not exist, or a restore was interrupted.
            DataError: if a CSV table or an ``id_prop.csv`` lacks a needed column, or has a column name twice.
            QueueLost: if all or part of the queue was lost.
        """
        # Commands that only read the queue skip this import, which is slow because pydantic builds its validators.
        from mbqueue.experiment import load_spec  # noqa: PLC0415
        from mbqueue.search.file import is_search  # noqa: PLC0415

        path = self.folder.experiment_file(str(experiment))
        overrides = _overrides(folds, epochs, dataset, settings, drop_invalid=drop_invalid)
        if is_search(path):
            if overrides:
                raise UsageError(
                    f"{path} describes a search. A search sets only its space and its folds; all other settings come "
                    "from its base, including the dataset. The only options for a search are --name and --priority."
                )
            return self._enqueue_search(path, name=name, priority=priority)
        return self._put(load_spec(path, overrides=_named(overrides, name)), priority=priority)

    def enqueue_seeds(
        self,
        experiment: str | Path,
        seeds: Iterable[int],
        *,
        folds: Iterable[int] | None = None,
        epochs: int | None = None,
        dataset: str | Path | None = None,
        priority: int = 0,
        settings: Mapping[str, Any] | None = None,
        name: str | None = None,
        drop_invalid: bool = False,
    ) -> tuple[EnqueueOutcome, ...]:
        """Enqueue an experiment once for each seed, as NAME.seed0, NAME.seed1 and so on.

        Args:
            experiment, folds, epochs, dataset, priority, settings, name, drop_invalid: as for `enqueue`.
            seeds: distinct non-negative integers.

        Returns:
            One outcome per seed, in order.

        Raises:
            SpecError, UsageError, DataError: for the same reasons as in `enqueue`, or if the file describes a search.
            ExperimentExists: if an experiment with a different spec has one of the names. Nothing is enqueued.
        """
        from mbqueue.experiment import load_spec  # noqa: PLC0415
        from mbqueue.search.file import is_search  # noqa: PLC0415

        path, numbers = self.folder.experiment_file(str(experiment)), list(seeds)
        if is_search(path):
            raise UsageError(f"{path} describes a search, whose file sets the seed. Leave out the seeds.")
        overrides = _overrides(folds, epochs, dataset, settings, drop_invalid=drop_invalid)
        if "seed" in overrides:
            raise UsageError("You gave both the setting `seed` and a list of seeds. Leave out one of them.")
        if not numbers or len(set(numbers)) != len(numbers):
            raise UsageError(f"Give at least one seed, and each seed once, for example 0-4 or 0,2,5; not {numbers}.")
        base = load_spec(path, overrides=_named(overrides, name))
        specs = []
        for seed in numbers:
            suffix = f".seed{seed}"
            own = {"seed": seed, "name": base.name + suffix, "results_name": base.folder_name + suffix}
            specs.append(load_spec(path, overrides=overrides | own))
        with open_queue(self.folder, refuses=anything) as queue:
            there = {one.name: one.spec_hash for one in queue.experiments()}
        # Start with names that already have a different spec: they raise an error before anything is enqueued.
        taken_first = sorted(specs, key=lambda spec: there.get(spec.name, spec.hash) == spec.hash)
        done = {spec.name: self._put(spec, priority=priority) for spec in taken_first}
        return tuple(done[spec.name] for spec in specs)

    def promote(self, search: str, *, name: str | None = None, priority: int = 0) -> EnqueueOutcome:
        """Enqueue the best settings of a search as an experiment on all folds.

        The experiment's description names the best trial and the folds on which trials were compared.

        Args:
            name: the experiment's name; by default, the search's name followed by ``-best``.

        Raises:
            UsageError: if the search does not exist, or none of its trials is fully trained.
        """
        from mbqueue.search.promotion import promoted  # noqa: PLC0415

        with self._reading_queue(search, before_adding=True) as queue:
            spec = promoted(queue, search, name=name or f"{search}-best", now=self._clock.now())
        return self._put(spec, priority=priority)

    def _enqueue_search(self, path: Path, *, name: str | None, priority: int) -> EnqueueOutcome:
        from mbqueue.experiment import load_spec  # noqa: PLC0415
        from mbqueue.queue.enqueueing import EnqueueOutcome, Outcome  # noqa: PLC0415
        from mbqueue.search.file import is_search, load_search, wrong_search  # noqa: PLC0415
        from mbqueue.search.steps import trial_spec  # noqa: PLC0415

        def base_spec(base: str) -> Spec:
            try:
                file = self.folder.experiment_file(base)
            except UsageError:
                jobs = self.folder.jobs_dir
                known = ", ".join(sorted(one.stem for one in jobs.glob("*.toml") if not is_search(one))) or "none"
                problem = f"base = {base!r}: there is no such experiment. Experiments in {jobs}: {known}"
                raise wrong_search(path, [problem]) from None
            if is_search(file):
                raise wrong_search(path, [f"base = {base!r}: this is a search; name an experiment instead"])
            return load_spec(file)

        search = load_search(path, name=name, base=base_spec)
        with open_queue(self.folder, refuses=anything) as queue:
            there = [trial for trial in queue.trials() if trial.spec["trial"]["search"]["name"] == search.name]
            if there and there[0].spec["trial"]["search"] == search.to_json():
                return EnqueueOutcome(outcome=Outcome.UNCHANGED, experiment=there[0], folds=(), n_jobs=0)
            if there or any(one.name == search.name for one in queue.experiments()):
                what = "a search" if there else "an experiment"
                why = ", with a different file or base" if there else ""
                raise ExperimentExists(
                    f"The queue already contains {what} named {search.name}{why}. Nothing was changed. Choose another "
                    f"name: --name {search.name}-2"
                )
        try:
            spec = trial_spec(search, ())
        except SpecError as error:
            raise wrong_search(path, [f"space: {error}"]) from None
        assert spec is not None
        return self._put(spec, priority=priority)

    def _put(self, spec: Spec, *, priority: int) -> EnqueueOutcome:
        from mbqueue.data.datasets import check_columns  # noqa: PLC0415

        data = spec.data
        with suppress(SourceAway):  # if the file cannot be read now, a session will check the columns
            check_columns(data.dataset, project_root=self.folder.root, target=spec.predicts, id_column=data.id_column)
        now = self._clock.now()
        results_dir = self.folder.results_folder(local_day(now), spec.folder_name)
        with open_queue(self.folder, refuses=anything) as queue:
            if spec.trial is None and experiments_of(queue, spec.name) != [spec.name]:
                raise ExperimentExists(
                    f"The queue already contains a search named {spec.name}. Nothing was changed. Choose another name: "
                    f"--name {spec.name}-2"
                )
            self._require_no_earlier_commits(queue)
            outcome = queue.enqueue(spec, results_dir=results_dir, priority=priority, now=now)
            self._keep_note(queue, spec.name)
        self._publish()
        return outcome

    def pause(self, experiment: str, *, fold: int | None = None) -> int:
        """Pause an experiment or fold, and return the number of paused jobs. Sessions save and release running jobs."""
        with self._writing_queue(experiment) as queue:
            now = self._clock.now()
            return sum(queue.pause(name, fold=fold, now=now) for name in experiments_of(queue, experiment))

    def resume(self, experiment: str, *, fold: int | None = None) -> int:
        """Undo `pause`. Return the number of resumed jobs."""
        with self._writing_queue(experiment) as queue:
            now = self._clock.now()
            return sum(queue.resume(name, fold=fold, now=now) for name in experiments_of(queue, experiment))

    def cancel(self, experiment: str, *, fold: int | None = None) -> int:
        """Cancel the unfinished jobs of an experiment or fold, and return how many there were. Committed work stays.

        A cancelled search starts no new trials until you call `retry`. If the search's newest trial had already ended,
        you can also call `resume`, which does not run the cancelled jobs again.
        """
        with self._writing_queue(experiment) as queue:
            now = self._clock.now()
            newest = experiments_of(queue, experiment)[-1]
            begins_more = newest != experiment and not queue.experiment(newest).paused
            if begins_more:  # while its newest trial is paused, a search starts no new trials
                queue.pause(newest, now=now, by="cancel")
            cancelled = {name: queue.cancel(name, fold=fold, now=now) for name in experiments_of(queue, experiment)}
            # If the newest trial was cancelled, the search starts no new trials, so the pause is no longer needed.
            if begins_more and fold is None and cancelled[newest]:
                queue.resume(newest, now=now, by="cancel")
            return sum(cancelled.values())

    def retry(self, experiment: str, *, fold: int | None = None) -> int:
        """Queue failed and cancelled jobs again, with the full number of attempts, and rebuild lost result files.

        A fold whose recorded files are missing or damaged is predicted again from its checkpoints. If the files are in
        an object store that is not responding, mbqueue logs a note and does not rebuild the files.

        A pruned trial of a search resumes and trains to the end. If the trial's checkpoints were removed, mbqueue logs
        a note and the trial starts from the beginning. If ``experiment`` is a search, its failed and cancelled trials
        are retried.

        Returns:
            The number of jobs that will run again.
        """
        from mbqueue.session.commits_binding import opened_store  # noqa: PLC0415
        from mbqueue.session.shared_commits import remove_released  # noqa: PLC0415

        with self._writing_queue(experiment) as queue:
            trials = experiments_of(queue, experiment)
            if trials != [experiment]:
                return sum(self._retry_failed(queue, trial) for trial in trials)
            found = queue.experiment(experiment)
            if found.is_released:
                # The trial starts over, so remove the checkpoints that a dying session may have left.
                remove_released(self.folder, [found], opened_store(self.folder, queue))
                tell(
                    f"The checkpoints of {experiment} were removed after the trial was pruned (pruned_hours in "
                    "mbqueue.toml), so the trial starts from the beginning."
                )
            changed = queue.retry(experiment, fold=fold, now=self._clock.now())
            try:
                lost_folds = self._lost_folds(queue, experiment)
            except StoreError as error:  # the jobs have already been requeued
                lost_folds = {}
                tell(
                    f"{error} Result files could not be checked. When the store is reachable again, repeat "
                    f"mbqueue retry {experiment}."
                )
            again = {lost: why for lost, why in lost_folds.items() if fold in (None, lost)}
            epochs = queue.experiment(experiment).spec["train"]["epochs"]
            return changed + queue.rewind(experiment, again, to_epoch=epochs, now=self._clock.now(), by="retry")

    def _retry_failed(self, queue: Queue, trial: str) -> int:
        states = {job.state for job in queue.jobs(experiment=trial)}
        return queue.retry(trial, now=self._clock.now()) if states & {State.FAILED, State.CANCELLED} else 0

    def set_priority(self, experiment: str, priority: int, *, fold: int | None = None) -> int:
        """Set the priority of an experiment or fold, and return the number of changed jobs.

        The new priority takes effect at the next claim.
        """
        with self._writing_queue(experiment) as queue:
            now = self._clock.now()
            names = experiments_of(queue, experiment)
            return sum(queue.set_priority(name, priority, fold=fold, now=now) for name in names)

    def status(self, experiment: str | None = None) -> Status:
        """Return the status of all experiments, or of one experiment.

        Raises:
            QueueError: if nothing has been enqueued yet.
            UsageError: if the experiment does not exist; the message lists the existing experiments.
        """
        with self._reading_queue(experiment) as queue:
            names = None if experiment is None else experiments_of(queue, experiment)
            now, root, whole = self._clock.now(), str(self.folder.root), None
            overview = queue.overview(now=now, project=root, experiments=names)
            # If no session is running, the view suggests a command, which depends on all experiments.
            if names is not None and all(session["state"] == "died" for session in overview["sessions"]):
                whole = queue.overview(now=now, project=root)
                whole["searches"] = summaries(whole)
        overview["searches"] = summaries(overview)
        if self.folder.topology.publishes_to:
            from mbqueue.drive.livestate import publishing_status  # noqa: PLC0415 - others need not wait for it

            overview["publishing"] = publishing_status(self.folder)
        return Status(
            overview=overview,
            session_seconds=self.folder.settings.session_seconds,
            whole=whole,
            search=experiment if names != [experiment] else None,
            errors_in_full=experiment is not None,
        )

    def errors(self, experiment: str) -> list[dict[str, Any]]:
        """Return the errors of an experiment's jobs, newest first, as in `status`.

        Raises:
            UsageError: if the experiment does not exist; the message lists the existing experiments.
        """
        with self._reading_queue(experiment) as queue:
            overview = queue.overview(now=self._clock.now(), project=str(self.folder.root), experiments=[experiment])
        return list(overview["errors"])

    def events(
        self, experiment: str | None = None, *, since: float = 0.0, after: int = 0, limit: int = 50
    ) -> tuple[Event, ...]:
        """Return the latest changes of job states, oldest first.

        Args:
            since: only changes since this time, a Unix timestamp.
            after: only changes after the event with this id, for example the last event that you have seen.
            limit: the maximum number of changes.
        """
        with self._reading_queue(experiment) as queue:
            return queue.events(experiment=experiment, since=since, after=after, limit=limit)

    def watch(self, experiment: str | None = None, *, seconds: float = 5.0) -> None:
        """Show the status in a notebook cell and update it in place, until no session is running or you press Ctrl-C.

        Args:
            seconds: time between two updates.

        Raises:
            UsageError: outside a notebook. In a terminal, use `mbqueue status --watch`.
        """
        try:
            from IPython.display import display  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415
        except ImportError as error:
            raise UsageError("watch() works only in notebooks. In a terminal, use: mbqueue status --watch") from error
        status = self.status(experiment)
        handle = display(status, display_id=True)  # type: ignore[no-untyped-call, unused-ignore]
        try:
            while handle is not None and status.is_active:
                time.sleep(seconds)
                status = self.status(experiment)
                handle.update(status)
        except KeyboardInterrupt:
            return


def _overrides(
    folds: Iterable[int] | None,
    epochs: int | None,
    dataset: str | Path | None,
    settings: Mapping[str, Any] | None,
    *,
    drop_invalid: bool,
) -> dict[str, Any]:
    overrides = dict(settings or {})
    if folds is not None:
        overrides["folds"] = list(folds)
    if epochs is not None:
        overrides["train.epochs"] = epochs
    if dataset is not None:
        overrides["data.dataset"] = str(dataset)
    if drop_invalid:
        overrides["data.drop_invalid"] = True
    return overrides


def _named(overrides: dict[str, Any], name: str | None) -> dict[str, Any]:
    return overrides if name is None else {"results_name": name} | overrides | {"name": name}
