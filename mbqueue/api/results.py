"""Read results as tables and models; write reports, comparisons and leaderboard files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbqueue.api.base import tell
from mbqueue.api.searches import Searches
from mbqueue.errors import ResultsError, UsageError
from mbqueue.outputs import page_for, require_writable
from mbqueue.project import working_folder
from mbqueue.queue.opening import is_queue_there, open_queue

if TYPE_CHECKING:
    import pandas as pd

    from mbqueue.results.compare import Comparison
    from mbqueue.results.folder import Recorded
    from mbqueue.results.report.sessions import Span
    from mbqueue.task import Target


class Results(Searches):
    def results(self, experiment: str) -> Recorded:
        """Return an experiment's recorded and verified results or, if it is unfinished, its results so far.

        Raises:
            ResultsError: if there are no results, or a file is missing or differs from what was recorded.
        """
        from mbqueue.results.folder import newest_folder, read_recorded, read_unfinished  # noqa: PLC0415
        from mbqueue.results.record import RESULTS_FILE  # noqa: PLC0415
        from mbqueue.results.tables import advised  # noqa: PLC0415
        from mbqueue.session.commits_binding import opened_store  # noqa: PLC0415
        from mbqueue.session.record_inputs import fingerprint_changes, record_inputs  # noqa: PLC0415
        from mbqueue.storage.commits import Commits  # noqa: PLC0415
        from mbqueue.storage.places import place_of  # noqa: PLC0415

        folder = self._folder_in_queue(experiment)
        if folder is None or (folder / RESULTS_FILE).exists():
            try:
                return self._told(read_recorded(folder or newest_folder(self._results_dirs, experiment)))
            except ResultsError as error:
                if folder is None:
                    raise
                again = f"mbqueue retry {experiment}, then mbqueue work"
                raise advised(error, f"Restore it from a copy, or rebuild it from the checkpoints: {again}") from None
        with open_queue(self.folder, read_only=True) as queue:
            if lost := self._lost_folds(queue, experiment):
                raise ResultsError(
                    f"Results of {experiment} are lost: {' '.join(lost.values())} Rebuild them "
                    f"from the checkpoints: mbqueue retry {experiment}, then mbqueue work"
                )
            entry = queue.experiment(experiment)
            place = queue.commits_place()
            # The first session with a new store sends the commits there. Until then, they are only in the folder.
            is_in_store = place is not None and place.kind == "store"
            store = opened_store(self.folder, queue) if is_in_store else None
            folds = [entry.identity(fold) for fold in entry.spec["folds"]]
            commits = {one.fold: Commits(place_of(self.folder, store, one), one) for one in folds}
            changes = fingerprint_changes(commits)
            inputs = record_inputs(queue, entry, now=self._clock.now(), fingerprint_changes=changes)
        unfinished = read_unfinished(folder, inputs)
        if not unfinished.histories:
            raise ResultsError(f"No fold of {experiment} has results yet. See the progress with: mbqueue status")
        return unfinished

    def history(self, experiment: str) -> pd.DataFrame:
        """Return a row for each finished epoch of each fold, with the columns of history_fold_i.csv and `fold`.

        Raises:
            ResultsError: if there are no epochs yet, or a file is damaged.
        """
        import pandas as pd  # noqa: PLC0415

        histories = self.results(experiment).histories
        return pd.DataFrame([{"fold": fold, **row} for fold, rows in histories.items() for row in rows])

    def predictions(self, experiment: str) -> pd.DataFrame:
        """Return a row for each predicted test crystal, with the columns of preds_fold_i.csv and `fold`.

        Raises:
            ResultsError: if no fold has been predicted yet, or a file is damaged.
        """
        import pandas as pd  # noqa: PLC0415

        recorded = self.results(experiment)
        if not recorded.folds:
            raise ResultsError(f"No fold of {experiment} has predictions yet. See the progress with: mbqueue status")
        frames = [
            pd.DataFrame(
                {
                    "fold": fold,
                    "id": table.ids,
                    "composition": table.compositions,
                    "n_atoms": table.n_atoms,
                    "y_true": table.y_true,
                    "y_pred": table.y_pred,
                    "abs_error": table.abs_error,
                }
            )
            for fold, table in recorded.predictions.items()
        ]
        return pd.concat(frames, ignore_index=True)

    def model(self, experiment: str, fold: int) -> Any:
        """Load the model of a fold's best epoch, on the CPU: a `chgnet.model.CHGNet` if the experiment uses CHGNet.

        Raises:
            ResultsError: if the fold has not been predicted yet, or the experiment is a blend, which has no model.
            CheckpointError: if the model's file is damaged.
            ProjectNotFound: if the working directory no longer exists.
        """
        working_folder()
        from mbqueue.results.members import enumerated, members_of  # noqa: PLC0415
        from mbqueue.results.tables import is_blend, model_file  # noqa: PLC0415
        from mbqueue.train.family import family_of  # noqa: PLC0415

        recorded = self.results(experiment)
        if is_blend(recorded.content["spec"]):
            members = enumerated(members_of(recorded.content["spec"]))
            raise ResultsError(f"{experiment} is a blend, which has no model. Use the models of {members}.")
        if fold not in recorded.folds:
            there = ", ".join(map(str, recorded.folds)) or "none"
            raise ResultsError(f"Fold {fold} of {experiment} has no model yet. Folds with a model: {there}.")
        family = family_of(recorded.content["spec"]["model"]["pretrained"])
        return family.load_model(model_file(recorded.folder, fold))

    def report(
        self,
        experiment: str,
        *,
        output: str | Path | None = None,
        png: str | Path | None = None,
        force: bool = False,
    ) -> list[Path]:
        """Write the report of an experiment or a search, finished or not, as one self-contained HTML page.

        Args:
            output: the page, or a folder for report.html; by default, the results folder or, for a search, a folder
                next to the results of its trials.
            png: a folder for a PNG file of each figure; by default, no PNG files are written.
            force: overwrite existing files even if they are not reports.

        Returns:
            The paths of the written files, the page first.

        Raises:
            ResultsError: if there are no results yet, or a file is damaged.
            UsageError: if the folder of `output` does not exist, or a file there must not be overwritten.
        """
        from mbqueue.results.report.markup import MARK  # noqa: PLC0415
        from mbqueue.results.report.page import REPORT_FILE, draw, write_report  # noqa: PLC0415

        if self.is_search(experiment):
            return self._report_search(experiment, output=output, png=png, force=force)
        page = None if output is None else page_for(Path(output), REPORT_FILE)
        recorded = self.results(experiment)
        page = page or self._shown_folder(recorded) / REPORT_FILE
        if output is not None or page.exists():  # on a drive, the page's default folder may be missing
            require_writable(page, force=force, reads=[*_files_of(recorded), *self.folder.never_outputs], ours=MARK)
        if png is not None:
            from mbqueue.results.report.pictures import require_pictures, write_pictures  # noqa: PLC0415

            require_pictures(draw(recorded), Path(png), force=force)
        spans = self.timeline(recorded.name)
        pictures = [] if png is None else write_pictures(draw(recorded, timeline=spans), Path(png))
        return [write_report(recorded, page, timeline=spans), *pictures]

    def timeline(self, experiment: str) -> list[Span]:
        """List what each session did for an experiment, and when; empty if there is no queue."""
        from mbqueue.dashboard.timeline import timeline  # noqa: PLC0415

        if not is_queue_there(self.folder):
            return []
        with open_queue(self.folder, read_only=True) as queue:
            sessions = queue.sessions(experiment=experiment)
            events = [*queue.events(experiment=experiment, limit=10**6)]
            if self.folder.topology.is_mirrored:  # add publishing events, which do not belong to any experiment
                events += [e for row in sessions for e in queue.events(by=row.id, limit=10**6) if not e.job_id]
            results = {job.id: job.result or {} for job in queue.jobs(experiment=experiment)}
        return timeline(sessions, events, now=self._clock.now(), results=results)

    def target(self, experiment: str) -> Target:
        """Return the target of an enqueued experiment.

        Raises:
            UsageError: if the experiment does not exist; the message lists the existing experiments.
        """
        from mbqueue.task import target_of  # noqa: PLC0415

        return target_of(self.spec(experiment))

    def spec(self, experiment: str) -> dict[str, Any]:
        """Return the frozen spec of an enqueued experiment as plain JSON values.

        Raises:
            UsageError: if the experiment does not exist; the message lists the existing experiments.
        """
        with self._reading_queue(experiment) as queue:
            return dict(queue.experiment(experiment).spec)

    def results_folder(self, experiment: str) -> Path:
        """Return the folder with an enqueued experiment's newest files; the folder may not exist yet.

        Raises:
            UsageError: if the experiment does not exist; the message lists the existing experiments.
        """
        with self._reading_queue(experiment) as queue:
            return self._newest_results(queue.experiment(experiment).results_dir)

    def compare(self, experiments: Sequence[str], *, html: str | Path | None = None, force: bool = False) -> Comparison:
        """Compare recorded experiments on the crystals that they share.

        Args:
            experiments: two or more; the first is the reference.
            html: a page to write.
            force: overwrite an existing file even if mbqueue did not write it.

        Raises:
            UsageError: for fewer than two experiments, for the same experiment twice, or if `html` is a folder, is in a
                missing folder, or is a file that must not be overwritten.
            ResultsError: if an experiment is not recorded, or the experiments share no crystals.
        """
        from mbqueue.results.compare import compare  # noqa: PLC0415
        from mbqueue.results.folder import newest_folder, read_recorded  # noqa: PLC0415
        from mbqueue.results.report.markup import MARK  # noqa: PLC0415

        if html is not None:
            require_writable(Path(html), force=force, ours=MARK, example="comparison.html")
        for name in experiments:
            self._folder_in_queue(name)  # an object store may have results that other machines recorded
        folders = [newest_folder(self._results_dirs, name) for name in experiments]
        if twice := [name for i, name in enumerate(experiments) if folders[i] in folders[:i]]:
            raise UsageError(f"{twice[0]} is given twice. Give different experiments.")
        found = [self._told(read_recorded(folder)) for folder in folders]
        if html is not None:
            reads = [*self.folder.never_outputs, *(path for recorded in found for path in _files_of(recorded))]
            require_writable(Path(html), force=force, reads=reads, ours=MARK)
        comparison = compare(found)
        if html is not None:
            from mbqueue.results.report.comparison import write_comparison  # noqa: PLC0415

            write_comparison(comparison, Path(html))
        return comparison

    def export(
        self,
        experiments: str | Sequence[str],
        output: str | Path = ".",
        *,
        authors: str,
        algorithm: str = "",
        notes: str = "",
        force: bool = False,
    ) -> Path:
        """Write the leaderboard's submission folder below ``output``, for one or more tasks; return its path.

        Args:
            force: replace an earlier export.

        Raises:
            ResultsError: if not all five official folds are recorded, or matbench is not installed; the message lists
                every reason.
            UsageError: if ``authors`` is empty, or the folder exists. With ``force``, an earlier export is replaced.
        """
        from mbqueue.results.export import export_submission  # noqa: PLC0415

        names = [experiments] if isinstance(experiments, str) else experiments
        recorded = [self.results(name) for name in names]
        return export_submission(recorded, Path(output), authors=authors, algorithm=algorithm, notes=notes, force=force)

    @property
    def _results_dirs(self) -> list[Path]:
        """The folders that can contain recorded results: two if the project is on a drive."""
        return list(dict.fromkeys([self.folder.working_results("results"), self.folder.results_dir]))

    def _shown_folder(self, recorded: Recorded) -> Path:
        """The results folder that users see; for a project on a drive, this is the folder on the drive."""
        folder, live = recorded.folder, self.folder.live_dir
        return self.folder.root / folder.relative_to(live) if folder.is_relative_to(live) else folder

    def _told(self, recorded: Recorded) -> Recorded:
        """Return the results; log a note if they have not been published to the drive yet."""
        from mbqueue.results.folder import recorded_at  # noqa: PLC0415

        if self.folder.topology.is_mirrored and recorded.folder.is_relative_to(self.folder.live_dir):
            published = self.folder.root / recorded.folder.relative_to(self.folder.live_dir)
            if recorded_at(published) != recorded_at(recorded.folder):
                tell(f"The results of {recorded.name} are from {recorded.folder}; they are not on the drive yet.")
        return recorded

    def _folder_in_queue(self, experiment: str) -> Path | None:
        if not is_queue_there(self.folder):
            return None
        with open_queue(self.folder, read_only=True) as queue:
            found = {entry.name: entry.results_dir for entry in queue.experiments()}
            if experiment in found:
                self._bring_results(queue, experiment)
        return self._newest_results(found[experiment]) if experiment in found else None


def _files_of(recorded: Recorded) -> list[Path]:
    from mbqueue.results.report.page import REPORT_FILE  # noqa: PLC0415

    return [path for path in recorded.folder.iterdir() if path.name != REPORT_FILE]
